"""From the network's outputs to a short list of detections per image."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from detector.boxes import decode
from detector.config import Clip
from detector.inference.nms import class_nms, suppress
from detector.structures import Detections, HeadOutputs

BLOCK = 1024
"""Entries of a level whose maximum is computed first on a CPU."""


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
    clip: Clip = "before_nms",
    drop_empty: bool = False,
    bound_shrinking: bool = False,
) -> list[Detections]:
    """Select the best candidates per level, decode and clip their boxes, and apply NMS within each class.

    Lin et al. 2017, section 4, "Inference".

    Args:
        outputs: the network's outputs.
        image_sizes: (B, 2) height and width of the resized images without padding.
        original_sizes: (B, 2) sizes to scale the boxes to; None leaves them in pixels of the network input.
        score_thresh: candidates must score above this.
        topk_candidates: maximum per image and level, a candidate being an anchor and a class.
        nms_thresh: IoU with a better candidate of the same class above which a candidate is suppressed.
        detections_per_img: maximum number of detections returned per image.
        clip: whether boxes are clipped to the image before or after NMS.
        drop_empty: drop boxes that lie entirely outside the image (before NMS, if they are clipped then).
        bound_shrinking: see `boxes.decode`.

    Returns:
        One per image, in main memory.
    """
    if outputs.anchors.device.type != "cpu":
        batched = postprocess_batched(
            outputs, image_sizes.to(outputs.anchors.device, non_blocking=True), score_thresh=score_thresh,
            topk_candidates=topk_candidates, nms_thresh=nms_thresh, detections_per_img=detections_per_img, clip=clip,
            drop_empty=drop_empty, bound_shrinking=bound_shrinking,
        )  # fmt: skip
        return batched.unpack(image_sizes, original_sizes)
    results = []
    level_logits = [outputs.level_score_logits(level) for level in range(len(outputs.cls_logits))]
    for image, size in enumerate(image_sizes):
        boxes, scores, labels = [], [], []
        for logits, deltas, anchors in zip(level_logits, outputs.box_deltas, outputs.level_anchors(), strict=True):
            score, entry = _best_candidates(logits[image], score_thresh, topk_candidates)
            anchor = torch.div(entry, logits.shape[-1], rounding_mode="floor")
            boxes.append(decode(deltas[image, anchor].float(), anchors[anchor], bound_shrinking=bound_shrinking))
            scores.append(score)
            labels.append(entry % logits.shape[-1])
        found = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
        if clip == "before_nms":
            found = _clip_and_drop(*found, size, drop_empty=drop_empty)
        keep = class_nms(*found, nms_thresh=nms_thresh)[:detections_per_img]
        box, score, label = (x[keep] for x in found)
        if clip == "after_nms":
            box, score, label = _clip_and_drop(box, score, label, size, drop_empty=drop_empty)
        if original_sizes is not None:
            box = _scale(box, size, original_sizes[image])
        results.append(Detections(box, score, label))
    return results


class BatchedDetections(NamedTuple):
    """Detections of a batch on a GPU, padded to D per image, highest score first."""

    boxes: Tensor
    """(B, D, 4) float32 xyxy in pixels of the network input."""
    scores: Tensor
    """(B, D) float32; -1 where padded."""
    labels: Tensor
    """(B, D) int64"""

    def unpack(self, image_sizes: Tensor, original_sizes: Tensor | None) -> list[Detections]:
        """Copy to main memory (a sync point); sizes as in `postprocess`, in main memory."""
        boxes, scores, labels = (part.cpu() for part in self)
        results = []
        for image, size in enumerate(image_sizes):
            valid = scores[image] >= 0
            box = boxes[image, valid]
            if original_sizes is not None:
                box = _scale(box, size, original_sizes[image])
            results.append(Detections(box, scores[image, valid], labels[image, valid]))
        return results


def postprocess_batched(
    outputs: HeadOutputs,
    image_sizes: Tensor,
    *,
    score_thresh: float,
    topk_candidates: int,
    nms_thresh: float,
    detections_per_img: int,
    clip: Clip = "before_nms",
    drop_empty: bool = False,
    bound_shrinking: bool = False,
) -> BatchedDetections:
    """Post-process all images of a batch together, in shapes that do not depend on the values.

    So nothing waits for the GPU, and a CUDA graph can capture it. Arguments as in `postprocess`, `image_sizes` on the
    device.
    """
    boxes, scores, labels = _batched_candidates(outputs, topk_candidates, bound_shrinking=bound_shrinking)
    valid = scores > score_thresh
    if clip == "before_nms":
        boxes, not_empty = _clip(boxes, image_sizes[:, None])
        valid = valid & not_empty if drop_empty else valid
    scores, order = torch.where(valid, scores, -torch.inf).sort(dim=1, descending=True, stable=True)
    boxes, labels = boxes.gather(1, order[..., None].expand(-1, -1, 4)), labels.gather(1, order)
    kept = suppress(boxes, scores, labels, nms_thresh=nms_thresh, limit=detections_per_img)
    position = kept.clamp(min=0)
    boxes, labels = boxes.gather(1, position[..., None].expand(-1, -1, 4)), labels.gather(1, position)
    valid = kept >= 0
    if clip == "after_nms":
        boxes, not_empty = _clip(boxes, image_sizes[:, None])
        valid = valid & not_empty if drop_empty else valid
    return BatchedDetections(boxes, torch.where(valid, scores.gather(1, position), -1.0), labels)


def _batched_candidates(outputs: HeadOutputs, topk: int, *, bound_shrinking: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The best entries of every level, whatever their score: boxes (B, N, 4), scores (B, N), labels (B, N).

    N is the sum over the levels of the lesser of `topk` and their entries.
    """
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for level, (deltas, anchors) in enumerate(zip(outputs.box_deltas, outputs.level_anchors(), strict=True)):
        logits = outputs.level_score_logits(level)
        _, count, classes = logits.shape
        # The best entries belong to the anchors with the best maxima, which leaves far fewer entries to sort.
        row = logits.amax(dim=2).topk(min(topk, count), dim=1, sorted=False).indices
        of_rows = logits.gather(1, row[..., None].expand(-1, -1, classes)).float().flatten(1)
        logit, entry = of_rows.topk(min(topk, of_rows.shape[1]), dim=1)
        anchor = row.gather(1, torch.div(entry, classes, rounding_mode="floor"))
        best_deltas = deltas.gather(1, anchor[..., None].expand(-1, -1, deltas.shape[2])).float()
        box = decode(best_deltas, anchors[anchor], bound_shrinking=bound_shrinking)
        found.append((box, torch.sigmoid(logit), entry % classes))
    boxes, scores, labels = (torch.cat(part, dim=1) for part in zip(*found, strict=True))
    return boxes, scores, labels


