"""From what the network says about every anchor to a short list of objects per image."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import batched_nms, clip_boxes_to_image

from detector.boxes import decode
from detector.inference.nms import suppress
from detector.structures import Detections, HeadOutputs

BLOCK = 1024
"""Entries of a level looked at together on a CPU."""


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

    Returns:
        One per image, in main memory.
    """
    if outputs.anchors.is_cuda:
        places = best_of_batch(
            outputs, image_sizes.to(outputs.anchors.device, non_blocking=True), score_thresh=score_thresh, topk_candidates=topk_candidates, nms_thresh=nms_thresh,
            detections_per_img=detections_per_img, clip=clip, drop_empty=drop_empty, bound_shrinking=bound_shrinking,
        )  # fmt: skip
        return as_detections(places, image_sizes, original_sizes)
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


class Places(NamedTuple):
    """Detections of a batch on a GPU, as many places for each image, best first."""

    boxes: Tensor
    """(B, D, 4) float32 xyxy in pixels of the network input."""
    scores: Tensor
    """(B, D) float32; -1 in empty places, which come last."""
    labels: Tensor
    """(B, D) int64"""


def best_of_batch(
    outputs: HeadOutputs,
    image_sizes: Tensor,
    *,
    score_thresh: float,
    topk_candidates: int,
    nms_thresh: float,
    detections_per_img: int,
    clip: Literal["before_nms", "after_nms"],
    drop_empty: bool,
    bound_shrinking: bool,
) -> Places:
    """What `postprocess` computes on a GPU: the whole batch at once, in shapes that do not depend on what is found, so that
    nothing waits for the GPU and it can be captured in a graph. Arguments as there, `image_sizes` on the device."""
    boxes, scores, labels = batch_candidates(outputs, topk_candidates, bound_shrinking=bound_shrinking)
    live = scores > score_thresh
    if clip == "before_nms":
        boxes, whole = _inside(boxes, image_sizes)
        live = live & whole if drop_empty else live
    scores, order = torch.where(live, scores, -torch.inf).sort(dim=1, descending=True, stable=True)
    boxes, labels = boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)
    kept = suppress(boxes, scores, labels, nms_thresh=nms_thresh, limit=detections_per_img)
    place = kept.clamp(min=0)
    boxes, labels = boxes.gather(1, place[..., None].expand(-1, -1, 4)), labels.gather(1, place)
    live = kept >= 0
    if clip == "after_nms":
        boxes, whole = _inside(boxes, image_sizes)
        live = live & whole if drop_empty else live
    return Places(boxes, torch.where(live, scores.gather(1, place), -1.0), labels)


def batch_candidates(
    outputs: HeadOutputs, topk: int, *, bound_shrinking: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The best entries of every level, whatever they score.

    Returns:
        boxes (B, N, 4), scores (B, N), labels (B, N); N: the sum over the levels of the lesser of `topk` and its entries.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    level_anchors = torch.split(outputs.anchors, [deltas.shape[1] for deltas in outputs.box_deltas])
    for logits, deltas, anchors in zip(outputs.cls_logits, outputs.box_deltas, level_anchors, strict=True):
        if outputs.activation == "softmax":
            logits = one_against_all(logits)
        _, count, classes = logits.shape
        # The best entries all lie with the anchors whose own best are the best: far fewer to sort.
        row = logits.amax(dim=2).topk(min(topk, count), dim=1, sorted=False).indices
        of_rows = logits.gather(1, row[..., None].expand(-1, -1, classes)).float().flatten(1)
        logit, entry = of_rows.topk(min(topk, of_rows.shape[1]), dim=1)
        anchor = row.gather(1, torch.div(entry, classes, rounding_mode="floor"))
        box = decode(
            deltas.gather(1, anchor[..., None].expand(-1, -1, 4)).float(), anchors[anchor],
            bound_shrinking=bound_shrinking,
        )  # fmt: skip
        found.append((box, torch.sigmoid(logit), entry % classes))
    boxes, scores, labels = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
    return boxes, scores, labels


def as_detections(places: Places, image_sizes: Tensor, original_sizes: Tensor | None) -> list[Detections]:
    """Wait for a batch and unpack it; sizes as in `postprocess`, in main memory."""
    boxes, scores, labels = (part.cpu() for part in places)
    results = []
    for i, (height, width) in enumerate(image_sizes.tolist()):
        live = scores[i] >= 0
        box = boxes[i, live]
        if original_sizes is not None:
            box = box * box.new_tensor([original_sizes[i, 1] / width, original_sizes[i, 0] / height] * 2)
        results.append(Detections(box, scores[i, live], labels[i, live]))
    return results


def _inside(boxes: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """(B, N, 4) boxes cut off at the borders of their images of `sizes` (B, 2), and which have anything left."""
    limit = sizes.flip(1).repeat(1, 2)[:, None].to(boxes.dtype)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    return boxes, (boxes[..., 2:] > boxes[..., :2]).all(dim=2)


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
    flat = logits.flatten()
    # The threshold is applied to the logits first, a hair low, so that few entries need a sigmoid.
    entry = _above(flat, _logit(score_thresh) - 1e-4)
    score = torch.sigmoid(flat[entry].float())
    above = score > score_thresh
    entry, score = entry[above], score[above]
    score, order = score.topk(min(topk, len(score)))
    return score, entry[order]


def _above(flat: Tensor, threshold: float) -> Tensor:
    """Positions of the entries above a threshold, in order.

    Blocks are looked at first, of which few hold any: on a CPU their maxima take a tenth of the time that comparing and
    listing every entry does.
    """
    whole = len(flat) // BLOCK * BLOCK
    blocks = flat[:whole].view(-1, BLOCK)
    hot = torch.nonzero(~(blocks.amax(dim=1).float() <= threshold)).squeeze(1)  # a NaN hides none of its neighbours
    if len(hot) > len(blocks) / 4:
        return torch.nonzero(flat.float() > threshold).squeeze(1)
    block, place = torch.nonzero(blocks[hot].float() > threshold).unbind(1)
    rest = torch.nonzero(flat[whole:].float() > threshold).squeeze(1)
    return torch.cat([hot[block] * BLOCK + place, rest + whole])


def _logit(p: float) -> float:
    if p <= 0:
        return -math.inf
    return math.log(p / (1 - p)) if p < 1 else math.inf
