"""Timing several ways to do one thing, fairly: interleaved, repeated, with the noise of the machine beside the result."""

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
from detector.training.profiler import profiler_of, slowest


@dataclass
class Measured:
    """One way's repetitions."""

    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Of memory above what was held before, in one repetition; GPU memory where there is a GPU."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        if len(self.seconds) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median


def interleaved(ways: Mapping[str, Work], *, repeats: int, warmup: int, device: torch.device) -> dict[str, Measured]:
    """Every way in turn, again and again, so that a machine that gets slower does so for all.

    The first way is timed twice in each round; its second series comes back as "again", and what lies between the two is the
    noise. Others come after each of them, so that the first does not find in the caches what it has just left there.
    """
    first, *others = ways
    order = [first, *others, "again", *others]
    doing = {**ways, "again": ways[first]}
    measured = {name: Measured() for name in order}
    for name in ways:
        for _ in range(warmup):
            doing[name]()
        measured[name].peak_bytes = peak_of(doing[name], device)
    for _ in range(repeats):
        for name in order:
            measured[name].seconds.append(seconds_of(doing[name], device))
    return measured


def seconds_of(work: Work, device: torch.device) -> float:
    """Time of one repetition, on the device."""
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def noise(measured: Mapping[str, Measured], first: str) -> float:
    """How far two series of the same lie apart, as a share."""
    a, b = measured[first].median, measured["again"].median
    return abs(a - b) / min(a, b)


def flops_of(work: Work) -> float:
    """Floating-point operations of convolutions and matrix products, a multiplication and an addition counted as two."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def where_time_goes(work: Work, device: torch.device, trace: Path) -> list[tuple[str, float]]:
    """Profile three repetitions; writes a trace for chrome://tracing or Perfetto.

    Returns:
        The kernels (on a CPU, the operations) that took most, with their milliseconds in a repetition.
    """
    with profiler_of(device) as profiler:
        for _ in range(3):
            work()
        if device.type == "cuda":
            torch.cuda.synchronize()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return slowest(profiler, device, 3)


def machine_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of the best that this machine does now: a matrix product on a GPU, on a CPU the best of a product
    and a convolution as the subnets do it."""
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
    """What a figure depends on besides the code."""
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
