"""What makes the code readable in an evening stays so: a short way to the loss, and a spine of bounded length."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from detector.losses.retinanet import RetinaNetLoss
from detector.training.step import Learner

ROOT = Path(__file__).resolve().parents[1]


def module_of(name: str) -> Path:
    return ROOT / f"{name.replace('.', '/')}.py"


def function(path: Path, name: str) -> ast.FunctionDef:
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    return next(node for node in nodes if isinstance(node, ast.FunctionDef) and node.name == name)


def called(path: Path, name: str) -> set[str]:
    """The names that a function calls, by `name(...)`."""
    calls = (node.func for node in ast.walk(function(path, name)) if isinstance(node, ast.Call))
    return {call.id for call in calls if isinstance(call, ast.Name)}


def imported_from(path: Path, name: str) -> Path:
    """The file of the module that a name is imported from."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name in {alias.name for alias in node.names}:
            return module_of(str(node.module))
    raise AssertionError(f"{path} does not import {name}")


def test_the_loss_is_three_calls_from_the_command_line() -> None:
    """main -> train -> train_step -> RetinaNetLoss.forward, with nothing in between."""
    tool = ROOT / "tools" / "train.py"
    assert "train" in called(tool, "main")
    loop = imported_from(tool, "train")
    assert "train_step" in called(loop, "train")
    step = imported_from(loop, "train_step")
    assert "loss" in called(step, "train_step")
    assigned = [
        (target.elts, node.value.elts)
        for node in ast.walk(function(step, "train_step"))
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
        for target in node.targets
        if isinstance(target, ast.Tuple)
    ]
    sources = {ast.unparse(a): ast.unparse(b) for names, values in assigned for a, b in zip(names, values, strict=True)}
    assert sources["loss"] == "learner.loss"
    assert Learner.__dataclass_fields__["loss"].type == RetinaNetLoss.__name__


def test_the_spine_is_read_in_an_evening() -> None:
    """docs/reading.md lists the spine with the length of every file."""
    text = (ROOT / "docs" / "reading.md").read_text(encoding="utf-8")
    rows = re.findall(r"\[`([\w/]+\.py)`\]\([^)]*\) \| (\d+) \|", text)
    assert 15 <= len(rows) <= 25
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name, _ in rows}
    assert sum(lengths.values()) <= 4500
    for name, stated in rows:
        assert abs(int(stated) - lengths[name]) <= 0.1 * lengths[name] + 5, f"{name} has {lengths[name]} lines"
