"""The shape of the package: who may import whom."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Of our own; a package may import its own modules.
ALLOWED: dict[str, set[str]] = {
    "config": set(),
    "structures": set(),
    "boxes": set(),
    "anchors": set(),
    "matching": {"boxes", "structures"},
    "losses": {"structures", "boxes", "matching", "config"},
    "nms": {"boxes", "nms_kernel"},
    "nms_kernel": set(),
    "postprocess": {"structures", "boxes", "nms"},
    "coco_eval": {"structures", "boxes"},
    "models": {"config", "structures", "anchors"},
    "datasets": {"config", "structures", "boxes"},
    "reports": {"structures", "boxes", "anchors", "matching"},
}
ALLOWED["engine"] = set(ALLOWED)
ALLOWED["benchmark"] = set(ALLOWED)

# Beside the standard library.
LIBRARIES: dict[str, set[str]] = {
    "config": {"yaml", "pydantic"},
    "structures": {"numpy", "torch"},
    "boxes": {"torch"},
    "anchors": {"torch"},
    "matching": {"torch"},
    "losses": {"torch", "torchvision"},
    "nms": {"torch"},
    "nms_kernel": {"torch", "triton"},
    "postprocess": {"torch", "torchvision"},
}

SOURCES = sorted((ROOT / "detector").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The full names of all modules that a file imports, inside functions too."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (base, node.module or "") if part)
            # `from detector import boxes` imports a module, too
            yield from (f"{module}.{alias.name}" for alias in node.names)


def part_of(path: Path) -> str:
    """`boxes` for detector/boxes.py, `models` for detector/models/fpn.py."""
    return path.relative_to(ROOT / "detector").parts[0].removesuffix(".py")


def test_every_part_of_the_package_has_its_rule() -> None:
    assert {part_of(path) for path in SOURCES} == {*ALLOWED, "__init__"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    used = {name.split(".")[1] for name in imports(path) if name.split(".")[0] == "detector"}
    assert used <= ALLOWED.get(part, set()) | {part}


@pytest.mark.parametrize("part", LIBRARIES)
def test_the_core_needs_few_libraries(part: str) -> None:
    for path in (p for p in SOURCES if part_of(p) == part):
        outside = {name.split(".")[0] for name in imports(path)} - {"detector", "__future__", *sys.stdlib_module_names}
        assert outside <= LIBRARIES[part], path


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if part_of(p) != "benchmark"], ids=lambda path: str(path.relative_to(ROOT))
)
def test_the_oracle_is_never_imported(path: Path) -> None:
    """But by the benchmark, whose peer it is."""
    assert not [name for name in imports(path) if name.startswith("torchvision.models.detection")]
    assert "models.detection" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tools_import_the_package_and_not_each_other(path: Path) -> None:
    tools = {p.stem for p in path.parent.glob("*.py")}
    assert not {name.split(".")[0] for name in imports(path)} & {*tools, "tools", "tests"}


@pytest.mark.parametrize("folder", ["detector", "tools", "tests"])
def test_no_file_is_a_drawer_for_everything(folder: str) -> None:
    drawers = {"utils", "util", "misc", "helpers", "helper", "common"}
    assert not [p for p in (ROOT / folder).rglob("*") if p.stem.strip("_").lower() in drawers]


def test_relative_imports_and_imported_submodules_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above rest on this."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "detector" / "models" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from . import fpn\nfrom ..boxes import area\nfrom detector import matching\ndef f():\n  import torch.nn\n"
    )
    assert sorted(imports(file)) == ["detector.boxes.area", "detector.matching", "detector.models.fpn", "torch.nn"]
