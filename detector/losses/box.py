"""Losses between a predicted and a true box."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from detector.boxes import area, decode, encode

BoxLoss = Literal["smooth_l1", "l1", "giou"]


def box_loss(deltas: Tensor, anchors: Tensor, boxes: Tensor, *, kind: BoxLoss, beta: float = 1 / 9) -> Tensor:
    """Loss of each anchor's box, in fp32.

    Args:
        deltas: (..., 4) as the box subnet gives them.
        anchors: (..., 4) xyxy.
        boxes: (..., 4) xyxy, the objects they should become; of positive size.
        kind: smooth_l1 (Girshick 2015, equation 3, with the corner at `beta`) and l1 compare encoded boxes, summed
            over the four numbers; giou (Rezatofighi et al. 2019) compares decoded ones.
        beta: where smooth L1 turns from square to straight, in encoded units.

    Returns:
        (...).
    """
    deltas = deltas.float()
    if kind == "giou":
        return _giou_loss(decode(deltas, anchors), boxes)
    wanted = encode(boxes, anchors)
    if kind == "l1":
        return F.l1_loss(deltas, wanted, reduction="none").sum(dim=-1)
    return F.smooth_l1_loss(deltas, wanted, reduction="none", beta=beta).sum(dim=-1)


def _giou_loss(found: Tensor, wanted: Tensor, *, eps: float = 1e-7) -> Tensor:
    """1 - GIoU of each pair (Rezatofighi et al. 2019, algorithm 2). torchvision's function picks the pairs that overlap,
    for which a GPU has to be waited for."""
    shared = torch.minimum(found[..., 2:], wanted[..., 2:]) - torch.maximum(found[..., :2], wanted[..., :2])
    hull = torch.maximum(found[..., 2:], wanted[..., 2:]) - torch.minimum(found[..., :2], wanted[..., :2])
    inter = shared[..., 0].clamp(min=0) * shared[..., 1].clamp(min=0)
    around = hull[..., 0] * hull[..., 1]
    union = area(found) + area(wanted) - inter
    return 1 - inter / (union + eps) + (around - union) / (around + eps)


def matched_boxes(anchors: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
    """The object of every anchor; for anchors without one the anchor itself, which any loss takes in its stride.

    anchors (A, 4), boxes (B, M, 4), index (B, A) with negatives for "none": returns (B, A, 4).
    """
    boxes = F.pad(boxes, (0, 0, 0, 1))  # a batch without any object still has a row to gather from
    gathered = boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))
    return torch.where((index >= 0)[..., None], gathered, anchors)
