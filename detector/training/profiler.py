"""A torch.profiler trace of some steps of a run."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

WARMUP_STEPS = 10
"""Steps of a session that are not profiled: libraries initialize, and code is compiled."""


class StepProfiler:
    """Profiles a number of steps of a session, reading and logging included, after the first `WARMUP_STEPS`.

    Args:
        steps: number of steps to profile; 0: none.
        path: the trace file to write, for Perfetto or chrome://tracing; a name that ends in .gz is compressed.
        device: the device that computes.
    """

    def __init__(self, steps: int, path: Path, device: torch.device) -> None:
        self.steps, self.path, self.device = steps, path, device
        self._done = 0
        self._profiler: profile | None = None

    def step(self) -> str | None:
        """Call this after every step.

        Returns:
            After the last profiled step: a report of the operations that took most of the time. Else None.
        """
        self._done += 1
        if self.steps and self._done == WARMUP_STEPS:
            self._profiler = create_profiler(self.device)
            self._profiler.start()
        if self._profiler is None or self._done < WARMUP_STEPS + self.steps:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self.path))
        operations = slowest(self._profiler, self.device, self.steps)[:8]
        self._profiler = None
        lines = [f"  {milliseconds:8.1f} ms  {name}" for name, milliseconds in operations]
        return "\n".join([f"profiler trace of {self.steps} steps in {self.path}; time per step:", *lines])


def create_profiler(device: torch.device) -> profile:
    """Create a profiler of the CPU and, where it is one, the GPU."""
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"))


def slowest(profiler: profile, device: torch.device, repetitions: int) -> list[tuple[str, float]]:
    """List the 40 kernels (on a CPU, operations) that took most time, each with its milliseconds per repetition."""
    operations = []
    for event in profiler.key_averages():
        on_device = device.type == "cuda"
        if on_device and str(event.device_type).endswith("CPU"):
            continue
        micros = event.self_device_time_total if on_device else event.self_cpu_time_total
        operations.append((event.key, micros / 1e3 / repetitions))
    return sorted(operations, key=lambda operation: -operation[1])[:40]
