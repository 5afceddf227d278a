"""The repository itself: versions, recipes, documents, and nothing private in its files."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import detector
from detector.config import Config
from detector.config_yaml import load_config
from detector.datasets.augment import Augmentation
from detector.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if "_base_" not in p.parts)


def test_uv_and_pip_install_the_same_versions() -> None:
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for_uv = set(pyproject["tool"]["uv"]["constraint-dependencies"])
    for_pip = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    assert for_uv == for_pip
    assert all("==" in pin for pin in for_uv)


def test_the_version_is_the_same_everywhere_and_has_a_section_in_the_changelog() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert detector.__version__ == version
    assert re.search(rf"^## \[?{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


# In parts, so that this file does not match.
PRIVATE = re.compile(
    rb"/ro" rb"ot/|/ho" rb"me/\w|/Us" rb"ers/\w|/wo" rb"rk/\w|index" rb"-url|arti" rb"factory|[\w-]+\.inter" rb"nal\b",
    re.IGNORECASE,
)
"""Absolute paths of a machine, and hosts of a private package registry."""


def test_tracked_files_name_neither_machine_paths_nor_registry_hosts() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    found = {str(path): match[0] for path in files if path.is_file() and (match := PRIVATE.search(path.read_bytes()))}
    assert not found


def test_every_dependency_is_justified_in_the_documents() -> None:
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
def test_a_recipe_loads_and_states_how_to_run_it(path: Path) -> None:
    config = load_config(path)
    Augmentation(config.data.augment, min_visibility=config.data.augment_min_visibility)
    header = "".join(line for line in path.read_text().splitlines(keepends=True) if line.startswith("#"))
    place = path.relative_to(ROOT)
    tool = "eval.py" if place.parts[1] == "coco" else "train.py"  # the networks of coco/ are published ones
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
def test_links_in_documents_have_targets(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_a_mistake_in_an_override_of_a_recipe_is_reported() -> None:
    with pytest.raises(ConfigError, match=r"did you mean optim\.lr"):
        load_config(RECIPES[0], ["learning_rate=1"])
