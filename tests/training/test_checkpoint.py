"""Checkpoints: complete, self-describing, readable without running code, and of known formats."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detector.checkpoint import TrainState, load_checkpoint, save_checkpoint
from detector.cli import require_checkpoint
from detector.config import Config
from detector.config_yaml import load_config
from detector.errors import CheckpointError, RunError
from detector.inference.predictor import Predictor
from detector.models.resnet import ARCHITECTURES, Architecture
from detector.structures import Categories
from tests.golden import make_format_1

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def state(**changes: Any) -> TrainState:
    values: dict[str, Any] = {
        "config": Config(), "categories": Categories((3, 7), ("cat", "dög")), "model": {"w": torch.arange(4.0)},
        "step": 5, "ema": {"w": torch.ones(4)}, "best_ap": 0.25, "versions": {"torch": "x"},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(4)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
    }  # fmt: skip
    return TrainState(**(values | changes))


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    saved = state()
    save_checkpoint(saved, tmp_path / "new" / "a.pt")
    loaded = load_checkpoint(tmp_path / "new" / "a.pt")
    assert loaded.config == saved.config
    assert loaded.categories == saved.categories
    assert (loaded.step, loaded.best_ap, loaded.versions, loaded.finished) == (5, 0.25, {"torch": "x"}, False)
    assert torch.equal(loaded.model["w"], saved.model["w"])
    assert loaded.optimizer is not None
    assert torch.equal(loaded.optimizer["state"][0]["momentum_buffer"], torch.ones(4))
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.pt"]


def test_ema_weights_are_used_if_there_are_any() -> None:
    assert torch.equal(state().weights["w"], torch.ones(4))
    assert torch.equal(state(ema=None).weights["w"], torch.arange(4.0))


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(state(step=1), path)

    def half(content: Any, file: Any) -> None:
        file.write(b"PK half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(
        RunError, match=r"last\.pt cannot be written: .*No space left on device; an older version of it is unchanged"
    ):
        save_checkpoint(state(step=2), path)
    assert load_checkpoint(path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_is_flushed_to_disk_before_it_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", recorded("flushed", os.fsync))
    monkeypatch.setattr(Path, "replace", recorded("renamed", Path.replace))
    save_checkpoint(state(), tmp_path / "a.pt")
    assert calls == ["flushed", "renamed", "flushed"], "the file, then its folder, which holds the new name"


def test_the_next_save_replaces_the_partial_file_of_a_killed_process(tmp_path: Path) -> None:
    save_checkpoint(state(), tmp_path / "last.pt")
    (tmp_path / ".last.pt.tmp").write_bytes(b"half")
    save_checkpoint(state(), tmp_path / "last.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_missing_checkpoint_names_those_that_are_there(tmp_path: Path) -> None:
    save_checkpoint(state(), tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"bset\.pt does not exist; there is .*best\.pt"):
        load_checkpoint(tmp_path / "bset.pt")
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pt cannot be read: is a folder, not a file"):
        require_checkpoint(tmp_path / "folder.pt")
    with pytest.raises(CheckpointError, match="does not exist"):
        load_checkpoint(tmp_path / "nowhere" / "best.pt")


class Bomb:
    """Runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("exploded"),)


def test_reading_a_checkpoint_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"format": 1, "model": Bomb()}, tmp_path / "zip.pt")
    torch.save({"format": 1, "model": Bomb()}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Bomb()))
    for name in ("zip.pt", "old.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match=f"{name} was rejected: .*could run code"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("size", [0, 10, 500, 2000, -1])
def test_a_damaged_checkpoint_is_named(size: int, tmp_path: Path) -> None:
    save_checkpoint(state(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=r"checkpoint .*a\.pt (cannot be read, it may be damaged: |is empty)"):
        load_checkpoint(tmp_path / "a.pt")


def test_a_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("epoch 1: loss 0.5\n")
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read"):
        load_checkpoint(tmp_path / "x.pt")


def test_any_damage_results_in_a_checkpoint_error_at_most(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(state(), path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        broken = bytearray(whole if rng.random() < 0.7 else whole[: rng.integers(1, len(whole) + 1)])
        for position in rng.integers(0, len(broken), 3):
            broken[position] = rng.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(CheckpointError):  # or it is read: not every byte matters
            load_checkpoint(path)


MINIMAL = {
    "format": 2, "config": "{}", "categories": {"ids": [1], "names": ["a"]}, "model": {}, "step": 1,
}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"w": torch.ones(2)}, "must be a checkpoint written by tools/train.py"),
        ([1, 2], "must be a checkpoint written by tools/train.py.*got list"),
        ({"format": "x"}, "must have a format of 1 to 2, got 'x'"),
        ({"format": 1}, "by another version"),
        ({**MINIMAL, "new": 2}, "by another version.*new"),
        ({**MINIMAL, "config": '{"train": {"epoch": 3}}'}, r"(?s)by another version.*train\.epoch"),
        ({**MINIMAL, "categories": {"ids": [], "names": []}}, "by another version.*at least one class"),
    ],
)
def test_another_file_is_refused_with_the_reason(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(tmp_path / "a.pt")


@pytest.mark.parametrize("number", [3, 99])
def test_a_checkpoint_of_a_newer_format_is_refused_before_anything_else_is_read(number: int, tmp_path: Path) -> None:
    torch.save({"format": number, "config": "{"}, tmp_path / "a.pt")
    expected = rf"checkpoint .*a\.pt has format {number}, this version reads up to 2; update retinanet-detector"
    with pytest.raises(CheckpointError, match=expected):
        load_checkpoint(tmp_path / "a.pt")


def test_a_checkpoint_of_format_1_has_the_same_weights_settings_and_detections(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file and the expected values were written by the code of that format (tests/golden/make_format_1.py)."""
    tiny = Architecture(bottleneck=True, blocks=(1, 1, 1, 1), channels=(4, 2, 4, 8, 16))
    monkeypatch.setitem(ARCHITECTURES, "resnet50", tiny)
    expected = json.loads((GOLDEN / "format_1" / "expected.json").read_text())
    loaded = load_checkpoint(GOLDEN / "format_1" / "checkpoint.pt")
    assert loaded.ema is not None
    assert make_format_1.digest(loaded.model) == expected["model"]
    assert make_format_1.digest(loaded.ema) == expected["ema"]
    assert loaded.config == load_config(GOLDEN / "format_1" / "config.yaml")
    assert (loaded.categories.names, loaded.step, loaded.best_ap, loaded.micro_batch) == (("cat", "dög"), 7, 0.25, 2)
    save_checkpoint(loaded, tmp_path / "new.pt")
    for state in (loaded, load_checkpoint(tmp_path / "new.pt")):
        found = Predictor(state, device=torch.device("cpu"))(make_format_1.image())
        assert found.labels.tolist() == expected["labels"]
        torch.testing.assert_close(found.boxes, torch.tensor(expected["boxes"]), rtol=0, atol=1e-3)
        torch.testing.assert_close(found.scores, torch.tensor(expected["scores"]), rtol=0, atol=1e-5)
