"""A run folder always holds a good checkpoint, and a damaged one is never used."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from detector.checkpoint import TrainState, load_checkpoint
from detector.config import Config
from detector.config_yaml import load_config
from detector.errors import CheckpointError, RunError
from detector.structures import Categories
from detector.training import checkpoints as checkpoints_module
from detector.training.checkpoints import (
    load_best,
    load_newest,
    save_best,
    save_last,
    set_aside_damaged,
    weights_only,
    write_with_retries,
)
from detector.training.train import train
from tests.conftest import Run
from tests.reliability.faults import FaultyCalls, flip_bit
from tests.tiny import TinyData, differing, last_checkpoint, records, tiny_config


def state(step: int) -> TrainState:
    """A checkpoint of a few numbers, all of which depend on the step."""
    return TrainState(
        Config(),
        Categories((1,), ("cat",)),
        {"w": torch.full((64,), float(step))},
        step=step,
        ema={"w": torch.full((64,), -float(step))},
        optimizer={"state": {0: {"momentum_buffer": torch.full((64,), 2.0 * step)}}, "param_groups": []},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(1, {"last.pt": 4}), (2, {"last.pt": 4, "last-1.pt": 3}), (3, {"last.pt": 4, "last-1.pt": 3, "last-2.pt": 2})],
)
def test_the_last_checkpoints_are_kept_in_their_order(keep: int, expected: dict[str, int], tmp_path: Path) -> None:
    for step in range(1, 5):
        save_last(state(step), tmp_path, keep=keep)
    assert names(tmp_path) == sorted(expected)
    assert {name: load_checkpoint(tmp_path / "checkpoints" / name).step for name in expected} == expected


def test_without_links_the_previous_checkpoint_is_kept_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", no_links)
    save_last(state(1), tmp_path, keep=2)
    save_last(state(2), tmp_path, keep=2)
    assert names(tmp_path) == ["last-1.pt", "last.pt"]
    assert load_checkpoint(tmp_path / "checkpoints" / "last-1.pt").step == 1


def test_nothing_is_resumed_from_an_empty_folder(tmp_path: Path) -> None:
    assert load_newest(tmp_path) is None


def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_last(state(step), tmp_path, keep=3)
    folder = tmp_path / "checkpoints"
    flip_bit(folder / "last.pt", 8 * ((folder / "last.pt").stat().st_size // 2))
    newest = load_newest(tmp_path)
    assert newest is not None
    loaded, path, warnings = newest
    assert (loaded.step, path.name) == (2, "last-1.pt")
    assert len(warnings) == 1
    assert "last.pt" in warnings[0]
    assert "resuming from last-1.pt of step 2 instead" in warnings[0]
    set_aside_damaged(tmp_path)
    save_last(state(3), tmp_path, keep=3)
    assert names(tmp_path) == ["last-1.pt", "last-2.pt", "last.damaged", "last.pt"]
    assert load_checkpoint(folder / "last-1.pt").step == 2, "the damaged file took no place of a good one"


def test_when_all_checkpoints_are_damaged_the_error_lists_them(tmp_path: Path) -> None:
    for step in (1, 2):
        save_last(state(step), tmp_path, keep=2)
    for name in ("last.pt", "last-1.pt"):
        (tmp_path / "checkpoints" / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"(?s)no checkpoint in .* can be read:.*last\.pt.*last-1\.pt.*Restore"):
        load_newest(tmp_path)


def test_model_pt_has_the_weights_to_use_and_nothing_else_of_size(tmp_path: Path) -> None:
    save_best(state(5), tmp_path)
    loaded = load_checkpoint(tmp_path / "checkpoints" / "model.pt")
    assert torch.equal(loaded.model["w"], torch.full((64,), -5.0)), "the EMA weights"
    assert (loaded.ema, loaded.optimizer, loaded.scaler, loaded.unlogged) == (None, None, None, None)
    assert (loaded.step, loaded.categories) == (5, state(5).categories)


def test_a_damaged_best_checkpoint_is_replaced_by_its_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.pt does not exist"):
        load_best(tmp_path, warn=print)
    save_best(state(5), tmp_path)
    (tmp_path / "checkpoints" / "best.pt").write_bytes(b"PK\x03\x04")
    warnings: list[str] = []
    loaded = load_best(tmp_path, warn=warnings.append)
    assert torch.equal(loaded.weights["w"], weights_only(state(5)).weights["w"])
    assert len(warnings) == 1
    assert "model.pt is used instead" in warnings[0]


def test_writing_is_tried_again_until_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_module, "FIRST_PAUSE", 0.001)
    attempts: list[int] = []
    warnings: list[str] = []

    def write() -> None:
        attempts.append(1)
        if len(attempts) < 4:
            raise RunError("the disk is full")

    write_with_retries(write, timeout=60, saved_step=None, warn=warnings.append)
    assert len(attempts) == 4
    assert warnings == ["the disk is full; trying again for 60 s"]


@pytest.mark.parametrize(
    ("saved", "safe"), [(None, "no checkpoint was saved before"), (1200, "the checkpoint of step 1,200 is safe")]
)
def test_the_error_after_the_last_attempt_states_what_is_safe(saved: int | None, safe: str) -> None:
    def write() -> None:
        raise RunError("the disk is full")

    with pytest.raises(RunError, match=rf"the disk is full; tried for 0 s \(train\.save_timeout\); {safe}"):
        write_with_retries(write, timeout=0, saved_step=saved, warn=print)


def test_an_error_that_no_waiting_ends_is_not_waited_for() -> None:
    def write() -> None:
        raise RunError("last.pt is a folder") from IsADirectoryError(errno.EISDIR, "Is a directory")

    with pytest.raises(RunError, match=r"last\.pt is a folder; the checkpoint of step 3 is safe"):
        write_with_retries(write, timeout=1000, saved_step=3, warn=print)


def test_a_signal_leaves_little_time_for_further_attempts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_module, "HURRIED_TIMEOUT", 0.3)
    attempts, started = [], time.monotonic()

    def write() -> None:
        attempts.append(time.monotonic())
        raise RunError("the disk is full")

    with pytest.raises(RunError, match=r"the disk is full; .*; the checkpoint of step 3 is safe"):
        write_with_retries(write, timeout=1000, saved_step=3, warn=print, hurry=lambda: bool(attempts))
    assert len(attempts) == 2
    assert time.monotonic() - started < 100


@pytest.mark.parametrize("kind", ["folder", "FIFO", "dangling link"])
def test_what_is_no_checkpoint_in_the_newest_ones_place_is_a_warning(kind: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_last(state(step), tmp_path, keep=2)
    last = tmp_path / "checkpoints" / "last.pt"
    last.unlink()
    if kind == "folder":
        last.mkdir()
    elif kind == "FIFO":
        os.mkfifo(last)
    else:
        last.symlink_to("x")
    loaded = load_newest(tmp_path)
    assert loaded is not None
    assert (loaded[0].step, loaded[1].name, len(loaded[2])) == (1, "last-1.pt", 1)


def test_too_little_room_for_the_checkpoints_is_an_error_before_the_first_step(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    expected = r"checkpoints need 0\.\d+ GB in .*, and only 0\.00 GB are free; .*keep_checkpoints=1"
    with pytest.raises(RunError, match=expected):
        train(tiny_config(tmp_path, data), tmp_path / "run")
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_a_run_with_a_damaged_last_checkpoint_ends_bit_equal_to_one_left_alone(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    last = out / "checkpoints" / "last.pt"
    flip_bit(last, 8 * (last.stat().st_size // 3))
    train(load_config(whole.config), out, resume="auto")
    assert "resuming from last-1.pt" in capsys.readouterr().err
    assert differing(last_checkpoint(out), last_checkpoint(whole.out)) == []
    assert records(out) == records(whole.out)
    assert "last.damaged" in names(out)


@pytest.mark.parametrize("name", ["last.pt", "best.pt", "model.pt"])
def test_no_flipped_bit_and_no_truncation_loads_silently_with_another_content(
    name: str, whole: Run, tmp_path: Path
) -> None:
    """20 seeded places in a checkpoint of a real run, half of them among its first and last kilobytes, and 5 lengths;
    200 and 20 with `pytest -m long`."""
    damage_and_load(whole.out / "checkpoints" / name, tmp_path / name, flips=20, lengths=5)


@pytest.mark.long
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "model.pt"])
def test_none_of_200_flipped_bits_and_20_truncations_loads_silently(name: str, whole: Run, tmp_path: Path) -> None:
    damage_and_load(whole.out / "checkpoints" / name, tmp_path / name, flips=200, lengths=20)


def damage_and_load(good: Path, path: Path, *, flips: int, lengths: int) -> None:
    """Damage copies of a checkpoint; each must be refused, or load with exactly the content of the good one."""
    shutil.copy(good, path)
    expected, size, rng = load_checkpoint(good), good.stat().st_size, random.Random(good.name)
    refused = 0
    for k in range(flips):
        byte = rng.randrange(size) if k % 2 else rng.choice([rng.randrange(4096), size - 1 - rng.randrange(16384)])
        position = 8 * byte + rng.randrange(8)
        flip_bit(path, position)
        try:
            found = load_checkpoint(path)
        except CheckpointError:
            refused += 1
        else:
            assert differing(found, expected) == [], f"bit {position}"
            assert (found.step, found.config, found.categories) == (expected.step, expected.config, expected.categories)
        flip_bit(path, position)
    assert refused > flips // 2, "the damage did not reach the content"
    for _ in range(lengths):
        path.write_bytes(good.read_bytes()[: rng.randrange(size)])
        with pytest.raises(CheckpointError):
            load_checkpoint(path)


class Stop(BaseException):
    """The end of a process."""


@pytest.mark.parametrize("moment", range(8))
def test_a_good_checkpoint_exists_at_every_moment_of_a_save(
    moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each of the renames, links and deletions of a save."""
    save_last(state(1), tmp_path, keep=2)
    faulty = FaultyCalls(moment, Stop())
    with monkeypatch.context() as patch, contextlib.suppress(Stop):
        for owner, name in ((os, "link"), (Path, "replace"), (Path, "unlink")):
            patch.setattr(owner, name, faulty.counted(getattr(owner, name)))
        save_last(state(2), tmp_path, keep=2)
    newest = load_newest(tmp_path)
    assert newest is not None
    assert newest[0].step in (1, 2)
    save_last(state(3), tmp_path, keep=2)
    assert load_checkpoint(tmp_path / "checkpoints" / "last.pt").step == 3
    assert names(tmp_path) == ["last-1.pt", "last.pt"]
