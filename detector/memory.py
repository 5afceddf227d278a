"""Memory of the machine and of this process: how much is free, and how much a piece of work needs."""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Callable
from pathlib import Path

import torch

Work = Callable[[], object]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

SPARE = 0.1
"""Share of the free memory that a step is not to use: what evaluation, pictures and fragments take."""


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take, of the machine or of its containers (cgroup v2); what files keep there
    only as long as nobody needs the room counts as free. None where unknown."""
    _give_back()
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        own = next(
            (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/"
        )
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup", own.strip("/"))
    for inside in [group, *group.parents][: len(group.parts) - 3]:  # up to /sys/fs/cgroup
        try:
            limit = int((inside / "memory.max").read_text())  # "max" where there is none
            used = int((inside / "memory.current").read_text())
            stat = dict(line.split() for line in (inside / "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(stat["file"]) - int(stat["shmem"]))
        except (OSError, KeyError, ValueError):
            continue
    return free


def keep_freed_memory() -> None:
    """Tell the C library to keep what it gets back: a step asks for the same memory as the one before, and pages that went
    to the system come back empty, one fault each (a ResNet-18's steps of small pictures on two cores take 5 % less time). Only glibc
    knows how; where the environment has told it otherwise, that stands."""
    if platform.libc_ver()[0] != "glibc" or any(key.startswith(("MALLOC_", "GLIBC_TUNABLES")) for key in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # larger blocks may still go back: kept, they would leave holes
    mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak_of(work: Work, device: torch.device) -> int:
    """Bytes that one repetition needs beyond what is held already."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _give_back()  # so that what is needed shows
    with _Watch() as watch:
        work()
    return watch.peak - watch.before


def _give_back() -> None:
    """To the system, what the C library keeps of what was freed."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class _Watch:
    """The highest memory of this process in pages really used, looked at every millisecond (the kernel's own record cannot be
    set back everywhere)."""

    def __enter__(self) -> _Watch:
        self.before = self.peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