def _clip(boxes: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """(..., 4) boxes clipped to images of `size` (..., 2), and which of them are not empty: (...) bool."""
    limit = size.flip(-1).repeat(*[1] * (size.dim() - 1), 2).to(boxes.dtype)
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    return boxes, (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)


def _clip_and_drop(
    box: Tensor, score: Tensor, label: Tensor, size: Tensor, *, drop_empty: bool
) -> tuple[Tensor, Tensor, Tensor]:
    box, not_empty = _clip(box, size)
    return (box[not_empty], score[not_empty], label[not_empty]) if drop_empty else (box, score, label)


def _scale(boxes: Tensor, size: Tensor, original_size: Tensor) -> Tensor:
    """(N, 4) boxes in pixels of an image of `size` (2,), in pixels of the image at its original size."""
    (height, width), (original_height, original_width) = size.tolist(), original_size.tolist()
    return boxes * boxes.new_tensor([original_width / width, original_height / height] * 2)


def _best_candidates(logits: Tensor, score_thresh: float, topk: int) -> tuple[Tensor, Tensor]:
    """Scores and flat positions of the best entries of (A, K) logits that score above the threshold, best first."""
    flat = logits.flatten()
    # The logits are compared first, with a slightly lower threshold, so that few entries need a sigmoid.
    entry = _above(flat, _logit(score_thresh) - 1e-4)
    score = torch.sigmoid(flat[entry].float())
    above = score > score_thresh
    entry, score = entry[above], score[above]
    score, order = score.topk(min(topk, len(score)))
    return score, entry[order]


def _above(flat: Tensor, threshold: float) -> Tensor:
    """Positions of the entries above a threshold, in order.

    Few blocks contain any, and on a CPU the maxima of all blocks take a tenth of the time of comparing and listing
    every entry.
    """
    in_blocks = len(flat) // BLOCK * BLOCK
    blocks = flat[:in_blocks].view(-1, BLOCK)
    hit = torch.nonzero(~(blocks.amax(dim=1).float() <= threshold)).squeeze(1)  # not >: a NaN must not hide a block
    if len(hit) > len(blocks) / 4:
        return torch.nonzero(flat.float() > threshold).squeeze(1)
    block, position = torch.nonzero(blocks[hit].float() > threshold).unbind(1)
    rest = torch.nonzero(flat[in_blocks:].float() > threshold).squeeze(1)
    return torch.cat([hit[block] * BLOCK + position, rest + in_blocks])


def _logit(p: float) -> float:
    if p <= 0:
        return -math.inf
    return math.log(p / (1 - p)) if p < 1 else math.inf
