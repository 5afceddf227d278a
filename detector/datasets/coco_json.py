"""The entries of a COCO annotation file, taken out of the JSON column by column; every malformed one is a `Problem`."""

from __future__ import annotations

import difflib
import gc
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.datasets.problems import Problem, printable, problem, shown
from detector.errors import DatasetError
from detector.structures import Categories


def cut(words: Sequence[str], limit: int) -> str:
    """The words in a row; of many the first and the last, with the count of the others."""
    if len(words) <= limit + 1:
        return ", ".join(words)
    return f"{', '.join(words[: limit - 1])}, ... ({len(words) - limit:,} more), {words[-1]}"


def load_json(path: Path) -> Any:
    """The parsed JSON. Raises `DatasetError` where there is none."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such annotation file{nearest_path(path)}") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {error.strerror or error}") from error
    head = raw[:200].lstrip()
    if head.startswith(b"version https://git-lfs"):
        raise DatasetError(f"{path}: is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`")
    if not raw.strip():
        raise DatasetError(f"{path}: the file is empty; expected a COCO annotation file (JSON)")
    # Collecting garbage among millions of new objects, none of which is garbage, doubles the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        text = raw.decode(json.detect_encoding(raw))
        del raw  # with a large file the bytes, the text and the objects need not all stand in memory
        return json.loads(text, object_hook=_without_needless_segmentation)
    except json.JSONDecodeError as error:
        kind = "XML" if head.startswith(b"<") else "no valid JSON"
        near = printable(error.doc[max(0, error.pos - 30) : error.pos + 30])
        raise DatasetError(
            f"{path}: {kind}: {error.msg} at line {error.lineno}, column {error.colno}, near: {near}\n"
            "Expected a COCO annotation file (JSON). If it was downloaded or copied, do that again."
        ) from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DatasetError(f"{path}: no valid JSON: {error}\nExpected a COCO annotation file (JSON).") from None
    finally:
        if collecting:
            gc.enable()


def _without_needless_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    """Polygons are nine tenths of a COCO file, and of use only where an annotation has no box."""
    box = entry.get("bbox")
    if type(box) is list and len(box) == 4:
        entry.pop("segmentation", None)
    return entry


def require_coco(path: Path, content: Any) -> None:
    """Raises `DatasetError`, saying what the file looks like, unless it has the three lists of a COCO file."""
    lists = ("images", "annotations", "categories")
    if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in lists):
        first = next((a for a in content["annotations"] if isinstance(a, dict)), {})
        if "segments_info" not in first:
            return
        looks = "a COCO panoptic file (its annotations have segments_info instead of a box)"
    elif isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        looks = "a list"
        if "score" in first and "image_id" in first:
            looks = "a COCO results file (detections with scores, which eval takes as --detections)"
        elif "bbox" in first:
            looks = "a list of annotations without their images and categories"
    elif isinstance(content, dict):
        missing = [key for key in lists if not isinstance(content.get(key), list)]
        keys = ", ".join(list(map(printable, content))[:8]) or "none"
        looks = f"a file without a list of {' and '.join(missing)} (its keys: {keys})"
        if "shapes" in content and "imagePath" in content:
            looks = "a labelme file (one per image)"
        elif "_via_settings" in content or any("regions" in v for v in content.values() if isinstance(v, dict)):
            looks = "a VGG Image Annotator file"
        elif content.get("type") == "FeatureCollection":
            looks = "a GeoJSON file"
        elif missing == ["annotations"]:
            looks += ", as COCO publishes for its test images"
        elif any("caption" in a for a in content.get("annotations") or () if isinstance(a, dict)):
            looks = "a COCO captions file"
    else:
        looks = shown(content)
    raise DatasetError(
        f"{path}: must be a COCO annotation file, got {looks}.\n"
        'Expected: {"images": [{"id", "file_name", ...}],\n'
        '           "annotations": [{"image_id", "category_id", "bbox": [x, y, width, height]}],\n'
        '           "categories": [{"id", "name"}]}'
    )


FETCHED = {"bccd": "bccd", "coco": "coco2017"}
"""Folders of data that `tools/get_data.py` makes, and by which name."""


def nearest_path(path: Path) -> str:
    """What exists instead of a path: the part of it that does, and the most similar name there; or how to fetch it."""
    parent = path.absolute()
    missing = parent.name
    while not os.path.isdir(parent.parent):
        parent = parent.parent
        missing = parent.name
    parent = parent.parent
    if missing in FETCHED:
        return f"; python tools/get_data.py {FETCHED[missing]} makes {parent / missing}"
    try:
        there = sorted(os.listdir(parent))
    except OSError:
        return ""
    near = difflib.get_close_matches(missing, there, 1, 0.5)
    if near:
        return f"; nearest in {parent}: {near[0]}"
    told = f"; {parent} has no {missing}" + (f", but {cut(there, 5)}" if there else " and is empty")
    if parent == Path.cwd():
        told += "; relative paths start at the folder the program was started in"
    return told


def read_categories(
    path: Path, declared: list[Any], training: Categories | None, problems: list[Problem]
) -> tuple[Categories, dict[int, int]]:
    """The classes and the label of each category id. Raises `DatasetError` with all mistakes."""
    mistakes: list[str] = []
    names: dict[int, str] = {}
    for k, category in enumerate(declared):
        if not isinstance(category, dict):
            mistakes.append(f"categories[{k}] must be an object with id and name, got {shown(category)}")
            continue
        number, name = _integer(category.get("id")), category.get("name")
        if number is None:
            mistakes.append(f"categories[{k}] must have an integer id, got {shown(category.get('id'))}")
        elif not isinstance(name, str) or not name:
            mistakes.append(f"categories[{k}] (id {number}) must have a name, got {shown(name)}")
        elif number in names:
            mistakes.append(f"category id {number} must stand for one class, got {names[number]!r} and {name!r}")
        else:
            names[number] = name
            if type(category["id"]) is not int:
                where = f"category {number} ({name})"
                problems.append(problem("number written as text", where, f"id {shown(category['id'])}"))
    for name, uses in Counter(names.values()).items():
        if uses > 1:
            owners = ", ".join(str(i) for i in names if names[i] == name)
            mistakes.append(f"category name {name!r} must belong to one id, got ids {owners}")
    if not declared:
        mistakes.append('"categories" must declare at least one class, got none')
    if mistakes:
        raise DatasetError("\n".join([f"{path}: its categories contradict themselves", *(f"  {m}" for m in mistakes)]))
    if training is None:
        ids = sorted(names)
        return Categories(tuple(ids), tuple(names[i] for i in ids)), {i: k for k, i in enumerate(ids)}

    only_here = [n for n in names.values() if n not in set(training.names)]
    only_there = [n for n in training.names if n not in set(names.values())]
    if only_here or only_there:
        raise DatasetError(_names_differ(path, only_here, only_there))
    id_of_name = {name: i for i, name in names.items()}
    ids = [id_of_name[name] for name in training.names]
    return Categories(tuple(ids), training.names), {i: k for k, i in enumerate(ids)}


def _names_differ(path: Path, only_here: list[str], only_there: list[str]) -> str:
    lines = [f"{path}: its category names must be those of training; classes are matched by name"]
    for title, names, others in (
        ("only in this file", only_here, only_there),
        ("only in training", only_there, only_here),
    ):
        lines.append(f"  {title}: {'none' if not names else ''}".rstrip())
        for name in names[:40]:
            near = difflib.get_close_matches(name, others, 1, 0.6)
            lines.append(f"    {name!r}" + (f"  (nearest on the other side: {near[0]!r})" if near else ""))
        if len(names) > 40:
            lines.append(f"    ... and {len(names) - 40:,} more")
    return "\n".join([*lines, "Rename the categories in one of the files, or choose the file that belongs to these."])


# Columns: values of one key over all entries, checked at C speed where all have the right type


def _integer(value: object) -> int | None:
    """An integer, or what clearly is one (7.0, "7"); None otherwise, and for booleans."""
    whole = isinstance(value, float) and value.is_integer()
    if whole or (isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,19}\s*", value)):
        value = int(value)  # type: ignore[call-overload]
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    return None


def _integers(values: list[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """(n,) values, where they are none, and where they were written as something else."""
    n = len(values)
    if set(map(type, values)) <= {int}:
        try:
            return np.array(values, np.int64), np.zeros(n, bool), np.zeros(n, bool)
        except OverflowError:
            pass
    read = [_integer(v) for v in values]
    bad = np.array([r is None for r in read], bool)
    other = np.array([type(v) is not int for v in values], bool)
    return np.array([r or 0 for r in read], np.int64), bad, other & ~bad


def _positive(values: list[Any]) -> NDArray[np.int32]:
    """(n,) image widths or heights; 0 where there is no usable one."""
    numbers, bad, _ = _integers(values)
    return np.where(bad | (numbers <= 0) | (numbers > 2**31 - 1), 0, numbers).astype(np.int32)


def _flags(values: list[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """(n,) iscrowd or ignore, and where it is neither 0 nor 1 nor absent."""
    known: dict[float | None, bool] = {0: False, 1: True, None: False}  # True and 1.0 are equal to 1
    read = [known.get(v) if isinstance(v, int | float | None) else None for v in values]
    bad = np.array([r is None for r in read], bool)
    return np.array([bool(r) for r in read], bool), bad


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


def _quads(values: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(n, 4) boxes, and where they are not four numbers."""
    if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
        flat = list(chain.from_iterable(values))
        if set(map(type, flat)) <= {int, float}:
            try:
                return np.array(flat, np.float64).reshape(-1, 4), np.zeros(len(values), bool)
            except OverflowError:
                pass
    boxes, bad = np.zeros((len(values), 4)), np.zeros(len(values), bool)
    for k, value in enumerate(values):
        if type(value) is list and len(value) == 4 and all(map(_is_number, value)):
            boxes[k] = [_float(v) for v in value]
        else:
            bad[k] = True
    return boxes, bad


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def numbers_text(values: Iterable[float]) -> str:
    """Numbers as they may stand in a message."""
    return f"[{', '.join(f'{v:.7g}' for v in values)}]"


