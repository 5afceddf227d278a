"""Images and annotations as columns: what a source of annotations delivers, and what `inspect_tables` checks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from detector.datasets.problems import Problem, problem

NO_ID = np.iinfo(np.int64).min
"""The id of an annotation for which the source has none."""


@dataclass
class ImageTable:
    """E images, in the order of the source. `kept` are those still in the dataset, at first all."""

    ids: NDArray[np.int64]
    """(E,)"""
    names: list[str]
    """E names in the image store."""
    sizes: NDArray[np.int32]
    """(E, 2) height and width; 0 where unknown. From the source first, then as decoded."""
    class_mask: NDArray[np.bool_] | None = None
    """(E, K) the classes annotated in each image, in the order of the source's categories; None means all."""
    num_malformed: int = 0
    """Images of the source that could not be read into this table."""

    def __post_init__(self) -> None:
        n = len(self.ids)
        if len(self.names) != n or self.sizes.shape != (n, 2):
            raise ValueError(
                f"ImageTable must have E ids, E names and sizes (E, 2), got {n}, {len(self.names)} and "
                f"{self.sizes.shape}"
            )
        self.kept: NDArray[np.bool_] = np.ones(n, bool)

    def where(self, i: int) -> str:
        """Name image i for a message."""
        return f"image {self.ids[i]} ({self.names[i]})"

    def drop(self, i: int, problems: list[Problem], kind: str, detail: str) -> None:
        """Take image i out of the dataset, and add the reason to the problems."""
        self.kept[i] = False
        problems.append(problem(kind, self.where(i), detail))


@dataclass(frozen=True)
class AnnotationTable:
    """T annotations, in the order of the source."""

    image_ids: NDArray[np.int64]
    """(T,)"""
    category_ids: NDArray[np.int64]
    """(T,)"""
    xywh: NDArray[np.float64]
    """(T, 4) in pixels of the image."""
    areas: NDArray[np.float64]
    """(T,) square pixels; NaN where the source has none, for width times height."""
    crowd: NDArray[np.bool_]
    """(T,)"""
    ignore: NDArray[np.bool_]
    """(T,)"""
    ids: NDArray[np.int64]
    """(T,) `NO_ID` where the source has none."""
    positions: NDArray[np.int64]
    """(T,) place in the source's list, which names an annotation without an id."""
    extras: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    """Further columns of T rows by name; they stay with the boxes up to `Objects.extras`."""
    num_malformed: int = 0
    """Annotations of the source that could not be read into this table."""

    def __post_init__(self) -> None:
        n = len(self.image_ids)
        wrong = {name: len(column) for name, column in self._columns().items() if len(column) != n}
        if wrong or self.xywh.shape != (n, 4):
            raise ValueError(
                f"the columns of an AnnotationTable must have as many rows as its image_ids, {n}, and xywh must be "
                f"({n}, 4), got {wrong or self.xywh.shape}"
            )

    def __len__(self) -> int:
        return len(self.image_ids)

    def _columns(self) -> dict[str, NDArray[np.generic]]:
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)} | dict(self.extras)

    def where(self, k: int, image_name: str | None = None) -> str:
        """Name annotation k for a message."""
        name = f"annotations[{self.positions[k]}]" if self.ids[k] == NO_ID else f"annotation {self.ids[k]}"
        image = f"image {self.image_ids[k]}" + (f", {image_name}" if image_name is not None else "")
        return f"{name} ({image})"

    def take(self, rows: NDArray[np.integer]) -> AnnotationTable:
        """Return the annotations at some rows."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        extras = {name: value[rows] for name, value in self.extras.items()}
        return AnnotationTable(**columns, extras=extras, num_malformed=self.num_malformed)
