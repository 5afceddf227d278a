"""Tiny data, and one run that many tests look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from detector.config import load_config
from detector.engine.train import train
from tests.tiny import TinyData, short_resnet, whole_resnet, write_config, write_tiny_data

EVERYTHING_ON: dict[str, Any] = {
    "train__ema": {"decay": 0.9},
    "train__micro_batch": 2,  # accumulation
    "train__checkpoint_every_steps": 2,
    "data__min_size": [48, 56, 64],
    "data__augment": [{"HorizontalFlip": {"p": 0.5}}, {"RandomBrightnessContrast": {"p": 0.5}}],
    "optim__clip_grad_norm": 5.0,
}
"""Averaging, accumulation, several scales, augmentation and clipping: six steps, saved after 2, 3, 4 and 6."""


class Run(NamedTuple):
    """A run that was left alone to its end."""

    config: Path
    out: Path


@pytest.fixture(scope="package", autouse=True)
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """As the processes that the tests start, so that their results can be compared; and no trace outside tmp_path."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def short_network() -> Iterator[None]:
    """In all modules but those with a fixture of this name of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detector.models.backbone._torchvision_resnet", short_resnet)
        yield


@pytest.fixture
def whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-18 as it is: a tool started from the shell has no other, and seeds that meet no kink are of one network."""
    monkeypatch.setattr("detector.models.backbone._torchvision_resnet", whole_resnet)


@pytest.fixture(scope="package")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="package")
def whole(data: TinyData, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "tiny.yaml", data, **EVERYTHING_ON)
    with pytest.MonkeyPatch.context() as patch:  # made before what belongs to a module
        patch.setattr("detector.models.backbone._torchvision_resnet", short_resnet)
        train(load_config(config), folder / "run")
    return Run(config, folder / "run")
