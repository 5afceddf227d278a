"""The image formats that are read. This module imports nothing, so that commands can use it before torch is loaded."""

from __future__ import annotations

FORMATS = ("JPEG", "PNG", "BMP", "TIFF", "WEBP", "GIF", "PPM", "JPEG2000", "AVIF")
"""As Pillow names them."""

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".jpe", ".jfif", ".apng", ".gif", ".pbm", ".pgm", ".ppm",
    ".pnm", ".pfm", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".avif", ".avifs",
)  # fmt: skip
"""Of files in these formats, in lower case, the usual ones first."""


def is_image_name(name: str) -> bool:
    """Whether a file of a folder is an image by its name; macOS's companions, `._NAME`, are none."""
    return name.lower().endswith(SUFFIXES) and not name.startswith("._")
