"""Image files: their pixels as RGB, their headers, and the check of a whole folder before anything relies on it.

How pixels become 8-bit RGB, the same in training, evaluation and prediction:

- grey, palette, YCbCr and CMYK images: as `PIL.Image.convert("RGB")` does;
- alpha is dropped, not composited: the field's convention; the colours below transparent pixels stay as stored;
- 16-bit grey: value / 257, rounded, so that 65535 becomes 255. A fixed rule, because a range taken from each image
  would make the same object look different from one image to the next. 16-bit colour: the high byte (all that Pillow
  gives), at most one step from that rule;
- floating-point pixels are refused: the file does not say which value is white;
- of an animation or a multi-page file, the first frame.

TIFF files are always turned as their orientation tag says: there the tag is part of the format, and Pillow applies it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from detector.errors import ImageError

# Formats that are known by their first bytes, and whose decoders only decode. Of Pillow's others, some start programs.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")

MAX_PIXELS = 1_000_000_000
"""Largest image that is decoded: 3 GB as RGB. Beyond it a file is refused, whatever it claims to be."""

# Pillow would warn above 89 megapixels and refuse above 179, both common in aerial and medical images; ours is above.
Image.MAX_IMAGE_PIXELS = None

_ORIENTATION_TAG = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPPING = tuple(_TRANSPOSE[orientation] for orientation in (5, 6, 7, 8))
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")


class ImageHeader(NamedTuple):
    """What an image file says about itself."""

    width: int
    """As stored, before any EXIF orientation."""
    height: int
    mode: str
    """Pillow's mode (L, RGB, P, I;16, ...), with ";16" added for colour of 16 bits per channel."""
    orientation: int
    """EXIF orientation 1..8; 5 to 8 swap width and height; 1 where the file has none."""


def decode_image(path: Path, *, apply_exif: bool) -> NDArray[np.uint8]:
    """Pixels of an image file as (H, W, 3) uint8 RGB, contiguous and writable, by the rules of this module.

    `apply_exif` turns the image as its EXIF orientation says. Raises `ImageError` if the file is missing, no image,
    truncated, of floating-point pixels or larger than `MAX_PIXELS`.
    """
    pixels, _ = decode_at_least(path, apply_exif=apply_exif, enough=None)
    return pixels


def decode_at_least(
    path: Path, *, apply_exif: bool, enough: Callable[[tuple[int, int]], tuple[int, int]] | None
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """As `decode_image`, but a colour JPEG may come at exactly a half, a quarter or an eighth of its size.

    Its decoder makes what are nearly the means of 2 x 2, 4 x 4 or 8 x 8 pixels in less time than the pixels, and most of what a
    resize by areas would do next is then done. (Colour that is stored at half the width only, 4:2:2, stays less sharp.)

    Args:
        path: of the file.
        apply_exif: see `decode_image`.
        enough: from the picture's height and width to those that the result must have at least; None: all pixels.

    Returns:
        The pixels, and height and width of the whole picture.
    """
    with _opened(path) as image:
        turn = _TRANSPOSE.get(_orientation(image)) if apply_exif else None
        size = image.height, image.width
        swapped = turn in _SWAPPING
        size = size[::-1] if swapped else size
        least = (0, 0) if enough is None else part_of(size, enough(size))
        pixels = None
        if image.format == "JPEG" and image.mode == "RGB":
            pixels = _usual_jpeg(path, least[::-1] if swapped else least)
        if pixels is None:
            rgb = _to_rgb(image)
            return np.array(rgb.transpose(turn) if turn is not None else rgb), size
        if turn is not None:
            pixels = np.array(Image.fromarray(pixels).transpose(turn))
        return pixels, size


def part_of(size: tuple[int, int], enough: tuple[int, int]) -> tuple[int, int]:
    """An eighth, a quarter or a half of a size, or all of it: the smallest that is enough and without a rest, because a rest
    would become a row of its own, and everything would lie beside where its box says."""
    height, width = size
    for factor in (8, 4, 2):
        if height % factor == width % factor == 0 and enough[0] * factor <= height and enough[1] * factor <= width:
            return height // factor, width // factor
    return size


def _usual_jpeg(path: Path, least: tuple[int, int] = (0, 0)) -> NDArray[np.uint8] | None:
    """A colour JPEG's pixels: those of Pillow, whose decoder it is, in three quarters of the time, because they are written
    where they stay; or at the decoder's smallest size of at least so much. None where the decoder had anything to remark, which is
    then left to Pillow to judge."""
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            path.read_bytes(), "RGB", min_height=least[0], min_width=least[1], strict=True
        )
    except ValueError:
        return None
    return pixels


def read_header(path: Path) -> ImageHeader:
    """Size, mode and orientation without decoding; raises `ImageError` for all that shows without the pixels."""
    with _opened(path) as image:
        return _header(image)


@contextmanager
def _opened(path: Path | str) -> Iterator[Image.Image]:
    """The open image; whatever the decoder trips over while it is open becomes an `ImageError`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ImageError(f"{path}: image must have at most {MAX_PIXELS:,} pixels, got {image.size}")
            if image.mode == "F":
                raise ImageError(
                    f"{path}: pixels must be integers, got floating point (mode F), where the file does not say which "
                    "value is white; save it as 8-bit or 16-bit"
                )
            yield image
    except ImageError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
        raise ImageError(f"{path}: {_reason(path, error)}") from error


def _reason(path: Path | str, error: Exception) -> str:
    """Why a file is no usable image, in words; looks at its first bytes for the usual suspects."""
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "no such file"
    if os.path.isdir(path):
        return "is a folder, not an image"
    try:
        with open(path, "rb") as file:
            head = file.read(64).lstrip().lower()
    except (OSError, ValueError) as unreadable:
        return str(getattr(unreadable, "strerror", None) or unreadable)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image itself (fetch it with `git lfs pull`)"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not an image (a failed download)"
    if isinstance(error, UnidentifiedImageError):
        return f"is no image of a known format ({', '.join(FORMATS)})"
    return f"cannot be decoded: {error}" if str(error) else f"cannot be decoded ({type(error).__name__})"


def _header(image: Image.Image) -> ImageHeader:
    mode = image.mode
    tiles = getattr(image, "tile", None)
    if mode not in DEEP_GREY and tiles and ";16" in str(tiles[0][3]):
        mode = f"{mode};16"
    return ImageHeader(image.width, image.height, mode, _orientation(image))


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # already turned by Pillow
        return 1
    try:
        # The base class's method: PNG's own would decode all pixels in search of EXIF data behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - EXIF that cannot be parsed says nothing about the orientation
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in DEEP_GREY:
        deep = np.asarray(image).astype(np.int64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ImageError(
                f"{getattr(image, 'filename', 'image')}: integer pixels must lie in 0..65535, "
                f"got {deep.min()}..{deep.max()}; save it as 8-bit or 16-bit"
            )
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    else:
        image.load()
    image.info.pop("transparency", None)  # or Pillow warns that dropping it loses something, for every palette image
    return image.convert("RGB")
