"""Read a COCO annotation file into columns; every malformed entry becomes a `Problem`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.datasets.ids import FileIds, Ids, fits, id_key
from detector.datasets.json_columns import areas, boxes, flags, lengths, numbers_text
from detector.datasets.missing_paths import nearest_path
from detector.datasets.problems import COCO_FORMAT, Problem, problem
from detector.datasets.segmentation import box_of_segmentation
from detector.datasets.tables import NO_ID, AnnotationTable, ImageTable
from detector.errors import DatasetError
from detector.file_kinds import LONGEST, other_kind
from detector.files import os_error_reason, read_bytes
from detector.json_text import JsonError, RepeatedKeyError, parse_json
from detector.structures import Categories
from detector.text import cut, printable, shown

EXPECTED = "expected a COCO annotation file (JSON)"


def load_json(path: Path) -> Any:
    """Parse a JSON file.

    Raises:
        DatasetError: it does not exist, cannot be read or is no valid JSON.
    """
    try:
        return parse_json(_content(path), convert=_without_needless_segmentation)
    except RepeatedKeyError as error:
        raise DatasetError(f"{path}: {error}") from None
    except JsonError as error:
        raise DatasetError(f"{path}: no valid JSON: {error}; {EXPECTED}") from None


def _content(path: Path) -> bytes:
    try:
        raw = read_bytes(path)
    except FileNotFoundError:
        raise DatasetError(f"{path}: no such annotation file{nearest_path(path)}") from None
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read: {os_error_reason(error)}") from error
    kind = other_kind(raw[:LONGEST], expected=("gzip",)) or ("is empty" if not raw.strip() else "")
    if kind:
        raise DatasetError(f"{path}: {kind}; {EXPECTED}")
    return raw


def _without_needless_segmentation(entry: dict[str, Any]) -> dict[str, Any]:
    """Drop polygons, nine tenths of a COCO file, except where an annotation has no box."""
    box = entry.get("bbox")
    if type(box) is list and len(box) == 4:
        entry.pop("segmentation", None)
    return entry


def require_coco(path: Path, content: Any) -> None:
    """Require the three lists of a COCO file.

    Raises:
        DatasetError: they are missing; the message names the format that the file seems to have.
    """
    other = other_format(content)
    if other is not None:
        raise DatasetError(f"{path}: must be a COCO annotation file, got {other}; {COCO_FORMAT}")


def other_format(content: Any) -> str | None:
    """Describe parsed JSON that is not a COCO file; None where it is one."""
    lists = ("images", "annotations", "categories")
    if isinstance(content, dict) and all(isinstance(content.get(key), list) for key in lists):
        first = next((a for a in content["annotations"] if isinstance(a, dict)), {})
        if "segments_info" in first:
            return "a COCO panoptic file (its annotations have segments_info instead of a box)"
        return None
    if isinstance(content, list):
        first = content[0] if content and isinstance(content[0], dict) else {}
        if "score" in first and "image_id" in first:
            return "a COCO results file (detections with scores, which eval reads with --detections)"
        return "a list of annotations without their images and categories" if "bbox" in first else "a list"
    if not isinstance(content, dict):
        return shown(content)
    if "shapes" in content and "imagePath" in content:
        return "a labelme file (one per image)"
    if "_via_settings" in content or any("regions" in v for v in content.values() if isinstance(v, dict)):
        return "a VGG Image Annotator file"
    if content.get("type") == "FeatureCollection":
        return "a GeoJSON file"
    missing = [key for key in lists if not isinstance(content.get(key), list)]
    if missing != ["annotations"]:
        annotations = content.get("annotations")
        if isinstance(annotations, list) and any("caption" in a for a in annotations if isinstance(a, dict)):
            return "a COCO captions file"
    keys = cut([printable(key, 40) for key in islice(content, 8)], 8) or "none"
    published = ", as COCO publishes for its test images" if missing == ["annotations"] else ""
    return f"a file without a list of {' and '.join(missing)} (its keys: {keys}){published}"


def read_ids(content: dict[str, list[Any]]) -> FileIds:
    """Read the ids that a COCO file declares."""

    def ids(entries: list[Any]) -> Ids:
        return Ids(entry.get("id") for entry in entries if isinstance(entry, dict))

    return FileIds(ids(content["images"]), ids(content["categories"]))


def read_categories(
    path: Path,
    declared: list[Any],
    ids: Ids,
    problems: list[Problem],
    *,
    used: NDArray[np.int64],
    kept: Collection[str] = (),
) -> Categories | None:
    """Read the declared categories, sorted by id.

    A category that no annotation uses is no class of its own if it is another's supercategory, or has the name of one
    that is used: exports declare a project's name this way.

    Args:
        path: of the file, for messages.
        declared: the file's "categories".
        ids: of the categories.
        problems: receives what is wrong with them.
        used: category ids of the annotations.
        kept: names that stay classes in any case.

    Returns:
        None where they are contradictory.
    """
    names: dict[int, str] = {}
    mistakes: list[str] = []

    for k, category in enumerate(declared):
        if not isinstance(category, dict):
            mistakes.append(f"categories[{k}] must be an object with id and name, got {shown(category)}")
            continue
        (number,), (no_id,), _ = ids.read([category.get("id")])
        category_id, name = int(number), category.get("name")
        as_number = type(name) in (int, float)
        name = str(name) if as_number else name
        if no_id:
            mistakes.append(f"categories[{k}] must have an id, a number or a text, got {shown(category.get('id'))}")
        elif not isinstance(name, str) or not name:
            mistakes.append(f"categories[{k}] (id {category_id}) must have a name, got {shown(name)}")
        elif category_id in names:
            both = f"{shown(names[category_id])} and {shown(name)}"
            mistakes.append(f"category id {category_id} must have one name, got {both}")
        else:
            names[category_id] = printable(name)
            where = f"category {category_id} ({name})"
            if names[category_id] != name:
                detail = f"its name {shown(name)} is written {shown(names[category_id])}"
                problems.append(problem("unprintable class name", where, detail))
            if category_id in ids.originals:
                _report_id(category["id"], category_id, where, problems)
            if as_number:
                problems.append(problem("class name written as number", where, f"name {shown(category['name'])}"))
    for category_id, reason in _unused(names, declared, set(used.tolist()), kept).items():
        where = f"category {category_id} ({names.pop(category_id)})"
        problems.append(problem("unused category", where, f"has no annotation, and {reason}"))
    ids_by_name: defaultdict[str, list[int]] = defaultdict(list)
    for category_id, name in names.items():
        ids_by_name[name].append(category_id)
    for name, several in ids_by_name.items():
        if len(several) > 1:
            ids_of_name = cut([str(i) for i in several], 8)
            mistakes.append(f"category name {shown(name)} must belong to one id, got ids {ids_of_name}")
    if not declared:
        mistakes.append('"categories" must declare at least one class, got none')
    problems += [problem("categories", str(path), mistake) for mistake in mistakes]
    in_order = sorted(names)
    return None if mistakes else Categories(tuple(in_order), tuple(names[i] for i in in_order))


def _unused(names: dict[int, str], declared: list[Any], used: set[int], kept: Collection[str]) -> dict[int, str]:
    """The categories that are no classes of their own, and why."""
    parents = {
        printable(parent)
        for category in declared
        if isinstance(category, dict) and isinstance(parent := category.get("supercategory"), str)
        if parent != category.get("name")
    }
    names_in_use = {names[category_id] for category_id in names if category_id in used}
    return {
        category_id: "is the supercategory of others" if name in parents else "has the name of another"
        for category_id, name in names.items()
        if category_id not in used and name not in kept and (name in parents or name in names_in_use)
    }


def _report_id(value: Any, number: int, where: str, problems: list[Problem]) -> None:
    """Report an id that does not stand for itself as an integer."""
    kind = "number written as text" if fits(id_key(value)) else "id that is no integer"
    problems.append(problem(kind, where, f"id {shown(value)} is {number} here"))


def read_images(items: list[Any], ids: Ids, problems: list[Problem], *, with_files: bool) -> ImageTable:
    """Read the entries of "images"; a usable file name is required only `with_files`."""
    entries = []
    for k, item in enumerate(items):
        if not isinstance(item, dict):
            problems.append(problem("malformed image", f"images[{k}]", f"must be an object, got {shown(item)}"))
        elif id_key(item.get("id")) is None:
            name = shown(item.get("file_name"))
            detail = f"id must be a number or a text, got {shown(item.get('id'))}"
            problems.append(problem("malformed image", f"images[{k}] ({name})", detail))
        else:
            entries.append(item)
    numbers, _, _ = ids.read([item["id"] for item in entries])
    raw_names = [_name_of(item) for item in entries]
    names = [name if isinstance(name, str) else "" for name in raw_names]
    sizes = np.stack([lengths([i.get(key) for i in entries]) for key in ("height", "width")], axis=1)
    table = ImageTable(numbers, names, sizes, num_malformed=len(items) - len(entries))
    for i in np.flatnonzero(np.isin(numbers, list(ids.originals))).tolist():
        _report_id(entries[i]["id"], int(numbers[i]), table.where(i), problems)
    for i, raw in enumerate(raw_names):
        if with_files and not isinstance(raw, str):
            table.drop(i, problems, "malformed image", f"file_name must be text, got {shown(raw)}")
        elif "file_name" not in entries[i] and isinstance(raw, str):
            problems.append(problem("file name from coco_url", table.where(i), shown(entries[i]["coco_url"])))
    return table


def _name_of(image: dict[str, Any]) -> Any:
    """The file name of an image entry; LVIS has a coco_url instead, http://HOST/FOLDER/NAME."""
    url = image.get("coco_url")
    if "file_name" not in image and isinstance(url, str) and url.rpartition("/")[2]:
        return url.rpartition("/")[2]
    return image.get("file_name")


