"""From what the network says about every anchor to a short list of objects per image."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from detector.boxes import decode
from detector.structures import Detections, HeadOutputs


@torch.no_grad()
def postprocess(
    outputs: HeadOutputs,
    image_sizes: Tensor,
    *,
    original_sizes: Tensor | None = None,
    score_thresh: float = 0.05,
    topk_candidates: int = 1000,
    nms_thresh: float = 0.5,
    detections_per_img: int = 100,
    clip: Literal["before_nms", "after_nms"] = "before_nms",
    drop_empty: bool = False,
    bound_shrinking: bool = False,
) -> list[Detections]:
    """Best candidates per level, decoded, clipped, thinned by non-maximum suppression within each class.

    Lin et al. 2017, section 4, "Inference".

    Args:
        outputs: of the network.
        image_sizes: (B, 2) height and width of the resized images without padding.
        original_sizes: (B, 2) size to scale the boxes to; None leaves them in pixels of the network input.
        score_thresh: candidates must score above this.
        topk_candidates: at most so many per image and level, a candidate being an anchor and a class.
        nms_thresh: overlap with a better one of the same class that removes a candidate.
        detections_per_img: at most so many are returned.
        clip: whether boxes are cut off at the picture's border before or after the suppression.
        drop_empty: leave out boxes of which nothing lies in the picture (before the suppression, if they are clipped then).
        bound_shrinking: see `boxes.decode`.
    """
    results = []
    sizes = image_sizes.tolist()
    originals = original_sizes.tolist() if original_sizes is not None else sizes
    level_logits = outputs.cls_logits
    if outputs.activation == "softmax":
        level_logits = tuple(one_against_all(logits) for logits in level_logits)
    level_anchors = torch.split(outputs.anchors, [deltas.shape[1] for deltas in outputs.box_deltas])
    for image, (size, original) in enumerate(zip(sizes, originals, strict=True)):
        boxes, scores, labels = [], [], []
        for logits, deltas, anchors in zip(level_logits, outputs.box_deltas, level_anchors, strict=True):
            score, entry = _best_candidates(logits[image], score_thresh, topk_candidates)
            anchor = torch.div(entry, logits.shape[-1], rounding_mode="floor")
            boxes.append(decode(deltas[image, anchor].float(), anchors[anchor], bound_shrinking=bound_shrinking))
            scores.append(score)
            labels.append(entry % logits.shape[-1])
        found = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        if clip == "before_nms":
            found = _clipped(*found, size, drop_empty)
        keep = batched_nms(*found, nms_thresh)[:detections_per_img]
        box, score, label = (x[keep] for x in found)
        if clip == "after_nms":
            box, score, label = _clipped(box, score, label, size, drop_empty)
        factors = box.new_tensor([original[1] / size[1], original[0] / size[0]] * 2)
        results.append(Detections(box * factors, score, label))
    return results


def one_against_all(logits: Tensor) -> Tensor:
    """(..., K + 1) logits of a softmax whose last class is the background, to the (..., K) logits whose sigmoids are the
    probabilities of the other classes."""
    log_p = torch.log_softmax(logits.float(), dim=-1)[..., :-1]
    return log_p - torch.log((-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny))


def _clipped(
    box: Tensor, score: Tensor, label: Tensor, size: tuple[int, int], drop_empty: bool
) -> tuple[Tensor, Tensor, Tensor]:
    box = clip_boxes_to_image(box, size)
    if not drop_empty:
        return box, score, label
    inside = (box[:, 2:] > box[:, :2]).all(dim=1)
    return box[inside], score[inside], label[inside]


def _best_candidates(logits: Tensor, score_thresh: float, topk: int) -> tuple[Tensor, Tensor]:
    """Scores and flat positions of the best entries of (A, K) logits that score above the threshold, best first."""
    flat = logits.float().flatten()
    # The threshold is applied to the logits first, a hair low, so that few entries need a sigmoid.
    entry = torch.nonzero(flat > _logit(score_thresh) - 1e-4).squeeze(1)
    score = torch.sigmoid(flat[entry])
    above = score > score_thresh
    entry, score = entry[above], score[above]
    score, order = score.topk(min(topk, len(score)))
    return score, entry[order]


def _logit(p: float) -> float:
    if p <= 0:
        return -math.inf
    return math.log(p / (1 - p)) if p < 1 else math.inf
