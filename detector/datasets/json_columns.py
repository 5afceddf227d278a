"""Values of one key over all entries of a JSON list as arrays; fast where all values have the expected type."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray


def integer(value: object) -> int | None:
    """Read an integer or an equivalent value (7.0, "7"); None for anything else and for booleans."""
    whole = isinstance(value, float) and value.is_integer()
    if whole or (isinstance(value, str) and re.fullmatch(r"\s*-?[0-9]{1,19}\s*", value)):
        value = int(value)  # type: ignore[call-overload]
    if type(value) is int and -(2**63) <= value < 2**63:
        return value
    return None


def integers(values: list[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Read integers: (n,) values, where there is none, and where it was written as another type."""
    n = len(values)
    if set(map(type, values)) <= {int}:
        try:
            return np.array(values, np.int64), np.zeros(n, bool), np.zeros(n, bool)
        except OverflowError:
            pass
    read = [integer(v) for v in values]
    bad = np.array([r is None for r in read], bool)
    other = np.array([type(v) is not int for v in values], bool)
    return np.array([r or 0 for r in read], np.int64), bad, other & ~bad


def lengths(values: list[Any]) -> NDArray[np.int32]:
    """Read image widths or heights: (n,); 0 where there is no usable one."""
    read, bad, _ = integers(values)
    return np.where(bad | (read <= 0) | (read > 2**31 - 1), 0, read).astype(np.int32)


def flags(values: list[Any]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Read iscrowd or ignore: (n,) values, and where it is neither 0 nor 1 nor absent."""
    known: dict[float | None, bool] = {0: False, 1: True, None: False}  # True and 1.0 are equal to 1
    read = [known.get(v) if isinstance(v, int | float | None) else None for v in values]
    bad = np.array([r is None for r in read], bool)
    return np.array([bool(r) for r in read], bool), bad


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


def boxes(values: list[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Read boxes: (n, 4) values, and where they are not four numbers."""
    if set(map(type, values)) <= {list} and set(map(len, values)) <= {4}:
        flat = list(chain.from_iterable(values))
        if set(map(type, flat)) <= {int, float}:
            try:
                return np.array(flat, np.float64).reshape(-1, 4), np.zeros(len(values), bool)
            except OverflowError:
                pass
    read, bad = np.zeros((len(values), 4)), np.zeros(len(values), bool)
    for k, value in enumerate(values):
        if type(value) is list and len(value) == 4 and all(map(is_number, value)):
            read[k] = [number(v) for v in value]
        else:
            bad[k] = True
    return read, bad


def numbers_text(values: Iterable[float]) -> str:
    """Format numbers for a message."""
    return f"[{', '.join(f'{v:.7g}' for v in values)}]"
