"""Free memory of the machine, and the peak memory of a computation."""

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
"""Parameters of glibc's mallopt (malloc.h)."""

SPARE = 0.1
"""Share of the free memory that a training step leaves for evaluation, images and fragmentation."""


def free_memory() -> int | None:
    """Return the bytes of main memory that this process can still allocate; None if unknown.

    The limits of the machine and of its containers (cgroup v2) apply. The page cache counts as free.
    """
    _release_freed_memory()
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
            limit = int((inside / "memory.max").read_text())  # "max" if there is no limit: a ValueError
            used = int((inside / "memory.current").read_text())
            stat = dict(line.split() for line in (inside / "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(stat["file"]) - int(stat["shmem"]))
        except (OSError, KeyError, ValueError):
            continue
    return free


def kills_for_memory() -> int | None:
    """Return how many processes of this machine the kernel has killed because memory was full; None if unknown."""
    try:
        lines = dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())
        return int(lines["oom_kill"])
    except (OSError, KeyError, ValueError):
        return None


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system.

    A step allocates the same memory as the one before, and every page from the system costs a page fault (5 % of the
    time of a ResNet-18's steps with small images on two cores). This has no effect with other C libraries, or if the
    environment configures glibc's allocator.
    """
    if platform.libc_ver()[0] != "glibc" or any(key.startswith(("MALLOC_", "GLIBC_TUNABLES")) for key in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # larger blocks are still returned: kept, they would fragment the heap
    mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak_of(work: Work, device: torch.device) -> int:
    """Return the peak memory in bytes of running `work` once, beyond what is allocated already."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _release_freed_memory()  # or it would be reused without a trace
    with _PeakMonitor() as monitor:
        work()
    return monitor.peak - monitor.before


def _release_freed_memory() -> None:
    """Return memory that the C library keeps after it was freed to the system."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class _PeakMonitor:
    """Peak resident memory of this process, sampled every millisecond: not every kernel lets its own peak be reset."""

    def __enter__(self) -> _PeakMonitor:
        self.before = self.peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
