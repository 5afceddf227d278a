"""COCO's detection metrics: what the published numbers mean, from our own records, by either of two engines.

The only place besides the dataset reader where COCO's category ids and xywh boxes exist. Neither engine sees a file:
both get the same validated arrays with images, classes, objects and detections renumbered from 1 in the order of
their ids, because pycocotools takes an object with id 0 for unmatched and hotcoco refuses negative ids, and because
ties between scores are broken by the order of the images.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.boxes import xyxy_to_xywh
from detector.errors import ResultsError
from detector.structures import Categories, Detections, GroundTruth

Engine = Literal["hotcoco", "pycocotools"]

UNDEFINED = -1.0
"""What COCO writes for a mean over nothing, e.g. the AP of a class without objects."""


@dataclass(frozen=True)
class CocoResults:
    """Detections of many images in COCO's terms; among equal scores of an image the earlier one comes first."""

    image_ids: NDArray[np.int64]
    """(N,)"""
    category_ids: NDArray[np.int64]
    """(N,)"""
    boxes: NDArray[np.float64]
    """(N, 4) xywh in pixels of the original image."""
    scores: NDArray[np.float64]
    """(N,)"""

    def __post_init__(self) -> None:
        n = len(self.image_ids)
        shapes = [a.shape for a in (self.image_ids, self.category_ids, self.boxes, self.scores)]
        if shapes != [(n,), (n,), (n, 4), (n,)]:
            raise ValueError(
                "CocoResults must have image_ids (N,), category_ids (N,), boxes (N, 4) and scores (N,), got "
                + ", ".join(map(str, shapes))
            )
        dtypes = [a.dtype for a in (self.image_ids, self.category_ids, self.boxes, self.scores)]
        if dtypes != [np.int64, np.int64, np.float64, np.float64]:
            raise ValueError(f"CocoResults must be int64, int64, float64, float64, got {', '.join(map(str, dtypes))}")
        # The product as well: an area beyond float64 makes an IoU of inf / inf, which pycocotools counts as a match.
        finite = np.isfinite(self.boxes).all(axis=1) & np.isfinite(self.scores)
        with np.errstate(over="ignore", invalid="ignore"):
            finite &= np.isfinite(self.boxes[:, 2] * self.boxes[:, 3])
        for rule, good in (("finite", finite), ("of width and height >= 0", (self.boxes[:, 2:] >= 0).all(axis=1))):
            if not good.all():
                i = int(np.argmin(good))
                raise ValueError(
                    f"CocoResults must be {rule}, got {n - int(good.sum())} that are not; the first is number {i}: "
                    f"image {self.image_ids[i]}, bbox {self.boxes[i].tolist()}, score {self.scores[i]}"
                )

    def __len__(self) -> int:
        return len(self.image_ids)

    @staticmethod
    def concatenate(parts: Sequence[CocoResults]) -> CocoResults:
        """The parts one after the other; no parts give no detections."""
        return CocoResults(
            np.concatenate([np.empty(0, np.int64), *(p.image_ids for p in parts)]),
            np.concatenate([np.empty(0, np.int64), *(p.category_ids for p in parts)]),
            np.concatenate([np.empty((0, 4)), *(p.boxes for p in parts)]),
            np.concatenate([np.empty(0), *(p.scores for p in parts)]),
        )

    def to_json_records(self) -> list[dict[str, Any]]:
        """COCO's results format; every number reads back as the same float64."""
        columns = (self.image_ids.tolist(), self.category_ids.tolist(), self.boxes.tolist(), self.scores.tolist())
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, box, score in zip(*columns, strict=True)
        ]


def detections_to_results(image_id: int, detections: Detections, categories: Categories) -> CocoResults:
    """One image's detections (boxes (N, 4) xyxy in pixels of the original image) in COCO's terms.

    Raises ValueError for labels outside 0..K-1, and for what `CocoResults` refuses.
    """
    found = detections.cpu()
    labels = found.labels.numpy()
    if ((labels < 0) | (labels >= len(categories))).any():
        raise ValueError(
            f"labels must lie in 0..{len(categories) - 1}, got {labels.min()}..{labels.max()} for image {image_id}"
        )
    return CocoResults(
        np.full(len(found), image_id, np.int64),
        np.asarray(categories.ids, np.int64)[labels],
        xyxy_to_xywh(found.boxes.double()).numpy(),  # float64 first: the subtraction then rounds nothing away
        found.scores.double().numpy(),
    )


