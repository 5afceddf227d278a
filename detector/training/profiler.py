"""A profile of some steps of a run: where their time goes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FIRST = 10
"""Steps of a session before it is looked at: libraries set themselves up, and code is compiled."""


class Trace:
    """Profiles so many steps of a session, reading and logging included, once the first ones are over.

    Args:
        steps: to look at; 0: none.
        path: what to write, for chrome://tracing or Perfetto; a name that ends in .gz is packed.
        device: that computes.
    """

    def __init__(self, steps: int, path: Path, device: torch.device) -> None:
        self.steps, self.path, self.device = steps, path, device
        self._done = 0
        self._profiler: profile | None = None

    def step(self) -> str | None:
        """To be called after every step. After the last one that is looked at: what took most of the time, in words."""
        self._done += 1
        if self.steps and self._done == FIRST:
            self._profiler = profiler_of(self.device)
            self._profiler.start()
        if self._profiler is None or self._done < FIRST + self.steps:
            return None
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(self.path))
        taken = slowest(self._profiler, self.device, self.steps)[:8]
        self._profiler = None
        lines = [f"  {milliseconds:8.1f} ms  {name}" for name, milliseconds in taken]
        return "\n".join(
            [f"where a step's time goes ({self.steps} were looked at; all of it is in {self.path}):", *lines]
        )


def profiler_of(device: torch.device) -> profile:
    """A profiler of all that this device does."""
    return profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda"))


def slowest(profiler: profile, device: torch.device, repetitions: int) -> list[tuple[str, float]]:
    """The kernels (on a CPU, the operations) that took most, with their milliseconds in a repetition."""
    taken = []
    for event in profiler.key_averages():
        on_device = device.type == "cuda"
        if on_device and str(event.device_type).endswith("CPU"):
            continue
        micros = event.self_device_time_total if on_device else event.self_cpu_time_total
        taken.append((event.key, micros / 1e3 / repetitions))
    return sorted(taken, key=lambda one: -one[1])[:40]
