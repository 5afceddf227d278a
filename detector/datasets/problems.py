"""Problems found in data, grouped by kind into findings, and how findings are printed and written."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from detector.atomic import write_text
from detector.text import printable, spreadsheet_cell

WIDTH = 110
EXAMPLES = 3
MAX_WHERE, MAX_DETAIL = 300, 600
"""Characters of a problem's fields."""

Severity = Literal["fatal", "error", "warning", "note"]
"""`fatal` refuses the dataset, `error` too unless `on_error` is `skip`; `warning` and `note` are handled either way."""


class Problem(NamedTuple):
    """One thing that is wrong in one place. Create it with `problem`."""

    kind: str
    """A key of `KINDS`."""
    where: str
    """The file, image or annotation, with its id and file name."""
    detail: str
    """What is wrong with it, with the values."""
    action: str
    """What is done about it if the dataset is used nevertheless."""


class Kind(NamedTuple):
    """The meaning of a kind of problem."""

    severity: Severity
    action: str
    remedy: str = ""
    """What the user can do."""


class Finding(NamedTuple):
    """All problems of one kind. Create findings with `group`."""

    kind: str
    severity: Severity
    action: str
    remedy: str
    note: str
    """What is known of all of them together; printed after the action."""
    problems: tuple[Problem, ...]


IMAGE_LEFT_OUT = "image and its annotations left out"
ANNOTATION_LEFT_OUT = "annotation left out"
COCO_FORMAT = (
    'a COCO file contains {"images": [{"id", "file_name", "width", "height"}], '
    '"annotations": [{"id", "image_id", "category_id", "bbox": [x, y, width, height]}], '
    '"categories": [{"id", "name"}]}'
)

KINDS = {
    "annotation file": Kind("fatal", "dataset not read"),
    "file format": Kind("fatal", "dataset not read", COCO_FORMAT),
    "image folder": Kind("fatal", "images not checked"),
    "categories": Kind("fatal", "classes not defined", "correct the file's categories"),
    "category names": Kind(
        "fatal", "classes not matched", "rename the categories in one of the files, or use the matching file"
    ),
    "no usable image": Kind("fatal", "dataset not used"),
    "format": Kind("error", "used unchanged", "write boxes as [x, y, width, height] in pixels of the image"),
    "malformed image": Kind("error", "image left out", "give every image an id and a file_name"),
    "duplicate image id": Kind("error", "later image left out", "give every image a unique id"),
    "unsafe file name": Kind("error", IMAGE_LEFT_OUT, "write file_name relative to the image folder, inside it"),
    "missing image": Kind("error", IMAGE_LEFT_OUT, "fetch the images, or correct the image folder"),
    "undecodable image": Kind("error", IMAGE_LEFT_OUT, "fetch or export these images again"),
    "image size mismatch": Kind("error", IMAGE_LEFT_OUT, "correct width and height, or restore the original images"),
    "malformed annotation": Kind("error", ANNOTATION_LEFT_OUT, "correct or delete these annotations"),
    "orphan annotation": Kind("error", ANNOTATION_LEFT_OUT, "add the image, or delete these annotations"),
    "unknown category": Kind("error", ANNOTATION_LEFT_OUT, 'declare the id in "categories", or correct it'),
    "duplicate annotation id": Kind("error", "both kept, renumbered", "give every annotation a unique id"),
    "suspected format": Kind(
        "warning", "used unchanged", "write boxes as [x, y, width, height] in pixels of the image"
    ),
    "undecided EXIF orientation": Kind(
        "warning", "orientation not applied", "view some of the images and set data.exif to apply or ignore"
    ),
    "box not finite": Kind("warning", "box dropped"),
    "box of zero size": Kind("warning", "box dropped"),
    "box outside image": Kind("warning", "box dropped for training"),
    "box partly outside": Kind("warning", "box clipped for training"),
    "box from segmentation": Kind("note", "box computed from the segmentation"),
    "unusable area": Kind("note", "width times height used"),
    "unusable image size": Kind("note", "size read from the file"),
    "no image size": Kind("note", "boxes not compared with the image"),
    "unusable annotation id": Kind("note", "renumbered"),
    "number written as text": Kind("note", "converted to a number"),
    "id that is no integer": Kind("note", "numbered; results are written with the file's own ids"),
    "class name written as number": Kind("note", "used as a text"),
    "file name from coco_url": Kind("note", "the last part of the URL used"),
    "file name written differently": Kind("note", "the file found used"),
    "unused category": Kind("note", "no class of its own"),
    "unprintable class name": Kind("note", "characters that cannot be printed are written as escapes"),
    "duplicate file name": Kind("note", "both images kept"),
    "dark 16-bit images": Kind("note", "scaled by 1/257 like all 16-bit images"),
}
"""All kinds, in the order in which they are printed."""

