"""The records that the parts of the detector hand to each other; each validated where it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Targets(NamedTuple):
    """What there is to find in a batch, padded to the fullest image.

    A NamedTuple because the loader pins those (and leaves dataclasses in pageable memory without a word).
    """

    boxes: Tensor
    """(B, M, 4) float32, xyxy in pixels of the padded image; zeros where padded."""
    labels: Tensor
    """(B, M) int64 in 0..K-1; -1 where padded."""
    ignore_boxes: Tensor
    """(B, R, 4) float32: crowd and ignore regions; zeros (area 0) where padded."""


class Unresized(NamedTuple):
    """What is still to be done to the pictures of a batch; plain numbers, so that a GPU need not be asked for them."""

    sizes: Sequence[tuple[int, int]]
    """Height and width of each as it is."""
    resized: Sequence[tuple[int, int]]
    """Height and width that each is to get."""
    canvas: tuple[int, int]
    """Height and width of the padded batch."""


class Batch(NamedTuple):
    """A micro-batch as the loader gives it."""

    images: Tensor
    """(B, 3, H, W) uint8 RGB, resized, zero-padded at the right and bottom; float32 where the model's resize is."""
    targets: Targets
    image_ids: Tensor
    """(B,) int64, COCO's ids."""
    image_sizes: Tensor
    """(B, 2) int64, height and width of the resized image without padding."""
    original_sizes: Tensor
    """(B, 2) int64, height and width of the image file (after EXIF orientation, where that is applied)."""
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody looks for here
    """(B,) int64, position in the dataset; negative for a filler, which counts for nothing: -1, or -2 - i in place of
    picture i, which could not be read (see datasets.loader)."""
    unresized: Unresized | None = None
    """Where the loader left the resizing of `images` to the device (`datasets.loader.to_device`); all else in the batch is
    in pixels of the resized images already."""


class HeadOutputs(NamedTuple):
    """What the network says: per level, finest first, each level row by row and within a cell by anchor."""

    cls_logits: tuple[Tensor, ...]
    """Per level (B, A_l, K), before the sigmoid; (B, A_l, K + 1), the background last, before a softmax."""
    box_deltas: tuple[Tensor, ...]
    """Per level (B, A_l, 4): dx, dy, dw, dh as in `boxes.encode`."""
    anchors: Tensor
    """(A, 4) float32 xyxy, all levels."""
    activation: Literal["sigmoid", "softmax"] = "sigmoid"
    """What makes scores of the logits."""

    def all_cls_logits(self) -> Tensor:
        """(B, A, K), the levels one after the other."""
        return torch.cat(self.cls_logits, dim=1)

    def all_box_deltas(self) -> Tensor:
        """(B, A, 4), the levels one after the other."""
        return torch.cat(self.box_deltas, dim=1)


@dataclass(frozen=True)
class Detections:
    """The objects found in one image, best score first.

    boxes (N, 4) float32 xyxy in pixels; scores (N,) float32 in 0..1; labels (N,) int64 in 0..K-1.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        n = len(self.boxes)
        if self.boxes.shape != (n, 4) or self.scores.shape != (n,) or self.labels.shape != (n,):
            raise ValueError(
                "Detections must have boxes (N, 4), scores (N,) and labels (N,), got "
                f"{tuple(self.boxes.shape)}, {tuple(self.scores.shape)} and {tuple(self.labels.shape)}"
            )

    def __len__(self) -> int:
        return len(self.boxes)

    def cpu(self) -> Detections:
        """The same in main memory (a sync point on a GPU)."""
        return Detections(self.boxes.cpu(), self.scores.cpu(), self.labels.cpu())


@dataclass(frozen=True)
class Categories:
    """The classes of a dataset or model: label k is `names[k]`, which COCO files call `ids[k]`."""

    ids: tuple[int, ...]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.names) or len(set(self.ids)) != len(self.ids) or not self.ids:
            raise ValueError(
                "Categories must hold at least one class, each with one name and an id of its own, got "
                f"ids {self.ids}, names {self.names}"
            )

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class GroundTruth:
    """A dataset's annotations as the evaluators get them: COCO's terms, in arrays, without the file's oddities.

    The one structure of the package that keeps COCO's xywh boxes and category ids, because the metric is defined on
    the published numbers, bit for bit.
    """

    categories: Categories
    image_ids: NDArray[np.int64]
    """(N,) every image that counts, also those without objects."""
    ann_image_ids: NDArray[np.int64]
    """(G,)"""
    ann_category_ids: NDArray[np.int64]
    """(G,)"""
    boxes: NDArray[np.float64]
    """(G, 4) xywh in pixels of the original image, as published (not clipped)."""
    areas: NDArray[np.float64]
    """(G,) square pixels, as published; width times height where the file has none."""
    iscrowd: NDArray[np.bool_]
    """(G,)"""
