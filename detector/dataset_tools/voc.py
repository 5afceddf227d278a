"""Convert Pascal VOC annotations (one XML file per image) to one COCO JSON.

A VOC box is the pixel corners (xmin, ymin, xmax, ymax); it becomes x = xmin, y = ymin, w = xmax - xmin,
h = ymax - ymin. Nothing is added to width and height: most tools that write this format today mean corners, not the
inclusive, one-based pixels of the original VOC. An object marked difficult gets `"ignore": 1`.
"""

from __future__ import annotations

import difflib
import json
import math
import os
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NotRequired, TypedDict

from detector.datasets.images import ImageHeader, read_header
from detector.datasets.problems import printable
from detector.errors import ImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
MAX_XML_BYTES = 16 * 2**20  # thousands of objects fit in one megabyte; more is not an annotation

Kind = Literal["xml", "image", "repeated", "size", "field", "category", "empty_box", "outside"]


class CocoImage(TypedDict):
    """One entry of COCO's ``images``."""

    id: int
    file_name: str
    width: int
    height: int
    license: NotRequired[int]


class CocoBox(TypedDict):
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
    """What a COCO detection file must have."""

    images: list[CocoImage]
    annotations: list[CocoBox]
    categories: list[CocoCategory]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one image, and what was left out of the result because of it."""

    name: str
    kind: Kind
    text: str
    lost: Literal["image", "box", "nothing"]

    def __str__(self) -> str:
        """Return one line for people."""
        tail = "" if self.lost == "nothing" else f" ({self.lost} left out)"
        return printable(f"{self.name}: {self.text}{tail}")


@dataclass(frozen=True)
class VocResult:
    """The COCO content and everything that was wrong on the way, in the order of the list."""

    coco: CocoFile
    problems: tuple[Problem, ...]


@dataclass(frozen=True)
class _VocObject:
    name: str
    corners: tuple[float, float, float, float]
    difficult: bool


@dataclass(frozen=True)
class _VocImage:
    """One annotation file; ``size`` is (width, height), None where the file does not say it."""

    size: tuple[int, int] | None
    objects: list[_VocObject]


def read_names(path: Path) -> list[str]:
    """Read an ImageSets list: one image name a line, without its suffix.

    Raises:
        ValueError: a name leads out of the image folder.
    """
    names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"image name must stay inside the image folder, got {name!r} in {path}")
    return names


def voc_to_coco(
    images: Path,
    annotations: Path,
    *,
    names: Sequence[str],
    categories: Sequence[str] | None = None,
    first_image_id: int = 1,
    first_box_id: int = 1,
) -> VocResult:
    """Convert ``annotations/NAME.xml`` of every name to COCO.

    Images are found as ``images/NAME.*``; the ``filename`` an XML file claims is not used, since renamed copies are
    common. An image whose annotation cannot be read is left out rather than kept as one without objects. Boxes beyond
    the image's border are reported and kept as they are. The size of the image file beats the size in the XML, unless
    that is the size of the image as its EXIF orientation turns it: then the boxes were made on the turned picture, and
    its size is written, which is how `read_coco` knows.

    Args:
        images: folder of the image files.
        annotations: folder of the XML files.
        names: image names without suffix; they set the order of the result.
        categories: names in id order, the first has id 1. Default: all names found, sorted. Give them when several
            splits must agree.
        first_image_id: id of the first image, to number several splits through.
        first_box_id: id of the first box.

    Returns:
        The COCO content, with image and box ids counting up without gaps, and the problems met.
    """
    problems: list[Problem] = []
    kept: list[tuple[str, tuple[int, int], list[_VocObject]]] = []
    seen: set[str] = set()
    for name in names:
        if name in seen:
            problems.append(Problem(name, "repeated", "image must be listed once, got it again; taken once", "nothing"))
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
                problems.append(
                    Problem(
                        Path(file_name).with_suffix("").as_posix(), "category", _unknown_category(item.name, ids), "box"
                    )
                )
                continue
            left, top, right, bottom = item.corners
            width_height = (right - left, bottom - top)
            box = CocoBox(
                id=first_box_id + len(coco["annotations"]),
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
    """Convert the images named in ``list_file`` and write ``output``, whole or not at all.

    Raises:
        ValueError: a folder or the list is missing, the categories repeat, or not one listed image could be converted.
    """
    mistakes = [
        f"{option} must be a folder, got {folder}"
        for option, folder in (("--images", images), ("--annotations", annotations))
        if not folder.is_dir()
    ]
    if not list_file.is_file():
        mistakes.append(f"--list must be a text file with one image name a line, got {list_file}")
    if categories is not None and (len(set(categories)) < len(categories) or not all(categories)):
        mistakes.append(f"--categories must be different names, got {','.join(categories)}")
    if mistakes:
        raise ValueError("; ".join(mistakes))
    result = voc_to_coco(images, annotations, names=read_names(list_file), categories=categories)
    if not result.coco["images"]:
        first = f"; the first problem: {result.problems[0]}" if result.problems else ""
        raise ValueError(f"{list_file} must name at least one image that can be converted, got none{first}")
    write_json(output, result.coco)
    return result


def write_json(path: Path, content: object) -> None:
    """Write compact JSON so that ``path`` is either the whole new file or what it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(json.dumps(content, separators=(",", ":"), ensure_ascii=False), encoding="utf-8")
    os.replace(unfinished, path)