# Images


@dataclass
class ImageEntries:
    """The E image entries with a usable id, in the order of the file; `alive` are those still in the dataset."""

    ids: NDArray[np.int64]
    names: list[str]
    sizes: NDArray[np.int32]
    """(E, 2) height and width; 0 where not known. From the JSON first, then as decoded."""
    alive: NDArray[np.bool_]

    def where(self, i: int) -> str:
        """Name entry i for a message."""
        return f"image {self.ids[i]} ({self.names[i]})"

    def drop(self, i: int, problems: list[Problem], kind: str, detail: str) -> None:
        """Take entry i out of the dataset, and say why."""
        self.alive[i] = False
        problems.append(problem(kind, self.where(i), detail))


def read_images(items: list[Any], problems: list[Problem], *, with_files: bool) -> ImageEntries:
    """The entries of "images"; file names matter only `with_files`."""
    entries = []
    for k, item in enumerate(items):
        if not isinstance(item, dict):
            problems.append(problem("malformed image", f"images[{k}]", f"must be an object, got {shown(item)}"))
        elif _integer(item.get("id")) is None:
            name = shown(item.get("file_name"))
            detail = f"id must be an integer, got {shown(item.get('id'))}"
            problems.append(problem("malformed image", f"images[{k}] ({name})", detail))
        else:
            entries.append(item)
    ids, _, as_text = _integers([item["id"] for item in entries])
    raw_names = [item.get("file_name") for item in entries]
    names = [name if isinstance(name, str) else "" for name in raw_names]
    sizes = np.stack([_positive([i.get(key) for i in entries]) for key in ("height", "width")], axis=1)
    table = ImageEntries(ids, names, sizes, np.ones(len(ids), bool))
    for i in np.flatnonzero(as_text).tolist():
        detail = f"id {shown(entries[i]['id'])}"
        problems.append(problem("number written as text", table.where(i), detail))

    first = np.zeros(len(ids), bool)
    first[np.unique(ids, return_index=True)[1]] = True
    if not first.all():
        original = dict(zip(ids[first].tolist(), np.flatnonzero(first).tolist(), strict=True))
        for i in np.flatnonzero(~first).tolist():
            earlier = names[original[int(ids[i])]]
            table.drop(i, problems, "duplicate image id", f"the id belongs to {earlier or 'an earlier entry'} already")
    if with_files:
        seen: dict[str, int] = {}
        for i in np.flatnonzero(table.alive).tolist():
            if not isinstance(raw_names[i], str):
                detail = f"file_name must be text, got {shown(raw_names[i])}"
                table.drop(i, problems, "malformed image", detail)
            elif seen.setdefault(names[i], i) != i:
                detail = f"image {ids[seen[names[i]]]} has the same file"
                problems.append(problem("duplicate file name", table.where(i), detail))
    return table


