"""What can be wrong with a dataset: the kinds of problems, the checks of boxes, and how both are told to the user."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

WIDTH = 110
EXAMPLES = 3


class Problem(NamedTuple):
    """One thing that is wrong in one place."""

    kind: str
    """A key of `KINDS`."""
    where: str
    """Which image or annotation, with id and file name."""
    detail: str
    """What is wrong with it, in numbers."""
    action: str
    """What becomes of it where the dataset is used all the same."""


class Kind(NamedTuple):
    """What a kind of problem means for the dataset."""

    severity: str
    """"refuse": the dataset is refused unless `on_error` is `skip`; "repair": handled either way; "note": harmless."""
    action: str
    remedy: str = ""


KINDS = {
    "format": Kind("refuse", "used as it stands", "write boxes as [x, y, width, height] in pixels of the image"),
    "malformed image": Kind("refuse", "entry left out", "give every image an integer id and a file_name"),
    "duplicate image id": Kind("refuse", "later entry left out", "give every image an id of its own"),
    "unsafe file name": Kind(
        "refuse", "image and its annotations left out", "write file_name relative to the image folder, inside it"
    ),
    "missing image": Kind(
        "refuse", "image and its annotations left out", "fetch the images, or correct the image folder"
    ),
    "undecodable image": Kind("refuse", "image and its annotations left out", "fetch or export these images anew"),
    "image size mismatch": Kind(
        "refuse", "image and its annotations left out", "correct width and height, or restore the original images"
    ),
    "malformed annotation": Kind("refuse", "annotation left out", "correct or delete these annotations"),
    "orphan annotation": Kind("refuse", "annotation left out", "add the image, or delete these annotations"),
    "unknown category": Kind("refuse", "annotation left out", 'declare the id in "categories", or correct it'),
    "duplicate annotation id": Kind("refuse", "both kept, renumbered", "give every annotation an id of its own"),
    "box not finite": Kind("repair", "box dropped"),
    "box of zero size": Kind("repair", "box dropped"),
    "box outside image": Kind("repair", "box dropped for training"),
    "box partly outside": Kind("repair", "box clipped for training"),
    "box from segmentation": Kind("note", "box taken from the segmentation"),
    "unusable area": Kind("note", "width times height used"),
    "unusable image size": Kind("note", "size taken from the file"),
    "no image size": Kind("note", "boxes not compared with the image"),
    "unusable annotation id": Kind("note", "renumbered"),
    "number written as text": Kind("note", "read as the integer it spells"),
    "duplicate file name": Kind("note", "both entries kept"),
    "dark 16-bit images": Kind("note", "scaled by 1/257 as all 16-bit images"),
}
"""All kinds, in the order in which they are told."""


def problem(kind: str, where: str, detail: str, action: str | None = None) -> Problem:
    """A `Problem` with its kind's usual action; texts from the file are made harmless for terminals and tables."""
    return Problem(kind, printable(where), printable(detail), action or KINDS[kind].action)


def printable(text: str) -> str:
    """Without line breaks, tabs and other control characters (shown as escapes)."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object, limit: int = 60) -> str:
    """A value of the file as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def training_boxes(xywh: NDArray[np.float64], sizes: NDArray[np.int32]) -> NDArray[np.float32]:
    """Boxes as training sees them: (T, 4) xywh and (T, 2) height, width -> (T, 4) float32 xyxy, clipped.

    Where a size is 0 (unknown), only the top and left border clip. Boxes outside their image come out with no area.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        limits = np.where(sizes > 0, sizes, np.inf)[:, [1, 0, 1, 0]]
        clipped: NDArray[np.float32] = np.clip(corners, 0, limits).astype(np.float32)
    return clipped


class BoxChecks(NamedTuple):
    """(T,) masks, no two of which are set for the same box."""

    not_finite: NDArray[np.bool_]
    zero: NDArray[np.bool_]
    outside: NDArray[np.bool_]
    partly: NDArray[np.bool_]
    excess: NDArray[np.float64]
    """(T,) pixels by which the box reaches out of its image, at the worst border; at most 0 where it does not."""


def _rows(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(T, n) -> (T,): where the whole row is set."""
    return np.asarray(mask.all(axis=1))


