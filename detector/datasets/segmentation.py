"""Boxes of COCO segmentations, for annotations without a box."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

from detector.datasets.json_columns import is_number, number


def box_of_segmentation(annotation: dict[str, Any]) -> list[float] | None:
    """Return the xywh box around polygons or a run-length-encoded mask; None where there is no usable one."""
    shape = annotation.get("segmentation")
    if annotation.get("bbox") not in (None, []):  # a malformed box must be reported, not replaced silently
        return None
    if isinstance(shape, list):
        shape = [_flat(part) for part in shape] if not all(map(is_number, shape)) else [shape]
        parts = [p for p in shape if isinstance(p, list) and len(p) >= 6 and len(p) % 2 == 0 and all(map(is_number, p))]
        if not parts or len(parts) < len(shape):
            return None
        xs, ys = [number(x) for p in parts for x in p[::2]], [number(y) for p in parts for y in p[1::2]]
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


def _flat(polygon: Any) -> Any:
    """A polygon of points [[x, y], ...] as [x, y, ...]; anything else as it is."""
    if isinstance(polygon, list) and polygon and all(isinstance(p, list) and len(p) == 2 for p in polygon):
        return [value for point in polygon for value in point]
    return polygon


def _decompressed(text: str) -> list[int] | None:
    """Return the runs of a compressed mask; None where the text is not one.

    pycocotools does the same, but reads and writes beyond its buffers where the text is malformed. A number is 5 bits a
    character, the lowest first, the last one with its sign; from the fourth on it is the difference to the run before
    the last (cocoapi, maskApi.c, rleFrString).
    """
    runs: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits == 35:  # pycocotools' runs have 32 bits, and fit into seven characters
            return None
        value |= (code & 31) << bits
        bits += 5
        if code & 32:  # more characters of this number follow
            continue
        if code & 16:
            value -= 1 << bits
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = bits = 0
    return None if bits else runs


def _box_of_runs(runs: list[int], height: int) -> list[float]:
    """Return the xywh box of a mask given as alternating runs of background and mask, column by column.

    The box of a mask without pixels has size 0.
    """
    ends = list(accumulate(runs))
    spans = [(ends[k - 1], ends[k] - 1) for k in range(1, len(runs), 2) if runs[k]]  # first and last pixel
    if not spans:
        return [0.0, 0.0, 0.0, 0.0]
    left, right = spans[0][0] // height, spans[-1][1] // height
    if any(first // height != last // height for first, last in spans):  # from one column's foot to the next's head
        top, bottom = 0, height - 1
    else:
        top, bottom = min(first % height for first, _ in spans), max(last % height for _, last in spans)
    return [float(left), float(top), float(right - left + 1), float(bottom - top + 1)]
