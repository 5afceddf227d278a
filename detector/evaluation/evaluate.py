"""Evaluating a model on a dataset: detect in every image, then score the detections."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from detector import distributed
from detector.config import Config
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import too_many_unreadable
from detector.errors import DatasetError
from detector.evaluation.coco_metrics import Metrics, evaluate
from detector.evaluation.coco_results import CocoResults, detections_to_results
from detector.evaluation.dataset_loop import loop_over_dataset
from detector.inference.detector import Detector
from detector.models import RetinaNet
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
    """Detect in every image of a dataset and score the detections; every process returns the same.

    Images that cannot be read (allowed where `data.on_error` is "skip") are excluded from the ground truth as well.

    Args:
        model: on `device`; its mode is restored afterwards.
        coco: the dataset.
        config: image sizes, post-processing, precision and engine.
        device: to run on.
        progress: called with the number of images done and their total.
        watch: called with the network's outputs for each batch and the batch, both on `device`.

    Raises:
        DatasetError: more than a few of the images cannot be read.
    """
    results, missing = detect(model, coco, config, device=device, progress=progress, watch=watch)
    if too_many_unreadable(len(missing), len(coco)):
        raise DatasetError(too_many_missing(coco, missing))
    ground_truth = select_images(coco.ground_truth(), np.delete(coco.image_ids, missing))
    metrics = evaluate(ground_truth, results, engine=config.eval.engine, max_dets=config.eval.max_dets)
    return metrics, results


def too_many_missing(coco: CocoDataset, missing: Sequence[int]) -> str:
    """The error message for more unreadable images, given by their positions, than `data.on_error=skip` allows."""
    return (
        f"{len(missing)} of the {len(coco)} images of {coco.annotations} cannot be read, for example "
        f"{coco.describe(missing[0])}: data.on_error=skip allows only a few that become unreadable later; restore "
        "their folder if it is missing, or set data.verify=decode, which excludes unreadable images from the start"
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
    """Detect in the images of a dataset, or in those at `indices`; the other arguments as in `evaluate_model`.

    Returns:
        The detections in COCO's terms, sorted by image, and the positions of images that could not be read.
    """
    results: list[CocoResults] = []

    def detect_batch(detector: Detector, loaded: Batch, batch: Batch) -> None:
        outputs = None
        if watch is not None:
            outputs = detector.outputs(batch.images, loaded.image_sizes)
            watch(outputs, batch)
            if device.type != "cpu":
                outputs = None  # a CUDA graph has its own, and there is memory for one at a time
        all_detections = detector(
            batch.images, loaded.image_sizes, original_sizes=loaded.original_sizes, outputs=outputs
        )
        for image_id, index, detections in zip(
            loaded.image_ids.tolist(), loaded.index.tolist(), all_detections, strict=True
        ):
            if index >= 0:
                results.append(detections_to_results(image_id, detections, coco.categories))

    missing = loop_over_dataset(model, coco, config, detect_batch, device=device, indices=indices, progress=progress)
    of_all_processes = [of_image for part in distributed.gather(results) for of_image in part]
    of_all_processes.sort(key=lambda of_image: int(of_image.image_ids[0]) if len(of_image) else -1)
    return CocoResults.concatenate(of_all_processes), missing


def highest_score(
    model: RetinaNet, coco: CocoDataset, config: Config, *, device: torch.device, count: int = 8
) -> float:
    """The highest score of any anchor in `count` evenly spaced images: how far a model is from its first detection."""
    settings = config.postprocess.model_copy(update={"score_thresh": 0.0, "detections_per_img": 1})
    indices = np.unique(np.linspace(0, len(coco) - 1, count).astype(int)).tolist()
    config = config.model_copy(update={"postprocess": settings})
    results, _ = detect(model, coco, config, device=device, indices=indices)
    return float(results.scores.max(initial=0.0))


def select_images(ground_truth: GroundTruth, image_ids: NDArray[np.int64]) -> GroundTruth:
    """The ground truth of these images only."""
    rows = np.isin(ground_truth.ann_image_ids, image_ids)
    return GroundTruth(
        ground_truth.categories,
        np.asarray(image_ids),
        ground_truth.ann_image_ids[rows],
        ground_truth.ann_category_ids[rows],
        ground_truth.boxes[rows],
        ground_truth.areas[rows],
        ground_truth.iscrowd[rows],
    )
