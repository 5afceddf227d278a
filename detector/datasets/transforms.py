"""The common geometry of training, evaluation and prediction: resize, mirror, pad."""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from detector.datasets.coco import Objects

Pad = Literal["multiple_128", "batch_max_32"]


def resized_size(size: tuple[int, int], *, min_size: int, max_size: int) -> tuple[int, int]:
    """Height and width after scaling the short side to `min_size`, but the long side at most to `max_size`."""
    height, width = size
    scale = min(min_size / min(height, width), max_size / max(height, width))
    return _scaled(size, scale)


def fit_inside(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """The size itself where it fits the canvas, else shrunk to fit, keeping the aspect ratio."""
    scale = min(1.0, canvas[0] / size[0], canvas[1] / size[1])
    height, width = _scaled(size, scale)
    return min(height, canvas[0]), min(width, canvas[1])


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, math.floor(size[0] * scale + 0.5)), max(1, math.floor(size[1] * scale + 0.5))


def padded_size(size: tuple[int, int], pad: Pad) -> tuple[int, int]:
    """Height and width rounded up to what the network gets."""
    multiple = {"multiple_128": 128, "batch_max_32": 32}[pad]
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def resize(image: NDArray[np.uint8], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(H, W, 3) to `size`: by areas where it shrinks (no aliasing), bilinear where it grows."""
    if image.shape[:2] == size:
        return image
    shrinks = size[0] * size[1] < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = cv2.resize(image, (size[1], size[0]), interpolation=interpolation)
    return resized


def scale_objects(objects: Objects, old: tuple[int, int], new: tuple[int, int]) -> Objects:
    """Boxes of a picture of size `old` (height, width) in pixels of the same picture at size `new`."""
    factors = np.array([new[1] / old[1], new[0] / old[0]] * 2, dtype=np.float32)
    return Objects(objects.boxes * factors, objects.labels, objects.ignore_boxes * factors)


def mirror(image: NDArray[np.uint8], objects: Objects) -> tuple[NDArray[np.uint8], Objects]:
    """Left becomes right."""
    width = image.shape[1]

    def flip(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)

    return image[:, ::-1], Objects(flip(objects.boxes), objects.labels, flip(objects.ignore_boxes))
