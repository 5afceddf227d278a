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
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from detector.datasets.store import FILES, ImageStore
from detector.errors import ImageError

# Formats that are recognized by their first bytes, and whose decoders only decode. Some other formats start programs.
FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")

MAX_PIXELS = 1_000_000_000
"""Largest image that is decoded: 3 GB as RGB. A file whose header declares more is refused."""

# Pillow would warn above 89 megapixels and refuse above 179, both common in aerial and medical images.
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
DEEP_GREY = ("I;16", "I;16L", "I;16B", "I;16N", "I")
"""Pillow's modes of 16-bit grey."""


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
        ImageError: see `decode_image`.
    """
    with open_image(store, name) as (image, file):
        orientation = _orientation(image) if apply_exif else 1
        transpose, exchanged = _TRANSPOSE.get(orientation), orientation >= 5
        size = (image.width, image.height) if exchanged else (image.height, image.width)
        least = (0, 0) if needed_size is None else reduced_size(size, needed_size(size))
        pixels = None
        if image.format == "JPEG" and image.mode == "RGB":
            file.seek(0)
            pixels = _decode_jpeg(file.read(), least[::-1] if exchanged else least)
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
    """
    try:
        with store.open(name) as file:
            try:
                with Image.open(file, formats=FORMATS) as image:
                    if image.width * image.height > MAX_PIXELS:
                        raise ImageError(f"image must have at most {MAX_PIXELS:,} pixels, got {image.size}")
                    if image.mode == "F":
                        raise ImageError(
                            "pixels must be integers, got floating point (mode F), where the file does not state which "
                            "value is white; save it as 8-bit or 16-bit"
                        )
                    yield image, file
            except ImageError:
                raise
            except Exception as error:  # decoders raise OSError, SyntaxError, struct.error, ... on damaged files
                raise ImageError(_reason(file, error)) from error
    except ImageError as error:
        raise ImageError(f"{store.describe(name)}: {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ImageError(f"{store.describe(name)}: no such file") from error
    except IsADirectoryError as error:
        raise ImageError(f"{store.describe(name)}: is a folder, not an image") from error
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise ImageError(f"{store.describe(name)}: {getattr(error, 'strerror', None) or error}") from error


def _reason(file: BinaryIO, error: Exception) -> str:
    """Explain why a file is no usable image; its first bytes show the usual causes."""
    try:
        file.seek(0)
        head = file.read(64).lstrip().lower()
    except OSError as unreadable:
        return unreadable.strerror or str(unreadable)
    if not head:
        return "the file is empty"
    if head.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image itself (fetch it with `git lfs pull`)"
    if head.startswith((b"<!doctype html", b"<html")):
        return "is a web page, not an image (a failed download)"
    if isinstance(error, UnidentifiedImageError):
        return f"is no image of a known format ({', '.join(FORMATS)})"
    return f"cannot be decoded: {error}" if str(error) else f"cannot be decoded ({type(error).__name__})"


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


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an open image to RGB by the rules of this module. Raises `ImageError`, and whatever the decoder raises."""
    if image.mode in DEEP_GREY:
        deep = np.asarray(image).astype(np.int64)
        if deep.size and (deep.min() < 0 or deep.max() > 65535):
            raise ImageError(
                f"integer pixels must lie in 0..65535, got {deep.min()}..{deep.max()}; save it as 8-bit or 16-bit"
            )
        image = Image.fromarray(((deep + 128) // 257).astype(np.uint8))
    else:
        image.load()
    image.info.pop("transparency", None)  # or Pillow warns, for every palette image, that dropping it loses information
    return image.convert("RGB")