def drop_unsafe_names(entries: ImageEntries, root: Path, problems: list[Problem]) -> None:
    """Leave out images whose name leads out of the folder.

    Links that the folder's owner put there are followed (datasets are often linked together); a name with ".." is
    judged by where it really leads.
    """
    real_root = os.path.realpath(root)
    for i in np.flatnonzero(entries.alive).tolist():
        name = entries.names[i]
        if not name.strip():
            entries.drop(i, problems, "unsafe file name", "file_name is empty")
        elif "\0" in name or not _encodable(name):
            entries.drop(i, problems, "unsafe file name", "file_name has characters that no file name can have")
        elif name[0] in "/\\" or re.match(r"[A-Za-z]:[\\/]", name):
            entries.drop(i, problems, "unsafe file name", "file_name must be relative to the image folder")
        elif ".." in name and ".." in re.split(r"[\\/]", name):
            real = os.path.realpath(os.path.join(root, name))
            if not real.startswith(real_root.rstrip(os.sep) + os.sep):
                entries.drop(i, problems, "unsafe file name", f"leads out of the image folder, to {real}")


def _encodable(name: str) -> bool:
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


# Annotations


@dataclass
class AnnotationEntries:
    """The annotations that have an image entry, a class and four numbers, in the order of the file."""

    rows: NDArray[np.int64]
    """(T,) row in `ImageEntries`."""
    labels: NDArray[np.int32]
    xywh: NDArray[np.float64]
    areas: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    ignore: NDArray[np.bool_]
    ids: NDArray[np.int64]
    has_id: NDArray[np.bool_]
    positions: NDArray[np.int64]
    """(T,) index in the file's list."""

    def where(self, k: int, entries: ImageEntries) -> str:
        """Name annotation k for a message."""
        name = f"annotation {self.ids[k]}" if self.has_id[k] else f"annotations[{self.positions[k]}]"
        return f"{name} ({entries.where(int(self.rows[k]))[:-1].replace(' (', ', ', 1)})"


