"""The self-check before training: ground truth must survive the whole pipeline unchanged."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detector.assign.assignment import Assignment
from detector.assign.max_iou import MaxIoUAssigner
from detector.boxes import encode, pairwise_iou
from detector.config import Config
from detector.datasets.coco import CocoDataset
from detector.errors import DatasetError, ImageError
from detector.evaluation.coco_metrics import evaluate
from detector.evaluation.coco_results import CocoResults, detections_to_results
from detector.evaluation.dataset_loop import loop_over_dataset
from detector.evaluation.evaluate import detect, select_images, too_many_missing
from detector.evaluation.validation_loss import ValidationLoss
from detector.inference.detector import Detector
from detector.inference.postprocess import postprocess
from detector.losses import RetinaNetLoss
from detector.models import RetinaNet
from detector.structures import Batch, HeadOutputs, Targets


class SelfCheckError(RuntimeError):
    """Ground-truth boxes did not survive the pipeline: a bug in the program, not a user error."""


def self_check(
    model: RetinaNet,
    loss: RetinaNetLoss,
    coco: CocoDataset,
    config: Config,
    *,
    device: torch.device,
) -> str:
    """Run two images through the whole pipeline before the first step, so that nothing in it can fail hours later.

    After the round trip the objects must score as high as the annotations themselves (an AP50 of 1, except for boxes
    that reach beyond their image or are ignored), and the untrained model must run through to an AP.

    Returns:
        A line for the log.

    Raises:
        SelfCheckError: the boxes did not survive the round trip.
        DatasetError: no image with objects can be read.
    """
    with_objects = np.nonzero(coco.num_objects)[0]
    candidates = with_objects if len(with_objects) else np.arange(len(coco))
    readable = (int(i) for i in candidates if config.data.on_error == "fail" or _is_readable(coco, int(i)))
    chosen = list(itertools.islice(readable, 2))
    if not chosen:
        raise DatasetError(f"{coco.annotations}: none of its images with objects can be read")
    image_ids = coco.image_ids[chosen]
    ground_truth = select_images(coco.ground_truth(), image_ids)
    max_dets = (1, 10, max(100, len(ground_truth.areas)))

    def ap50(results: CocoResults) -> float:
        return evaluate(ground_truth, results, engine=config.eval.engine, max_dets=max_dets).values["AP50"]

    expected = ap50(CocoResults.concatenate([_annotations_as_results(coco, i) for i in chosen]))
    # An assigner that needs a network's outputs has none here; the default one exercises the same geometry.
    assign = MaxIoUAssigner() if loss.assigner.needs_outputs else loss.assign
    reached = ap50(round_trip(model, assign, coco, config, chosen))
    if reached < expected - 0.01:
        raise SelfCheckError(
            f"boxes of images {image_ids.tolist()} must survive resizing, assignment, decoding and evaluation, got "
            f"AP50 {reached:.3f} instead of {expected:.3f}; this is a bug in the program or its anchors, please report "
            "it with the config"
        )
    watch = ValidationLoss(loss, device).add if config.eval.loss else None
    results, _ = detect(model, coco, config, device=device, indices=chosen, watch=watch)
    evaluate(ground_truth, results, engine=config.eval.engine, max_dets=config.eval.max_dets)
    best = f"highest score {results.scores.max():.3f}" if len(results) else "none above the score threshold"
    return (
        f"self-check passed on images {image_ids.tolist()}: ground-truth round trip AP50 {reached:.3f}; "
        f"initial model: {len(results)} detections ({best})"
    )


def round_trip(
    model: RetinaNet,
    assign: Callable[..., Assignment],
    coco: CocoDataset,
    config: Config,
    indices: Sequence[int] | None = None,
) -> CocoResults:
    """Pass ground truth through loading, assignment, encoding, decoding and un-resizing, as if a model had detected it.

    Non-maximum suppression is configured to remove nothing, because real objects may overlap arbitrarily.

    Raises:
        ImageError, DatasetError: an image cannot be read.
    """
    settings: dict[str, Any] = {
        "score_thresh": 0.5, "nms_thresh": 1.0, "topk_candidates": 10**6, "detections_per_img": 10**6,
    }  # fmt: skip
    results = []

    def convert_batch(_: Detector, loaded: Batch, batch: Batch) -> None:
        anchors = model.anchors_of(batch.images)
        assignment = assign(anchors, batch.targets, grids=model.grids_of(batch.images))
        outputs = perfect_outputs(anchors, batch.targets, assignment, len(coco.categories))
        all_detections = postprocess(outputs, batch.image_sizes, original_sizes=batch.original_sizes, **settings)
        for image_id, detections in zip(loaded.image_ids.tolist(), all_detections, strict=True):
            results.append(detections_to_results(image_id, detections, coco.categories))

    missing = loop_over_dataset(
        model, coco, config, convert_batch, device=torch.device("cpu"), indices=indices, split_over_processes=False
    )
    if missing:
        raise DatasetError(too_many_missing(coco, missing))
    return CocoResults.concatenate(results)


def perfect_outputs(anchors: Tensor, targets: Targets, assignment: Assignment, num_classes: int) -> HeadOutputs:
    """The outputs of a perfect network: each object at an anchor of its own, background at every other anchor.

    An object's anchor is the one with the highest IoU among those assigned to it or, if there is none, among all
    unused ones. It scores slightly less than the object before it, which fixes the order in which the metric processes
    them.

    Args:
        anchors: (A, 4).
        targets: of a batch.
        assignment: of the anchors to `targets`.
        num_classes: K.
    """
    batch, num_anchors = len(targets.boxes), len(anchors)
    logits = torch.full((batch, num_anchors, num_classes), -20.0)
    deltas = torch.zeros(batch, num_anchors, 4)
    for image in range(batch):
        used = torch.zeros(num_anchors, dtype=torch.bool)
        for position, (box, label) in enumerate(zip(targets.boxes[image], targets.labels[image].tolist(), strict=True)):
            if label < 0:
                continue
            iou = pairwise_iou(box[None], anchors).squeeze(0)
            assigned = (assignment.matched[image] == position) & ~used
            anchor = int(torch.where(assigned if assigned.any() else ~used, iou, -1.0).argmax())
            used[anchor] = True
            logits[image, anchor, label] = 8 - 0.002 * position
            deltas[image, anchor] = encode(box, anchors[anchor])
    return HeadOutputs((logits,), (deltas,), anchors)


def _annotations_as_results(coco: CocoDataset, index: int) -> CocoResults:
    """The objects of an image as detections, converted by none of the code under test."""
    boxes, labels = coco.objects(index)[:2]
    return CocoResults(
        np.full(len(boxes), coco.image_ids[index]),
        np.array(coco.categories.ids, np.int64)[labels],
        np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64),
        np.ones(len(boxes)),
    )


def _is_readable(coco: CocoDataset, index: int) -> bool:
    try:
        coco.decode(index)
    except (ImageError, OSError):
        return False
    return True
