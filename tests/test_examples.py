"""The documentation's examples run and print what it promises."""

from __future__ import annotations

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
