"""Detections in COCO's terms: arrays with image ids, category ids and xywh boxes, and COCO results files."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.atomic import write_text
from detector.boxes import xyxy_to_xywh
from detector.datasets.ids import FileIds
from detector.structures import Categories, Detections


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


def write_results(path: Path, results: CocoResults, file_ids: FileIds | None = None) -> None:
    """Write a COCO results file, one detection per line; readers see either the old file or the complete new one.

    Args:
        path: of the file.
        results: the detections.
        file_ids: the ids as the annotations write them; None: as integers.
    """
    records = results.to_json_records()
    if file_ids is not None and (file_ids.images.originals or file_ids.categories.originals):
        for record in records:
            record["image_id"] = file_ids.images.original(record["image_id"])
            record["category_id"] = file_ids.categories.original(record["category_id"])
    write_text("[" + ",".join("\n" + json.dumps(record) for record in records) + "\n]\n", path)


def brief_list(values: Collection[int]) -> str:
    """List values in ascending order, with the middle elided if there are more than eight."""
    ordered = [str(v) for v in sorted(values)]
    return ", ".join(ordered if len(ordered) <= 8 else [*ordered[:5], "...", ordered[-1]])
