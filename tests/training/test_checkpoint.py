"""Checkpoints: whole or not there, telling about themselves, and inert."""

from __future__ import annotations

import contextlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detector.checkpoint import TrainState, load_checkpoint, save_checkpoint
from detector.config import Config
from detector.errors import CheckpointError
from detector.structures import Categories


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


def test_averaged_weights_are_used_where_there_are_any() -> None:
    assert torch.equal(state().weights["w"], torch.ones(4))
    assert torch.equal(state(ema=None).weights["w"], torch.arange(4.0))


def test_a_disk_that_fills_up_leaves_the_previous_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.pt"
    save_checkpoint(state(step=1), path)

    def half(content: Any, file: Any) -> None:
        file.write(b"PK half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(CheckpointError, match="No space left on device; the previous one is untouched"):
        save_checkpoint(state(step=2), path)
    assert load_checkpoint(path).step == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_checkpoint_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            done.append(what)
            return function(*arguments)

        return call

    monkeypatch.setattr(os, "fsync", noted("flushed", os.fsync))
    monkeypatch.setattr(Path, "replace", noted("renamed", Path.replace))
    save_checkpoint(state(), tmp_path / "a.pt")
    assert done == ["flushed", "renamed"]


def test_what_a_killed_process_half_wrote_is_gone_after_the_next_save(tmp_path: Path) -> None:
    save_checkpoint(state(), tmp_path / "last.pt")
    (tmp_path / ".last.pt.tmp").write_bytes(b"half")
    save_checkpoint(state(), tmp_path / "last.pt")
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_missing_checkpoint_names_those_that_are_there(tmp_path: Path) -> None:
    save_checkpoint(state(), tmp_path / "best.pt")
    with pytest.raises(CheckpointError, match=r"bset\.pt does not exist; there is .*best\.pt"):
        load_checkpoint(tmp_path / "bset.pt")
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
        with pytest.raises(CheckpointError, match=f"{name} is not read: .*could run code"):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("size", [0, 10, 500, 2000, -1])
def test_a_damaged_checkpoint_is_named(size: int, tmp_path: Path) -> None:
    save_checkpoint(state(), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[:size])
    with pytest.raises(CheckpointError, match=r"checkpoint .*a\.pt cannot be read, it may be damaged: "):
        load_checkpoint(tmp_path / "a.pt")


def test_a_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_text("epoch 1: loss 0.5\n")
    with pytest.raises(CheckpointError, match=r"x\.pt cannot be read"):
        load_checkpoint(tmp_path / "x.pt")


def test_no_damage_ends_in_anything_but_an_error_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    save_checkpoint(state(), path)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(500):
        broken = bytearray(whole if rng.random() < 0.7 else whole[: rng.integers(1, len(whole) + 1)])
        for position in rng.integers(0, len(broken), 3):
            broken[position] = rng.integers(256)
        path.write_bytes(broken)
        with contextlib.suppress(CheckpointError):  # or it reads: not every byte matters
            load_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"w": torch.ones(2)}, "must be a checkpoint written by tools/train.py"),
        ([1, 2], "must be a checkpoint written by tools/train.py.*got list"),
        ({"format": 99}, "format 1.*got format 99"),
        ({"format": 1}, "of another version"),
        ({"format": 1, "config": "{}", "categories": {"ids": [1], "names": ["a"]}, "model": {}, "step": 1, "new": 2}, "of another version.*new"),
        ({"format": 1, "config": '{"train": {"epoch": 3}}', "categories": {"ids": [1], "names": ["a"]}}, r"(?s)of another version.*train\.epoch"),
        ({"format": 1, "config": "{}", "categories": {"ids": [], "names": []}, "model": {}, "step": 1}, "of another version|at least one class"),
    ],
)  # fmt: skip
def test_another_file_is_refused_with_the_reason(content: Any, told: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(tmp_path / "a.pt")
