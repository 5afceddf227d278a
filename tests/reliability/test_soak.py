"""A long run keeps its memory, its open files and its folder as they are after the first steps."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from detector.training.run import Run
from detector.training.train import train
from tests.tiny import TinyData, tiny_config


class Usage(NamedTuple):
    """What the process uses after a step."""

    step: int
    megabytes: float
    files: int
    threads: int
    objects: int


def usage(step: int) -> Usage:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    gc.collect()
    return Usage(
        step, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, len(os.listdir("/proc/self/fd")), threading.active_count(),
        len(gc.get_objects()),
    )  # fmt: skip


def soak(data: TinyData, folder: Path, monkeypatch: pytest.MonkeyPatch, *, steps: int, every: int) -> list[Usage]:
    """Train for epochs of 11 steps, with a checkpoint after each, an evaluation every 5, and TensorBoard."""
    config = tiny_config(
        folder, data, train__epochs=steps // 11, train__batch_size=1, train__log_every=5, optim__lr=1e-4,
        optim__scale_lr=False, eval__every_epochs=5, train__images_every_epochs=5, model__fpn_channels=16,
        data__min_size=32,
    )  # fmt: skip
    found: list[Usage] = []
    finish_step = Run.finish_step

    def finish_and_measure(self: Run) -> None:
        finish_step(self)
        if self.state.step % every == 0:
            found.append(usage(self.state.step))

    monkeypatch.setattr(Run, "finish_step", finish_and_measure)
    train(config, folder / "run")
    assert sorted(path.name for path in (folder / "run" / "checkpoints").iterdir()) == [
        "best.pt", "last-1.pt", "last.pt", "model.pt",
    ]  # fmt: skip
    assert [path.name for path in (folder / "run").rglob(".*")] == []
    return found


def test_a_few_hundred_steps_leave_no_file_open_and_no_object_behind(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = soak(data, tmp_path, monkeypatch, steps=132, every=22)[2:]
    assert max(u.files for u in found) <= found[0].files + 2, "one per save or evaluation would be 6 or 1 more"
    assert {u.threads for u in found} == {found[0].threads}
    assert max(u.objects for u in found) - found[0].objects < 300, [u.objects for u in found]


@pytest.mark.long
def test_twenty_thousand_steps_take_no_more_memory_than_two_thousand(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = soak(data, tmp_path, monkeypatch, steps=20_009, every=200)
    settled = [u for u in found if u.step >= 2000]
    steps, megabytes = np.array([u.step for u in settled]), np.array([u.megabytes for u in settled])
    slope = float(np.polyfit(steps / 1000, megabytes, 1)[0])
    figures = f"{megabytes[0]:.1f} MB after 2,000 steps, {megabytes[-1]:.1f} at the end, {slope:+.3f} per 1,000 steps"
    with capsys.disabled():
        print(f"\n{figures}")
    assert abs(slope) < 0.3, figures
    assert max(u.files for u in settled) <= settled[0].files + 2
    assert {u.threads for u in settled} == {settled[0].threads}
