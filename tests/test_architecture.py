"""The structure of the package: which modules may import which."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

GROUND_FLOOR = {
    "errors", "cli", "config", "config_formats", "config_errors", "config_packages", "config_yaml", "atomic",
    "scores", "structures", "boxes", "anchors", "precision", "distributed", "heartbeat", "memory", "files",
    "file_kinds", "text", "redact", "json_text", "yaml_text",
}  # fmt: skip
"""Modules that import only each other."""

# The packages that a package or module may import besides the ground floor and itself.
ALLOWED: dict[str, set[str]] = {name: set() for name in GROUND_FLOOR}
ALLOWED |= {
    "assign": set(),
    "models": set(),
    "losses": {"assign"},
    "datasets": {"losses"},
    "weights": {"models"},
    "checkpoint": {"weights"},
    "dataset_tools": {"datasets"},
    "inference": {"models", "datasets", "checkpoint"},
    "evaluation": {"inference", "models", "losses", "assign", "datasets", "checkpoint"},
}
ALLOWED["reports"] = {*ALLOWED["evaluation"], "evaluation"}
ALLOWED["training"] = {*ALLOWED["reports"], "reports", "weights"}
ALLOWED["experiments"] = {*ALLOWED["training"], "training", "dataset_tools"}
ALLOWED["api"] = {"training", "evaluation", "inference"}
ALLOWED["__init__"] = {"api", "inference", "losses"}
ALLOWED["__main__"] = {"__version__"}

# Third-party libraries that a package or module may import.
LIBRARIES: dict[str, set[str]] = {
    "errors": set(),
    "cli": set(),
    "files": set(),
    "file_kinds": set(),
    "text": set(),
    "json_text": set(),
    "redact": {"yaml"},
    "atomic": set(),
    "config": {"pydantic"},
    "config_errors": {"pydantic"},
    "config_formats": set(),
    "config_packages": set(),
    "config_yaml": {"yaml"},
    "yaml_text": {"yaml"},
    "api": set(),
    "__init__": set(),
    "__main__": set(),
    "scores": {"torch"},
    "structures": {"numpy", "torch"},
    "boxes": {"torch"},
    "anchors": {"torch"},
    "precision": {"torch"},
    "distributed": {"torch"},
    "heartbeat": {"torch"},
    "memory": {"torch"},
    "assign": {"torch"},
    "losses": {"torch", "torchvision"},
}

SOURCES = sorted((ROOT / "detector").rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, inside functions too."""
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
    """The part that a file belongs to: `boxes` for detector/boxes.py, `models` for detector/models/fpn.py."""
    return path.relative_to(ROOT / "detector").parts[0].removesuffix(".py")


def test_every_part_of_the_package_has_a_rule() -> None:
    assert {part_of(path) for path in SOURCES} == set(ALLOWED)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    used = {name.split(".")[1] for name in imports(path) if name.split(".")[0] == "detector"}
    assert used <= ALLOWED[part] | GROUND_FLOOR | {part}


@pytest.mark.parametrize("part", LIBRARIES)
def test_modules_import_only_their_libraries(part: str) -> None:
    for path in (p for p in SOURCES if part_of(p) == part):
        outside = {name.split(".")[0] for name in imports(path)} - {"detector", "__future__", *sys.stdlib_module_names}
        assert outside <= LIBRARIES[part], path


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_torchvisions_detectors_are_imported_by_tests_only(path: Path) -> None:
    assert not [name for name in imports(path) if name.startswith("torchvision.models.detection")]
    assert "models.detection" not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted((ROOT / "tools").glob("*.py")), ids=lambda path: path.name)
def test_tools_import_the_package_and_not_each_other(path: Path) -> None:
    tools = {p.stem for p in path.parent.glob("*.py")}
    outside = {name for name in imports(path) if not name.startswith("tools.benchmarks.")}
    assert not {name.split(".")[0] for name in outside} & {*tools, "tools", "tests"}


@pytest.mark.parametrize("folder", ["detector", "tools", "tests"])
def test_no_file_is_named_utils_or_the_like(folder: str) -> None:
    names = {"utils", "util", "misc", "helpers", "helper", "common"}
    assert not [p for p in (ROOT / folder).rglob("*") if p.stem.strip("_").lower() in names]


def test_there_are_no_circular_imports() -> None:
    """This concerns imports at module level, not those inside functions or for type checking."""
    graph = {name_of(path): {m for m in top_level_imports(path) if m.startswith("detector.")} for path in SOURCES}
    names = set(graph)
    edges = {name: {longest_module(m, names) for m in used} - {name, None} for name, used in graph.items()}
    while True:
        leaves = {name for name, used in edges.items() if not used}
        if not leaves:
            break
        edges = {name: used - leaves for name, used in edges.items() if name not in leaves}
    assert not edges


def name_of(path: Path) -> str:
    """The module of a file, such as `detector.models.fpn`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def longest_module(name: str, modules: set[str]) -> str | None:
    """The module in a full name: `detector.boxes` for `detector.boxes.area`."""
    parts = name.split(".")
    return next((m for n in range(len(parts), 0, -1) if (m := ".".join(parts[:n])) in modules), None)


def top_level_imports(path: Path) -> Iterator[str]:
    """Full names of what a file imports at module level."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_relative_imports_and_imported_submodules_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests above rely on this."""
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    file = tmp_path / "detector" / "models" / "x.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "from . import fpn\nfrom ..boxes import area\nfrom detector import matching\ndef f():\n  import torch.nn\n"
    )
    assert sorted(imports(file)) == [
        "detector.boxes.area",
        "detector.matching",
        "detector.models.fpn",
        "torch.nn",
    ]
