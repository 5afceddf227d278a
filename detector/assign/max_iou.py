"""Assignment by the highest IoU of each anchor (Lin et al. 2017, section 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from detector.assign.assignment import BACKGROUND, IGNORED, Assignment
from detector.boxes import area, pairwise_intersection, pairwise_iou
from detector.structures import HeadOutputs, Targets

MAX_PAIRS = 4_000_000
"""Anchor-box pairs per block, 16 times as many on a GPU: bounds the memory (4 bytes a pair and temporary) whatever the
number of objects."""


@dataclass(frozen=True)
class MaxIoUAssigner:
    """The paper's rule: positive from `fg_iou_thresh` on, background below `bg_iou_thresh`, ignored in between.

    Args:
        fg_iou_thresh: IoU with an object from which an anchor is positive. Ties go to the object listed first.
        bg_iou_thresh: IoU below which an anchor is background.
        low_quality_matches: also make the anchors tied for the highest IoU of some object positive, whatever that IoU
            is, for the object they themselves overlap most (torchvision's rule). Unlike in torchvision, an object that
            overlaps no anchor at all gets none, rather than all anchors it does not touch.
        ignore_regions: ignore anchors that are not positive and lie at least half (of their own area) in an ignore box.
    """

    fg_iou_thresh: float = 0.5
    bg_iou_thresh: float = 0.4
    low_quality_matches: bool = False
    ignore_regions: bool = True
    needs_outputs = False

    @torch.no_grad()
    def __call__(
        self,
        anchors: Tensor,
        targets: Targets,
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        outputs: HeadOutputs | None = None,  # noqa: ARG002 (part of the interface)
    ) -> Assignment:
        """Assign anchors to objects; see `Assigner`.

        The memory does not grow with the number of objects: they are processed in blocks or, where the grids are known
        on a CPU, only the few anchors around each object are compared with it, with a bit-identical result.
        """
        thresholds = self.fg_iou_thresh, self.bg_iou_thresh, self.low_quality_matches
        on_grid = grids is not None and anchors.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_grid and grids is not None and self.bg_iou_thresh > 0:
            matched = _windows(anchors, targets, grids, *thresholds)
        else:
            matched = _all_pairs(anchors, targets, *thresholds)
        if self.ignore_regions and targets.ignore_boxes.shape[1]:
            own_area = area(anchors)
            for region in targets.ignore_boxes.unbind(dim=1):
                if region.device.type == "cpu" and not torch.compiler.is_compiling() and not region.any():
                    continue  # padding, which comes last
                inside = pairwise_intersection(region[:, None], anchors).squeeze(1) >= 0.5 * own_area
                matched = torch.where(inside & (matched == BACKGROUND), IGNORED, matched)
        return Assignment(matched, (matched >= 0).sum(dim=1))


def _all_pairs(
    anchors: Tensor, targets: Targets, fg_iou_thresh: float, bg_iou_thresh: float, low_quality_matches: bool
) -> Tensor:
    """Assign by comparing every anchor with every object: (B, A), without ignore regions."""
    batch, num_anchors = len(targets.boxes), len(anchors)
    best_iou = anchors.new_full((batch, num_anchors), -1.0)
    best = torch.full((batch, num_anchors), 0, dtype=torch.int64, device=anchors.device)
    best_of_box = []
    step = max(1, MAX_PAIRS * (16 if anchors.is_cuda else 1) // max(1, batch * num_anchors))
    if torch.compiler.is_compiling() and not low_quality_matches:
        step = max(1, targets.boxes.shape[1])  # IoUs are consumed as they are computed and never stored
    blocks = range(0, targets.boxes.shape[1], step)
    for start in blocks:
        iou = _block_iou(anchors, targets, start, step)
        block_iou, block_best = iou.max(dim=1)
        better = block_iou > best_iou
        best_iou = torch.where(better, block_iou, best_iou)
        best = torch.where(better, block_best + start, best)
        best_of_box.append(iou.amax(dim=2))
    matched = torch.where(best_iou >= fg_iou_thresh, best, IGNORED)
    matched = torch.where(best_iou < bg_iou_thresh, BACKGROUND, matched)
    if low_quality_matches:
        # Compiled, an IoU is computed twice, in two kernels, which may round differently.
        nearly = 1 - 1e-6 if torch.compiler.is_compiling() else 1.0
        for start, highest in zip(blocks, best_of_box, strict=True):
            iou = _block_iou(anchors, targets, start, step)
            tied = (iou >= (highest * nearly)[:, :, None]) & (highest > 0)[:, :, None]
            matched = torch.where(tied.any(dim=1), best, matched)
    return matched


def _block_iou(anchors: Tensor, targets: Targets, start: int, step: int) -> Tensor:
    """(B, block, A) IoUs, -1 for padding, so that padding loses even against no overlap."""
    iou = pairwise_iou(targets.boxes[:, start : start + step], anchors)
    return torch.where(targets.labels[:, start : start + step, None] < 0, -1.0, iou)


# The anchors of one shape and level stand on a grid, so the overlap of each with a box is a product: of the overlap of
# the column's interval with the box's and that of the row's. The highest of either bound whether any anchor of the
# shape can reach a threshold, and which columns and rows can. What remains are small windows of anchors to compare one
# by one.

MAX_WINDOWS = 1_000_000
"""Anchors of a batch plus overlaps of its objects with rows and columns per block: more do not fit into the cache."""
SLACK = 1e-4
"""Relative margin by which windows are larger than exact arithmetic would need."""


class _Axis(NamedTuple):
    """The intervals of all columns (or rows), ordered by level, shape and position."""

    low: Tensor  # (L,)
    high: Tensor  # (L,)
    lengths: list[int]  # of each level's grid along the axis
    shapes: int  # anchors of a cell

    def overlaps(self, low: Tensor, high: Tensor) -> Tensor:
        """Overlap of (M,) intervals with all L: (M, L)."""
        return (torch.minimum(high[:, None], self.high) - torch.maximum(low[:, None], self.low)).clamp(min=0)

    def by_shape(self, overlaps: Tensor) -> list[Tensor]:
        """(M, L) to (M, shapes, length) of each level."""
        parts = torch.split(overlaps, [self.shapes * length for length in self.lengths], dim=1)
        return [p.view(len(p), self.shapes, n) for p, n in zip(parts, self.lengths, strict=True)]

    def reaching(self, overlaps: Tensor, least: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the first and number of each shape's intervals that overlap by at least `least` (M, S): (M, S) each.

        They are adjacent, because along a grid the overlap first grows and then falls.
        """
        levels = zip(self.by_shape(overlaps), torch.split(least, self.shapes, dim=1), strict=True)
        masks = [(overlap >= enough[..., None]).to(torch.uint8) for overlap, enough in levels]
        return torch.cat([m.argmax(dim=2) for m in masks], dim=1), torch.cat([m.sum(dim=2) for m in masks], dim=1)

    def starts(self) -> Tensor:
        """(S,) offset of each shape's first interval."""
        counts = torch.tensor(self.lengths).repeat_interleave(self.shapes)
        return counts.cumsum(0) - counts


def _axes(anchors: Tensor, grids: Sequence[tuple[int, int]]) -> tuple[_Axis, _Axis]:
    shapes = len(anchors) // sum(h * w for h, w in grids)
    levels = [
        level.view(h, w, shapes, 4)
        for level, (h, w) in zip(torch.split(anchors, [h * w * shapes for h, w in grids]), grids, strict=True)
    ]
    rows, columns = ([level.select(axis, 0) for level in levels] for axis in (1, 0))  # (H, shapes, 4), (W, shapes, 4)

    def intervals(parts: list[Tensor], corner: int) -> Tensor:
        return torch.cat([part[..., corner].T.flatten() for part in parts])

    return (
        _Axis(intervals(columns, 0), intervals(columns, 2), [w for _, w in grids], shapes),
        _Axis(intervals(rows, 1), intervals(rows, 3), [h for h, _ in grids], shapes),
    )


def _windows(
    anchors: Tensor,
    targets: Targets,
    grids: Sequence[tuple[int, int]],
    fg_iou_thresh: float,
    bg_iou_thresh: float,
    low_quality_matches: bool,
) -> Tensor:
    """The result of `_all_pairs`, (B, A), for the objects of all images together, or of half of the images at a
    time."""
    settings = (fg_iou_thresh, bg_iou_thresh, low_quality_matches)
    batch = len(targets.boxes)

    def halves() -> Tensor:
        parts = zip(*(torch.tensor_split(t, 2) for t in targets[:3]), strict=True)
        return torch.cat([_windows(anchors, Targets(*part), grids, *settings) for part in parts])

    image, number = torch.nonzero(targets.labels >= 0, as_tuple=True)
    matched = torch.full((batch * len(anchors),), BACKGROUND)
    if not len(image):
        return matched.view(batch, len(anchors))
    shapes = len(anchors) // sum(h * w for h, w in grids)
    if batch > 1 and len(matched) + len(image) * shapes * sum(h + w for h, w in grids) > MAX_WINDOWS:
        return halves()
    x_axis, y_axis = _axes(anchors, grids)
    cells = torch.tensor([h * w for h, w in grids])
    level = torch.arange(len(grids)).repeat_interleave(shapes)
    first_anchor = ((cells.cumsum(0) - cells) * shapes)[level] + torch.arange(shapes).repeat(len(grids))
    width = torch.tensor([w for _, w in grids])[level]
    x_start, y_start = x_axis.starts(), y_axis.starts()
    # The size of a shape is the same everywhere but for rounding, which SLACK covers.
    shape_area = (x_axis.high - x_axis.low)[x_start] * (y_axis.high - y_axis.low)[y_start]

    boxes = targets.boxes[image, number]
    box_area = area(boxes)
    x_overlap, y_overlap = x_axis.overlaps(boxes[:, 0], boxes[:, 2]), y_axis.overlaps(boxes[:, 1], boxes[:, 3])
    x_most = torch.cat([part.amax(dim=2) for part in x_axis.by_shape(x_overlap)], dim=1)
    y_most = torch.cat([part.amax(dim=2) for part in y_axis.by_shape(y_overlap)], dim=1)
    both = box_area[:, None] + shape_area
    most = x_most * y_most
    best_iou = most / (both - most)
    least_iou = torch.full_like(box_area, bg_iou_thresh)
    if low_quality_matches:
        least_iou = torch.minimum(least_iou, best_iou.amax(dim=1))
    least_iou = least_iou * (1 - SLACK)
    reached = (best_iou >= least_iou[:, None]) & (most > 0)
    # overlap / (both - overlap) >= least
    least = (least_iou / (1 + least_iou))[:, None] * both * (1 - SLACK)
    column, columns = x_axis.reaching(x_overlap, least / y_most)
    row, lines = y_axis.reaching(y_overlap, least / x_most)

    box, shape = torch.nonzero(reached, as_tuple=True)
    window = columns[box, shape] * lines[box, shape]
    if int(window.sum()) > MAX_PAIRS:
        if batch > 1:
            return halves()
        # large objects and a low threshold: windows save nothing
        objects = int(number.max()) + 1  # without the padding to other images
        alone = Targets(targets.boxes[:, :objects], targets.labels[:, :objects], targets.ignore_boxes)
        return _all_pairs(anchors, alone, *settings)
    pair = torch.repeat_interleave(torch.arange(len(box)), window)
    place = torch.arange(len(pair)) - (window.cumsum(0) - window)[pair]
    box, shape = box[pair], shape[pair]
    line = torch.div(place, columns[box, shape], rounding_mode="floor")
    x = column[box, shape] + place - line * columns[box, shape]
    y = row[box, shape] + line
    # position in `matched`, where the anchors of the images are concatenated
    anchor = image[box] * len(anchors) + first_anchor[shape] + (y * width[shape] + x) * shapes
    x, y = x + x_start[shape], y + y_start[shape]
    overlap = x_overlap[box, x] * y_overlap[box, y]
    own_area = (x_axis.high - x_axis.low)[x] * (y_axis.high - y_axis.low)[y]
    iou = overlap / (box_area[box] + own_area - overlap)

    best = torch.full(matched.shape, -1.0).scatter_reduce_(0, anchor, iou, "amax")
    won = iou == best[anchor]
    none = targets.labels.shape[1]
    object_ = torch.full_like(matched, none).scatter_reduce_(0, anchor[won], number[box[won]], "amin")
    matched[best >= bg_iou_thresh] = IGNORED
    positive = best >= fg_iou_thresh
    matched[positive] = object_[positive]
    if low_quality_matches:
        highest = torch.zeros(len(boxes)).scatter_reduce_(0, box, iou, "amax")
        tied = torch.unique(anchor[(iou == highest[box]) & (highest[box] > 0)])
        known = best[tied] >= bg_iou_thresh
        matched[tied[known]] = object_[tied[known]]
        # A low IoU may be the highest of its object and yet not of its anchor: compare these few with all objects.
        unknown = tied[~known]
        of_image = torch.div(unknown, len(anchors), rounding_mode="floor")
        for i in torch.unique(of_image).tolist():
            own = image == i
            for few in torch.split(unknown[of_image == i], max(1, MAX_PAIRS // int(own.sum()))):
                overlap = pairwise_iou(boxes[own], anchors[few - i * len(anchors)])
                matched[few] = number[own][overlap.argmax(dim=0)]
    return matched.view(batch, len(anchors))
