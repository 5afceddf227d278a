"""Detections in COCO's terms: arrays with image ids, category ids and xywh boxes, and COCO results files."""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.atomic import write_text
from detector.boxes import xyxy_to_xywh
from detector.errors import ResultsError
from detector.files import os_error_reason, read_bytes
from detector.json_text import JsonError, RepeatedKeyError, parse_json
from detector.structures import Categories, Detections, GroundTruth
from detector.text import MAX_MESSAGE, as_many_as_fit, cut, shown


@dataclass(frozen=True)
class CocoResults:
    """The detections of many images. Among equal scores within an image, the earlier detection ranks first."""

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
        columns = (self.image_ids, self.category_ids, self.boxes, self.scores)
        shapes = [a.shape for a in columns]
        if shapes != [(n,), (n,), (n, 4), (n,)]:
            raise ValueError(
                "CocoResults must have image_ids (N,), category_ids (N,), boxes (N, 4) and scores (N,), got "
                + ", ".join(map(str, shapes))
            )
        dtypes = [a.dtype for a in columns]
        if dtypes != [np.int64, np.int64, np.float64, np.float64]:
            raise ValueError(f"CocoResults must be int64, int64, float64, float64, got {', '.join(map(str, dtypes))}")
        # The product as well: an area beyond float64 makes an IoU of inf / inf, which pycocotools counts as a match.
        finite = np.isfinite(self.boxes).all(axis=1) & np.isfinite(self.scores)
        with np.errstate(over="ignore", invalid="ignore"):
            finite &= np.isfinite(self.boxes[:, 2] * self.boxes[:, 3])
        for rule, valid in (("finite", finite), ("of width and height >= 0", (self.boxes[:, 2:] >= 0).all(axis=1))):
            if not valid.all():
                i = int(np.argmin(valid))
                raise ValueError(
                    f"CocoResults must be {rule}, got {n - int(valid.sum())} that are not; the first is number {i}: "
                    f"image {self.image_ids[i]}, bbox {self.boxes[i].tolist()}, score {self.scores[i]}"
                )

    def __len__(self) -> int:
        return len(self.image_ids)

    @staticmethod
    def concatenate(parts: Sequence[CocoResults]) -> CocoResults:
        """Concatenate results in the given order; an empty sequence gives empty results."""
        return CocoResults(
            np.concatenate([np.empty(0, np.int64), *(p.image_ids for p in parts)]),
            np.concatenate([np.empty(0, np.int64), *(p.category_ids for p in parts)]),
            np.concatenate([np.empty((0, 4)), *(p.boxes for p in parts)]),
            np.concatenate([np.empty(0), *(p.scores for p in parts)]),
        )

    def to_json_records(self) -> list[dict[str, Any]]:
        """Convert to COCO's results format; every number reads back as the same float64."""
        columns = (self.image_ids.tolist(), self.category_ids.tolist(), self.boxes.tolist(), self.scores.tolist())
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": score}
            for image, category, box, score in zip(*columns, strict=True)
        ]


def detections_to_results(image_id: int, detections: Detections, categories: Categories) -> CocoResults:
    """Convert one image's detections, with boxes (N, 4) xyxy in pixels of the original image.

    Raises:
        ValueError: labels outside 0..K-1, or values that `CocoResults` refuses.
    """
    detections = detections.cpu()
    labels = detections.labels.numpy()
    if ((labels < 0) | (labels >= len(categories))).any():
        raise ValueError(
            f"labels must lie in 0..{len(categories) - 1}, got {labels.min()}..{labels.max()} for image {image_id}"
        )
    return CocoResults(
        np.full(len(detections), image_id, np.int64),
        np.asarray(categories.ids, np.int64)[labels],
        xyxy_to_xywh(detections.boxes.double()).numpy(),  # float64 first: the subtraction then rounds nothing away
        detections.scores.double().numpy(),
    )


def write_results(path: Path, results: CocoResults) -> None:
    """Write a COCO results file, one detection per line; readers see either the old file or the complete new one."""
    write_text("[" + ",".join("\n" + json.dumps(record) for record in results.to_json_records()) + "\n]\n", path)


