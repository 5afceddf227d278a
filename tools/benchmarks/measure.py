"""Fair timing of several implementations: interleaved, repeated, with the noise of the machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from detector.memory import Work, peak_of
from detector.training.profiler import create_profiler, slowest


@dataclass
class Timings:
    """The repetitions of one implementation."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Peak memory of one repetition beyond what was allocated before; GPU memory if there is a GPU."""

    @property
    def median(self) -> float:
        """Median of the repetitions, in seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def interleaved(works: Mapping[str, Work], *, repeats: int, warmup: int, device: torch.device) -> dict[str, Timings]:
    """Time implementations in alternation, so that a machine that becomes slower does so for all of them.

    Args:
        works: by name; the first one is "ours".
        repeats: rounds.
        warmup: repetitions of each before the first round.
        device: where they compute.

    Returns:
        The timings by name. In each round, ours is timed twice; the second series is "again", and the difference of the
        two is the noise. The others follow each of the two, so that ours does not find its own data in the caches.
    """
    first, *others = works
    order = [first, *others, "again", *others]
    work_of = {**works, "again": works[first]}
    timings = {name: Timings() for name in order}
    for name in works:
        for _ in range(warmup):
            work_of[name]()
        timings[name].peak_bytes = peak_of(work_of[name], device)
    for _ in range(repeats):
        for name in order:
            timings[name].seconds.append(seconds_of(work_of[name], device))
    return timings


def seconds_of(work: Work, device: torch.device) -> float:
    """Return the time of one repetition on the device, in seconds."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def noise(timings: Mapping[str, Timings]) -> float:
    """Relative difference between the two series of ours."""
    a, b = timings["ours"].median, timings["again"].median
    return abs(a - b) / min(a, b)


def flops_of(work: Work) -> float:
    """Count the floating-point operations of convolutions and matrix products; a multiply-add counts as two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def profile_operations(work: Work, device: torch.device, trace: Path) -> list[tuple[str, float]]:
    """Profile three repetitions; writes a trace for chrome://tracing or Perfetto.

    Returns:
        The slowest kernels (on a CPU, operations), with their milliseconds per repetition.
    """
    with create_profiler(device) as profiler:
        for _ in range(3):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return slowest(profiler, device, 3)


def machine_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the machine's floating-point operations per second: a matrix product on a GPU; on a CPU, the faster of a
    matrix product and a convolution like the subnets'."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    works: list[tuple[float, Work]] = [(2.0 * size**3, lambda: a @ b)]
    if device.type == "cpu":
        x = torch.randn(1, 256, 64, 64, dtype=dtype).contiguous(memory_format=torch.channels_last)
        w = torch.randn(256, 256, 3, 3, dtype=dtype).contiguous(memory_format=torch.channels_last)
        works.append((2.0 * 9 * 256 * 256 * 64 * 64, lambda: F.conv2d(x, w, padding=1)))
    rates = []
    for operations, work in works:
        for _ in range(3):
            work()
        rates.append(operations / statistics.median(seconds_of(work, device) for _ in range(9)))
    return max(rates)


def machine(device: torch.device) -> dict[str, Any]:
    """Hardware, threads and versions, on which figures depend."""
    import platform

    import torchvision

    name = torch.cuda.get_device_name() if device.type == "cuda" else _processor()
    return {
        "device": name, "threads": torch.get_num_threads(), "torch": str(torch.__version__),
        "torchvision": torchvision.__version__, "python": platform.python_version(),
    }  # fmt: skip


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return "cpu"
