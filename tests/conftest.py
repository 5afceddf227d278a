"""Where the tests find the repository and the shared data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


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
