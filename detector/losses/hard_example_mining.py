"""Choosing the examples that count: what the focal loss was compared with (Lin et al. 2017, section 5.1, table 1d).

All of them work on labels: an anchor that is not chosen becomes one that is ignored, and the loss of the others is plain
cross entropy. Losses of any origin will do; they are chosen among by rows, an image's or, as `losses[None]`, a whole batch's, and
`chosen < -1` is the mask that a loss takes as `ignore`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

IGNORED = -2


def hardest_fraction(losses: Tensor, labels: Tensor, *, fraction: float) -> Tensor:
    """Bootstrapping (Sung and Poggio 1994): of every image the anchors with the highest loss, positive or not.

    Args:
        losses: (B, A) loss of every anchor, or of any other example.
        labels: (B, A) int64: a class from 0 on, -1 for background, below -1 for ignored.
        fraction: of the anchors that are not ignored, at least one.

    Returns:
        (B, A) int64 labels; -2, ignored, for all that were not chosen.
    """
    chosen = torch.full_like(labels, IGNORED)
    for image, (loss, label) in enumerate(zip(losses, labels, strict=True)):
        valid = torch.nonzero(label >= -1).squeeze(1)
        count = max(1, round(fraction * len(valid))) if len(valid) else 0
        best = valid[loss[valid].topk(count).indices]
        chosen[image, best] = label[best]
    return chosen


def online_hard_examples(
    losses: Tensor,
    labels: Tensor,
    boxes: Tensor,
    *,
    batch_size: int,
    nms_thresh: float,
    negatives_per_positive: int | None = None,
) -> Tensor:
    """OHEM (Shrivastava et al. 2016) over dense anchors, as the paper's section 5.1 describes it.

    The anchors of an image are thinned by non-maximum suppression, their loss being their score, and the `batch_size`
    hardest are kept; with `negatives_per_positive` (the paper's "1:3") the hardest positives and at most so many times as
    many negatives.

    Args:
        losses: (B, A) loss of every anchor.
        labels: (B, A) as in `hardest_fraction`.
        boxes: (B, A, 4) xyxy, what each anchor predicts.
        batch_size: anchors kept of an image.
        nms_thresh: overlap with a harder anchor that removes one.
        negatives_per_positive: None for no ratio.

    Returns:
        (B, A) int64 labels; -2, ignored, for all that were not chosen.
    """
    chosen = torch.full_like(labels, IGNORED)
    for image, (loss, label, box) in enumerate(zip(losses, labels, boxes, strict=True)):
        valid = torch.nonzero(label >= -1).squeeze(1)
        # Suppression of all of 100,000 anchors would take seconds; beyond so many times the batch, none is kept anyway.
        valid = valid[loss[valid].topk(min(len(valid), 50 * batch_size)).indices]
        if negatives_per_positive is not None:  # rare positives are not to be lost among the hardest of all
            valid = torch.unique(torch.cat([valid, torch.nonzero(label >= 0).squeeze(1)]))
        hard = valid[nms(box[valid].float(), loss[valid].float(), nms_thresh)]  # hardest first
        if negatives_per_positive is not None:
            share = batch_size // (1 + negatives_per_positive)
            positive = hard[label[hard] >= 0][:share]
            limit = min(batch_size - len(positive), negatives_per_positive * max(1, len(positive)))
            hard = torch.cat([positive, hard[label[hard] < 0][:limit]])
        hard = hard[:batch_size]
        chosen[image, hard] = label[hard]
    return chosen