def read_annotations(
    items: list[Any], entries: ImageEntries, label_of_id: dict[int, int], problems: list[Problem]
) -> AnnotationEntries:
    """The annotations that have an image entry, a declared class and a box; what is wrong with the others.

    Ids may be written as "3" or 3.0, which is noted; anything else that is no integer is malformed.
    """
    is_object = np.array([type(a) is dict for a in items], bool)
    for k in np.flatnonzero(~is_object).tolist():
        problems.append(
            problem("malformed annotation", f"annotations[{k}]", f"must be an object, got {shown(items[k])}")
        )
    positions = np.flatnonzero(is_object)
    dicts = [items[k] for k in positions.tolist()] if len(positions) < len(items) else items

    ids, no_id, id_text = _integers([a.get("id") for a in dicts])
    image_ids, no_image, image_text = _integers([a.get("image_id") for a in dicts])
    category_ids, no_category, category_text = _integers([a.get("category_id") for a in dicts])
    crowd, bad_crowd = _flags([a.get("iscrowd") for a in dicts])
    ignore, bad_ignore = _flags([a.get("ignore") for a in dicts])
    xywh, no_box = _quads([a.get("bbox") for a in dicts])

    def where(k: int) -> str:
        name = f"annotations[{positions[k]}]" if no_id[k] else f"annotation {ids[k]}"
        return f"{name} (image {shown(dicts[k].get('image_id'))})"

    derived = {k: box for k in np.flatnonzero(no_box).tolist() if (box := box_of_segmentation(dicts[k])) is not None}
    for k, box in derived.items():
        xywh[k], no_box[k] = box, False
        detail = f"bbox {shown(dicts[k].get('bbox'))}, the segmentation gives {numbers_text(box)}"
        problems.append(problem("box from segmentation", where(k), detail))

    malformed = no_image | no_category | no_box | bad_crowd | bad_ignore
    for k in np.flatnonzero(malformed).tolist():
        a = dicts[k]
        details = [
            f"{key} must be {rule}, got {shown(a.get(key))}"
            for key, bad, rule in (
                ("image_id", no_image, "an integer"),
                ("category_id", no_category, "an integer"),
                ("bbox", no_box, "four numbers"),
                ("iscrowd", bad_crowd, "0 or 1"),
                ("ignore", bad_ignore, "0 or 1"),
            )
            if bad[k]
        ]
        problems.append(problem("malformed annotation", where(k), "; ".join(details)))
    for k in np.flatnonzero(id_text | image_text | category_text).tolist():
        written = {key: dicts[k].get(key) for key in ("id", "image_id", "category_id")}
        problems.append(problem("number written as text", where(k), shown(written)))
    for k in np.flatnonzero(no_id).tolist():
        problems.append(
            problem("unusable annotation id", where(k), f"id must be an integer, got {shown(dicts[k].get('id'))}")
        )

    # An id stands for the first entry that has it; a malformed image entry has none.
    known_ids, first_rows = np.unique(entries.ids, return_index=True)
    spot = np.minimum(np.searchsorted(known_ids, image_ids), max(0, len(known_ids) - 1))
    has_image = known_ids[spot] == image_ids if len(known_ids) else np.zeros(len(image_ids), bool)
    rows = first_rows[spot] if len(known_ids) else np.zeros(len(image_ids), np.int64)
    orphan = ~has_image & ~no_image
    for k in np.flatnonzero(orphan).tolist():
        problems.append(problem("orphan annotation", where(k), f"no image has the id {image_ids[k]}"))

    known = np.array(sorted(label_of_id), np.int64)
    place = np.minimum(np.searchsorted(known, category_ids), len(known) - 1)
    has_class = known[place] == category_ids
    labels = np.array([label_of_id[i] for i in known.tolist()], np.int32)[place]
    for k in np.flatnonzero(~has_class & ~no_category).tolist():
        detail = f"category_id {category_ids[k]} is not declared"
        problems.append(problem("unknown category", where(k), detail))

    real = np.flatnonzero(~no_id)
    again = np.ones(len(real), bool)
    again[np.unique(ids[real], return_index=True)[1]] = False
    for k in real[again].tolist():
        problems.append(problem("duplicate annotation id", where(k), f"an earlier annotation has the id {ids[k]} too"))

    keep = np.flatnonzero(~malformed & has_image & has_class)
    areas, unusable = _areas([dicts[k].get("area") for k in keep.tolist()], xywh[keep])
    for k in keep[unusable].tolist():
        detail = f"area must be a number of at least 0, got {shown(dicts[k].get('area'))}"
        problems.append(problem("unusable area", where(k), detail))
    return AnnotationEntries(
        rows[keep], labels[keep], xywh[keep], areas, crowd[keep], ignore[keep], ids[keep], ~no_id[keep], positions[keep]
    )


