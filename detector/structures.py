"""The records that the parts of the detector exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.config import Activation
from detector.scores import score_logits
from detector.text import printable, shown


class Targets(NamedTuple):
    """The ground truth of a batch, padded to the image with the most objects.

    This is a NamedTuple because DataLoader pins those and leaves dataclasses in pageable memory silently.
    """

    boxes: Tensor
    """(B, M, 4) float32, xyxy in pixels of the padded image; zeros where padded."""
    labels: Tensor
    """(B, M) int64 in 0..K-1; -1 where padded."""
    ignore_boxes: Tensor
    """(B, R, 4) float32: crowd and ignore regions; zeros (area 0) where padded."""
    weights: Tensor | None = None
    """(B, M) float32: the factor of each object's class and box loss; None means 1."""
    class_mask: Tensor | None = None
    """(B, K) bool: the classes annotated in each image; the class loss ignores the others. None means all."""

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Targets:
        """Copy all tensors to a device."""
        moved: list[Any] = [None if t is None else t.to(device, non_blocking=non_blocking) for t in self]
        return Targets(*moved)


class Unresized(NamedTuple):
    """The resizing that remains to be done for a batch; plain numbers, so that a GPU need not be synchronized."""

    sizes: Sequence[tuple[int, int]]
    """Current height and width of each image."""
    resized: Sequence[tuple[int, int]]
    """Target height and width of each image."""
    canvas: tuple[int, int]
    """Height and width of the padded batch."""


class Batch(NamedTuple):
    """A micro-batch as the loader yields it."""

    images: Tensor
    """(B, 3, H, W) uint8 RGB, resized, zero-padded at the right and bottom; float32 where the model's resize is."""
    targets: Targets
    image_ids: Tensor
    """(B,) int64, COCO's ids."""
    image_sizes: Tensor
    """(B, 2) int64, height and width of the resized image without padding."""
    original_sizes: Tensor
    """(B, 2) int64, height and width of the image file (after EXIF orientation, where that is applied)."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """(B,) int64, position in the dataset; negative for a filler, which contributes nothing: -1, or -2 - i in place of
    image i, which could not be read (see `datasets.loader`)."""
    unresized: Unresized | None = None
    """Set where the loader left the resizing of `images` to the device (`datasets.loader.to_device`); everything else
    in the batch is in pixels of the resized images already."""


class HeadOutputs(NamedTuple):
    """Raw outputs of the network: per level, finest first, each level row by row and within a cell by anchor."""

    cls_logits: tuple[Tensor, ...]
    """Per level (B, A_l, K), before the sigmoid; (B, A_l, K + 1) with the background last, before a softmax."""
    box_deltas: tuple[Tensor, ...]
    """Per level (B, A_l, 4 * n): dx, dy, dw, dh as in `boxes.encode` for n = 1, else the logits of a distribution over
    n distances for each side; `boxes.decode` reads both."""
    anchors: Tensor
    """(A, 4) float32 xyxy, all levels."""
    activation: Activation = "sigmoid"
    """How class probabilities are made of the logits."""
    quality: tuple[Tensor, ...] | None = None
    """Per level (B, A_l, 1): logits of localization quality (centerness or predicted IoU), where the network has
    them."""

    def detach(self) -> HeadOutputs:
        """The same without a gradient."""
        return self._replace(
            cls_logits=tuple(x.detach() for x in self.cls_logits),
            box_deltas=tuple(x.detach() for x in self.box_deltas),
            quality=None if self.quality is None else tuple(x.detach() for x in self.quality),
        )

    def all_cls_logits(self) -> Tensor:
        """(B, A, K), the levels concatenated."""
        return torch.cat(self.cls_logits, dim=1)

    def all_box_deltas(self) -> Tensor:
        """(B, A, 4 * n), the levels concatenated."""
        return torch.cat(self.box_deltas, dim=1)

    def level_anchors(self) -> tuple[Tensor, ...]:
        """Per level (A_l, 4)."""
        return torch.split(self.anchors, [deltas.shape[1] for deltas in self.box_deltas])

    def level_score_logits(self, level: int) -> Tensor:
        """(B, A_l, K) logits of one level whose sigmoids are the scores; see `scores.score_logits`."""
        return score_logits(
            self.cls_logits[level], self.activation, None if self.quality is None else self.quality[level]
        )


@dataclass(frozen=True)
class Detections:
    """The detections of one image, highest score first.

    boxes (N, 4) float32 xyxy in pixels; scores (N,) float32 in 0..1; labels (N,) int64 in 0..K-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...] = ()
    """Of the labels 0..K-1, where known."""

    def __post_init__(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, 4) or self.scores.shape != (n,) or self.labels.shape != (n,):
            raise ValueError(
                "Detections must have boxes (N, 4), scores (N,) and labels (N,), got "
                f"{tuple(self.boxes.shape)}, {tuple(self.scores.shape)} and {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def cpu(self) -> Detections:
        """Copy to main memory (a sync point on a GPU)."""
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu(), self.class_names)


@dataclass(frozen=True)
class Categories:
    """The classes of a dataset or model: label k has the name `names[k]` and the COCO category id `ids[k]`.

    Characters of names that control a terminal or cannot be printed are replaced by escapes: here, because every
    dataset, checkpoint and imported file passes through, and equal names stay equal.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        typed = all(type(i) is int and -(2**63) <= i < 2**63 for i in self.ids)
        typed = typed and all(isinstance(name, str) and name for name in self.names)
        if not typed or len(self.ids) != len(self.names) or len(set(self.ids)) != len(self.ids) or not self.ids:
            raise ValueError(
                "Categories must hold at least one class, each with one name and an integer id of its own, got "
                f"ids {shown(self.ids)}, names {shown(self.names)}"
            )
        object.__setattr__(self, "names", tuple(printable(name) for name in self.names))

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class GroundTruth:
    """A dataset's annotations as the evaluators get them: COCO's columns as validated arrays.

    Only this record keeps COCO's xywh boxes and category ids, because the metric is defined on the published numbers.
    """

    categories: Categories
    image_ids: NDArray[np.int64]
    """(N,) all images that are evaluated, including those without objects."""
    ann_image_ids: NDArray[np.int64]
    """(G,)"""
    ann_category_ids: NDArray[np.int64]
    """(G,)"""
    boxes: NDArray[np.float64]
    """(G, 4) xywh in pixels of the original image, as published (not clipped)."""
    areas: NDArray[np.float64]
    """(G,) square pixels, as published; width times height where the file has no area."""
    iscrowd: NDArray[np.bool_]
    """(G,)"""
