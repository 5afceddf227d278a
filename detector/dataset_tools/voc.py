"""Convert Pascal VOC annotations (one XML file per image) to one COCO file.

A VOC box has the pixel corners (xmin, ymin, xmax, ymax) and becomes x = xmin, y = ymin, w = xmax - xmin,
h = ymax - ymin. Width and height are not increased by 1: most tools that write this format today use half-open corners,
not the inclusive, one-based pixels of the original VOC. A difficult object gets `"ignore": 1`.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NotRequired, TypedDict

from detector.atomic import write_json
from detector.datasets.image_formats import SUFFIXES
from detector.datasets.images import ImageHeader, read_header
from detector.datasets.problems import ANNOTATION_LEFT_OUT, IMAGE_LEFT_OUT, Problem, problem
from detector.errors import ImageError, UserError
from detector.files import os_error_reason, read_bytes
from detector.text import cut, printable, shown

MAX_XML_BYTES = 16 * 2**20  # one megabyte holds thousands of objects; a larger file is not an annotation


class CocoImage(TypedDict):
    """One entry of COCO's ``images``."""

    id: int
    file_name: str
    width: int
    height: int
    license: NotRequired[int]


class CocoAnnotation(TypedDict):
    """One entry of COCO's ``annotations``; ``bbox`` is x, y, w, h in pixels."""

    id: int
    image_id: int
    category_id: int
    bbox: list[float]
    area: float
    iscrowd: int
    ignore: NotRequired[int]


class CocoCategory(TypedDict):
    """One entry of COCO's ``categories``."""

    id: int
    name: str
    supercategory: str


class CocoFile(TypedDict):
    """The required content of a COCO detection file."""

    images: list[CocoImage]
    annotations: list[CocoAnnotation]
    categories: list[CocoCategory]


@dataclass(frozen=True)
class VocResult:
    """The COCO content and the problems found while converting, in the order of the image names."""

    coco: CocoFile
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _VocObject:
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class _VocImage:
    """One annotation file; `size` is (width, height), None if the file does not state it."""

    size: tuple[int, int] | None
    objects: list[_VocObject]


def read_names(path: Path) -> list[str]:
    """Read an ImageSets list: one image name per line, without suffix.

    Raises:
        UserError: the file cannot be read or is not UTF-8 text, or a name leads out of the image folder.
        FileNotFoundError: it does not exist.
    """
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UserError(f"{path} cannot be read: {os_error_reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} must be UTF-8 text, got byte {error.start:,}: {error.reason}") from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name:
            raise UserError(f"image name must stay inside the image folder, got {shown(name)} in {path}")
    return names


def voc_to_coco(
    images: Path,
    annotations: Path,
    *,
    names: Sequence[str],
    categories: Sequence[str] | None = None,
    first_image_id: int = 1,
    first_annotation_id: int = 1,
) -> VocResult:
    """Convert `annotations/NAME.xml` of every name to COCO.

    The image is `images/NAME.*`; the `filename` in the XML file is not used, since renamed copies are common. An image
    with an unreadable annotation is left out instead of being kept without objects. Boxes that cross the image's border
    are reported and kept unchanged. The size is that of the image file, not of the XML file, unless the XML has the
    size after the EXIF rotation: then the boxes were drawn on the rotated image, and the rotated size is written, which
    makes `read_coco` rotate the image.

    Args:
        images: folder of the image files.
        annotations: folder of the XML files.
        names: image names without suffix, in the order of the result.
        categories: category names in id order, from id 1. Default: all names found, sorted. Needed if several splits
            must have the same ids.
        first_image_id: id of the first image, for ids that are unique over several splits.
        first_annotation_id: id of the first annotation.

    Returns:
        The COCO content, with consecutive image and annotation ids, and the problems found.
    """
    problems: list[Problem] = []
    kept: list[tuple[str, tuple[int, int], list[_VocObject]]] = []
    seen: set[str] = set()
    for name in names:
        if name in seen:
            problems.append(problem("duplicate file name", name, "image must be listed once", action="converted once"))
            continue
        seen.add(name)
        found = _find_image(images, name, problems)
        if found is None:
            continue
        parsed = _read_annotation(annotations / f"{name}.xml", name, problems)
        if parsed is None:
            continue
        file_name, header = found
        size = _image_size(name, parsed.size, header, problems)
        kept.append((file_name, size, [item for item in parsed.objects if _is_usable(name, item, size, problems)]))

    if categories is None:
        categories = sorted({item.name for _, _, objects in kept for item in objects})
    ids = {category: index for index, category in enumerate(categories, start=1)}

    coco = CocoFile(
        images=[],
        annotations=[],
        categories=[CocoCategory(id=index, name=category, supercategory="") for category, index in ids.items()],
    )
    for image_id, (file_name, (width, height), objects) in enumerate(kept, start=first_image_id):
        coco["images"].append(CocoImage(id=image_id, file_name=file_name, width=width, height=height))
        for item in objects:
            if item.name not in ids:
                where = Path(file_name).with_suffix("").as_posix()
                problems.append(problem("unknown category", where, _unknown_category(item.name, ids)))
                continue
            left, top, right, bottom = item.corners
            width_height = (right - left, bottom - top)
            box = CocoAnnotation(
                id=first_annotation_id + len(coco["annotations"]),
                image_id=image_id,
                category_id=ids[item.name],
                bbox=[left, top, *width_height],
                area=width_height[0] * width_height[1],
                iscrowd=0,
            )
            if item.difficult:
                box["ignore"] = 1
            coco["annotations"].append(box)
    return VocResult(coco, tuple(problems))