def read_annotations(items: list[Any], file_ids: FileIds, problems: list[Problem]) -> AnnotationTable:
    """Read the entries of "annotations" that have an image id, a category id and a box.

    Numbers may be written as text ("3"), which is noted. An id that nothing declares and that is no integer is
    malformed.
    """
    is_object = np.array([type(a) is dict for a in items], bool)
    for k in np.flatnonzero(~is_object).tolist():
        detail = f"must be an object, got {shown(items[k])}"
        problems.append(problem("malformed annotation", f"annotations[{k}]", detail))
    positions = np.flatnonzero(is_object)
    entries = [items[k] for k in positions.tolist()] if len(positions) < len(items) else items

    def column(key: str) -> list[Any]:
        return [a.get(key) for a in entries]

    ids, no_id, id_text = Ids().read(column("id"))
    image_ids, no_image, image_text = file_ids.images.read(column("image_id"))
    category_ids, no_category, category_text = file_ids.categories.read(column("category_id"))
    crowd, bad_crowd, crowd_text = flags(column("iscrowd"))
    ignore, bad_ignore, ignore_text = flags(column("ignore"))
    xywh, no_box, box_text = boxes(column("bbox"))

    def report(kind: str, rows: NDArray[np.bool_], detail: Callable[[int, dict[str, Any]], str]) -> None:
        for k in np.flatnonzero(rows).tolist():
            name = f"annotations[{positions[k]}]" if no_id[k] else f"annotation {ids[k]}"
            where = f"{name} (image {shown(entries[k].get('image_id'))})"
            problems.append(problem(kind, where, detail(k, entries[k])))

    derived = np.zeros(len(entries), bool)
    for k in np.flatnonzero(no_box).tolist():
        box = box_of_segmentation(entries[k])
        if box is not None:
            xywh[k], no_box[k], derived[k] = box, False, True
    report(
        "box from segmentation",
        derived,
        lambda k, a: f"bbox {shown(a.get('bbox'))}, the segmentation gives {numbers_text(xywh[k])}",
    )
    rules = (
        ("image_id", no_image, "an image's id"),
        ("category_id", no_category, "a category's id"),
        ("bbox", no_box, "four numbers"),
        ("iscrowd", bad_crowd, "0 or 1"),
        ("ignore", bad_ignore, "0 or 1"),
    )
    malformed = no_image | no_category | no_box | bad_crowd | bad_ignore
    report(
        "malformed annotation",
        malformed,
        lambda k, a: "; ".join(f"{key} must be {rule}, got {shown(a.get(key))}" for key, bad, rule in rules if bad[k]),
    )
    report(
        "number written as text",
        (id_text | image_text | category_text | crowd_text | ignore_text | box_text) & ~malformed,
        lambda _, a: shown({key: a[key] for key in _NUMBERS if _holds_text(a.get(key))}),
    )
    report("unusable annotation id", no_id, lambda _, a: f"id must be an integer, got {shown(a.get('id'))}")
    published, bad_area = areas(column("area"))
    report(
        "unusable area",
        bad_area & ~malformed,
        lambda _, a: f"area must be a number of at least 0, got {shown(a.get('area'))}",
    )
    table = AnnotationTable(
        image_ids, category_ids, xywh, published, crowd, ignore, np.where(no_id, NO_ID, ids), positions,
        num_malformed=int(malformed.sum()) + len(items) - len(entries),
    )  # fmt: skip
    return table.take(np.flatnonzero(~malformed)) if malformed.any() else table


_NUMBERS = ("id", "image_id", "category_id", "iscrowd", "ignore", "bbox")


def _holds_text(value: object) -> bool:
    return isinstance(value, str | float) or (isinstance(value, list) and any(isinstance(v, str) for v in value))