def write_results(path: Path, results: CocoResults) -> None:
    """Write a COCO results file, one detection a line; a reader sees the old file or the whole new one."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write("[" + ",".join("\n" + json.dumps(record) for record in results.to_json_records()) + "\n]\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load_results(path: Path, ground_truth: GroundTruth) -> CocoResults:
    """Read a COCO results file for these annotations.

    An empty list is fine: a detector that finds nothing. Raises ResultsError, which lists all mistakes.
    """
    try:
        records = json.loads(path.read_bytes())
    except OSError as error:
        raise ResultsError(f"{path} must be a readable file, got: {error.strerror}") from error
    except ValueError as error:
        raise ResultsError(f"{path} must be JSON, got: {error}. Was it written completely?") from error
    if not isinstance(records, list):
        got = f"an object with the keys {list(records)[:8]}" if isinstance(records, dict) else repr(records)[:80]
        raise ResultsError(
            f"{path} must be a COCO results file, a list of {_RECORD}, got {got}. "
            "(Annotations belong in the config, under data.)"
        )
    mistakes = _record_mistakes(records, ground_truth)
    if mistakes:
        raise ResultsError(
            f"{path} must be a COCO results file for these annotations, got {len(records)} results with mistakes:\n"
            + "\n".join(f"- {m}" for m in mistakes)
        )
    n = len(records)
    return CocoResults(
        np.array([r["image_id"] for r in records], np.int64),
        np.array([r["category_id"] for r in records], np.int64),
        np.array([r["bbox"] for r in records], np.float64).reshape(n, 4),
        np.array([r["score"] for r in records], np.float64),
    )


_KEYS = ("image_id", "category_id", "bbox", "score")
_RECORD = '{"image_id", "category_id", "bbox": [x, y, width, height], "score"}'


def _record_mistakes(records: list[Any], ground_truth: GroundTruth) -> list[str]:
    """One line per kind of mistake: how often, the first few cases, and the remedy."""
    image_ids = set(ground_truth.image_ids.tolist())
    category_ids = set(ground_truth.categories.ids)
    found: dict[str, list[str]] = {}
    for i, record in enumerate(records):
        for kind, case in _mistakes_of_record(record, image_ids, category_ids):
            found.setdefault(kind, []).append(f"{str(case)[:60]} (result {i})")
    if not found:
        return []

    used = {r["category_id"] for r in records if isinstance(r, dict) and _is_id(r.get("category_id"))}
    use_ids = "write the category ids of the annotation file"
    if used <= set(range(len(category_ids))):
        use_ids = f"these look like class numbers 0..{len(category_ids) - 1}: write each class's category id instead"
    remedies = {
        "not an object": f"every result must be {_RECORD}",
        "masks without bbox": "these are segmentation results, and boxes are scored here; export a bbox for each",
        "keys missing": f"every result must be {_RECORD}",
        "image_id not an integer": "image ids must be those of the annotation file",
        "image_id unknown": f"the annotations hold {len(image_ids)} images with ids {_brief(image_ids)}; "
        "score the split that these results were made on",
        "category_id not an integer": "category ids must be those of the annotation file",
        "category_id unknown": f"the annotations declare the ids {_brief(category_ids)}; {use_ids}",
        "score not finite": "scores must be finite numbers; a model that diverged gives nan",
        "bbox not four numbers": "bbox must be [x, y, width, height]",
        "bbox not finite": "boxes must be finite numbers; a model that diverged gives nan",
        "bbox negative": "width and height must be at least 0; bbox is [x, y, width, height], not two corners",
    }
    return [
        f"{kind}, {len(cases)} times: {', '.join(cases[:3])}{', ...' if len(cases) > 3 else ''}; {remedy}"
        for kind, remedy in remedies.items()
        if (cases := found.get(kind))
    ]


def _mistakes_of_record(record: object, image_ids: set[int], category_ids: set[int]) -> Iterator[tuple[str, object]]:
    if not isinstance(record, dict):
        yield "not an object", record
        return
    missing = [key for key in _KEYS if key not in record]
    if missing == ["bbox"] and "segmentation" in record:
        yield "masks without bbox", f"keys {list(record)}"
    elif missing:
        yield "keys missing", " ".join(missing)
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        if key in record and not _is_id(record[key]):
            yield f"{key} not an integer", repr(record[key])
        elif key in record and record[key] not in known:
            yield f"{key} unknown", record[key]
    if "score" in record and not _is_finite(record["score"]):
        yield "score not finite", repr(record["score"])
    if "bbox" in record:
        box = record["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
            yield "bbox not four numbers", repr(box)
        elif not (all(map(_is_finite, box)) and _is_finite(float(box[2]) * float(box[3]))):
            yield "bbox not finite", box
        elif box[2] < 0 or box[3] < 0:
            yield "bbox negative", box


def _is_finite(value: object) -> bool:
    # The comparison is also right for integers beyond every float, on which math.isfinite raises.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


def _is_id(value: object) -> bool:
    """Whole floats too: some exporters write 1.0, and pycocotools takes it."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def _brief(values: Collection[int]) -> str:
    """The values in order, the middle left out where there are many."""
    ordered = [str(v) for v in sorted(values)]
    return ", ".join(ordered if len(ordered) <= 8 else [*ordered[:5], "...", ordered[-1]])