def convert_voc(
    images: Path, annotations: Path, *, list_file: Path, output: Path, categories: Sequence[str] | None = None
) -> VocResult:
    """Convert the images named in `list_file` and write the COCO file `output`.

    Raises:
        UserError: a folder or the list is missing, a category is repeated, or no listed image can be converted.
    """
    invalid = [
        f"{option} must be a folder, got {folder}"
        for option, folder in (("--images", images), ("--annotations", annotations))
        if not folder.is_dir()
    ]
    if not list_file.is_file():
        invalid.append(f"--list must be a text file with one image name per line, got {list_file}")
    if categories is not None and (len(set(categories)) < len(categories) or not all(categories)):
        invalid.append(f"--categories must be distinct names, got {shown(','.join(categories), 200)}")
    if invalid:
        raise UserError("; ".join(invalid))
    result = voc_to_coco(images, annotations, names=read_names(list_file), categories=categories)
    if not result.coco["images"]:
        first = "".join(f"; the first problem: {one.where}: {one.detail}" for one in result.problems[:1])
        raise UserError(f"{list_file} must name at least one image that can be converted, got none{first}")
    write_json(result.coco, output, compact=True)
    return result


def parse_xml(data: bytes) -> ET.Element:
    """Parse XML from an untrusted source: a document type, and with it every entity, is refused.

    The text is decoded first and parsed as text, so that the check and the parser cannot use different encodings.

    Raises:
        ValueError: the data is too large, not text, not XML, or has a document type.
    """
    if len(data) > MAX_XML_BYTES:
        raise ValueError(f"XML must be at most {MAX_XML_BYTES} bytes, got {len(data)}")
    declared = re.match(rb"""(?:\xef\xbb\xbf)?\s*<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""", data[:256])
    encoding = declared[1].decode("ascii") if declared else "utf-8"
    try:
        text = data.decode("utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding)
    except (UnicodeDecodeError, LookupError) as error:
        raise ValueError(f"XML must be text in its declared encoding, got {error}") from error
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise ValueError("XML must not have a document type or entities, got <!DOCTYPE or <!ENTITY")
    try:
        return ET.fromstring(text)
    except (ET.ParseError, ValueError) as error:
        raise ValueError(f"XML must be well formed, got {error}") from error


def _read_annotation(path: Path, name: str, problems: list[Problem]) -> _VocImage | None:
    """Read one XML file; report malformed objects and return None for an unreadable file."""
    try:
        root = parse_xml(read_bytes(path, limit=MAX_XML_BYTES))
    except (OSError, ValueError) as error:
        reason = os_error_reason(error) if isinstance(error, OSError) else error
        text = f"{path} must exist, got no file" if isinstance(error, FileNotFoundError) else f"{path}: {reason}"
        problems.append(problem("malformed annotation", name, text, action=IMAGE_LEFT_OUT))
        return None
    if root.tag != "annotation":
        text = f"{path}: root must be <annotation>, got <{printable(root.tag, 100)}>"
        problems.append(problem("malformed annotation", name, text, action=IMAGE_LEFT_OUT))
        return None
    objects = []
    for index, element in enumerate(root.findall("object")):
        missing: list[str] = []
        label = (element.findtext("name") or "").strip()
        if not label:
            missing.append("name")
        corners = [_number(element, f"bndbox/{side}", missing) for side in ("xmin", "ymin", "xmax", "ymax")]
        if missing:
            text = f"object {index} must have {', '.join(missing)} (text, finite numbers), got none in {path}"
            problems.append(problem("malformed annotation", name, text))
            continue
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            text = f"object {index} must have difficult 0 or 1, got {shown(difficult)} in {path}"
            problems.append(problem("malformed annotation", name, text, action="0 used"))
        objects.append(_VocObject(label, (corners[0], corners[1], corners[2], corners[3]), difficult == "1"))
    missing = []
    width, height = _number(root, "size/width", missing), _number(root, "size/height", missing)
    return _VocImage(None if missing or min(width, height) < 1 else (int(width), int(height)), objects)


def _number(element: ET.Element, path: str, missing: list[str]) -> float:
    """Return the number at `path`, as int if it is whole; if there is none, return 0 and add `path` to `missing`."""
    try:
        value = float(element.findtext(path) or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        missing.append(path)
        return 0
    return int(value) if value.is_integer() else value


def _find_image(images: Path, name: str, problems: list[Problem]) -> tuple[str, ImageHeader] | None:
    """Return the image's file name relative to `images` and its header; report a missing or unreadable image."""
    for suffix in (form for lower in SUFFIXES for form in (lower, lower.upper())):
        path = images / f"{name}{suffix}"
        if not os.path.isfile(path):
            continue
        try:
            return f"{name}{suffix}", read_header(path)
        except ImageError as error:
            problems.append(problem("undecodable image", name, str(error)))
            return None
    text = f"image must exist as {images / name} with one of {' '.join(SUFFIXES)}, got no file"
    problems.append(problem("missing image", name, text))
    return None


def _image_size(
    name: str, stated: tuple[int, int] | None, header: ImageHeader, problems: list[Problem]
) -> tuple[int, int]:
    """Return the (width, height) to write: the file's, or after its EXIF rotation if the XML file states that one."""
    real = (header.width, header.height)
    if header.orientation >= 5 and stated == real[::-1]:
        return real[::-1]
    if stated is None:
        problems.append(
            problem("unusable image size", name, f"size must be in the XML, got none for {real[0]}x{real[1]} pixels")
        )
    elif stated != real:
        rotated = "; if the image was rotated by 90 degrees, its boxes are wrong" if stated == real[::-1] else ""
        text = f"size must be the image's {real[0]}x{real[1]}, got {stated[0]}x{stated[1]} in the XML{rotated}"
        problems.append(problem("image size mismatch", name, text, action="size read from the file"))
    return real


def _is_usable(name: str, item: _VocObject, size: tuple[int, int], problems: list[Problem]) -> bool:
    """Return whether the box has an area; report one that has none or crosses the image's border."""
    left, top, right, bottom = item.corners
    corners = f"[{left},{top},{right},{bottom}]"
    if right <= left or bottom <= top:
        text = f"box must have xmax > xmin and ymax > ymin, got {printable(item.name, 100)} {corners}"
        problems.append(problem("box of zero size", name, text, action=ANNOTATION_LEFT_OUT))
        return False
    if left < 0 or top < 0 or right > size[0] or bottom > size[1]:
        text = f"box must lie in the {size[0]}x{size[1]} image, got {printable(item.name, 100)} {corners}"
        problems.append(problem("box partly outside", name, text, action="kept unchanged"))
    return True


def _unknown_category(name: str, ids: dict[str, int]) -> str:
    near = difflib.get_close_matches(name[:200], list(ids)[:1000], n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"category must be one of {cut(list(ids), 12)}, got {printable(name, 100)}{hint}"
