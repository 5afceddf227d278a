"""`nms.suppress` as one Triton kernel for a batch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def suppress_in_one_kernel(boxes: Tensor, scores: Tensor, labels: Tensor, *, nms_thresh: float, limit: int) -> Tensor:
    """See `nms.suppress`."""
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
    """One program per image, with all boxes in registers."""
    image = tl.program_id(0)
    position = tl.arange(0, BLOCK)
    exists = position < count
    corner = boxes + (image * count + position) * 4
    left = tl.load(corner, mask=exists, other=0.0)
    top = tl.load(corner + 1, mask=exists, other=0.0)
    right = tl.load(corner + 2, mask=exists, other=0.0)
    bottom = tl.load(corner + 3, mask=exists, other=0.0)
    label = tl.load(labels + image * count + position, mask=exists, other=-1)
    score = tl.load(scores + image * count + position, mask=exists, other=float("-inf"))
    area = (right - left) * (bottom - top)
    candidate = score > float("-inf")
    best = tl.min(tl.where(candidate, position, BLOCK))
    number = 0
    while (number < LIMIT) & (best < count):
        tl.store(kept + image * LIMIT + number, best.to(tl.int64))
        best_corner = boxes + (image * count + best) * 4
        best_left, best_top = tl.load(best_corner), tl.load(best_corner + 1)
        best_right, best_bottom = tl.load(best_corner + 2), tl.load(best_corner + 3)
        best_label = tl.load(labels + image * count + best)
        width = tl.maximum(tl.minimum(right, best_right) - tl.maximum(left, best_left), 0.0)
        height = tl.maximum(tl.minimum(bottom, best_bottom) - tl.maximum(top, best_top), 0.0)
        inter = width * height
        union = area + (best_right - best_left) * (best_bottom - best_top) - inter
        suppressed = (label == best_label) & (inter > nms_thresh * union)
        candidate = candidate & (position != best) & ~suppressed
        best = tl.min(tl.where(candidate, position, BLOCK))
        number += 1