@dataclass(frozen=True)
class ClassMetrics:
    """AP of one class over all IoU thresholds and at 0.5, areas and with most detections; -1 without objects."""

    category_id: int
    name: str
    num_gt: int
    """Objects that are not crowds."""
    AP: float
    AP50: float


@dataclass(frozen=True)
class Metrics:
    """COCO's twelve numbers, in COCO's order, and the AP of each class in the order of the labels; undefined is -1."""

    values: dict[str, float]
    per_class: tuple[ClassMetrics, ...]

    def to_json(self) -> dict[str, Any]:
        """The twelve numbers and `per_class`, as metrics.json holds them."""
        return {**self.values, "per_class": [vars(c) for c in self.per_class]}

    def table(self) -> str:
        """The same as text for a terminal."""
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
    """Score detections as pycocotools does; both engines give the same numbers, bit for bit.

    `max_dets` are the detections that count per image and class, for AR@ each of them; AP and the AR by area use
    the last, also where it is not 100 (pycocotools' own summary gives AP -1 there). A class's AP is the mean of its
    precisions over recall and IoU thresholds. Raises ValueError for results on images or classes that the ground
    truth does not have, and for ground truth that contradicts itself.
    """
    if not (len(max_dets) == 3 and 0 < max_dets[0] < max_dets[1] < max_dets[2]):
        raise ValueError(f"max_dets must be three increasing numbers above 0, got {max_dets}")
    curves = _ENGINES[engine](numbered(ground_truth, results), max_dets)

    precision, recall = curves.precision, curves.recall  # (T, R, K, area, max_dets), (T, K, area, max_dets)
    values = {
        "AP": _mean(precision[..., 0, -1]),
        "AP50": _mean(precision[0, ..., 0, -1]),
        "AP75": _mean(precision[5, ..., 0, -1]),
        **{f"AP_{name}": _mean(precision[..., a, -1]) for a, name in enumerate(_AREAS, start=1)},
        **{f"AR@{m}": _mean(recall[..., 0, i]) for i, m in enumerate(max_dets)},
        **{f"AR_{name}": _mean(recall[..., a, -1]) for a, name in enumerate(_AREAS, start=1)},
    }
    objects = np.unique(ground_truth.ann_category_ids[~ground_truth.iscrowd], return_counts=True)
    num_gt = dict(zip(*(a.tolist() for a in objects), strict=True))
    categories = ground_truth.categories
    rank = {category_id: k for k, category_id in enumerate(sorted(categories.ids))}
    per_class = tuple(
        ClassMetrics(
            category_id=category_id,
            name=name,
            num_gt=num_gt.get(category_id, 0),
            AP=_mean(precision[:, :, rank[category_id], 0, -1]),
            AP50=_mean(precision[0, :, rank[category_id], 0, -1]),
        )
        for category_id, name in zip(categories.ids, categories.names, strict=True)
    )
    return Metrics(values, per_class)


_AREAS = ("small", "medium", "large")


def _mean(values: NDArray[np.float64]) -> float:
    valid = values[values > -1]
    return float(np.mean(valid)) if len(valid) else UNDEFINED


class Numbered(NamedTuple):
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


class _Curves(NamedTuple):
    """T IoU thresholds, R recall thresholds, K classes, 4 areas (all, small, medium, large), 3 max_dets; -1 is none."""

    precision: NDArray[np.float64]
    """(T, R, K, 4, 3)"""
    recall: NDArray[np.float64]
    """(T, K, 4, 3)"""


