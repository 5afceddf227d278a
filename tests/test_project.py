"""The repository itself: pins, recipes, documents."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
import yaml

from detector.config import Config
from detector.config_yaml import load_config
from detector.datasets.augment import Augmentation
from detector.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "_base_" not in p.parts)


def test_uv_and_pip_are_held_to_the_same_versions() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for_uv = set(pyproject["tool"]["uv"]["constraint-dependencies"])
    for_pip = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    assert for_uv == for_pip
    assert all("==" in pin for pin in for_uv)


def test_every_dependency_earns_its_place_by_a_sentence() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    text = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in pyproject["project"]["dependencies"]:
        name = re.split(r"[<>=~ ]", requirement)[0]
        assert f"`{name}`" in text


def test_the_base_config_shows_every_setting_at_its_default() -> None:
    path = ROOT / "configs" / "_base_" / "retinanet.yaml"
    assert load_config(path) == Config()
    assert _keys(yaml.safe_load(path.read_text())) == _keys(Config().model_dump())


def _keys(values: object) -> object:
    return {k: _keys(v) for k, v in values.items()} if isinstance(values, dict) else None


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_loads_and_says_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    Augmentation(config.data.augment, min_visibility=config.data.augment_min_visibility)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    place = path.relative_to(ROOT)
    tool = "eval.py" if place.parts[1] == "coco" else "train.py"  # the networks in coco/ are already trained
    assert f"python tools/{tool} --config {place}" in header


def test_no_recipe_repeats_a_default() -> None:
    base = yaml.safe_load((ROOT / "configs" / "_base_" / "retinanet.yaml").read_text())
    for path in RECIPES:
        values = yaml.safe_load(path.read_text())
        if values.pop("_base_", "_base_/retinanet.yaml") == "_base_/retinanet.yaml":
            assert not list(_repeated(values, base)), path


def _repeated(values: dict[str, object], base: dict[str, object], at: str = "") -> list[str]:
    same = []
    for key, value in values.items():
        other = base.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            same += _repeated(value, other, f"{at}{key}.")
        elif value == other:
            same.append(at + key)
    return same


@pytest.mark.parametrize("path", sorted(ROOT.glob("*.md")) + sorted((ROOT / "docs").glob("*.md")), ids=lambda p: p.name)
def test_links_of_the_documents_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_an_override_can_break_a_recipe_only_with_a_message() -> None:
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr"):
        load_config(RECIPES[0], ["learning_rate=1"])