def check_boxes(xywh: NDArray[np.float64], sizes: NDArray[np.int32]) -> BoxChecks:
    """What is wrong with boxes (T, 4) xywh in images of sizes (T, 2) height, width (0 where unknown)."""
    finite = _rows(np.isfinite(xywh))
    positive = finite & _rows(xywh[:, 2:] > 0)
    safe = np.where(positive[:, None], xywh, 0.0)
    clipped = training_boxes(safe, sizes)
    gone: NDArray[np.bool_] = positive & ~(clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    limits = np.where(sizes > 0, sizes, np.inf)[:, ::-1]
    with np.errstate(over="ignore"):
        excess = np.maximum(-safe[:, :2], safe[:, :2] + safe[:, 2:] - limits).max(axis=1, initial=-np.inf)
        # A box inside its image that float32 cannot tell from an empty one has no size, wherever it lies.
        thin: NDArray[np.bool_] = (
            gone & (safe[:, :2] < limits).all(axis=1) & (safe[:, :2] + safe[:, 2:] > 0).all(axis=1)
        )
    # Sums of float64 coordinates are off by 1e-13; that is no statement of the annotator's.
    partly: NDArray[np.bool_] = positive & ~gone & (excess > 1e-6)
    return BoxChecks(~finite, (finite & ~positive) | thin, gone & ~thin, partly, excess)


def format_problems(xywh: NDArray[np.float64], sizes: NDArray[np.int32], where: str) -> tuple[list[Problem], bool]:
    """Mistakes that show only in the whole of the boxes: (T, 4) as in the file, (T, 2) height, width.

    Returns the problems and whether the evidence is overwhelming: half of the boxes, and at least ten.
    """
    known = np.isfinite(xywh).all(axis=1) & (sizes > 0).all(axis=1)
    boxes, wh = xywh[known], sizes[known][:, ::-1].astype(np.float64)
    if not len(boxes):
        return [], False
    found: list[Problem] = []
    near, far = boxes[:, :2], boxes[:, 2:]
    sized = (far > 0).all(axis=1)

    normalised = (np.abs(boxes) <= 1).all(axis=1) & sized & (wh > 2).all(axis=1)
    with np.errstate(over="ignore"):
        leaves = sized & (near + far > wh + 1).any(axis=1)
        fits_corners = (far > near).all(axis=1) & (near >= -1).all(axis=1) & (far <= wh + 1).all(axis=1)
        fits_turned = sized & (near >= -1).all(axis=1) & (near + far <= wh[:, ::-1] + 1).all(axis=1)
        fits_centre = (near - far / 2 >= -1).all(axis=1) & (near + far / 2 <= wh + 1).all(axis=1)

    def add(share: float, detail: str) -> None:
        found.append(problem("format", where, f"{_percent(share)} of {len(boxes):,} boxes {detail}"))

    shares = {
        "normalised": float(normalised.mean()),
        "corners": float((leaves & fits_corners).mean()),
        "turned": float((leaves & fits_turned).mean()),
    }
    if len(boxes) >= 3 and shares["normalised"] >= 0.5:
        add(shares["normalised"], "lie within 0..1: fractions of the image instead of pixels? COCO wants pixels")
    elif len(boxes) >= 3 and shares["corners"] >= 0.1 and float(fits_corners.mean()) >= 0.9:
        add(
            shares["corners"],
            "reach out of their image as [x, y, width, height] and fit as [x1, y1, x2, y2]: corners instead of xywh?",
        )
    elif len(boxes) >= 3 and shares["turned"] >= 0.1 and float(fits_turned.mean()) >= 0.9:
        add(shares["turned"], "reach out of their image and fit once its width and height are exchanged: swapped?")
    elif float(leaves.mean()) >= 0.05 and leaves.sum() >= 3 and bool(fits_centre.all()):
        add(
            float(leaves.mean()),
            "reach out of their image as [x, y, width, height], and all fit as [centre x, centre y, width, height]: "
            "centres instead of corners?",
        )
    return found, len(boxes) >= 10 and max(shares.values()) >= 0.5 and bool(found)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.1 <= share <= 0.995 or share == 1 else f"{100 * share:.2g} %"


def count_kinds(problems: Sequence[Problem]) -> dict[str, int]:
    """How many problems of each kind there are, in the order of `KINDS`."""
    counts = Counter(p.kind for p in problems)
    return {kind: counts[kind] for kind in KINDS if counts[kind]}


def table(
    problems: Sequence[Problem], refusing: frozenset[str] = frozenset(), notes: Mapping[str, str] | None = None
) -> str:
    """The kinds with counts, what becomes of each, and a note; first those that refuse the dataset, if any."""
    counts = count_kinds(problems)
    groups = [
        ("reasons to refuse the dataset", "with data.on_error=skip", [k for k in counts if k in refusing]),
        ("handled" if not refusing else "handled either way", "", [k for k in counts if k not in refusing]),
    ]
    lines = []
    for title, column, kinds in groups:
        if kinds:
            lines.append(f"  {title:<41}{column}".rstrip())
            lines += [f"  {counts[k]:>11,}  {k:<26}  {KINDS[k].action}{(notes or {}).get(k, '')}" for k in kinds]
    return "\n".join(lines)


def examples(problems: Sequence[Problem], kinds: Sequence[str], limit: int = EXAMPLES) -> str:
    """The first few problems of each of the kinds."""
    lines: list[str] = []
    for kind in kinds:
        of_kind = [p for p in problems if p.kind == kind]
        lines.append(f"  {kind}")
        lines += [wrap(f"{p.where}: {p.detail}", "    ", "      ") for p in of_kind[:limit]]
        if len(of_kind) > limit:
            lines.append(f"    ... and {len(of_kind) - limit:,} more")
    return "\n".join(lines)


def wrap(text: str, indent: str = "", hanging: str | None = None) -> str:
    """Folded to the width of messages or of a narrower terminal; paths and other long words stay whole."""
    return textwrap.fill(
        text,
        min(WIDTH, shutil.get_terminal_size((WIDTH, 0)).columns),
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_long_words=False,
        break_on_hyphens=False,
    )


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """One line per problem: kind, where, detail and action, separated by tabs. Without any there is no file."""
    if not problems:
        path.unlink(missing_ok=True)  # an earlier attempt's, mended since
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(p) + "\n" for p in problems), encoding="utf-8", errors="backslashreplace")
