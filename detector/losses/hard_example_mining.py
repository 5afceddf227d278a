"""Hard example mining, the baselines that the focal loss was compared with (Lin et al. 2017, section 5.1, table 1d).

Each function maps labels to labels in which anchors that were not selected are ignored; the loss of the others is plain
cross entropy. The losses to select by may be those of any examples: a row is an image, or, as `losses[None]`, a whole
batch. `selected < -1` is the `ignore` mask of a loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detector.assign.assignment import BACKGROUND, IGNORED


def hardest_fraction(losses: Tensor, labels: Tensor, *, fraction: float) -> Tensor:
    """Select the anchors of every image with the highest loss, positive or not: bootstrapping (Sung and Poggio 1994).

    Args:
        losses: (B, A) loss of every anchor, or of any other example.
        labels: (B, A) int64: a class from 0 on, -1 for background, below -1 for ignored.
        fraction: part of the anchors not ignored that is selected, 0..1; at least one anchor is.

    Returns:
        (B, A) int64 labels, with -2 (ignored) for anchors that were not selected.

    Example:
        >>> losses, labels = torch.tensor([[0.1, 2.0, 0.5, 9.0]]), torch.tensor([[-1, 3, -1, -2]])
        >>> hardest_fraction(losses, labels, fraction=1 / 3)
        tensor([[-2,  3, -2, -2]])
    """
    selected = torch.full_like(labels, IGNORED)
    for image, (loss, label) in enumerate(zip(losses, labels, strict=True)):
        valid = torch.nonzero(label >= BACKGROUND).squeeze(1)
        count = max(1, round(fraction * len(valid))) if len(valid) else 0
        hardest = valid[loss[valid].topk(count).indices]
        selected[image, hardest] = label[hardest]
    return selected


def online_hard_examples(
    losses: Tensor,
    labels: Tensor,
    boxes: Tensor,
    *,
    batch_size: int,
    nms_thresh: float,
    negatives_per_positive: int | None = None,
) -> Tensor:
    """Select the hardest anchors of every image that do not overlap a harder one: OHEM (Shrivastava et al. 2016).

    As Lin et al. 2017, section 5.1, apply it to dense anchors: non-maximum suppression with the loss as the score, then
    the `batch_size` hardest, or with a ratio (their "1:3") the hardest positives and a multiple of them in negatives.

    Args:
        losses: (B, A) loss of every anchor.
        labels: (B, A) int64: a class from 0 on, -1 for background, below -1 for ignored.
        boxes: (B, A, 4) xyxy, the predicted box of every anchor.
        batch_size: maximum number of anchors selected per image.
        nms_thresh: IoU with the box of a harder anchor above which an anchor is suppressed.
        negatives_per_positive: maximum number of negatives per selected positive; None for no ratio.

    Returns:
        (B, A) int64 labels, with -2 (ignored) for anchors that were not selected.

    Example:
        >>> boxes = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60]]])
        >>> losses, labels = torch.tensor([[3.0, 4.0, 2.0]]), torch.tensor([[-1, -1, 0]])
        >>> online_hard_examples(losses, labels, boxes, batch_size=2, nms_thresh=0.7)  # the second suppresses the first
        tensor([[-2, -1,  0]])
    """
    from torchvision.ops import nms  # loading torchvision takes long, and few runs use OHEM

    selected = torch.full_like(labels, IGNORED)
    for image, (loss, label, box) in enumerate(zip(losses, labels, boxes, strict=True)):
        valid = torch.nonzero(label >= BACKGROUND).squeeze(1)
        # suppression among 100,000 anchors would take seconds; the hardest 50 batches of them nearly always suffice
        valid = valid[loss[valid].topk(min(len(valid), 50 * batch_size)).indices]
        if negatives_per_positive is not None:  # positives are rare and may be missing among the hardest
            valid = torch.unique(torch.cat([valid, torch.nonzero(label >= 0).squeeze(1)]))
        hard = valid[nms(box[valid].float(), loss[valid].float(), nms_thresh)]  # hardest first
        if negatives_per_positive is not None:
            positive = hard[label[hard] >= 0][: batch_size // (1 + negatives_per_positive)]
            limit = min(batch_size - len(positive), negatives_per_positive * max(1, len(positive)))
            hard = torch.cat([positive, hard[label[hard] < 0][:limit]])
        hard = hard[:batch_size]
        selected[image, hard] = label[hard]
    return selected
