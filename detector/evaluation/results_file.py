"""Read COCO results files: validate every record, and find the images and classes that records name."""

from __future__ import annotations

import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from detector.datasets.ids import FileIds, id_key
from detector.datasets.json_columns import number_in
from detector.errors import ResultsError
from detector.evaluation.coco_results import CocoResults, brief_list
from detector.file_kinds import LONGEST, other_kind
from detector.files import os_error_reason, read_bytes
from detector.json_text import JsonError, RepeatedKeyError, parse_json
from detector.structures import GroundTruth
from detector.text import MAX_MESSAGE, as_many_as_fit, cut, printable, shown

_KEYS = ("image_id", "category_id", "bbox", "score")
_RECORD = '{"image_id", "category_id", "bbox": [x, y, width, height], "score"}'


def load_results(
    path: Path,
    ground_truth: GroundTruth,
    *,
    file_ids: FileIds | None = None,
    file_names: Sequence[str] | None = None,
    notes: list[str] | None = None,
) -> CocoResults:
    """Read a COCO results file and validate it against the annotations. An empty list is valid.

    Records of `tools/predict.py` and other programs that number images themselves have a `file_name` and a
    `category_name`. Where these are those of the annotations, they decide which image and class a record belongs to.

    Args:
        path: the file.
        ground_truth: N images and their annotations.
        file_ids: the ids as the annotations write them; None: as integers.
        file_names: of the N images; None: ids alone decide.
        notes: receives what the reader should know about how records were read.

    Raises:
        ResultsError: lists every problem of the file.
    """
    records = _records(path)
    notes = [] if notes is None else notes
    ids = FileIds() if file_ids is None else file_ids
    if file_names is not None:
        records = _matched_by_name(records, ground_truth, file_names, ids, notes)
    columns = _Columns(records, ids)
    problems = _problems(records, columns, ground_truth)
    if problems:
        raise ResultsError(
            f"{path} must be a COCO results file for these annotations, got {len(records)} results with problems:\n"
            + "\n".join(as_many_as_fit([f"- {p}" for p in problems], MAX_MESSAGE - 500))
        )
    n = len(records)
    return CocoResults(
        columns.image_ids,
        columns.category_ids,
        np.array([[number_in(v) for v in r["bbox"]] for r in records], np.float64).reshape(n, 4),
        np.array([number_in(r["score"]) for r in records], np.float64),
    )


def _records(path: Path) -> list[Any]:
    """Parse a results file: a list."""
    try:
        raw = read_bytes(path)
        kind = other_kind(raw[:LONGEST], expected=("gzip",))
        if kind:
            raise ResultsError(f"{path} {kind}; expected a COCO results file (JSON)")
        records = parse_json(raw)
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
    return records


# --- images and classes by name


def _matched_by_name(
    records: list[Any], ground_truth: GroundTruth, file_names: Sequence[str], ids: FileIds, notes: list[str]
) -> list[Any]:
    """Return records whose ids are those of the annotations, by file name and class name, where records have both.

    Records of files that the annotations do not list are left out, which is noted, if others are listed.
    """
    if not records or not all(isinstance(r, dict) and isinstance(r.get("file_name"), str) for r in records):
        return records
    image_of = _images_by_name({r["file_name"] for r in records}, ground_truth, file_names)
    if not any(image is not None for image in image_of.values()):
        return records
    listed = [r for r in records if image_of[r["file_name"]] is not None]
    if len(listed) < len(records):
        unlisted = [name for name, image in image_of.items() if image is None]
        notes.append(
            f"left out: {len(records) - len(listed):,} detections in {len(unlisted):,} files that the annotations do "
            f"not list, for example {shown(unlisted[0])}"
        )
    changed = [{**r, "image_id": ids.images.original(int(image_of[r["file_name"]] or 0))} for r in listed]
    if any(id_key(new["image_id"]) != id_key(old.get("image_id")) for new, old in zip(changed, listed, strict=True)):
        notes.append("images are matched by file_name, because image_id is not that of the annotations")
    categories = ground_truth.categories
    class_of = {
        name: ids.categories.original(number) for name, number in zip(categories.names, categories.ids, strict=True)
    }
    names = [r.get("category_name") for r in changed]
    if all(isinstance(name, str) and printable(name) in class_of for name in names):
        renamed = [{**r, "category_id": class_of[printable(str(r["category_name"]))]} for r in changed]
        if any(
            id_key(new["category_id"]) != id_key(old.get("category_id"))
            for new, old in zip(renamed, changed, strict=True)
        ):
            notes.append("classes are matched by category_name, because category_id is not that of the annotations")
        changed = renamed
    return changed


