"""The common geometry of training, evaluation and prediction: resize, mirror, pad."""

from __future__ import annotations

import math
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from detector.datasets.coco import Objects
from detector.structures import Unresized

Pad = Literal["multiple_128", "batch_max_32"]
Resize = Literal["area", "float_bilinear", "pil_bilinear", "cv2_bilinear"]


def resized_size(size: tuple[int, int], *, min_size: int, max_size: int, resize: Resize = "area") -> tuple[int, int]:
    """Height and width after scaling the short side to `min_size`, but the long side at most to `max_size`.

    Rounded to the nearest pixel; down where the resize is float_bilinear (torchvision's rule).
    """
    height, width = size
    scale = min(min_size / min(height, width), max_size / max(height, width))
    if resize == "float_bilinear":
        return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))
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


def resize_picture(image: NDArray[np.uint8], size: tuple[int, int], resize: Resize) -> NDArray[np.uint8]:
    """(H, W, 3) to `size`, in 8 bits: by areas where it shrinks (no aliasing) and bilinear where it grows ("area"), or as
    detectron2 ("pil_bilinear", without aliasing either) or mmdetection does ("cv2_bilinear"). See `resize_batch` for
    "float_bilinear"."""
    if image.shape[:2] == size:
        return image
    if resize == "pil_bilinear":
        return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR))
    shrinks = size[0] * size[1] < image.shape[0] * image.shape[1]
    interpolation = cv2.INTER_AREA if shrinks and resize == "area" else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = cv2.resize(image, (size[1], size[0]), interpolation=interpolation)
    return resized


def resize_batch(images: Tensor, unresized: Unresized) -> Tensor:
    """(B, 3, h, w) uint8 pictures of several sizes to the (B, 3, H, W) float32 batch that torchvision would make of them:
    bilinear in floating point, without anti-aliasing. (It normalises before; that makes no difference but of rounding.)"""
    out = images.new_zeros((len(images), 3, *unresized.canvas), dtype=torch.float32)
    out = out.contiguous(memory_format=torch.channels_last)
    for i, ((h, w), (new_h, new_w)) in enumerate(zip(unresized.sizes, unresized.resized, strict=True)):
        picture = images[i : i + 1, :, :h, :w].float()
        out[i, :, :new_h, :new_w] = F.interpolate(picture, (new_h, new_w), mode="bilinear", align_corners=False)[0]
    return out


def scale_objects(objects: Objects, old: tuple[int, int], new: tuple[int, int]) -> Objects:
    """Boxes of a picture of size `old` (height, width) in pixels of the same picture at size `new`."""
    factors = np.array([new[1] / old[1], new[0] / old[0]] * 2, dtype=np.float32)
    return Objects(objects.boxes * factors, objects.labels, objects.ignore_boxes * factors)


def mirror(image: NDArray[np.uint8], objects: Objects, *, width: int) -> tuple[NDArray[np.uint8], Objects]:
    """Left becomes right. `width`: of the picture in the pixels that the objects are in."""

    def flip(boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)

    # turned while it is copied: a view would cost the batch twenty times as much
    turned: NDArray[np.uint8] = cv2.flip(image, 1)
    return turned, Objects(flip(objects.boxes), objects.labels, flip(objects.ignore_boxes))
