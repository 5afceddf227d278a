"""AP on bootstrap samples of the images: how much AP varies with the choice of validation images.

Matching treats each image independently, so it runs only once. A replicate then counts each image as often as it was
drawn. The result equals scoring a dataset with copies of these images, except for the order of equal scores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.evaluation.coco_engines import engine_input, hotcoco_evaluator
from detector.evaluation.coco_results import CocoResults
from detector.structures import GroundTruth

RECALLS = np.linspace(0, 1, 101)
CHUNK = 50
"""Replicates computed together; each needs a few float64 per detection of a class."""


class MatchedClass(NamedTuple):
    """COCO's matching of one class: N detections by descending score, in I images, at T IoU thresholds."""

    image: NDArray[np.intp]
    """(N,) index of each detection's image among the sorted image ids."""
    positive: NDArray[np.bool_]
    """(T, N) whether the detection matches an object."""
    ignored: NDArray[np.bool_]
    """(T, N) whether the detection matches a crowd region and does not count."""
    objects: NDArray[np.int64]
    """(I,) number of objects in each image, without crowd regions."""


def match_classes(ground_truth: GroundTruth, results: CocoResults, *, max_dets: int = 100) -> list[MatchedClass]:
    """Match detections with objects as COCO does, class by class in the order of the category ids.

    Raises:
        ValueError: as `coco_metrics.evaluate`.
    """
    p = engine_input(ground_truth, results)
    evaluator = hotcoco_evaluator(p)
    evaluator.params.max_dets = [max_dets]
    evaluator.params.area_rng, evaluator.params.area_rng_lbl = [[0.0, 1e10]], ["all"]
    evaluator.evaluate()
    by_class: list[list[tuple[int, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]]]
    by_class = [[] for _ in range(p.num_classes)]
    for entry in evaluator.eval_imgs:
        if entry is not None and entry["dtIds"]:
            by_class[entry["category_id"] - 1].append(
                (
                    entry["image_id"] - 1,
                    np.array(entry["dtScores"]),
                    np.array(entry["dtMatched"], bool),
                    np.array(entry["dtIgnore"], bool),
                )
            )
    classes = []
    for k, parts in enumerate(by_class, start=1):
        parts.sort(key=lambda part: part[0])
        objects = np.bincount(p.gt_images[(p.gt_classes == k) & ~p.gt_iscrowd] - 1, minlength=p.num_images)
        empty = np.zeros((len(evaluator.params.iou_thrs), 0), bool)
        image = np.repeat([part[0] for part in parts], [len(part[1]) for part in parts]).astype(np.intp)
        order = np.argsort(-np.concatenate([np.empty(0), *(part[1] for part in parts)]), kind="stable")
        positive = np.concatenate([empty, *(part[2] for part in parts)], axis=1)[:, order]
        ignored = np.concatenate([empty, *(part[3] for part in parts)], axis=1)[:, order]
        classes.append(MatchedClass(image[order], positive & ~ignored, ignored, objects))
    return classes


def resampled_ap(classes: list[MatchedClass], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Compute AP on resampled images.

    Args:
        classes: the result of `match_classes`.
        counts: (R, I) how often each image is in each replicate.

    Returns:
        (R,) mean AP over the classes that have objects in the replicate; nan if no class has.
    """
    parts = [
        np.stack([_class_ap(matched, counts[start : start + CHUNK].astype(np.float64)) for matched in classes])
        for start in range(0, len(counts), CHUNK)
    ]
    per_class = np.concatenate(parts, axis=1)
    valid = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.where(valid, per_class, 0).sum(axis=0) / valid.sum(axis=0)
    return mean


def _class_ap(matched: MatchedClass, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R,) AP of a class in each replicate."""
    objects = counts @ matched.objects
    weights = counts[:, matched.image]
    total = np.cumsum(weights, axis=1)
    ap = np.zeros(len(counts))
    for positive, ignored in zip(matched.positive, matched.ignored, strict=True):
        at = np.nonzero(positive)[0]  # recall changes only here
        if not len(at):
            continue
        counted = total[:, at] if not ignored.any() else np.cumsum(weights * ~ignored, axis=1)[:, at]
        true_positives = np.cumsum(weights[:, at], axis=1)
        precision = true_positives / (counted + np.spacing(1))
        envelope = np.zeros((len(counts), len(at) + 1))  # last column: recalls that are not reached
        envelope[:, :-1] = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore"):
            recall = true_positives / objects[:, None]
        for r in np.nonzero(objects)[0]:
            ap[r] += envelope[r, np.searchsorted(recall[r], RECALLS)].mean()
    ap[objects == 0] = np.nan
    return ap / len(matched.positive)


def draw_counts(num_images: int, replicates: int, *, seed: int) -> NDArray[np.int64]:
    """(replicates, num_images) how often each image occurs among `num_images` draws with replacement."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=replicates)
