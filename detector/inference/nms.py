"""Non-maximum suppression of a whole batch at once, on a GPU, without waiting for it.

torchvision's `batched_nms` (used elsewhere) takes one image at a time and gives as many boxes as are left, so that the
processor has to wait for the number. Here every image fills the same number of places, and the work stops at the last of them:
a greedy suppression that is to give 100 boxes has to look for the best remaining one 100 times, however many there are.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from detector.boxes import pairwise_iou


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, *, nms_thresh: float, limit: int) -> Tensor:
    """The positions of the boxes that greedy suppression within each class keeps.

    Args:
        boxes: (B, N, 4) xyxy, float32, each image's in descending order of score; on a GPU.
        scores: (B, N) float32; what is no candidate scores -inf.
        labels: (B, N) int64.
        nms_thresh: overlap with a kept one of the same class above which a box goes.
        limit: at most so many are kept of each image.

    Returns:
        (B, limit) int64, best first, then -1.
    """
    if boxes.is_cuda and has_triton(boxes.device):
        from detector.inference.nms_kernel import suppress_in_one_kernel

        return suppress_in_one_kernel(boxes, scores, labels, nms_thresh=nms_thresh, limit=limit)
    left = scores > -torch.inf
    place = torch.arange(scores.shape[1], device=scores.device)
    kept = torch.full((len(scores), limit), -1, device=scores.device)
    for number in range(limit if scores.shape[1] else 0):
        best = left.int().argmax(dim=1, keepdim=True)
        kept[:, number] = torch.where(left.any(dim=1), best[:, 0], -1)
        overlap = pairwise_iou(boxes.gather(1, best[..., None].expand(-1, -1, 4)), boxes)[:, 0]
        left &= ~((labels == labels.gather(1, best)) & (overlap > nms_thresh)) & (place != best)
    return kept


@cache
def has_triton(device: torch.device) -> bool:
    """Whether this GPU can be given kernels of our own: Triton comes with torch on Linux, and knows NVIDIA's GPUs from Volta on."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
