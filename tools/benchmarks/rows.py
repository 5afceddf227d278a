"""Options of the benchmark command, and the rows of figures that the cases return.

A row is a mapping {"case", "row", "ours", "peer", ...}, which `report` prints and the JSON file stores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from detector.config import Precision
from detector.inference.nms import has_triton
from detector.memory import Work
from tools.benchmarks.measure import Timings, noise, profile_operations

Row = dict[str, Any]


class MismatchError(RuntimeError):
    """The two implementations do not compute the same, so a ratio of their times would be meaningless."""


@dataclass(frozen=True)
class Options:
    """The options of the command line."""

    device: torch.device
    size: tuple[int, int] = (800, 800)
    """Height and width of the network input."""
    batch: int = 2
    boxes: int = 10
    """Objects in the image with most of them."""
    classes: int = 80
    backbone: str = "resnet50"
    precision: Literal["all"] | Precision = "all"
    compiled: bool | None = None
    """Whether ours is compiled; None: on a GPU."""
    checkpoint_activations: bool = False
    repeats: int = 7
    warmup: int = 2
    peer: bool = True
    trace: Path | None = None
    """Folder for profiler traces."""
    images: int = 5000
    workers: int = 2
    image_size: tuple[int, int] = (480, 640)
    """Height and width of the image files."""

    @property
    def compiles(self) -> bool:
        """`compiled` with its default filled in."""
        if self.compiled is None:
            return self.device.type == "cuda" and has_triton(self.device)
        return self.compiled

    @property
    def precisions(self) -> list[Precision]:
        """The precisions to measure."""
        return ["fp32", "bf16"] if self.precision == "all" else [self.precision]

    @property
    def workload(self) -> Row:
        """The columns that describe the work."""
        return {
            "size": list(self.size), "batch": self.batch, "boxes": self.boxes, "classes": self.classes,
            "backbone": self.backbone,
        }  # fmt: skip

    def profile(self, work: Work, name: str) -> list[tuple[str, float]]:
        """Write a profiler trace if one is wanted; returns the slowest operations with milliseconds."""
        if self.trace is None:
            return []
        return profile_operations(work, self.device, self.trace / f"{name}.json.gz")


def figures(
    timings: Mapping[str, Timings],
    *,
    images: int | None = None,
    operations: float | None = None,
    peak: float | None = None,
) -> Row:
    """The columns of measured times and memory.

    Args:
        timings: by implementation, as `interleaved` returns them.
        images: per repetition; adds the throughput.
        operations: floating-point operations per repetition.
        peak: operations per second that the machine can do; adds the share of it, with `operations`.
    """
    row: Row = {"noise": noise(timings)}
    for name, one in timings.items():
        if name == "again":
            continue
        row[name] = {"median_ms": one.median * 1e3, "spread": one.spread, "seconds": one.seconds}
        if one.peak_bytes:
            row[name]["peak_mb"] = one.peak_bytes / 1e6
        if images is not None:
            row[name]["images_per_second"] = images / one.median
        if operations is not None and peak is not None:
            row[name]["share_of_peak"] = operations / one.median / peak
    if peak is not None:
        row["peak_tflops"], row["gflop"] = peak / 1e12, (operations or 0) / 1e9
    if "peer" in timings:
        row["ratio"] = timings["peer"].median / timings["ours"].median
        if timings["peer"].peak_bytes:
            row["memory_ratio"] = timings["ours"].peak_bytes / timings["peer"].peak_bytes
    return row
