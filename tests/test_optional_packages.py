"""Without an optional package, what does not need it works, and what does is an error with a remedy."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import REPO, TinyData, write_config

WITHOUT = """
import sys
for name in {missing!r}:
    sys.modules[name] = None  # importing it then raises ImportError
from tools import {tool}
sys.exit({tool}.main({argv!r}))
"""


def run_without(missing: list[str], tool: str, argv: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a tool in a process where some packages cannot be imported."""
    env = {**os.environ, "PYTHONPATH": str(REPO), "XDG_CACHE_HOME": str(cwd / "cache")}
    code = WITHOUT.format(missing=missing, tool=tool, argv=argv)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=env, check=False)


@pytest.fixture
def config(data: TinyData, tmp_path: Path) -> str:
    return str(write_config(tmp_path / "c.yaml", data, train__epochs=1))


def test_training_and_evaluation_need_neither_albumentations_nor_hotcoco(config: str, tmp_path: Path) -> None:
    argv = ["--config", config, "--output-dir", "run", "eval.engine=pycocotools"]
    done = run_without(["albumentations", "hotcoco", "matplotlib", "optuna", "scipy"], "train", argv, tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "run" / "metrics.json").exists()


@pytest.mark.parametrize(
    ("missing", "setting", "remedy"),
    [
        ("albumentations", "data.augment=[{HorizontalFlip: {p: 0.5}}]", "pip install albumentations"),
        ("hotcoco", "eval.engine=hotcoco", "eval.engine=pycocotools"),
        ("pycocotools", "eval.engine=pycocotools", "eval.engine=hotcoco"),
    ],
)
def test_what_needs_a_missing_package_is_an_error_with_a_remedy(
    missing: str, setting: str, remedy: str, config: str, tmp_path: Path
) -> None:
    argv = ["--config", config, "--output-dir", "run", setting]
    done = run_without([missing], "train", argv, tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.startswith("error: ")
    assert missing in done.stderr
    assert remedy in done.stderr