def load_results(path: Path, ground_truth: GroundTruth) -> CocoResults:
    """Read a COCO results file and validate it against the annotations. An empty list is valid.

    Raises:
        ResultsError: lists every problem of the file.
    """
    try:
        records = parse_json(read_bytes(path))
    except OSError as error:
        raise ResultsError(f"{path} must be a readable file, got: {os_error_reason(error)}") from error
    except JsonError as error:
        whole = "" if isinstance(error, RepeatedKeyError) else ". Was it written completely?"
        raise ResultsError(f"{path} must be JSON, got: {error}{whole}") from error
    if not isinstance(records, list):
        keys = cut([shown(key) for key in islice(records, 8)], 8) if isinstance(records, dict) else ""
        got = f"an object with the keys {keys}" if keys else shown(records)
        raise ResultsError(
            f"{path} must be a COCO results file, a list of {_RECORD}, got {got}. "
            "(Annotations belong in the config, under data.)"
        )
    problems = _problems(records, ground_truth)
    if problems:
        raise ResultsError(
            f"{path} must be a COCO results file for these annotations, got {len(records)} results with problems:\n"
            + "\n".join(as_many_as_fit([f"- {p}" for p in problems], MAX_MESSAGE - 500))
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


def _problems(records: list[Any], ground_truth: GroundTruth) -> list[str]:
    """Summarize the problems of a results file, one line per kind: the number, the first three cases, the remedy."""
    image_ids = set(ground_truth.image_ids.tolist())
    category_ids = set(ground_truth.categories.ids)
    counts: Counter[str] = Counter()
    cases_of: defaultdict[str, list[str]] = defaultdict(list)  # the first three of each kind
    for i, record in enumerate(records):
        for kind, case in _problems_of_record(record, image_ids, category_ids):
            counts[kind] += 1
            if counts[kind] <= 3:
                cases_of[kind].append(f"{shown(case)} (result {i})")
    if not counts:
        return []

    used = (r["category_id"] for r in records if isinstance(r, dict) and _is_id(r.get("category_id")))
    use_ids = "write the category ids of the annotation file"
    if all(0 <= category_id < len(category_ids) for category_id in used):
        use_ids = f"these look like class indices 0..{len(category_ids) - 1}: write each class's category id instead"
    remedies = {
        "not an object": f"every result must be {_RECORD}",
        "masks without bbox": "these are segmentation results, and boxes are scored here; export a bbox for each",
        "keys missing": f"every result must be {_RECORD}",
        "image_id not an integer": "image ids must be those of the annotation file",
        "image_id unknown": f"the annotations hold {len(image_ids)} images with ids {brief_list(image_ids)}; "
        "score the split that these results were made on",
        "category_id not an integer": "category ids must be those of the annotation file",
        "category_id unknown": f"the annotations declare the ids {brief_list(category_ids)}; {use_ids}",
        "score not finite": "scores must be finite numbers; a model that diverged gives nan",
        "bbox not four numbers": "bbox must be [x, y, width, height]",
        "bbox not finite": "boxes must be finite numbers; a model that diverged gives nan",
        "bbox negative": "width and height must be at least 0; bbox is [x, y, width, height], not two corners",
    }
    return [
        f"{kind}, {counts[kind]} times: {', '.join(cases_of[kind])}{', ...' if counts[kind] > 3 else ''}; {remedy}"
        for kind, remedy in remedies.items()
        if counts[kind]
    ]


def _problems_of_record(record: object, image_ids: set[int], category_ids: set[int]) -> Iterator[tuple[str, object]]:
    """Yield each problem of one result as its kind (a key of the remedies) and the offending value."""
    if not isinstance(record, dict):
        yield "not an object", record
        return
    missing = [key for key in _KEYS if key not in record]
    if missing == ["bbox"] and "segmentation" in record:
        yield "masks without bbox", list(record)
    elif missing:
        yield "keys missing", missing
    for key, known in (("image_id", image_ids), ("category_id", category_ids)):
        if key in record and not _is_id(record[key]):
            yield f"{key} not an integer", record[key]
        elif key in record and record[key] not in known:
            yield f"{key} unknown", record[key]
    if "score" in record and not _is_finite(record["score"]):
        yield "score not finite", record["score"]
    if "bbox" in record:
        box = record["bbox"]
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(v, int | float) for v in box)):
            yield "bbox not four numbers", box
        elif not (all(map(_is_finite, box)) and _is_finite(float(box[2]) * float(box[3]))):
            yield "bbox not finite", box
        elif box[2] < 0 or box[3] < 0:
            yield "bbox negative", box


def _is_finite(value: object) -> bool:
    # The comparison also holds for integers beyond the range of float, for which math.isfinite raises.
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and -sys.float_info.max <= value <= sys.float_info.max  # type: ignore[operator]


def _is_id(value: object) -> bool:
    """Whether a value is an integer or an integral float, which some exporters write and pycocotools accepts."""
    return (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and value.is_integer())


def brief_list(values: Collection[int]) -> str:
    """List values in ascending order, with the middle elided if there are more than eight."""
    ordered = [str(v) for v in sorted(values)]
    return ", ".join(ordered if len(ordered) <= 8 else [*ordered[:5], "...", ordered[-1]])
