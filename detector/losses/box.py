"""Losses between predicted and ground-truth boxes."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from detector.boxes import area, decode, encode
from detector.config import BoxLossKind


def box_loss(deltas: Tensor, anchors: Tensor, boxes: Tensor, *, kind: BoxLossKind, beta: float = 1 / 9) -> Tensor:
    """Compute the box loss of each anchor, in fp32.

    Args:
        deltas: (..., 4) encoded boxes, the output of the box subnet; any floating type.
        anchors: (..., 4) xyxy.
        boxes: (..., 4) xyxy, the ground-truth box of each anchor, of positive size.
        kind: smooth_l1 (Girshick 2015, equation 3, with the corner at `beta`) and l1 compare encoded boxes, summed over
            the four numbers; giou is 1 - GIoU of the decoded boxes (Rezatofighi et al. 2019).
        beta: distance in encoded units where smooth L1 changes from quadratic to linear.

    Returns:
        (...) fp32.

    Example:
        >>> anchors = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
        >>> boxes = torch.tensor([[5.0, 0.0, 15.0, 10.0]])  # half an anchor to the right
        >>> box_loss(torch.zeros(1, 4), anchors, boxes, kind="l1")
        tensor([0.5000])
        >>> box_loss(torch.zeros(1, 4), anchors, boxes, kind="giou")
        tensor([0.6667])
    """
    deltas = deltas.float()
    if kind == "giou":
        return _giou_loss(decode(deltas, anchors), boxes)
    encoded = encode(boxes, anchors)
    if kind == "l1":
        return F.l1_loss(deltas, encoded, reduction="none").sum(dim=-1)
    return F.smooth_l1_loss(deltas, encoded, reduction="none", beta=beta).sum(dim=-1)


def _giou_loss(predicted: Tensor, boxes: Tensor, *, eps: float = 1e-7) -> Tensor:
    """Return 1 - GIoU of each pair of boxes (..., 4) (Rezatofighi et al. 2019, algorithm 2).

    torchvision's function selects the pairs that overlap, which makes the CPU wait for the GPU.
    """
    shared = torch.minimum(predicted[..., 2:], boxes[..., 2:]) - torch.maximum(predicted[..., :2], boxes[..., :2])
    hull = torch.maximum(predicted[..., 2:], boxes[..., 2:]) - torch.minimum(predicted[..., :2], boxes[..., :2])
    inter = shared[..., 0].clamp(min=0) * shared[..., 1].clamp(min=0)
    hull_area = hull[..., 0] * hull[..., 1]
    union = area(predicted) + area(boxes) - inter
    return 1 - inter / (union + eps) + (hull_area - union) / (hull_area + eps)


def matched_boxes(anchors: Tensor, boxes: Tensor, index: Tensor) -> Tensor:
    """Return the ground-truth box of every anchor, or the anchor itself (of positive size, so safe in any box loss).

    Args:
        anchors: (A, 4).
        boxes: (B, M, 4) ground-truth boxes of a batch.
        index: (B, A) int64 position of each anchor's box among the M; negative for none.

    Returns:
        (B, A, 4).
    """
    boxes = F.pad(boxes, (0, 0, 0, 1))  # one row to gather from even if the batch has no object
    gathered = boxes.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, 4))
    return torch.where((index >= 0)[..., None], gathered, anchors)
