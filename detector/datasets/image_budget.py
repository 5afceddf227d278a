"""Bounds on what decoding an image file may cost: on its pixels, on those per byte, on the scans of a JPEG, on memory.

A file of a few hundred bytes may declare a billion pixels, or a thousand passes over them.
"""

from __future__ import annotations

import os
import re
import struct
from typing import BinaryIO

from PIL import Image

from detector.errors import ImageError, RunError

MAX_PIXELS = 1_000_000_000
"""Largest image that is decoded: 3 GB as RGB. A file whose header declares more is refused."""

CHEAP_PIXELS = 64_000_000
"""Images of up to this many pixels take at most half a gigabyte, and are decoded whatever the size of their file."""

MAX_PIXELS_PER_BYTE = 2_000
"""Of larger images: what the best compression of 8-bit pixels reaches is half of it (PNG, of a single colour)."""

MAX_PIXELS_PER_BYTE_OF_BITMAPS = 16_000
"""The same for black-and-white images, such as scanned drawings."""

MAX_BYTES_AT_ONCE = 2**28
"""Largest file of a format that Pillow reads into memory as a whole before it decodes anything."""

USUAL_SCANS, MAX_SCANS, MAX_SCANNED_PIXELS = 25, 500, 2e9
"""Scans of a JPEG that are always decoded; that are decoded at most; and pixels times scans. A progressive JPEG has
about ten scans, each takes 0.5 to 1 ns per pixel to decode, and a scan of 12 bytes is enough to cost that."""

JPEGS = ("JPEG", "MPO")
"""Pillow's names of JPEG files; an MPO holds several."""

_START_OF_SCAN = re.compile(b"\xff\xda")  # twice as fast as bytes.count


def require_few_pixels(image: Image.Image, num_bytes: int) -> None:
    """Refuse an image whose declared size is more than can be decoded, or than a file of `num_bytes` can hold.

    Raises:
        ImageError: it has too many pixels, or too many for the size of its file.
    """
    pixels = image.width * image.height
    if pixels > MAX_PIXELS:
        raise ImageError(f"image must have at most {MAX_PIXELS:,} pixels, got {image.size}")
    if pixels <= CHEAP_PIXELS:
        return
    limit = MAX_PIXELS_PER_BYTE_OF_BITMAPS if image.mode == "1" else MAX_PIXELS_PER_BYTE
    if pixels > limit * num_bytes:
        raise ImageError(
            f"an image of more than {CHEAP_PIXELS:,} pixels must have at most {limit:,} of them per byte of its file, "
            f"got {image.width:,} x {image.height:,} in {num_bytes:,} bytes; it may be damaged, or made to fill memory"
        )


def require_memory(image: Image.Image) -> None:
    """Check that there is memory to decode a large image; for small ones, this costs nothing.

    Raises:
        RunError: there is not.
    """
    pixels = image.width * image.height
    if pixels <= CHEAP_PIXELS:
        return
    from detector.memory import free_memory  # it imports torch, which commands without images should not wait for

    needed, free = 8 * pixels, free_memory()  # at most 1 as stored, 4 as Pillow keeps RGB, 3 as an array
    if free is not None and needed > free:
        raise RunError(
            f"decoding {image.width:,} x {image.height:,} pixels needs up to {needed / 1e9:.1f} GB of memory, and "
            f"{free / 1e9:.1f} GB is free; make the image smaller, or cut it into tiles"
        )


def require_few_scans(image: Image.Image, file: BinaryIO) -> bytes:
    """Refuse a JPEG whose scans would take very long to decode, each of which may be a few bytes long.

    Returns:
        The content of the file, without what may follow the image.

    Raises:
        ImageError: it has too many scans.
    """
    pixels, after_header = max(1, image.width * image.height), file.tell()
    num_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    data = file.read(min(num_bytes, 16 * pixels + MAX_BYTES_AT_ONCE))
    if "progressive" not in image.info and _first_scan_is_whole(data, after_header, getattr(image, "layers", 0)):
        return data
    # A thumbnail counts as a scan, too; inside a scan, FF is always followed by something else.
    scans = len(_START_OF_SCAN.findall(data))
    limit = max(USUAL_SCANS, min(MAX_SCANS, int(MAX_SCANNED_PIXELS / pixels)))
    if scans > limit:
        raise ImageError(
            f"a JPEG of {image.width:,} x {image.height:,} pixels must have at most {limit} scans, got {scans:,}; save "
            "it again"
        )
    return data


def _first_scan_is_whole(data: bytes, after_header: int, channels: int) -> bool:
    """Whether the first scan of a JPEG, whose header ends at `after_header`, has all channels; a decoder of baseline
    JPEG then ignores any other scan."""
    header = struct.pack(">2sHB", b"\xff\xda", 6 + 2 * channels, channels)
    return data.startswith(header, max(0, after_header - 8 - 2 * channels))