def _areas(values: list[Any], xywh: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """(T,) published areas, width times height where there is none; and where one was given that is no area."""
    areas = np.array([_float(v) if _is_number(v) else np.nan for v in values], np.float64)
    unusable = ~(np.isfinite(areas) & (areas >= 0))
    given = np.array([v is not None for v in values], bool)
    with np.errstate(over="ignore", invalid="ignore"):
        return np.where(unusable, xywh[:, 2] * xywh[:, 3], areas), unusable & given


def box_of_segmentation(annotation: dict[str, Any]) -> list[float] | None:
    """xywh around polygons or a run-length-encoded mask; None where there is no usable one."""
    shape = annotation.get("segmentation")
    if annotation.get("bbox") is not None:  # something stands there; that it is wrong must not be papered over
        return None
    if isinstance(shape, list):
        parts = [
            p for p in shape if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(_is_number, p))
        ]
        if not parts or len(parts) < len(shape):
            return None
        xs, ys = [_float(x) for p in parts for x in p[::2]], [_float(y) for p in parts for y in p[1::2]]
        return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    if not isinstance(shape, dict):
        return None
    size, counts = shape.get("size"), shape.get("counts")
    if not (isinstance(size, list) and len(size) == 2 and all(type(s) is int and 0 < s < 2**31 for s in size)):
        return None
    runs = _decompressed(counts) if isinstance(counts, str) else counts
    if not isinstance(runs, list) or not all(type(run) is int and run >= 0 for run in runs):
        return None
    return _box_of_runs(runs, size[0]) if sum(runs) == size[0] * size[1] else None


def _decompressed(text: str) -> list[int] | None:
    """The runs in a compressed mask; None where the text is not one.

    pycocotools does the same, but reads and writes beyond its buffers where the text is malformed. A number is 5 bits a
    character, the lowest first, the last one with its sign; from the fourth on it is the difference to the run before
    the last (cocoapi, maskApi.c, rleFrString).
    """
    runs: list[int] = []
    number = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits == 35:  # pycocotools' runs have 32 bits, and fit into seven characters
            return None
        number |= (code & 31) << bits
        bits += 5
        if code & 32:  # the number goes on
            continue
        if code & 16:
            number -= 1 << bits
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = bits = 0
    return None if bits else runs


def _box_of_runs(runs: list[int], height: int) -> list[float]:
    """xywh around a mask whose columns are runs of background and mask by turns; of size 0 where no pixel is mask."""
    ends = list(accumulate(runs))
    spans = [(ends[k - 1], ends[k] - 1) for k in range(1, len(runs), 2) if runs[k]]  # first and last pixel
    if not spans:
        return [0.0, 0.0, 0.0, 0.0]
    left, right = spans[0][0] // height, spans[-1][1] // height
    if any(first // height != last // height for first, last in spans):  # on from one column's foot to the next's head
        top, bottom = 0, height - 1
    else:
        top, bottom = min(first % height for first, _ in spans), max(last % height for _, last in spans)
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]
