"""Checks of boxes against their images: finite, of positive size, inside; and signs of another box format."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.datasets.problems import Problem, problem


def training_boxes(xywh: NDArray[np.float64], sizes: NDArray[np.int32]) -> NDArray[np.float32]:
    """Convert boxes for training: (T, 4) xywh and (T, 2) height, width -> (T, 4) float32 xyxy, clipped.

    Where a size is 0 (unknown), only the top and left border clip. Boxes outside their image get no area.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        corners = np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], axis=1)
        limits = np.where(sizes > 0, sizes, np.inf)[:, [1, 0, 1, 0]]
        clipped: NDArray[np.float32] = np.clip(corners, 0, limits).astype(np.float32)
    return clipped


class BoxChecks(NamedTuple):
    """(T,) masks, of which at most one is set for each box."""

    not_finite: NDArray[np.bool_]
    zero: NDArray[np.bool_]
    outside: NDArray[np.bool_]
    partly: NDArray[np.bool_]
    excess: NDArray[np.float64]
    """(T,) pixels by which the box extends beyond its image, at the worst border; at most 0 where it does not."""


def check_boxes(xywh: NDArray[np.float64], sizes: NDArray[np.int32]) -> BoxChecks:
    """Check boxes (T, 4) xywh in images of sizes (T, 2) height, width (0 where unknown)."""
    finite = np.asarray(np.isfinite(xywh).all(axis=1))
    positive = finite & np.asarray((xywh[:, 2:] > 0).all(axis=1))
    safe = np.where(positive[:, None], xywh, 0.0)
    clipped = training_boxes(safe, sizes)
    empty: NDArray[np.bool_] = positive & ~(clipped[:, 2:] > clipped[:, :2]).all(axis=1)
    limits = np.where(sizes > 0, sizes, np.inf)[:, ::-1]
    with np.errstate(over="ignore"):
        excess = np.maximum(-safe[:, :2], safe[:, :2] + safe[:, 2:] - limits).max(axis=1, initial=-np.inf)
        # A box inside its image that float32 cannot distinguish from an empty one has no size, wherever it lies.
        thin: NDArray[np.bool_] = (
            empty & (safe[:, :2] < limits).all(axis=1) & (safe[:, :2] + safe[:, 2:] > 0).all(axis=1)
        )
    # Sums of float64 coordinates are off by 1e-13, which no annotator intended.
    partly: NDArray[np.bool_] = positive & ~empty & (excess > 1e-6)
    return BoxChecks(~finite, (finite & ~positive) | thin, empty & ~thin, partly, excess)


def format_problems(xywh: NDArray[np.float64], sizes: NDArray[np.int32], where: str) -> list[Problem]:
    """Find signs of another box format in all boxes together: (T, 4) as in the file, (T, 2) height, width.

    The problem is an error ("format") where at least half of the boxes, and at least ten boxes, support it; else it is
    a "suspected format".
    """
    known = np.isfinite(xywh).all(axis=1) & (sizes > 0).all(axis=1)
    boxes, wh = xywh[known], sizes[known][:, ::-1].astype(np.float64)
    if not len(boxes):
        return []
    near, far = boxes[:, :2], boxes[:, 2:]
    sized = (far > 0).all(axis=1)

    normalised = (np.abs(boxes) <= 1).all(axis=1) & sized & (wh > 2).all(axis=1)
    with np.errstate(over="ignore"):
        leaves = sized & (near + far > wh + 1).any(axis=1)
        fits_corners = (far > near).all(axis=1) & (near >= -1).all(axis=1) & (far <= wh + 1).all(axis=1)
        fits_exchanged = sized & (near >= -1).all(axis=1) & (near + far <= wh[:, ::-1] + 1).all(axis=1)
        fits_centre = (near - far / 2 >= -1).all(axis=1) & (near + far / 2 <= wh + 1).all(axis=1)

    shares = {
        "normalised": float(normalised.mean()),
        "corners": float((leaves & fits_corners).mean()),
        "exchanged": float((leaves & fits_exchanged).mean()),
        "centres": float(leaves.mean()),
    }
    if len(boxes) >= 3 and shares["normalised"] >= 0.5:
        sign, detail = "normalised", "lie within 0..1: fractions of the image instead of pixels? COCO wants pixels"
    elif len(boxes) >= 3 and shares["corners"] >= 0.1 and float(fits_corners.mean()) >= 0.9:
        sign = "corners"
        detail = "leave their image as [x, y, width, height] and fit as [x1, y1, x2, y2]: corners instead of xywh?"
    elif len(boxes) >= 3 and shares["exchanged"] >= 0.1 and float(fits_exchanged.mean()) >= 0.9:
        sign, detail = "exchanged", "leave their image and fit once its width and height are exchanged: swapped?"
    elif shares["centres"] >= 0.05 and leaves.sum() >= 3 and bool(fits_centre.all()):
        sign = "centres"
        detail = (
            "leave their image as [x, y, width, height], and all fit as [centre x, centre y, width, height]: "
            "centres instead of corners?"
        )
    else:
        return []
    certain = len(boxes) >= 10 and max(shares["normalised"], shares["corners"], shares["exchanged"]) >= 0.5
    kind = "format" if certain else "suspected format"
    return [problem(kind, where, f"{_percent(shares[sign])} of {len(boxes):,} boxes {detail}")]


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if 0.1 <= share <= 0.995 or share == 1 else f"{100 * share:.2g} %"
