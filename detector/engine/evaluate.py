"""Running a detector over a dataset and scoring what it finds; and proving the way there and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.boxes import encode, pairwise_iou
from detector.coco_eval import CocoResults, Metrics, detections_to_results, evaluate
from detector.config import Config
from detector.datasets.coco import CocoDataset, DatasetError
from detector.datasets.images import ImageError, decode_image
from detector.datasets.loader import DetectionDataset, build_loader, to_device, too_many_unreadable, unreadable
from detector.datasets.sampling import SampleKey, eval_batches
from detector.engine import distributed
from detector.engine.detect import Detector
from detector.engine.optim import resolve_precision
from detector.losses import RetinaNetLoss
from detector.matching import Matches
from detector.models import RetinaNet
from detector.postprocess import postprocess
from detector.structures import Batch, GroundTruth, HeadOutputs, Targets


class PipelineError(RuntimeError):
    """Boxes that go through the pipeline do not come back as they were."""


def evaluate_model(
    model: RetinaNet,
    coco: CocoDataset,
    config: Config,
    *,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[HeadOutputs, Batch], None] | None = None,
) -> tuple[Metrics, CocoResults]:
    """Detect in every image of a dataset and score the result; on every process alike.

    Images that cannot be read (where `data.on_error` lets them be) are left out of the truth as well.

    Args:
        model: on `device`; its mode is restored afterwards.
        coco: the dataset.
        config: sizes, post-processing, precision and engine.
        device: to run on.
        progress: called with images done and in all.
        watch: called with what the network says of each batch.

    Raises:
        DatasetError: more of the images than a few cannot be read.
    """
    results, lost = detect(model, coco, config, device=device, progress=progress, watch=watch)
    if too_many_unreadable(len(lost), len(coco)):
        raise DatasetError(gone_away(coco, lost))
    truth = _only(coco.ground_truth(), np.delete(coco.image_ids, lost))
    metrics = evaluate(truth, results, engine=config.eval.engine, max_dets=config.eval.max_dets)
    return metrics, results


def gone_away(coco: CocoDataset, lost: Sequence[int]) -> str:
    """What to say where too many images cannot be read."""
    return (
        f"{len(lost)} of the {len(coco)} images of {coco.annotations} cannot be read, for example {coco.path(lost[0])}: "
        "data.on_error=skip forgives a few that break later, not so many; bring them back if their folder is gone, or set "
        "data.verify=decode, which leaves out what is broken when the set is opened"
    )


class ValidationLoss:
    """The loss of training over a whole dataset, seen as in evaluation: neither augmented nor mirrored, and divided as that of
    one step. (GHM-C weighs by what it sees at once, so there it depends a little on the batches.)

    Args:
        loss: of training.
        device: of the network.
    """

    def __init__(self, loss: RetinaNetLoss, device: torch.device) -> None:
        self.loss = loss
        # of loss_cls and loss_box before they are divided, positive anchors and images
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    @torch.inference_mode()
    def add(self, outputs: HeadOutputs, batch: Batch) -> None:
        """Count a batch."""
        matches = self.loss.match(outputs.anchors, batch.targets)
        one = torch.ones((), device=outputs.anchors.device)
        parts = self.loss(outputs, batch.targets, matches=matches, num_pos=one, num_images=one)
        counts = matches.num_pos.sum(), (batch.index >= 0).sum()
        self.sums += torch.stack([parts["loss_cls"], parts["loss_box"], *counts])

    def means(self) -> dict[str, float]:
        """loss, loss_cls and loss_box, over what all processes have seen."""
        cls, box, num_pos, num_images = distributed.sum_over_processes(self.sums.clone()).tolist()
        images, positives = max(1.0, num_images), max(1.0, num_pos)
        usual = positives if self.loss.normalizer == "global" else images
        cls /= images if self.loss.class_loss.is_mean else usual
        box /= usual
        return {"loss": cls + box, "loss_cls": cls, "loss_box": box}


def detect(
    model: RetinaNet,
    coco: CocoDataset,
    config: Config,
    *,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
    watch: Callable[[HeadOutputs, Batch], None] | None = None,
    indices: Sequence[int] | None = None,
) -> tuple[CocoResults, list[int]]:
    """What the model finds in a dataset (or in some of its images), in COCO's terms, sorted by image; and the positions
    of images that could not be read."""
    batches = eval_keys(coco, config, indices)[distributed.rank() :: distributed.world_size()]
    dataset = DetectionDataset(
        coco,
        max_size=config.data.max_size,
        resize=config.model.resize,
        skip_unreadable=config.data.on_error == "skip",
    )
    workers = min(config.data.num_workers, len(batches))
    loader = build_loader(dataset, batches, num_workers=workers, pin_memory=device.type == "cuda")
    precision = resolve_precision(config.eval.precision, device)
    was_training = model.training
    model.eval()
    found: list[CocoResults] = []
    lost: list[int] = []
    done, total = 0, sum(map(len, batches))
    detector = Detector(model, config.postprocess.model_dump(), precision=precision, device=device)
    # Every picture is padded as if it were alone: far too many shapes to compile the network for.
    with torch.compiler.set_stance("force_eager"):
        for batch in loader:
            there = to_device(batch, device)
            outputs = None
            if watch is not None:
                outputs = detector.outputs(there.images, batch.image_sizes)
                watch(outputs, there)
                if device.type != "cpu":
                    outputs = None  # a graph has its own, and there is memory for one at a time
            detections = detector(there.images, batch.image_sizes, original_sizes=batch.original_sizes, outputs=outputs)
            for image_id, index, detection in zip(
                batch.image_ids.tolist(), batch.index.tolist(), detections, strict=True
            ):
                if index >= 0:
                    found.append(detections_to_results(image_id, detection, coco.categories))
                else:
                    lost.append(unreadable(index))
            done += len(detections)
            if progress is not None:
                progress(done, total)
    model.train(was_training)
    everyones = [results for part in distributed.gather(found) for results in part]
    everyones.sort(key=lambda results: int(results.image_ids[0]) if len(results.image_ids) else -1)
    return CocoResults.concatenate(everyones), [i for part in distributed.gather(lost) for i in part]


def highest_score(
    model: RetinaNet, coco: CocoDataset, config: Config, *, device: torch.device, count: int = 8
) -> float:
    """Of all anchors of a few images spread over the set: how near a model that finds nothing is to finding something."""
    settings = config.postprocess.model_copy(update={"score_thresh": 0.0, "detections_per_img": 1})
    indices = np.unique(np.linspace(0, len(coco) - 1, count).astype(int)).tolist()
    config = config.model_copy(update={"postprocess": settings})
    results, _ = detect(model, coco, config, device=device, indices=indices)
    return float(results.scores.max(initial=0.0))


def eval_batch_size(config: Config) -> int:
    """Pictures that are looked at together."""
    micro_batch = config.train.micro_batch if config.train.micro_batch != "auto" else None
    return config.eval.batch_size or micro_batch or config.train.batch_size


def eval_keys(coco: CocoDataset, config: Config, indices: Sequence[int] | None = None) -> list[list[SampleKey]]:
    """The samples of an evaluation, or of some of its images, in batches of one padded shape."""
    batches = eval_batches(
        coco.sizes,
        eval_batch_size(config),
        min_size=config.data.eval_size,
        max_size=config.data.max_size,
        pad=config.model.pad,
        resize=config.model.resize,
    )
    if indices is None:
        return batches
    wanted = set(indices)
    chosen = [[key for key in batch if key.index in wanted] for batch in batches]
    return [batch for batch in chosen if batch]


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


def _only(truth: GroundTruth, image_ids: Any) -> GroundTruth:
    rows = np.isin(truth.ann_image_ids, image_ids)
    return GroundTruth(
        truth.categories,
        np.asarray(image_ids),
        truth.ann_image_ids[rows],
        truth.ann_category_ids[rows],
        truth.boxes[rows],
        truth.areas[rows],
        truth.iscrowd[rows],
    )
