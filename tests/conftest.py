"""Where the tests find the repository and the shared data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# One thread each, here and in the programs that tests start: small tensors gain nothing from more, and when anything
# else runs on the same cores, threads that wait for each other make a test five times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "110"  # messages fold to the terminal's width, which tests must not depend on


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared(repo_root: Path) -> Path:
    """Real and messy datasets and reference results: $DETECTOR_SHARED, or `shared` beside the repository."""
    path = Path(os.environ.get("DETECTOR_SHARED") or repo_root.parent / "shared").resolve()
    if not path.is_dir():
        pytest.skip(f"no shared data at {path} (set DETECTOR_SHARED)")
    return path
