"""Processes that die, hang, are slow or fail: one error that names the process, on all others, in bounded time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from detector import distributed
from detector.config_yaml import load_config
from detector.datasets.store import FolderStore
from detector.training.train import train
from tests.tiny import (
    REPO,
    TinyData,
    differing,
    images_of,
    last_checkpoint,
    ranks,
    start_process,
    start_tool,
    wait,
    wait_for,
    write_config,
    write_tiny_data,
)
from tools import train as train_tool


def long_run(folder: Path, data: TinyData, **settings: Any) -> Path:
    """A run of thousands of steps, which only its end by an error makes short."""
    defaults = {"train__epochs": 2000, "data__val": None, "train__checkpoint_every_steps": 2, "train__rank_timeout": 60}
    return write_config(folder / "c.yaml", data, **(defaults | settings))


def start(config: Path, out: Path, log: Path, *, world_size: int = 2) -> list[ForkServerProcess]:
    argv = ["--config", str(config), "--output-dir", str(out)]
    return [start_tool("train", argv, log, env) for env in ranks(world_size)]


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return path.read_text().count('"step"') if path.exists() else 0


def errors(log: Path) -> list[str]:
    return [line for line in log.read_text(errors="replace").splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_process_is_named_by_the_other(lost: int, data: TinyData, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    processes = start(long_run(tmp_path, data), out, log)
    wait_for(lambda: steps_done(out) >= 3, processes[0], log)
    pid = processes[lost].pid
    processes[lost].kill()
    assert wait([processes[1 - lost]], log, seconds=50) == [2], log.read_text()
    (error,) = errors(log)
    assert f"rank {lost} of 2" in error
    assert "does not answer: it was killed" in error
    if lost == 1:  # the first process hosts what the others know about it
        assert f"(process {pid} on " in error
        assert "continue with --resume auto" in log.read_text()
    assert "Traceback" not in log.read_text()


@pytest.mark.slow
def test_a_stopped_process_is_named_after_the_timeout(data: TinyData, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    processes = start(long_run(tmp_path, data, train__rank_timeout=3), out, log)
    wait_for(lambda: steps_done(out) >= 3, processes[0], log)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGSTOP)
    assert wait([processes[0]], log, seconds=60) == [2], log.read_text()
    processes[1].kill()
    (error,) = errors(log)
    assert f"rank 1 of 2 (process {processes[1].pid} on " in error
    assert "does not answer" in error


def train_with_a_slow_disk(config: Path, out: Path) -> None:
    """On rank 1, the fourth image that is read takes for ever; the first step has three images, one of them for it."""
    opened, count = FolderStore.open, 0

    def open_slowly(self: FolderStore, name: str) -> Any:
        nonlocal count
        count += 1
        if count == 4 and os.environ["RANK"] == "1":
            time.sleep(1000)
        return opened(self, name)

    FolderStore.open = open_slowly  # type: ignore[method-assign]
    sys.exit(train_tool.main(["--config", str(config), "--output-dir", str(out)]))


def test_a_process_that_hangs_is_named_with_what_it_does(data: TinyData, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    config = long_run(tmp_path, data, train__rank_timeout=4)
    processes = [start_process(train_with_a_slow_disk, (config, out), log, env) for env in ranks(2)]
    assert wait([processes[0]], log, seconds=100) == [2], log.read_text()
    processes[1].kill()
    (error,) = errors(log)
    assert f"rank 1 of 2 (process {processes[1].pid} on " in error
    assert "holds up the others: it has been reading the images of step 3 for " in error
    assert "train.rank_timeout is 4 s" in error


def test_an_error_of_one_process_is_printed_once_and_ends_all(tmp_path: Path) -> None:
    data = write_tiny_data(tmp_path)
    config = long_run(tmp_path, data)
    for path in list(images_of(data.train).iterdir())[:1]:
        path.write_bytes(b"no image")
    log = tmp_path / "log"
    assert wait(start(config, tmp_path / "run", log), log, seconds=100) == [2, 2], log.read_text()
    (error,) = errors(log)
    assert "is no image of a known format" in error


def test_an_error_of_all_processes_is_printed_once(data: TinyData, tmp_path: Path) -> None:
    config = long_run(tmp_path, data, model__norm="sync_bn")
    log = tmp_path / "log"
    assert wait(start(config, tmp_path / "run", log, world_size=3), log, seconds=100) == [2, 2, 2], log.read_text()
    (error,) = errors(log)
    assert "model.norm must not be sync_bn on a CPU" in error


def test_too_few_processes_are_an_error_however_they_wait(data: TinyData, tmp_path: Path) -> None:
    """The first one hosts what they find each other by; the other looks for it."""
    config = long_run(tmp_path, data, train__rank_timeout=3)
    for rank, reason in ((0, "1/2 clients joined"), (1, "nothing listens on port")):
        log = tmp_path / f"log{rank}"
        process = start_process(train_if_all_come, (config, tmp_path / "run"), log, ranks(2)[rank])
        assert wait([process], log, seconds=60) == [2], log.read_text()
        (error,) = errors(log)
        assert "the 2 processes of the run did not find each other" in error
        assert reason in error
    assert not (tmp_path / "run" / "config.yaml").exists()


def train_if_all_come(config: Path, out: Path) -> None:
    """Wait only two seconds for the other process."""
    distributed.MIN_JOINING_SECONDS, distributed.MARGIN = 2.0, timedelta(seconds=0)
    sys.exit(train_tool.main(["--config", str(config), "--output-dir", str(out)]))


DIES_ONCE = """
import os, signal, sys
from pathlib import Path
from detector.training.run import Run
from tools.train import main

finish = Run.finish_step

def finish_step(self):
    finish(self)
    if os.environ["RANK"] == "1" and self.state.step == 8 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

Run.finish_step = finish_step
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("whole_network")
def test_torchrun_restarts_a_run_from_its_last_checkpoint(data: TinyData, tmp_path: Path) -> None:
    """One process is killed once; the weights at the end are those of a run that nobody disturbed."""
    config = write_config(
        tmp_path / "c.yaml", data, train__epochs=4, train__checkpoint_every_steps=2, data__val=None,
        train__ema={"decay": 0.9},
    )  # fmt: skip
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "--master-addr",
        "127.0.0.1", "--master-port",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(REPO)}
    outputs = {}
    for name, what in (("whole", str(REPO / "tools/train.py")), ("broken", str(script))):
        argv = [what, "--config", str(config), "--output-dir", str(tmp_path / name)]
        done = subprocess.run(
            [*command, ranks(1)[0]["MASTER_PORT"], *argv], env=env, capture_output=True, text=True, timeout=300,
            cwd=tmp_path, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        outputs[name] = done.stdout + done.stderr
    assert "resumed after step 8 of 12" in outputs["broken"]
    assert "rank 1 of 2" in outputs["broken"]
    assert differing(last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "broken")) == []


def test_a_single_process_needs_no_heartbeat(data: TinyData, tmp_path: Path) -> None:
    config = write_config(tmp_path / "c.yaml", data, train__epochs=1, data__val=None)
    train(load_config(config), tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").finished
