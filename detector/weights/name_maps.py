"""Renaming of tensors: what the importers share."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Source = Literal["torchvision", "detectron2", "mmdet"]
Style = Literal["pytorch", "caffe"]


@dataclass
class Said:
    """What the user says about a file that does not say it itself."""

    source: Source | None = None
    categories: str | None = None
    """A COCO file, or names separated by commas."""
    norm_eps: float | None = None
    style: Style | None = None
    box_weights: tuple[float, float, float, float] | None = None
    """What the box subnet's numbers are to be divided by: detectron2's BBOX_REG_WEIGHTS, the inverse of mmdetection's
    target_stds."""


@dataclass
class _Facts:
    """What is found out about a file on the way."""

    path: Path
    content: Any
    said: Said
    notes: list[str] = field(default_factory=list)
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of `ModelConfig` that the file or its kind decides."""
    postprocess: dict[str, Any] = field(default_factory=dict)
    sizes: tuple[int, int] | None = None
    box_weights: Sequence[float] | None = None


# ---- names ------------------------------------------------------------------------------------------------------

DROP = ""
"""What becomes of tensors that say nothing that a config does not."""

Rename = Iterable[tuple[str, "str | Callable[[re.Match[str]], str]"]]


_WB = r"(weight|bias)"


def _tower(kind: str, what: str, place: int | str, end: str) -> str:
    subnet = "cls_subnet" if kind.startswith("cl") else "box_subnet"
    return f"{subnet}.{what}.{place}.{end}"


_BN = r"(weight|bias|running_mean|running_var|num_batches_tracked)"
