"""Where the tests find the repository, the shared data, and one tiny run that many tests use."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from detector.config_yaml import load_config
from detector.datasets import loader
from detector.models.resnet import ARCHITECTURES
from detector.training.train import train
from tests.tiny import SHORT, WHOLE, TinyData, write_config, write_tiny_data

# One thread each, here and in the programs that tests start: small tensors gain nothing from more, and when anything
# else runs on the same cores, threads that wait for each other make a test five times slower.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["COLUMNS"] = "110"  # messages fold to the terminal's width, which tests must not depend on

# Tests remove images on purpose, and would spend most of their time in the pauses before another attempt to read.
loader.RETRY_PAUSES = (0.01, 0.01)

# A background job of a script ignores SIGINT, one under nohup SIGHUP, and the programs that tests start would, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


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


@pytest.fixture(scope="session")
def one_thread(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use one thread, as the subprocesses of the tests do, so that results compare; write caches below tmp_path."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def short_network() -> Iterator[None]:
    """Use a ResNet-18 with one block per layer, which halves the time of a tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "resnet18", SHORT)
        yield


@pytest.fixture
def whole_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """ResNet-18 as it is: a tool started from the shell has no other, and seeds that meet no kink are of one
    network."""
    monkeypatch.setitem(ARCHITECTURES, "resnet18", WHOLE)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return write_tiny_data(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def whole(data: TinyData, tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Run:
    folder = tmp_path_factory.mktemp("whole")
    config = write_config(folder / "tiny.yaml", data, **EVERYTHING_ON)
    with pytest.MonkeyPatch.context() as patch:  # made before what belongs to a module
        patch.setitem(ARCHITECTURES, "resnet18", SHORT)
        train(load_config(config), folder / "run")
    return Run(config, folder / "run")
