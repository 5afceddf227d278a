"""The suppression of `detector.nms` as one Triton kernel for a batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def suppress_in_one_kernel(boxes: Tensor, scores: Tensor, labels: Tensor, *, nms_thresh: float, limit: int) -> Tensor:
    """As `nms.suppress`."""
    batch, count = scores.shape
    kept = torch.full((batch, limit), -1, dtype=torch.int64, device=boxes.device)
    if count and batch:
        block = max(128, triton.next_power_of_2(count))
        _suppress[(batch,)](
            boxes.contiguous(), scores.contiguous(), labels.contiguous(), kept, count, nms_thresh,
            LIMIT=limit, BLOCK=block, num_warps=min(16, max(4, block // 256)),
            enable_fp_fusion=False,  # products are rounded as on a CPU
        )  # fmt: skip
    return kept


@triton.jit  # type: ignore[untyped-decorator]
def _suppress(boxes, scores, labels, kept, count, nms_thresh, LIMIT: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
    """One program an image: all boxes stay in registers."""
    image = tl.program_id(0)
    place = tl.arange(0, BLOCK)
    exists = place < count
    corner = boxes + (image * count + place) * 4
    left = tl.load(corner, mask=exists, other=0.0)
    top = tl.load(corner + 1, mask=exists, other=0.0)
    right = tl.load(corner + 2, mask=exists, other=0.0)
    bottom = tl.load(corner + 3, mask=exists, other=0.0)
    label = tl.load(labels + image * count + place, mask=exists, other=-1)
    score = tl.load(scores + image * count + place, mask=exists, other=float("-inf"))
    area = (right - left) * (bottom - top)
    candidate = score > float("-inf")
    best = tl.min(tl.where(candidate, place, BLOCK))
    number = 0
    while (number < LIMIT) & (best < count):
        tl.store(kept + image * LIMIT + number, best.to(tl.int64))
        own = boxes + (image * count + best) * 4
        own_left, own_top, own_right, own_bottom = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
        own_label = tl.load(labels + image * count + best)
        width = tl.maximum(tl.minimum(right, own_right) - tl.maximum(left, own_left), 0.0)
        height = tl.maximum(tl.minimum(bottom, own_bottom) - tl.maximum(top, own_top), 0.0)
        inter = width * height
        union = area + (own_right - own_left) * (own_bottom - own_top) - inter
        gone = (label == own_label) & (inter > nms_thresh * union)
        candidate = candidate & (place != best) & ~gone
        best = tl.min(tl.where(candidate, place, BLOCK))
        number += 1
