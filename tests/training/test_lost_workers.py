"""A loader worker that is killed while a run trains: the run ends with one error, and resumes without a difference."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from detector.config_yaml import load_config
from detector.training.run import Run
from detector.training.train import train
from tests.conftest import EVERYTHING_ON
from tests.tiny import (
    TinyData,
    differing,
    images_of,
    last_checkpoint,
    records,
    start_process,
    start_tool,
    wait,
    write_config,
    write_tiny_data,
)
from tools.train import main


def losing_run(folder: Path, data: TinyData, **settings: Any) -> Path:
    defaults = {**EVERYTHING_ON, "train__epochs": 4, "data__val": None, "data__num_workers": 2}
    defaults["train__checkpoint_every_steps"] = 1000
    return write_config(folder / "c.yaml", data, **(defaults | settings))


def train_losing_a_worker(config: Path, out: Path) -> None:
    """A worker is killed after the fifth step."""
    finish = Run.finish_step

    def finish_step(self: Run) -> None:
        finish(self)
        if self.state.step == 5:
            worker = max(process.pid or 0 for process in multiprocessing.active_children())
            print(f"killing {worker}", flush=True)
            os.kill(worker, signal.SIGKILL)

    Run.finish_step = finish_step  # type: ignore[method-assign]
    sys.exit(main(["--config", str(config), "--output-dir", str(out)]))


def test_a_run_that_loses_a_worker_ends_after_its_last_step_and_resumes_bit_equal(
    data: TinyData, tmp_path: Path
) -> None:
    config, out, log = losing_run(tmp_path, data), tmp_path / "run", tmp_path / "log"
    assert wait([start_process(train_losing_a_worker, (config, out), log)], log) == [2], log.read_text()
    text = log.read_text()
    assert text.count("error: ") == 1
    worker = text.partition("killing ")[2].split()[0]
    assert f"of 2 (process {worker}) was killed by SIGKILL while it read " in text
    assert "data.num_workers=1" in text
    assert "continue with --resume auto" in text
    assert "Traceback" not in text
    logged = (out / "metrics.jsonl").read_text().count('"step"')
    assert last_checkpoint(out).step == logged >= 5, "no step is lost"
    argv = ["--config", str(config), "--output-dir", str(out), "--resume", "auto", "data.num_workers=0"]
    assert wait([start_tool("train", argv, log)], log) == [0], log.read_text()
    train(load_config(config, ["data.num_workers=0"]), tmp_path / "whole")
    assert differing(last_checkpoint(out), last_checkpoint(tmp_path / "whole")) == []
    assert records(out) == records(tmp_path / "whole")


def test_a_pipe_among_the_images_ends_a_run_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """data.verify=none reads no image before the first step."""
    own = write_tiny_data(tmp_path)
    path = min(images_of(own.train).iterdir())
    path.unlink()
    os.mkfifo(path)
    config = losing_run(tmp_path, own, data__num_workers=0)
    assert main(["--config", str(config), "--output-dir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert f"{path.name}: is a pipe (FIFO), not a regular file" in error


def test_a_run_whose_workers_cannot_be_started_leaves_nothing_that_looks_like_a_run(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that it can be started again as the message advises."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    config, out = losing_run(tmp_path, data, train__epochs=1), tmp_path / "run"
    argv = ["--config", str(config), "--output-dir", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing, "Semaphore", refuse)
        assert main(argv) == 2
    assert "/dev/shm is full; set data.num_workers=0" in capsys.readouterr().err
    assert not (out / "config.yaml").exists()
    assert main([*argv, "data.num_workers=0"]) == 0
