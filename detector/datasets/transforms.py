"""The geometry shared by training, evaluation and prediction: resize, mirror, pad."""

from __future__ import annotations

import math
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from detector.config import Pad, Resize
from detector.datasets.objects import Objects
from detector.structures import Unresized


class View(NamedTuple):
    """An image with its objects, between reading and batching."""

    image: NDArray[np.uint8]
    """(h, w, 3) RGB."""
    size: tuple[int, int]
    """Height and width of the frame that the objects' pixels refer to; the image may have been resized already, or be
    resized later on the device."""
    objects: Objects


def resized_size(size: tuple[int, int], *, min_size: int, max_size: int, resize: Resize = "area") -> tuple[int, int]:
    """Return height and width after scaling the short side to `min_size`, but the long side at most to `max_size`.

    Rounded to the nearest pixel; down where the resize is float_bilinear (torchvision's rule).
    """
    height, width = size
    scale = min(min_size / min(height, width), max_size / max(height, width))
    if resize == "float_bilinear":
        return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
    return _scaled(size, scale)


def fit_inside(size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the size itself if it fits the canvas, else shrunk to fit, keeping the aspect ratio."""
    scale = min(1.0, canvas[0] / size[0], canvas[1] / size[1])
    height, width = _scaled(size, scale)
    return min(height, canvas[0]), min(width, canvas[1])


def _scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, math.floor(size[0] * scale + 0.5)), max(1, math.floor(size[1] * scale + 0.5))


def padded_size(size: tuple[int, int], pad: Pad) -> tuple[int, int]:
    """Return height and width rounded up to the padded size."""
    multiple = {"multiple_128": 128, "batch_max_32": 32}[pad]
    return -(-size[0] // multiple) * multiple, -(-size[1] // multiple) * multiple


def resize_image(image: NDArray[np.uint8], size: tuple[int, int], resize: Resize) -> NDArray[np.uint8]:
    """Resize (H, W, 3) to `size`, in 8 bits.

    "area" averages areas where the image shrinks (no aliasing) and is bilinear where it grows; "pil_bilinear" is
    detectron2's rule, without aliasing either, and "cv2_bilinear" is mmdetection's. See `resize_batch` for
    "float_bilinear".
    """
    if image.shape[:2] == size:
        return image
    if resize == "pil_bilinear":
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    shrinks = size[0] * size[1] < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks and resize == "area" else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = cv2.resize(image, (size[1], size[0]), interpolation=interpolation)
    return resized


def resize_batch(images: Tensor, unresized: Unresized) -> Tensor:
    """Resize (B, 3, h, w) uint8 images of several sizes to the (B, 3, H, W) float32 batch that torchvision would make.

    Bilinear in floating point, without anti-aliasing. (torchvision normalises first; only rounding differs.)
    """
    out = images.new_zeros((len(images), 3, *unresized.canvas), dtype=torch.float32)
    out = out.contiguous(memory_format=torch.channels_last)
    for i, ((h, w), (new_h, new_w)) in enumerate(zip(unresized.sizes, unresized.resized, strict=True)):
        image = images[i : i + 1, :, :h, :w].float()
        out[i, :, :new_h, :new_w] = F.interpolate(image, (new_h, new_w), mode="bilinear", align_corners=False)[0]
    return out


def resize_view(view: View, size: tuple[int, int], resize: Resize) -> View:
    """Resize the objects of a view, and its image unless that is left to the device ("float_bilinear")."""
    image = view.image if resize == "float_bilinear" else resize_image(view.image, size, resize)
    factors = np.array([size[1] / view.size[1], size[0] / view.size[0]] * 2, dtype=np.float32)
    objects = view.objects
    return View(
        image, size, objects._replace(boxes=objects.boxes * factors, ignore_boxes=objects.ignore_boxes * factors)
    )


def mirror(view: View) -> View:
    """Exchange left and right."""
    width = view.size[1]

    def flip(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)

    # mirrored while it is copied: collating a mirrored view of the array would take twenty times as long
    image: NDArray[np.uint8] = cv2.flip(view.image, 1)
    objects = view.objects
    return View(image, view.size, objects._replace(boxes=flip(objects.boxes), ignore_boxes=flip(objects.ignore_boxes)))


def mirror_randomly(view: View, rng: np.random.Generator, *, probability: float) -> View:
    """Mirror a view with some probability."""
    return mirror(view) if rng.random() < probability else view