WHOLE_DATASET = ("format", "suspected format", "undecided EXIF orientation")
"""Kinds that concern a dataset as a whole; each is printed as a warning in full when the dataset is used."""


def problem(kind: str, where: str, detail: str, *, action: str | None = None) -> Problem:
    """Create a `Problem` with its kind's usual action; text from files is made safe for terminals and tables."""
    return Problem(kind, printable(where, MAX_WHERE), printable(detail, MAX_DETAIL), action or KINDS[kind].action)


def group(problems: Iterable[Problem], notes: Mapping[str, str] | None = None) -> tuple[Finding, ...]:
    """Group problems into one finding per kind, in the order of `KINDS`.

    Args:
        problems: in any order, which is kept within each kind.
        notes: a note for some of the kinds.
    """
    by_kind: dict[str, list[Problem]] = {}
    for one in problems:
        by_kind.setdefault(one.kind, []).append(one)
    return tuple(
        Finding(kind, about.severity, about.action, about.remedy, (notes or {}).get(kind, ""), tuple(by_kind[kind]))
        for kind, about in KINDS.items()
        if kind in by_kind
    )


def to_json(findings: Iterable[Finding]) -> str:
    """Serialize findings: a list of objects with a Finding's fields; every problem is a list of a Problem's fields."""
    return json.dumps([finding._asdict() for finding in findings])


def from_json(text: str) -> tuple[Finding, ...]:
    """Read what `to_json` wrote."""
    return tuple(
        Finding(**{**record, "problems": tuple(Problem(*fields) for fields in record["problems"])})
        for record in json.loads(text)
    )


def write_problems(path: Path, findings: Iterable[Finding]) -> None:
    """Write a line per problem: kind, where, detail, action, separated by tabs. Without problems, delete the file."""
    lines = ["\t".join(map(spreadsheet_cell, one)) + "\n" for finding in findings for one in finding.problems]
    if not lines:
        path.unlink(missing_ok=True)
        return
    write_text("".join(lines), path)


def table(findings: Sequence[Finding], *, refused: bool = False) -> str:
    """Format the count and action of each finding; if the dataset is `refused`, its errors come first."""
    errors = [finding for finding in findings if refused and finding.severity == "error"]
    others = [finding for finding in findings if finding not in errors]
    lines = []
    for title, column, some in (
        ("errors", "with data.on_error=skip", errors),
        ("handled either way" if errors else "handled", "", others),
    ):
        if some:
            lines.append(f"  {title:<41}{column}".rstrip())
            lines += [f"  {len(f.problems):>11,}  {f.kind:<26}  {f.action}{f.note}" for f in some]
    return "\n".join(lines)


def examples(findings: Iterable[Finding], limit: int = EXAMPLES) -> str:
    """Format the first few problems of each finding."""
    lines: list[str] = []
    for finding in findings:
        lines.append(f"  {finding.kind}")
        lines += [wrap(f"{one.where}: {one.detail}", "    ", "      ") for one in finding.problems[:limit]]
        if len(finding.problems) > limit:
            lines.append(f"    ... and {len(finding.problems) - limit:,} more")
    return "\n".join(lines)


def wrap(text: str, indent: str = "", hanging: str | None = None) -> str:
    """Fold text to the width of messages or of a narrower terminal; paths and other long words stay whole."""
    return textwrap.fill(
        text,
        min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns),
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )
