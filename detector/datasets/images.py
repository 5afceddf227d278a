"""Decode image files to RGB pixels, and read their headers.

How pixels become 8-bit RGB, in training, evaluation and prediction alike:

- grey, palette, YCbCr and CMYK images: as `PIL.Image.convert("RGB")` does;
- alpha is dropped, not composited: the field's convention; the colours below transparent pixels stay as stored;
- 16-bit grey: value / 257, rounded, so that 65535 becomes 255. A fixed rule, because a range taken from each image
  would make the same object look different from one image to the next. 16-bit colour: the high byte (all that Pillow
  provides), at most one step from that rule;
- floating-point pixels are refused: the file does not state which value is white;
- of an animation or a multi-page file, the first frame.

TIFF files are always rotated by their orientation tag: there the tag is part of the format, and Pillow applies it.

Image files come from anywhere, so what one of them may cost is bounded before it is decoded: its pixels, its pixels per
byte of the file, the scans of a JPEG, and memory.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from detector.datasets.image_budget import (
    JPEGS,
    MAX_BYTES_AT_ONCE,
    MAX_PIXELS,
    require_few_pixels,
    require_few_scans,
    require_memory,
)
from detector.datasets.image_formats import FORMATS
from detector.datasets.store import FILES, ImageStore
from detector.errors import ImageError, RunError
from detector.file_kinds import LONGEST, other_kind
from detector.files import os_error_remedy
from detector.text import printable

# Formats that are recognized by their first bytes, and whose decoders only decode. Some other formats start programs.
_READ_IN_PARTS = tuple(name for name in FORMATS if name not in ("WEBP", "AVIF"))

LONGEST_NAME = 1_000
"""Characters of a file's path that messages show."""

# Pillow refuses twice this limit, also where an animation allocates its canvas while it is opened, and warns above it.
# Its own limit is 89 megapixels, which aerial and medical images exceed.
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

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
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of 16-bit grey."""
_TO_8_BITS = ((np.arange(65536) + 128) // 257).astype(np.uint8)


class ImageHeader(NamedTuple):
    """What an image file's header declares."""

    width: int
    """As stored, before any EXIF orientation."""
    height: int
    mode: str
    """Pillow's mode (L, RGB, P, I;16, ...), with ";16" added for colour of 16 bits per channel."""
    orientation: int
    """EXIF orientation 1..8; 5 to 8 exchange width and height; 1 where the file has none."""


def decode_image(path: Path, *, apply_exif: bool) -> NDArray[np.uint8]:
    """Decode an image file to (H, W, 3) uint8 RGB pixels, contiguous and writable, by the rules of this module.

    Args:
        path: of the file.
        apply_exif: whether to rotate or mirror the image by its EXIF orientation.

    Raises:
        ImageError: the file is missing, no image, truncated, of floating-point pixels or larger than `MAX_PIXELS`.
        RunError: there is not enough memory.
    """
    return decode_at_least(FILES, str(path), apply_exif=apply_exif)[0]


def rgb_pixels(image: Image.Image, *, apply_exif: bool) -> NDArray[np.uint8]:
    """Decode an open Pillow image to (H, W, 3) uint8 RGB; see `decode_image`."""
    transpose = _TRANSPOSE.get(_orientation(image)) if apply_exif else None
    rgb = to_rgb(image)
    return np.array(rgb.transpose(transpose) if transpose is not None else rgb)


def decode_at_least(
    store: ImageStore,
    name: str,
    *,
    apply_exif: bool,
    needed_size: Callable[[tuple[int, int]], tuple[int, int]] | None = None,
) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """Decode an image of a store like `decode_image`; a colour JPEG maybe at exactly 1/2, 1/4 or 1/8 of its size.

    The JPEG decoder computes nearly the means of 2 x 2, 4 x 4 or 8 x 8 pixels in less time than the pixels, which is
    most of what resizing by areas would do next. (Chroma stored at half the width only, 4:2:2, stays less sharp.)

    Args:
        store: the image store.
        name: of the image in the store.
        apply_exif: whether to rotate or mirror the image by its EXIF orientation.
        needed_size: maps the image's height and width to those that are enough; None: all pixels.

    Returns:
        The pixels, and height and width of the whole image.

    Raises:
        ImageError, RunError: see `decode_image`.
    """
    with open_image(store, name) as (image, file):
        require_memory(image)
        orientation = _orientation(image) if apply_exif else 1
        transpose, exchanged = _TRANSPOSE.get(orientation), orientation >= 5
        size = (image.width, image.height) if exchanged else (image.height, image.width)
        least = (0, 0) if needed_size is None else reduced_size(size, needed_size(size))
        pixels = None
        if image.format in JPEGS:
            data = require_few_scans(image, file)
            if image.format == "JPEG" and image.mode == "RGB":
                pixels = _decode_jpeg(data, least[::-1] if exchanged else least)
        if pixels is None:
            return rgb_pixels(image, apply_exif=apply_exif), size
        if transpose is not None:
            pixels = np.array(Image.fromarray(pixels).transpose(transpose))
        return pixels, size


def reduced_size(size: tuple[int, int], needed: tuple[int, int]) -> tuple[int, int]:
    """Return the smallest of 1/8, 1/4, 1/2 and all of a size that is at least the `needed` size.

    Only divisors without a remainder count: the decoder would make a row of its own from a remainder, and everything
    would be shifted against its boxes.
    """
    height, width = size
    for factor in (8, 4, 2):
        if height % factor == width % factor == 0 and needed[0] * factor <= height and needed[1] * factor <= width:
            return height // factor, width // factor
    return size


