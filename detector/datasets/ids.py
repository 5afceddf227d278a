"""Read ids alike wherever they stand in a dataset's files: as integers, or numbered where they are something else.

Image ids are integers in COCO's own files, but names, hashes, text of digits or unsigned 64-bit numbers in others.
pycocotools takes them all, because it only compares them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

_DIGITS = re.compile(r"\s*-?[0-9]{1,100}\s*")


def id_key(value: object) -> int | str | None:
    """Return what an id means: equal ids have equal keys.

    7, 7.0 and "7" mean the integer 7; other text means itself. None for anything else, such as booleans and blank text.
    """
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip():
        return int(value) if _DIGITS.fullmatch(value) else value
    return None


def fits(key: int | str | None) -> TypeGuard[int]:
    """Whether a key is an integer of 64 bits."""
    return type(key) is int and -(2**63) <= key < 2**63


class Ids:
    """The ids that a file declares, of images or of categories, and the 64-bit integers that stand for them.

    An integer stands for itself. Other ids are numbered in the order of their appearance, from the largest integer on.

    Args:
        declared: the ids as they stand in the file; values that are no id are left out.
    """

    def __init__(self, declared: Iterable[Any] = ()) -> None:
        self.originals: dict[int, Any] = {}
        """The id as it stands in the file, where that is not an integer of 64 bits."""
        self._numbers: dict[int | str | None, int] = {}
        declared = list(declared)
        if set(map(type, declared)) <= {int} and all(map(fits, declared)):
            return
        keys = [id_key(value) for value in declared]
        free = max((key for key in keys if fits(key)), default=0)
        for value, key in zip(declared, keys, strict=True):
            if key is None or (type(value) is int and fits(value)):
                continue
            number = key if fits(key) else self._numbers.get(key)
            if number is None:
                free = free + 1 if free < 2**63 - 1 else -(2**63)
                number = self._numbers[key] = free
            self.originals.setdefault(number, value)

    @property
    def numbered(self) -> int:
        """How many ids are neither integers of 64 bits nor text of one."""
        return len(self._numbers)

    def read(self, values: list[Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
        """Read ids: (n,) integers, where there is none, and where one was written as another type."""
        n = len(values)
        if set(map(type, values)) <= {int} and not self._numbers:
            try:
                return np.array(values, np.int64), np.zeros(n, bool), np.zeros(n, bool)
            except OverflowError:
                pass
        keys = [id_key(value) for value in values]
        given = set(self._numbers.values())  # which stand for other ids, and are none of the file's
        read = [self._numbers.get(key) if not fits(key) else None if key in given else key for key in keys]
        bad = np.array([number is None for number in read], bool)
        other = np.array([type(v) is not int and fits(k) for v, k in zip(values, keys, strict=True)], bool)
        return np.array([number or 0 for number in read], np.int64), bad, other

    def original(self, number: int) -> Any:
        """Return an id as it stands in the file."""
        return self.originals.get(number, number)


class FileIds(NamedTuple):
    """The ids of a COCO file."""

    images: Ids = Ids()
    categories: Ids = Ids()
