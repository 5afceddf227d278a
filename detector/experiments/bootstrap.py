"""AP on resampled images: how far it would have moved had other pictures of the same kind been in the set.

Matching looks at one image at a time, so it is done once. A replicate then only counts each image as often as it was
drawn, which gives what scoring a dataset with copies of these images would (but for the order of equal scores).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.evaluation.coco_metrics import CocoResults, hotcoco_run, numbered
from detector.structures import GroundTruth

RECALLS = np.linspace(0, 1, 101)
AT_ONCE = 50
"""Replicates in memory together: float64 for every detection of a class."""


class MatchedClass(NamedTuple):
    """What COCO's matching says of one class: N detections, best score first, in I images; T IoU thresholds."""

    image: NDArray[np.intp]
    """(N,) position of each detection's image among the sorted image ids."""
    positive: NDArray[np.bool_]
    """(T, N) whether it found an object."""
    ignored: NDArray[np.bool_]
    """(T, N) whether it found a crowd, and counts neither way."""
    objects: NDArray[np.int64]
    """(I,) objects in each image, without crowds."""


def match(truth: GroundTruth, results: CocoResults, *, max_dets: int = 100) -> list[MatchedClass]:
    """Match detections with objects as COCO does, class by class in the order of the category ids.

    Raises:
        ValueError: as `coco_eval.evaluate`.
    """
    p = numbered(truth, results)
    run = hotcoco_run(p)
    run.params.max_dets = [max_dets]
    run.params.area_rng, run.params.area_rng_lbl = [[0.0, 1e10]], ["all"]
    run.evaluate()
    found: list[list[tuple[int, NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]]]
    found = [[] for _ in range(p.num_classes)]
    for entry in run.eval_imgs:
        if entry is not None and entry["dtIds"]:
            found[entry["category_id"] - 1].append(
                (
                    entry["image_id"] - 1,
                    np.array(entry["dtScores"]),
                    np.array(entry["dtMatched"], bool),
                    np.array(entry["dtIgnore"], bool),
                )
            )
    classes = []
    for k, parts in enumerate(found, start=1):
        parts.sort(key=lambda part: part[0])
        here = p.gt_images[(p.gt_classes == k) & ~p.gt_iscrowd] - 1
        objects = np.bincount(here, minlength=p.num_images)
        nothing = np.zeros((len(run.params.iou_thrs), 0), bool)
        image = np.repeat([part[0] for part in parts], [len(part[1]) for part in parts]).astype(np.intp)
        order = np.argsort(-np.concatenate([np.empty(0), *(part[1] for part in parts)]), kind="stable")
        positive = np.concatenate([nothing, *(part[2] for part in parts)], axis=1)[:, order]
        ignored = np.concatenate([nothing, *(part[3] for part in parts)], axis=1)[:, order]
        classes.append(MatchedClass(image[order], positive & ~ignored, ignored, objects))
    return classes


def resampled_ap(classes: list[MatchedClass], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """AP of resampled images.

    Args:
        classes: of `match`.
        counts: (R, I) how often each image is in each replicate.

    Returns:
        (R,) the mean over the classes that have objects in the replicate; nan where none has.
    """
    parts = [
        np.stack([_class_ap(of_class, counts[start : start + AT_ONCE].astype(np.float64)) for of_class in classes])
        for start in range(0, len(counts), AT_ONCE)
    ]
    per_class = np.concatenate(parts, axis=1)
    valid = ~np.isnan(per_class)
    with np.errstate(invalid="ignore"):
        mean: NDArray[np.float64] = np.where(valid, per_class, 0).sum(axis=0) / valid.sum(axis=0)
    return mean


def _class_ap(of_class: MatchedClass, counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """(R,) AP of a class in each replicate."""
    objects = counts @ of_class.objects
    weights = counts[:, of_class.image]
    total = np.cumsum(weights, axis=1)
    ap = np.zeros(len(counts))
    for positive, ignored in zip(of_class.positive, of_class.ignored, strict=True):
        at = np.nonzero(positive)[0]  # recall, and with it the curve, changes nowhere else
        if not len(at):
            continue
        counted = total[:, at] if not ignored.any() else np.cumsum(weights * ~ignored, axis=1)[:, at]
        right = np.cumsum(weights[:, at], axis=1)
        precision = right / (counted + np.spacing(1))
        envelope = np.zeros((len(counts), len(at) + 1))  # the last column: recalls that are never reached
        envelope[:, :-1] = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        with np.errstate(invalid="ignore"):
            recall = right / objects[:, None]
        for r in np.nonzero(objects)[0]:
            ap[r] += envelope[r, np.searchsorted(recall[r], RECALLS)].mean()
    ap[objects == 0] = np.nan
    return ap / len(of_class.positive)


def draw(num_images: int, replicates: int, *, seed: int) -> NDArray[np.int64]:
    """(replicates, num_images) how often each image is drawn, with replacement, as many as there are."""
    rng = np.random.default_rng(seed)
    return rng.multinomial(num_images, np.full(num_images, 1 / num_images), size=replicates)