def _decode_jpeg(data: bytes, least: tuple[int, int] = (0, 0)) -> NDArray[np.uint8] | None:
    """Decode a colour JPEG at the smallest size the decoder offers of at least `least`.

    The pixels are Pillow's, which uses the same decoder, in three quarters of the time, because they are written where
    they stay. Returns None where the decoder had a warning; Pillow then decides.
    """
    try:
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(
            data, "RGB", min_height=least[0], min_width=least[1], strict=True
        )
    except ValueError:
        return None
    return pixels


def read_header(path: Path) -> ImageHeader:
    """Read size, mode and orientation without decoding.

    Raises:
        ImageError: the header shows that the image cannot be used.
    """
    with open_image(FILES, str(path)) as (image, _):
        return header_of(image)


@contextmanager
def open_image(store: ImageStore, name: str) -> Iterator[tuple[Image.Image, BinaryIO]]:
    """Open an image of a store, without decoding it; yield it and its file.

    Raises:
        ImageError: any error of opening or decoding, also inside the block.
        RunError: raised inside the block; the image's name is added.
    """
    try:
        with store.open(name) as file:
            try:
                num_bytes = file.seek(0, os.SEEK_END)
                file.seek(0)
                formats = FORMATS if num_bytes <= MAX_BYTES_AT_ONCE else _READ_IN_PARTS
                with Image.open(file, formats=formats) as image:
                    require_few_pixels(image, num_bytes)
                    if image.mode == "F":
                        raise ImageError(
                            "pixels must be integers, got floating point (mode F), where the file does not state which "
                            "value is white; save it as 8-bit or 16-bit"
                        )
                    yield image, file
            except (ImageError, RunError):
                raise
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
                raise ImageError(_reason(file, error)) from error
    except (ImageError, RunError) as error:
        raise type(error)(f"{name_of(store, name)}: {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"{name_of(store, name)}: no such file") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ImageError(f"{name_of(store, name)}: {why_unreadable(error)}") from error


def name_of(store: ImageStore, name: str) -> str:
    """Return the name of an image for messages, with unprintable characters escaped."""
    return printable(store.describe(name), LONGEST_NAME)


def why_unreadable(error: OSError | ValueError) -> str:
    """Explain an error of the operating system, or of a name that no file can have, without the file's name."""
    reason = error.strerror if isinstance(error, OSError) else None
    return f"{reason or printable(str(error))}{os_error_remedy(error)}"


def file_system_error(error: BaseException | None) -> OSError | None:
    """Return the error of the operating system that an error was raised from; None where a decoder failed."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error
        error = error.__cause__
    return None


def _reason(file: BinaryIO, error: Exception) -> str:
    """Explain why a file is no usable image; its first bytes show the usual causes."""
    if isinstance(error, OSError) and error.errno is not None:
        return why_unreadable(error)
    try:
        file.seek(0)
        head = file.read(LONGEST)
    except OSError as unreadable:
        return why_unreadable(unreadable)
    kind = other_kind(head, expected=("JPEG", "PNG"))
    if kind:
        return kind
    if isinstance(error, UnidentifiedImageError):
        return f"is no image of a known format ({', '.join(FORMATS)})"
    if isinstance(error, Image.DecompressionBombError):
        return f"image must have at most {MAX_PIXELS:,} pixels"
    if isinstance(error, MemoryError):
        return "cannot be decoded: it needs more memory than is free"
    text = printable(str(error))
    return f"cannot be decoded: {text}" if text else f"cannot be decoded ({type(error).__name__})"


def header_of(image: Image.Image) -> ImageHeader:
    """Return the header of an open image."""
    mode = image.mode
    tiles = getattr(image, "tile", None)
    if mode not in DEEP_GREY and tiles and ";16" in str(tiles[0][3]):
        mode = f"{mode};16"
    return ImageHeader(image.width, image.height, mode, _orientation(image))


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":  # Pillow has applied it
        return 1
    try:
        # The base class's method: PNG's own would decode all pixels in search of EXIF data behind them.
        value = Image.Image.getexif(image).get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001 - EXIF that cannot be parsed has no orientation
        return 1
    return value if isinstance(value, int) and value in _TRANSPOSE else 1


def decode_open(image: Image.Image, file: BinaryIO) -> Image.Image:
    """Decode an open image of a store to RGB. Raises like `to_rgb`; `RunError` where there is not enough memory."""
    require_memory(image)
    if image.format in JPEGS:
        require_few_scans(image, file)
    return to_rgb(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an open image to RGB by the rules of this module. Raises `ImageError`, and whatever the decoder raises."""
    if image.mode in DEEP_GREY:
        deep = np.asarray(image)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ImageError(
                f"integer pixels must lie in 0..65535, got {deep.min()}..{deep.max()}; save it as 8-bit or 16-bit"
            )
        shallow = np.empty(deep.shape, np.uint8)
        for rows in range(0, len(deep), 256):  # in parts, because indices take 8 bytes per pixel
            shallow[rows : rows + 256] = _TO_8_BITS[deep[rows : rows + 256]]
        image = Image.fromarray(shallow)
    else:
        image.load()
    image.info.pop("transparency", None)  # or Pillow warns, for every palette image, that dropping it loses information
    return image.convert("RGB")