def numbered(gt: GroundTruth, results: CocoResults) -> Numbered:
    """What both engines are given.

    Raises:
        ValueError: as `evaluate`.
    """
    images = np.unique(gt.image_ids)
    if len(images) < len(gt.image_ids):
        raise ValueError(
            f"image ids of the ground truth must differ, got {len(gt.image_ids) - len(images)} more than once"
        )
    if not (np.isfinite(gt.boxes).all() and np.isfinite(gt.areas).all()):
        raise ValueError("boxes and areas of the ground truth must be finite, got nan or inf; fix or drop the objects")
    classes = np.array(sorted(gt.categories.ids), np.int64)
    return Numbered(
        num_images=len(images),
        num_classes=len(classes),
        gt_images=_rank(gt.ann_image_ids, images, "image ids of the objects", "images of the ground truth"),
        gt_classes=_rank(gt.ann_category_ids, classes, "category ids of the objects", "categories of the ground truth"),
        gt_boxes=gt.boxes,
        gt_areas=gt.areas,
        gt_iscrowd=gt.iscrowd,
        dt_images=_rank(results.image_ids, images, "image ids of the results", "images of the ground truth"),
        dt_classes=_rank(
            results.category_ids, classes, "category ids of the results", "categories of the ground truth"
        ),
        dt_boxes=results.boxes,
        dt_scores=results.scores,
    )


def _rank(values: NDArray[np.int64], known: NDArray[np.int64], what: str, which: str) -> NDArray[np.int64]:
    """1-based positions of the values among the sorted known ones."""
    foreign = np.setdiff1d(values, known)
    if len(foreign):
        raise ValueError(f"{what} must be among the {len(known)} {which}, got also {_brief(foreign.tolist())}")
    return (np.searchsorted(known, values) + 1).astype(np.int64)


def _named(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "name": str(i)} for i in range(1, count + 1)]


def hotcoco_run(p: Numbered) -> Any:
    """A `hotcoco.COCOeval` that is still to be told its parameters and to run."""
    import hotcoco

    gt = hotcoco.COCO.from_arrays(
        [{"id": i} for i in range(1, p.num_images + 1)],
        _named(p.num_classes),
        p.gt_images,
        p.gt_classes,
        p.gt_boxes,
        area=p.gt_areas,
        iscrowd=p.gt_iscrowd,
    )
    dt = gt.load_res(np.column_stack([p.dt_images, p.dt_boxes, p.dt_scores, p.dt_classes]))
    return hotcoco.COCOeval(gt, dt, "bbox")


def _hotcoco_curves(p: Numbered, max_dets: tuple[int, int, int]) -> _Curves:
    run = hotcoco_run(p)
    run.params.max_dets = list(max_dets)
    run.evaluate()
    run.accumulate()
    curves = run.eval
    assert curves is not None, "accumulate fills it"
    return _Curves(curves["precision"], curves["recall"])


def _pycocotools_curves(p: Numbered, max_dets: tuple[int, int, int]) -> _Curves:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": i} for i in range(1, p.num_images + 1)]
    objects = zip(
        p.gt_images.tolist(),
        p.gt_classes.tolist(),
        p.gt_boxes.tolist(),
        p.gt_areas.tolist(),
        p.gt_iscrowd.astype(int).tolist(),
        strict=True,
    )
    detections = zip(
        p.dt_images.tolist(),
        p.dt_classes.tolist(),
        p.dt_boxes.tolist(),
        (p.dt_boxes[:, 2] * p.dt_boxes[:, 3]).tolist(),
        p.dt_scores.tolist(),
        strict=True,
    )
    annotations = [
        [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for i, (image, category, box, area, crowd) in enumerate(objects, start=1)
        ],
        # What loadRes makes of a list, which it refuses when empty, less the polygons that no box metric reads.
        [
            {"id": i, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": 0, "score": s}
            for i, (image, category, box, area, s) in enumerate(detections, start=1)
        ],
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        gt, dt = COCO(), COCO()
        for coco, records in zip((gt, dt), annotations, strict=True):
            coco.dataset = {"images": images, "categories": _named(p.num_classes), "annotations": records}
            coco.createIndex()
        run = COCOeval(gt, dt, "bbox")
        run.params.maxDets = list(max_dets)
        run.evaluate()
        run.accumulate()
    return _Curves(run.eval["precision"], run.eval["recall"])


_ENGINES = {"hotcoco": _hotcoco_curves, "pycocotools": _pycocotools_curves}


def ground_truth_warnings(gt: GroundTruth, max_dets: tuple[int, int, int]) -> list[str]:
    """What about these annotations limits the metric or leaves it undefined, each with the remedy."""
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
            f"there where only {most} detections per image are kept; raise postprocess.detections_per_img and "
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
