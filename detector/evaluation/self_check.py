"""Self-check before training: ground truth must survive the whole pipeline."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.assign.max_iou import Matches
from detector.boxes import encode, pairwise_iou
from detector.config import Config
from detector.datasets.coco import CocoDataset
from detector.datasets.images import decode_image
from detector.datasets.loader import DetectionDataset, build_loader, to_device
from detector.errors import DatasetError, ImageError
from detector.evaluation.coco_metrics import CocoResults, detections_to_results, evaluate
from detector.evaluation.evaluate import _only, detect, eval_keys
from detector.evaluation.validation_loss import ValidationLoss
from detector.inference.postprocess import postprocess
from detector.losses import RetinaNetLoss
from detector.models import RetinaNet
from detector.structures import HeadOutputs, Targets


class PipelineError(RuntimeError):
    """Boxes that go through the pipeline do not come back as they were."""


# ---- there and back ---------------------------------------------------------------------------------------------


def perfect_outputs(anchors: Tensor, targets: Targets, matches: Matches, num_classes: int) -> HeadOutputs:
    """What a faultless network would say: each object at one anchor of its own, every other anchor silent.

    An object speaks through the anchor that overlaps it most among those matched to it, or, where none was, among all
    that are still free. It scores a little less than the object before it (`perfect_score`), so that the order in which
    the metric goes through them is known.
    """
    batch, num_anchors = len(targets.boxes), len(anchors)
    logits = torch.full((batch, num_anchors, num_classes), -20.0)
    deltas = torch.zeros(batch, num_anchors, 4)
    for image in range(batch):
        taken = torch.zeros(num_anchors, dtype=torch.bool)
        for position, (box, label) in enumerate(zip(targets.boxes[image], targets.labels[image].tolist(), strict=True)):
            if label < 0:
                continue
            overlap = pairwise_iou(box[None], anchors).squeeze(0)
            own = (matches.matched[image] == position) & ~taken
            anchor = int(torch.where(own if own.any() else ~taken, overlap, -1.0).argmax())
            taken[anchor] = True
            logits[image, anchor, label] = 8 - 0.002 * position
            deltas[image, anchor] = encode(box, anchors[anchor])
    return HeadOutputs((logits,), (deltas,), anchors)


def perfect_score(position: NDArray[np.int64]) -> NDArray[np.float64]:
    """The score that `perfect_outputs` gives the objects of an image, by their place in its list."""
    score: NDArray[np.float64] = 1 / (1 + np.exp(0.002 * position - 8))
    return score


def round_trip(model: RetinaNet, match: Callable[..., Matches], coco: CocoDataset, config: Config,
               indices: Sequence[int] | None = None) -> CocoResults:  # fmt: skip
    """Ground truth by way of real batches, matching, encoding, decoding and un-resizing, as if it had been detected.

    Raises:
        ImageError: a picture cannot be read, whatever `data.on_error` is.

    Non-maximum suppression is set to remove nothing, because real objects may overlap as much as they like.
    """
    dataset = DetectionDataset(coco, max_size=config.data.max_size, resize=config.model.resize)
    settings: dict[str, Any] = {
        "score_thresh": 0.5, "nms_thresh": 1.0, "topk_candidates": 10**6, "detections_per_img": 10**6,
    }  # fmt: skip
    found = []
    for loaded in build_loader(dataset, eval_keys(coco, config, indices), num_workers=0):
        batch = to_device(loaded, torch.device("cpu"))
        anchors = model.anchors_of(batch.images)
        outputs = perfect_outputs(
            anchors,
            batch.targets,
            match(anchors, batch.targets, grids=model.grids_of(batch.images)),
            len(coco.categories),
        )
        detections = postprocess(outputs, batch.image_sizes, original_sizes=batch.original_sizes, **settings)
        for image_id, detection in zip(batch.image_ids.tolist(), detections, strict=True):
            found.append(detections_to_results(image_id, detection, coco.categories))
    return CocoResults.concatenate(found)


def prove_pipeline(
    model: RetinaNet,
    loss: RetinaNetLoss,
    coco: CocoDataset,
    config: Config,
    *,
    device: torch.device,
) -> str:
    """Before the first step: two images go all the way, so that nothing of it can fail hours later.

    Their objects, as training sees them, must come back from the round trip scoring what they score as they are (1 but
    for boxes that reach out of their image or are to be ignored), and the model as it is must run through to an AP.

    Returns:
        A line about what was found.

    Raises:
        PipelineError: the boxes did not come back.
    """
    with_objects = np.nonzero(coco.num_objects)[0]
    candidates = with_objects if len(with_objects) else np.arange(len(coco))
    readable = (int(i) for i in candidates if config.data.on_error == "fail" or _is_readable(coco, int(i)))
    chosen = list(itertools.islice(readable, 2))
    if not chosen:
        raise DatasetError(f"{coco.annotations}: none of its pictures with objects can be read")
    truth = _only(coco.ground_truth(), coco.image_ids[chosen])
    published = CocoResults.concatenate([_as_results(coco, i) for i in chosen])
    max_dets = (1, 10, max(100, len(truth.areas)))
    expected = evaluate(truth, published, engine=config.eval.engine, max_dets=max_dets).values["AP50"]
    with torch.compiler.set_stance("force_eager"):  # matching may be compiled, for another device
        back = round_trip(model, loss.match, coco, config, chosen)
    reached = evaluate(truth, back, engine=config.eval.engine, max_dets=max_dets).values["AP50"]
    if reached < expected - 0.01:
        raise PipelineError(
            f"boxes of images {coco.image_ids[chosen].tolist()} do not come back from resizing, matching, decoding and "
            f"evaluation: AP50 {reached:.3f}, expected {expected:.3f}; this is a fault of the program or of its "
            "anchors, please report it with the config"
        )
    watch = ValidationLoss(loss, device).add if config.eval.loss else None
    results, _ = detect(model, coco, config, device=device, indices=chosen, watch=watch)
    evaluate(truth, results, engine=config.eval.engine, max_dets=config.eval.max_dets)
    best = f"highest score {results.scores.max():.3f}" if len(results.scores) else "none above the score threshold"
    return (
        f"pipeline proved on images {coco.image_ids[chosen].tolist()}: ground truth comes back at AP50 {reached:.3f}; "
        f"the model as it starts finds {len(results.scores)} objects ({best})"
    )


def _as_results(coco: CocoDataset, index: int) -> CocoResults:
    """The objects of an image as if they had been detected; by none of the code that is to be proved."""
    boxes, labels, _ = coco.objects(index)
    return CocoResults(
        np.full(len(boxes), coco.image_ids[index]),
        np.array(coco.categories.ids, np.int64)[labels],
        np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).astype(np.float64),
        np.ones(len(boxes)),
    )


def _is_readable(coco: CocoDataset, index: int) -> bool:
    try:
        decode_image(coco.path(index), apply_exif=coco.apply_exif)
    except (ImageError, OSError):
        return False
    return True
