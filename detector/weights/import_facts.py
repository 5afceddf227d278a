"""What an import starts from and collects: the user's options, the facts about a file, and each framework's format."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor

from detector.weights.name_maps import RenameRules

Source = Literal["torchvision", "detectron2", "mmdet"]
"""The framework that trained a detector."""

Style = Literal["pytorch", "caffe"]
"""mmdetection's two kinds of backbone: they differ in strides, channel order and normalisation."""

BGR_MEAN = (103.53, 116.28, 123.675)
"""ImageNet's mean in BGR order, values 0..255: the default of detectron2 and of mmdetection's caffe style."""


@dataclass(frozen=True)
class ImportOptions:
    """Facts that a file may lack, given by the user; None: taken from the file, or assumed."""

    source: Source | None = None
    categories: str | None = None
    """Path of a COCO file, or class names separated by commas, in the order of the outputs."""
    norm_eps: float | None = None
    """Epsilon of the backbone's batch norms."""
    style: Style | None = None
    box_weights: tuple[float, float, float, float] | None = None
    """Divisors of the predicted dx, dy, dw, dh: detectron2's BBOX_REG_WEIGHTS, 1 / mmdetection's target_stds."""


@dataclass
class ImportedFacts:
    """What is known about a file while it is imported."""

    path: Path
    content: Any
    options: ImportOptions
    model: dict[str, Any] = field(default_factory=dict)
    """Settings of `ModelConfig` that the file or its framework determines."""
    compat: dict[str, Any] = field(default_factory=dict)
    """Settings of `CompatConfig` that the file or its framework determines."""
    postprocess: dict[str, Any] = field(default_factory=dict)
    """Settings of `PostprocessConfig` that the file or its framework determines."""
    min_max_size: tuple[int, int] | None = None
    """Short side of test images and bound of the long side, in pixels."""
    box_weights: Sequence[float] | None = None
    """Divisors of the predicted dx, dy, dw, dh that the file contains."""
    class_names: list[str] | None = None
    notes: list[str] = field(default_factory=list)
    """What was assumed, dropped or converted."""


class SourceFormat(NamedTuple):
    """How a framework stores a RetinaNet."""

    marker: str
    """Name of a tensor that only this framework's RetinaNet has."""
    rename: RenameRules
    """Rules to this project's names, but hidden layers of the subnets as in `name_maps.hidden_layer`."""
    collect_facts: Callable[[Mapping[str, Tensor], dict[str, Tensor], ImportedFacts], None]
    """Fill the facts from the tensors, under their original and their new names; may complete the latter."""
    anchor_axes: Literal["ratio, scale", "scale, ratio"]
    """Order of a cell's nine anchors in the rows of the last convolutions."""
