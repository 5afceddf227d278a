"""The two implementations of COCO's detection metrics, hotcoco and pycocotools, behind one interface.

Neither reads a file: both get the same validated arrays, with images, classes, objects and detections renumbered from
1 in the order of their ids, because pycocotools treats an object with id 0 as unmatched and hotcoco refuses negative
ids, and because the order of the images breaks ties between scores.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.config import Engine
from detector.config_packages import import_engine
from detector.evaluation.coco_results import CocoResults, brief_list
from detector.structures import GroundTruth


class EngineInput(NamedTuple):
    """Ground truth and detections with images and classes numbered from 1 in the order of their ids."""

    num_images: int
    num_classes: int
    gt_images: NDArray[np.int64]
    gt_classes: NDArray[np.int64]
    gt_boxes: NDArray[np.float64]
    gt_areas: NDArray[np.float64]
    gt_iscrowd: NDArray[np.bool_]
    dt_images: NDArray[np.int64]
    dt_classes: NDArray[np.int64]
    dt_boxes: NDArray[np.float64]
    dt_scores: NDArray[np.float64]


class Curves(NamedTuple):
    """T IoU and R recall thresholds, K classes, 4 areas (all, small, medium, large), 3 max_dets; -1 is undefined."""

    precision: NDArray[np.float64]
    """(T, R, K, 4, 3)"""
    recall: NDArray[np.float64]
    """(T, K, 4, 3)"""


def engine_input(gt: GroundTruth, results: CocoResults) -> EngineInput:
    """Validate and renumber ground truth and detections for either engine.

    Raises:
        ValueError: results for images or classes that the ground truth does not have, or inconsistent ground truth.
    """
    images = np.unique(gt.image_ids)
    if len(images) < len(gt.image_ids):
        raise ValueError(
            f"image ids of the ground truth must differ, got {len(gt.image_ids) - len(images)} more than once"
        )
    if not (np.isfinite(gt.boxes).all() and np.isfinite(gt.areas).all()):
        raise ValueError("boxes and areas of the ground truth must be finite, got nan or inf; fix or drop the objects")
    classes = np.array(sorted(gt.categories.ids), np.int64)
    of_images, of_classes = (images, "images of the ground truth"), (classes, "categories of the ground truth")
    return EngineInput(
        num_images=len(images),
        num_classes=len(classes),
        gt_images=_renumbered(gt.ann_image_ids, "image ids of the objects", *of_images),
        gt_classes=_renumbered(gt.ann_category_ids, "category ids of the objects", *of_classes),
        gt_boxes=gt.boxes,
        gt_areas=gt.areas,
        gt_iscrowd=gt.iscrowd,
        dt_images=_renumbered(results.image_ids, "image ids of the results", *of_images),
        dt_classes=_renumbered(results.category_ids, "category ids of the results", *of_classes),
        dt_boxes=results.boxes,
        dt_scores=results.scores,
    )


def _renumbered(ids: NDArray[np.int64], what: str, known: NDArray[np.int64], which: str) -> NDArray[np.int64]:
    """1-based positions of the ids among the sorted known ids."""
    unknown = np.setdiff1d(ids, known)
    if len(unknown):
        raise ValueError(f"{what} must be among the {len(known)} {which}, got also {brief_list(unknown.tolist())}")
    return (np.searchsorted(known, ids) + 1).astype(np.int64)


def precision_recall_curves(engine: Engine, inputs: EngineInput, max_dets: tuple[int, int, int]) -> Curves:
    """Match detections with objects and accumulate precision and recall; both engines return the same numbers.

    Raises:
        ConfigError: the engine is not installed.
    """
    if engine == "pycocotools":
        return _pycocotools_curves(inputs, max_dets)
    evaluator = hotcoco_evaluator(inputs)
    evaluator.params.max_dets = list(max_dets)
    evaluator.evaluate()
    evaluator.accumulate()
    curves = evaluator.eval
    assert curves is not None, "accumulate fills it"
    return Curves(curves["precision"], curves["recall"])


def hotcoco_evaluator(inputs: EngineInput) -> Any:
    """Create a `hotcoco.COCOeval`; the caller sets its parameters and runs it.

    Raises:
        ConfigError: hotcoco is not installed.
    """
    hotcoco = import_engine("hotcoco", "hotcoco")
    gt = hotcoco.COCO.from_arrays(
        [{"id": i} for i in range(1, inputs.num_images + 1)],
        _class_records(inputs),
        inputs.gt_images,
        inputs.gt_classes,
        inputs.gt_boxes,
        area=inputs.gt_areas,
        iscrowd=inputs.gt_iscrowd,
    )
    dt = gt.load_res(np.column_stack([inputs.dt_images, inputs.dt_boxes, inputs.dt_scores, inputs.dt_classes]))
    return hotcoco.COCOeval(gt, dt, "bbox")


def _pycocotools_curves(inputs: EngineInput, max_dets: tuple[int, int, int]) -> Curves:
    pycocotools = import_engine("pycocotools", "pycocotools.coco")
    cocoeval = importlib.import_module("pycocotools.cocoeval")

    def records(images: Any, classes: Any, boxes: Any, areas: Any, **more: Any) -> list[dict[str, Any]]:
        columns = {"image_id": images, "category_id": classes, "bbox": boxes, "area": areas, **more}
        rows = zip(*(values.tolist() for values in columns.values()), strict=True)
        return [{"id": i, **dict(zip(columns, row, strict=True))} for i, row in enumerate(rows, start=1)]

    images = [{"id": i} for i in range(1, inputs.num_images + 1)]
    objects = records(
        inputs.gt_images, inputs.gt_classes, inputs.gt_boxes, inputs.gt_areas, iscrowd=inputs.gt_iscrowd.astype(int)
    )
    # What loadRes makes of a list (it refuses an empty one), without the polygons, which no box metric reads.
    detections = records(
        inputs.dt_images,
        inputs.dt_classes,
        inputs.dt_boxes,
        inputs.dt_boxes[:, 2] * inputs.dt_boxes[:, 3],
        iscrowd=np.zeros(len(inputs.dt_scores), int),
        score=inputs.dt_scores,
    )
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = pycocotools.COCO(), pycocotools.COCO()
        for coco, annotations in ((gt, objects), (dt, detections)):
            coco.dataset = {"images": images, "categories": _class_records(inputs), "annotations": annotations}
            coco.createIndex()
        evaluator = cocoeval.COCOeval(gt, dt, "bbox")
        evaluator.params.maxDets = list(max_dets)
        evaluator.evaluate()
        evaluator.accumulate()
    return Curves(evaluator.eval["precision"], evaluator.eval["recall"])


def _class_records(inputs: EngineInput) -> list[dict[str, Any]]:
    return [{"id": i, "name": str(i)} for i in range(1, inputs.num_classes + 1)]