def parse_xml(data: bytes) -> ET.Element:
    """Parse XML that may come from anyone: a document type, and with it every entity, is refused.

    The text is decoded here and parsed as text, so that the check and the parser cannot disagree about the encoding.

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
    """Read one XML file; a broken object is a problem, a broken file is None and a problem."""
    try:
        root = parse_xml(path.read_bytes())
    except (OSError, ValueError) as error:
        text = f"{path} must exist, got no file" if isinstance(error, FileNotFoundError) else f"{path}: {error}"
        problems.append(Problem(name, "xml", text, "image"))
        return None
    if root.tag != "annotation":
        problems.append(Problem(name, "xml", f"{path}: root must be <annotation>, got <{root.tag}>", "image"))
        return None
    objects = []
    for index, element in enumerate(root.findall("object")):
        missing: list[str] = []
        label = (element.findtext("name") or "").strip()
        if not label:
            missing.append("name")
        corners = [_number(element, f"bndbox/{side}", missing) for side in ("xmin", "ymin", "xmax", "ymax")]
        if missing:
            text = f"object {index} must have {', '.join(missing)} (text, finite numbers), got none such in {path}"
            problems.append(Problem(name, "field", text, "box"))
            continue
        difficult = (element.findtext("difficult") or "0").strip()
        if difficult not in ("0", "1"):
            text = f"object {index} must have difficult 0 or 1, got {difficult!r}, taken as 0, in {path}"
            problems.append(Problem(name, "field", text, "nothing"))
        objects.append(_VocObject(label, (corners[0], corners[1], corners[2], corners[3]), difficult == "1"))
    unsaid: list[str] = []
    width, height = _number(root, "size/width", unsaid), _number(root, "size/height", unsaid)
    return _VocImage(None if unsaid or min(width, height) < 1 else (int(width), int(height)), objects)


def _number(element: ET.Element, path: str, missing: list[str]) -> float:
    """Return the number at ``path``, an int where it is whole; add ``path`` to ``missing`` where there is none."""
    try:
        value = float(element.findtext(path) or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        missing.append(path)
        return 0
    return int(value) if value.is_integer() else value


def _find_image(images: Path, name: str, problems: list[Problem]) -> tuple[str, ImageHeader] | None:
    """Return the file name relative to ``images`` and the file's header."""
    for suffix in (form for lower in IMAGE_SUFFIXES for form in (lower, lower.upper())):
        path = images / f"{name}{suffix}"
        if not path.is_file():
            continue
        try:
            return f"{name}{suffix}", read_header(path)
        except ImageError as error:
            problems.append(Problem(name, "image", str(error), "image"))
            return None
    text = f"image must exist as {images / name} with one of {' '.join(IMAGE_SUFFIXES)}, got no file"
    problems.append(Problem(name, "image", text, "image"))
    return None


def _image_size(
    name: str, said: tuple[int, int] | None, header: ImageHeader, problems: list[Problem]
) -> tuple[int, int]:
    """Return the (width, height) to write: the file's, or its turned one where the annotations are of the turned."""
    real = (header.width, header.height)
    if header.orientation >= 5 and said == real[::-1]:
        return real[::-1]
    if said is None:
        text = f"size must stand in the XML, got none; took {real[0]}x{real[1]} from the image"
        problems.append(Problem(name, "size", text, "nothing"))
    elif said != real:
        turned = "; turned by 90 degrees? then its boxes are wrong" if said == real[::-1] else ""
        text = f"size must be the image's {real[0]}x{real[1]}, got {said[0]}x{said[1]} in the XML{turned}"
        problems.append(Problem(name, "size", text, "nothing"))
    return real


def _is_usable(name: str, item: _VocObject, size: tuple[int, int], problems: list[Problem]) -> bool:
    """Whether the box has an area; one that crosses the border is usable and a problem."""
    left, top, right, bottom = item.corners
    corners = f"[{left},{top},{right},{bottom}]"
    if right <= left or bottom <= top:
        text = f"box must have xmax > xmin and ymax > ymin, got {item.name} {corners}"
        problems.append(Problem(name, "empty_box", text, "box"))
        return False
    if left < 0 or top < 0 or right > size[0] or bottom > size[1]:
        text = f"box must lie in the {size[0]}x{size[1]} image, got {item.name} {corners}"
        problems.append(Problem(name, "outside", text, "nothing"))
    return True


def _unknown_category(name: str, ids: dict[str, int]) -> str:
    nearest = difflib.get_close_matches(name, ids, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"category must be one of {', '.join(ids)}, got {name}{hint}"
