"""Values of one key over all entries of a JSON list as arrays; fast where all values have the expected type."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.datasets.ids import id_key


def lengths(values: list[Any]) -> NDArray[np.int32]:
    """Read image widths or heights: (n,); 0 where there is no usable one."""
    keys = values if set(map(type, values)) <= {int} else [id_key(value) for value in values]
    return np.array([key if type(key) is int and 0 < key < 2**31 else 0 for key in keys], np.int32)


_FLAGS: dict[object, bool] = {  # True and 1.0 are equal to 1
    0: False, 1: True, None: False, "0": False, "1": True, "": False, "false": False, "true": True, "0.0": False,
    "1.0": True,
}  # fmt: skip


def _is_plain(value: object) -> bool:
    return isinstance(value, int | float | str | None)


def flags(values: list[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]:
    """Read iscrowd or ignore: (n,) values, where it is neither 0 nor 1 nor absent, and where it was written as text."""
    if set(map(type, values)) <= {int, type(None)} and set(values) <= {0, 1, None}:
        return np.array(values) == 1, np.zeros(len(values), bool), np.zeros(len(values), bool)
    read = [_FLAGS.get(v.strip().lower() if isinstance(v, str) else v) if _is_plain(v) else None for v in values]
    bad = np.array([r is None for r in read], bool)
    as_text = np.array([isinstance(v, str) for v in values], bool)
    return np.array([bool(r) for r in read], bool), bad, as_text & ~bad


def is_number(value: object) -> bool:
    """Whether a value is an int or a float, but no boolean."""
    return type(value) in (int, float)


def number(value: int | float) -> float:
    """Convert to float; integers beyond all floats become infinite."""
    try:
        return float(value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def areas(values: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Read areas: (n,) values, NaN where there is no usable one; and where one is given that is not usable."""
    read = np.array([number(v) if is_number(v) else np.nan for v in values], np.float64)
    usable = np.isfinite(read) & (read >= 0)
    given = np.array([v is not None for v in values], bool)
    return np.where(usable, read, np.nan), given & ~usable


def number_in(value: object) -> float | None:
    """Read a number, also one that is written as text; None for anything else."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return number(value)
    return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value) else None


_NUMBER = re.compile(r"\s*[-+]?(?:[0-9]{1,30}(?:\.[0-9]{0,30})?|\.[0-9]{1,30})(?:[eE][-+]?[0-9]{1,3})?\s*")


def boxes(values: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Read boxes: (n, 4) values, where they are not four numbers, and where a number was written as text."""
    if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
        flat = list(chain.from_iterable(values))
        if set(map(type, flat)) <= {int, float}:
            try:
                no_box = np.zeros(len(values), bool)
                return np.array(flat, np.float64).reshape(-1, 4), no_box, no_box.copy()
            except OverflowError:
                pass
    read, bad, as_text = np.zeros((len(values), 4)), np.zeros(len(values), bool), np.zeros(len(values), bool)
    for k, value in enumerate(values):
        numbers = [number_in(v) for v in value] if type(value) is list and len(value) == 4 else [None]
        if None in numbers:
            bad[k] = True
        else:
            read[k], as_text[k] = numbers, not all(map(is_number, value))
    return read, bad, as_text


def numbers_text(values: Iterable[float]) -> str:
    """Format numbers for a message."""
    return f"[{', '.join(f'{v:.7g}' for v in values)}]"