def _images_by_name(wanted: set[str], ground_truth: GroundTruth, file_names: Sequence[str]) -> Mapping[str, int | None]:
    """Find the image id of each file name: of two paths to the same file, one ends with the other."""
    parts_of_name: defaultdict[str, list[tuple[tuple[str, ...], int]]] = defaultdict(list)
    for name, image_id in zip(file_names, ground_truth.image_ids.tolist(), strict=True):
        parts = _parts(name)
        parts_of_name[parts[-1]].append((parts, image_id))
    found: dict[str, int | None] = {}
    for name in wanted:
        parts = _parts(name)
        same = []
        for other, image_id in parts_of_name.get(parts[-1], []):
            length = min(len(parts), len(other))
            if parts[-length:] == other[-length:]:
                same.append((length, image_id))
        longest = max((length for length, _ in same), default=0)
        best = {image_id for length, image_id in same if length == longest}
        found[name] = best.pop() if len(best) == 1 else None
    return found


def _parts(name: str) -> tuple[str, ...]:
    """The folders and the name of a path, whatever the system that wrote it."""
    parts = tuple(part for part in unicodedata.normalize("NFC", name).replace("\\", "/").split("/") if part != ".")
    return parts or ("",)


# --- validation


class _Columns:
    """The ids of all records as integers, and where a record has none."""

    def __init__(self, records: list[Any], ids: FileIds) -> None:
        entries = [record if isinstance(record, dict) else {} for record in records]
        self.image_ids, self.no_image, _ = ids.images.read([entry.get("image_id") for entry in entries])
        self.category_ids, self.no_category, _ = ids.categories.read([entry.get("category_id") for entry in entries])


def _problems(records: list[Any], columns: _Columns, ground_truth: GroundTruth) -> list[str]:
    """Summarize the problems of a results file, one line per kind: the number, the first three cases, the remedy."""
    image_ids = set(ground_truth.image_ids.tolist())
    category_ids = set(ground_truth.categories.ids)
    counts: Counter[str] = Counter()
    cases_of: defaultdict[str, list[str]] = defaultdict(list)  # the first three of each kind
    known_image = np.isin(columns.image_ids, ground_truth.image_ids) & ~columns.no_image
    known_category = np.isin(columns.category_ids, ground_truth.categories.ids) & ~columns.no_category
    known = zip(known_image.tolist(), known_category.tolist(), strict=True)
    for i, (record, (has_image, has_category)) in enumerate(zip(records, known, strict=True)):
        for kind, case in _problems_of_record(record, has_image=has_image, has_category=has_category):
            counts[kind] += 1
            if counts[kind] <= 3:
                cases_of[kind].append(f"{shown(case)} (result {i})")
    if not counts:
        return []

    used = columns.category_ids[~columns.no_category]
    use_ids = "write the category ids of the annotation file"
    if ((used >= 0) & (used < len(category_ids))).all():
        use_ids = f"these look like class indices 0..{len(category_ids) - 1}: write each class's category id instead"
    has_names = any(isinstance(r, dict) and "file_name" in r for r in records[:1])
    use_images = (
        "neither image_id nor file_name is that of an image of the annotations; score the split that these results "
        "were made on"
        if has_names
        else "score the split that these results were made on; if another program numbered the images, write the ids "
        "of the annotations, or add file_name to every result"
    )
    remedies = {
        "not an object": f"every result must be {_RECORD}",
        "masks without bbox": "these are segmentation results, and boxes are scored here; export a bbox for each",
        "keys missing": f"every result must be {_RECORD}",
        "image_id is no id": "image ids must be those of the annotation file",
        "image_id unknown": f"the annotations hold {len(image_ids)} images with ids {brief_list(image_ids)}; "
        + use_images,
        "category_id is no id": "category ids must be those of the annotation file",
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


def _problems_of_record(record: object, *, has_image: bool, has_category: bool) -> Iterator[tuple[str, object]]:
    """Yield each problem of one result as its kind (a key of the remedies) and the offending value.

    Args:
        record: the result.
        has_image, has_category: whether its ids are those of an image and a category of the annotations.
    """
    if not isinstance(record, dict):
        yield "not an object", record
        return
    missing = [key for key in _KEYS if key not in record]
    if missing == ["bbox"] and "segmentation" in record:
        yield "masks without bbox", list(record)
    elif missing:
        yield "keys missing", missing
    for key, known in (("image_id", has_image), ("category_id", has_category)):
        if key in record and not known:
            yield f"{key} {'is no id' if id_key(record[key]) is None else 'unknown'}", record[key]
    if "score" in record and not _is_finite(number_in(record["score"])):
        yield "score not finite", record["score"]
    if "bbox" in record:
        box = record["bbox"]
        numbers = [number_in(v) for v in box] if isinstance(box, list) and len(box) == 4 else [None]
        width, height = numbers[-2:] if len(numbers) == 4 else (None, None)
        if width is None or height is None or None in numbers:
            yield "bbox not four numbers", box
        elif not (all(map(_is_finite, numbers)) and _is_finite(width * height)):
            yield "bbox not finite", box
        elif width < 0 or height < 0:
            yield "bbox negative", box


def _is_finite(value: float | None) -> bool:
    return value is not None and -sys.float_info.max <= value <= sys.float_info.max
