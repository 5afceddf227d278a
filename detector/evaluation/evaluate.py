"""Running a detector over a dataset and scoring what it finds; and proving the way there and back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from detector import distributed
from detector.config import Config
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, build_loader, to_device, too_many_unreadable, unreadable
from detector.datasets.sampling import SampleKey, eval_batches
from detector.errors import DatasetError
from detector.evaluation.coco_metrics import CocoResults, Metrics, detections_to_results, evaluate
from detector.inference.detector import Detector
from detector.models import RetinaNet
from detector.precision import resolve_precision
from detector.structures import Batch, GroundTruth, HeadOutputs


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
