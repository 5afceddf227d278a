"""The objects of one image: boxes, labels and whatever else belongs to each box."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Objects(NamedTuple):
    """The ground truth of one image, as training uses it."""

    boxes: NDArray[np.float32]
    """(M, 4) xyxy in pixels, clipped to the image, none of zero size."""
    labels: NDArray[np.int64]
    """(M,) in 0..K-1."""
    ignore_boxes: NDArray[np.float32]
    """(R, 4) boxes of crowd and ignore regions, clipped."""
    extras: Mapping[str, NDArray[np.generic]] = {}
    """Further arrays of M rows by name. "weights" become `Targets.weights`."""
    class_mask: NDArray[np.bool_] | None = None
    """(K,) the classes annotated in this image; None means all."""

    def take(self, rows: NDArray[np.integer], boxes: NDArray[np.float32]) -> Objects:
        """Keep some of the M objects, with new boxes."""
        extras = {name: values[rows] for name, values in self.extras.items()}
        return self._replace(boxes=boxes, labels=self.labels[rows], extras=extras)


NO_OBJECTS = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 4), np.float32))
