"""Non-maximum suppression within each class: of one image on a CPU, of a whole batch on a GPU."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.boxes import pairwise_iou


def class_nms(boxes: Tensor, scores: Tensor, labels: Tensor, *, nms_thresh: float) -> Tensor:
    """The positions of the boxes of one image that greedy suppression within each class keeps.

    Equals torchvision.ops.batched_nms, whose operator it uses.

    Args:
        boxes: (N, 4) xyxy, float32.
        scores: (N,) float32.
        labels: (N,) int64.
        nms_thresh: IoU with a kept box of the same class above which a box is suppressed.

    Returns:
        (n,) int64, highest score first.
    """
    nms = _torchvision_nms()
    if not len(boxes):
        return labels.new_empty(0)
    if len(boxes) <= 1000:  # all classes in one call, their boxes moved too far apart to overlap
        offsets = labels.to(boxes) * (boxes.max() + 1)
        kept: Tensor = nms(boxes + offsets[:, None], scores, nms_thresh)
        return kept
    keep = torch.zeros_like(scores, dtype=torch.bool)
    for label in torch.unique(labels):
        of_class = torch.nonzero(labels == label).squeeze(1)
        keep[of_class[nms(boxes[of_class], scores[of_class], nms_thresh)]] = True
    position = torch.nonzero(keep).squeeze(1)
    return position[scores[position].sort(descending=True).indices]


@cache
def _torchvision_nms() -> Any:
    """torchvision's operator, from its extension alone: importing the package takes longer than importing torch."""
    spec = find_spec("torchvision")
    if spec is not None and spec.origin is not None and not hasattr(torch.ops.torchvision, "nms"):
        for library in Path(spec.origin).parent.glob("_C*"):
            torch.ops.load_library(library)  # type: ignore[no-untyped-call]
    if not hasattr(torch.ops.torchvision, "nms"):
        import torchvision.ops  # noqa: F401 - the extension has another name, or an error that the package explains
    return torch.ops.torchvision.nms


def suppress(boxes: Tensor, scores: Tensor, labels: Tensor, *, nms_thresh: float, limit: int) -> Tensor:
    """The positions of the boxes of each image that greedy suppression within each class keeps.

    The result has a fixed size, so a GPU need not be synchronized, and the work ends with the last box kept: keeping
    100 boxes takes 100 searches for the best remaining one, however many candidates there are.

    Args:
        boxes: (B, N, 4) xyxy, float32, each image's in descending order of score.
        scores: (B, N) float32; -inf for boxes that are no candidates.
        labels: (B, N) int64.
        nms_thresh: IoU with a kept box of the same class above which a box is suppressed.
        limit: maximum number of boxes kept per image.

    Returns:
        (B, limit) int64, highest score first, padded with -1.
    """
    if boxes.is_cuda and has_triton(boxes.device):
        from detector.inference.nms_kernel import suppress_in_one_kernel

        return suppress_in_one_kernel(boxes, scores, labels, nms_thresh=nms_thresh, limit=limit)
    remaining = scores > -torch.inf
    position = torch.arange(scores.shape[1], device=scores.device)
    kept = torch.full((len(scores), limit), -1, device=scores.device)
    for number in range(limit if scores.shape[1] else 0):
        best = remaining.int().argmax(dim=1, keepdim=True)
        kept[:, number] = torch.where(remaining.any(dim=1), best[:, 0], -1)
        iou = pairwise_iou(boxes.gather(1, best[..., None].expand(-1, -1, 4)), boxes)[:, 0]
        remaining &= ~((labels == labels.gather(1, best)) & (iou > nms_thresh)) & (position != best)
    return kept


@cache
def has_triton(device: torch.device) -> bool:
    """Whether this GPU can run Triton kernels: torch includes Triton on Linux, for NVIDIA GPUs from Volta on."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)
