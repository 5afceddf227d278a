"""Runs of a sweep as processes: start them, follow their progress, and stop them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detector.cli import package_folder
from detector.errors import RunError
from detector.reports.records import read_records
from detector.text import printable


def _tool(name: str) -> tuple[str, ...]:
    """The command line of a tool: of a clone's file, or of the installed package."""
    path = package_folder("tools") / f"{name}.py"
    in_clone = (path.parents[1] / "detector").is_dir()
    return (sys.executable, str(path)) if in_clone else (sys.executable, "-m", "detector", name)


STOP_WITH_PARENT = (
    sys.executable, "-S", "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])",
)  # fmt: skip
"""Prefix of a command: the kernel sends SIGTERM to the process when its parent dies (Linux)."""


class Commands(NamedTuple):
    """Command lines that train a run, and that write the detections of its best checkpoint."""

    train: tuple[str, ...] = _tool("train")
    detect: tuple[str, ...] = (*_tool("compare"), "--detect", "--replicates", "0")


def start_process(command: Sequence[str], run: Path, *, worker: int, workers: int) -> subprocess.Popen[bytes]:
    """Start a program that works on a run; its output is appended to the run's log.txt.

    The process inherits the lock of the run and holds it as long as it lives, even if the sweep is killed.

    Args:
        command: program and arguments.
        run: output folder of the run.
        worker: index of the worker, which selects its GPU if there are several.
        workers: number of workers, which share the CPU threads.

    Raises:
        RunError: a process of an earlier sweep still works on the run.
    """
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = visible or [str(i) for i in range(torch.cuda.device_count())]
    if devices:
        environment["CUDA_VISIBLE_DEVICES"] = devices[worker % len(devices)]
    with (run / ".lock").open("w") as lock, (run / "log.txt").open("ab") as log:
        _wait_for_lock(lock, run)
        return subprocess.Popen(
            [*(STOP_WITH_PARENT if sys.platform == "linux" else ()), *command],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, pass_fds=[lock.fileno()],
            start_new_session=True,  # Ctrl-C reaches only the sweep, which stops the processes once
        )  # fmt: skip


def stop_processes(processes: Sequence[subprocess.Popen[bytes]], *, timeout: float = 60) -> None:
    """Terminate processes, which makes a training save a checkpoint; kill those that do not stop in time."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + timeout
    for process in processes:
        try:
            process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # includes loader workers
            process.wait()


def _wait_for_lock(lock: Any, run: Path, *, timeout: float = 120) -> None:
    """Wait for a process that a killed sweep left behind."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise RunError(f"a process of an earlier sweep still trains in {run}; stop it first") from None
            time.sleep(0.1)


@contextlib.contextmanager
def exclusive_lock(path: Path, message: str) -> Iterator[None]:
    """Hold a lock file.

    Raises:
        RunError: another process holds it; with the given message.
    """
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(message) from None
        yield


class RunProgress(NamedTuple):
    """Progress of a run."""

    epoch: float
    best_ap: dict[float, float]
    """Best validation AP so far, by epoch of its evaluations."""


def read_progress(path: Path) -> RunProgress:
    """Read the progress of a run from metrics.jsonl, whose last line may be incomplete."""
    if not path.exists():
        return RunProgress(0.0, {})
    records, best, best_ap = read_records(path), 0.0, {}
    for record in records.validation:
        best_ap[record["epoch"]] = best = max(best, record["AP"])
    return RunProgress(max((r["epoch"] for r in [*records.training, *records.validation]), default=0.0), best_ap)


def error_from_log(log: Path, exit_code: int) -> str:
    """Find the line of a log that explains why the program failed."""
    if exit_code < 0:
        out_of_memory = " (out of memory?)" if exit_code == -signal.SIGKILL else ""
        return f"killed by {signal.Signals(-exit_code).name}{out_of_memory}"
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return printable((errors or lines or [f"exit code {exit_code}"])[-1])
