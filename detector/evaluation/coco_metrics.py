"""COCO's detection metrics: the twelve numbers and the AP of each class, as pycocotools defines them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.config import Engine
from detector.evaluation.coco_engines import engine_input, precision_recall_curves
from detector.evaluation.coco_results import CocoResults
from detector.structures import GroundTruth

UNDEFINED = -1.0
"""What COCO reports for a mean over nothing, e.g. the AP of a class without objects."""
AREAS = ("small", "medium", "large")


@dataclass(frozen=True)
class ClassMetrics:
    """AP of one class over all IoU thresholds and at 0.5, for all areas and the most detections; -1 without objects."""

    category_id: int
    name: str
    num_gt: int
    """Objects, without crowds."""
    AP: float
    AP50: float


@dataclass(frozen=True)
class Metrics:
    """COCO's twelve numbers, in COCO's order, and the AP of each class in the order of the labels; -1: undefined."""

    values: dict[str, float]
    per_class: tuple[ClassMetrics, ...]

    def to_json(self) -> dict[str, Any]:
        """The twelve numbers and `per_class`, as in metrics.json."""
        return {**self.values, "per_class": [vars(c) for c in self.per_class]}

    def table(self) -> str:
        """Format the metrics as text for a terminal."""
        cells = [f"{name:<10}{_number(value)}" for name, value in self.values.items()]
        summary = ["   ".join(cells[row : row + 3]) for row in range(0, len(cells), 3)]
        width = max(len("class"), *(len(c.name) for c in self.per_class))
        head = f"{'class':<{width}}  {'id':>6}  {'objects':>8}  {'AP':>6}  {'AP50':>6}"
        rows = [
            f"{c.name:<{width}}  {c.category_id:>6}  {c.num_gt:>8}  {_number(c.AP)}  {_number(c.AP50)}"
            for c in self.per_class
        ]
        return "\n".join([*summary, "", head, *rows])


def _number(value: float) -> str:
    return f"{'-':>6}" if value == UNDEFINED else f"{value:6.4f}"


def evaluate(
    ground_truth: GroundTruth,
    results: CocoResults,
    *,
    engine: Engine = "hotcoco",
    max_dets: tuple[int, int, int] = (1, 10, 100),
) -> Metrics:
    """Score detections as pycocotools does; both engines return bit-identical numbers.

    A class's AP is the mean of its precisions over recall and IoU thresholds.

    Args:
        ground_truth: the annotations of all evaluated images.
        results: the detections.
        engine: the implementation to use.
        max_dets: numbers of detections per image and class, for AR@ each of them; AP and the AR by area use the last,
            even if it is not 100 (pycocotools' own summary reports AP -1 there).

    Raises:
        ValueError: results for images or classes that the ground truth does not have, or inconsistent ground truth.
        ConfigError: the engine is not installed.
    """
    if not (len(max_dets) == 3 and 0 < max_dets[0] < max_dets[1] < max_dets[2]):
        raise ValueError(f"max_dets must be three increasing numbers above 0, got {max_dets}")
    # (T, R, K, area, max_dets), (T, K, area, max_dets)
    precision, recall = precision_recall_curves(engine, engine_input(ground_truth, results), max_dets)
    values = {
        "AP": _mean(precision[..., 0, -1]),
        "AP50": _mean(precision[0, ..., 0, -1]),
        "AP75": _mean(precision[5, ..., 0, -1]),
        **{f"AP_{name}": _mean(precision[..., a, -1]) for a, name in enumerate(AREAS, start=1)},
        **{f"AR@{m}": _mean(recall[..., 0, i]) for i, m in enumerate(max_dets)},
        **{f"AR_{name}": _mean(recall[..., a, -1]) for a, name in enumerate(AREAS, start=1)},
    }
    categories = ground_truth.categories
    ids = np.sort(categories.ids)  # the order of the classes in the curves
    num_gt = np.bincount(np.searchsorted(ids, ground_truth.ann_category_ids[~ground_truth.iscrowd]), minlength=len(ids))
    per_class = tuple(
        ClassMetrics(
            category_id=category_id,
            name=name,
            num_gt=int(num_gt[k]),
            AP=_mean(precision[:, :, k, 0, -1]),
            AP50=_mean(precision[0, :, k, 0, -1]),
        )
        for category_id, name, k in zip(
            categories.ids, categories.names, np.searchsorted(ids, categories.ids).tolist(), strict=True
        )
    )
    return Metrics(values, per_class)


def _mean(values: NDArray[np.float64]) -> float:
    valid = values[values > -1]
    return float(np.mean(valid)) if len(valid) else UNDEFINED


def ground_truth_warnings(gt: GroundTruth, max_dets: tuple[int, int, int]) -> list[str]:
    """Warn of annotations that cap the metric or leave it undefined, each with the remedy."""
    if not (~gt.iscrowd).any():
        return [f"none of the {len(gt.image_ids)} images holds an object: every metric is undefined (-1)"]
    warnings = []
    most = max_dets[-1]
    image_ids, category_ids = gt.ann_image_ids[~gt.iscrowd], gt.ann_category_ids[~gt.iscrowd]
    _, per_image = np.unique(image_ids, return_counts=True)
    pairs, per_class = np.unique(np.stack([image_ids, category_ids]), axis=1, return_counts=True)
    if per_class.max() > most:
        full = len(np.unique(pairs[0, per_class > most]))
        warnings.append(
            f"{full} images hold more than {most} objects of one class (up to {per_class.max()}), and only {most} "
            f"detections per image and class count: AP and AR are capped there; raise eval.max_dets and "
            "postprocess.detections_per_img"
        )
    elif per_image.max() > most:
        warnings.append(
            f"{(per_image > most).sum()} images hold more than {most} objects (up to {per_image.max()}): AP is capped "
            f"there if only {most} detections per image are kept; raise postprocess.detections_per_img and "
            "eval.max_dets"
        )
    present = set(category_ids.tolist())
    categories = zip(gt.categories.ids, gt.categories.names, strict=True)
    absent = [f"{name} (id {i})" for i, name in categories if i not in present]
    if absent:
        warnings.append(
            f"{len(absent)} of {len(gt.categories)} classes have no objects here, so their AP is undefined (-1) and in "
            f"no mean: {', '.join(absent[:5])}{', ...' if len(absent) > 5 else ''}"
        )
    return warnings
