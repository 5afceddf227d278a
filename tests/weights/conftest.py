"""Weights of other frameworks that several test files import."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from detector.weights.foreign import ImportedDetector, import_detector
from detector.weights.import_facts import ImportOptions
from tests.weights.peer_detectron2 import detectron2_state
from tests.weights.peer_mmdetection import mmdet_state
from tests.weights.peer_models import R18, State


@pytest.fixture(scope="module")
def mmdet_weights() -> State:
    """The smallest complete network."""
    return mmdet_state(R18)


@pytest.fixture(scope="module")
def detectron2_weights() -> State:
    return detectron2_state()


def import_of(content: Any, folder: Path, name: str = "w.pth", **options: Any) -> ImportedDetector:
    torch.save(content, folder / name)
    return import_detector(folder / name, options=ImportOptions(**options))
