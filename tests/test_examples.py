"""The documentation's examples run and print what it promises."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest


def test_the_digits_example_runs_both_problems(repo_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    main = runpy.run_path(str(repo_root / "docs" / "examples" / "digits.py"))["main"]
    assert main(["--seeds", "1"]) == 0
    table = capsys.readouterr().out
    scores = [float(x) for x in re.findall(r" (0\.\d{3}) \(nan\)", table)]
    assert len(scores) == 12
    assert min(scores) > 0.4, "far above chance, which is 0.1"
    assert len(set(scores)) == 12, "no two losses give the same result"


def test_the_snippet_of_the_focal_loss_guide_runs(repo_root: Path) -> None:
    guide = (repo_root / "docs" / "focal-loss.md").read_text()
    names: dict[str, Any] = {}
    exec(guide.partition("```python\n")[2].partition("```")[0], names)
    assert names["loss"].isfinite()


@pytest.mark.slow
def test_the_notebook_runs_from_top_to_bottom(
    repo_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its code cells in one namespace, with one epoch instead of fourteen."""
    notebook = json.loads((repo_root / "docs" / "examples" / "train_and_detect.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5
    monkeypatch.setenv("REPOSITORY", str(repo_root))
    monkeypatch.setenv("OUTPUT", str(tmp_path / "run"))
    monkeypatch.setenv("EPOCHS", "1")
    monkeypatch.chdir(repo_root)
    names: dict[str, Any] = {"display": print}
    for cell in cells:
        exec(cell, names)
    assert names["sheet"].size[0] > 100
    assert len(names["metrics"]["per_class"]) == 8
    assert "000" in capsys.readouterr().out, "a line for each image"
