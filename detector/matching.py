"""Which object, background or nothing at all each anchor stands for (Lin et al. 2017, section 4)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from detector.boxes import area, pairwise_intersection, pairwise_iou
from detector.structures import Targets

BACKGROUND = -1
IGNORED = -2

PAIRS_AT_ONCE = 4_000_000
"""Anchor-box pairs looked at together: bounds the memory (some 16 MB a temporary) however many objects there are."""


class Matches(NamedTuple):
    """The result of matching a batch."""

    matched: Tensor
    """(B, A) int64: the object (position in Targets.boxes), or BACKGROUND, or IGNORED."""
    num_pos: Tensor
    """(B,) int64: positive anchors per image."""


@torch.no_grad()
def match_anchors(
    anchors: Tensor,
    targets: Targets,
    *,
    fg_iou_thresh: float,
    bg_iou_thresh: float,
    low_quality_matches: bool,
    ignore_regions: bool = True,
) -> Matches:
    """Match every anchor of every image by its best overlap.

    Objects are taken in blocks, so memory does not grow with their number. Ties go to the object listed first.

    Args:
        anchors: (A, 4).
        targets: padded as in `Targets`; padding never matches.
        fg_iou_thresh: positive from here on.
        bg_iou_thresh: background below; between the two ignored.
        low_quality_matches: anchors tied for the best overlap of some object are positive whatever that overlap is,
            for the object they themselves overlap best (torchvision's rule). Unlike torchvision, an object that
            overlaps no anchor at all matches none, rather than all anchors it does not touch.
        ignore_regions: an anchor that is not positive and has at least half its area in an ignore box is ignored.
    """
    batch, num_anchors = len(targets.boxes), len(anchors)
    best_iou = anchors.new_full((batch, num_anchors), -1.0)
    best = torch.full((batch, num_anchors), 0, dtype=torch.int64, device=anchors.device)
    best_of_box = []
    step = max(1, PAIRS_AT_ONCE // max(1, batch * num_anchors))
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
        for start, highest in zip(blocks, best_of_box, strict=True):
            iou = _block_iou(anchors, targets, start, step)
            tied = (iou == highest[:, :, None]) & (highest > 0)[:, :, None]
            matched = torch.where(tied.any(dim=1), best, matched)
    if ignore_regions and targets.ignore_boxes.shape[1]:
        own_area = area(anchors)
        for region in targets.ignore_boxes.unbind(dim=1):
            inside = pairwise_intersection(region[:, None], anchors).squeeze(1) >= 0.5 * own_area
            matched = torch.where(inside & (matched == BACKGROUND), IGNORED, matched)
    return Matches(matched, (matched >= 0).sum(dim=1))


def _block_iou(anchors: Tensor, targets: Targets, start: int, step: int) -> Tensor:
    """(B, block, A) overlaps, -1 for padding, so that padding loses even against no overlap."""
    iou = pairwise_iou(targets.boxes[:, start : start + step], anchors)
    return torch.where(targets.labels[:, start : start + step, None] < 0, -1.0, iou)
