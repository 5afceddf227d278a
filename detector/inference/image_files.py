"""The image files that a command's inputs refer to. This module imports no torch."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from detector.errors import InputError

SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".ppm", ".pgm"}
"""Files in folders with these suffixes are used; files named one by one may have any name."""


def find_images(inputs: Sequence[str], *, output_dir: Path | None = None) -> list[Path]:
    """The files that names, folders (searched recursively) and globs refer to, each once, in order.

    Raises:
        InputError: an input that refers to no image (all of them are listed); or images in `output_dir`, which drawn
            images could overwrite.
    """
    found: dict[Path, None] = {}
    problems = []
    for text in inputs:
        path = Path(text)
        if path.is_dir():
            matches = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES)
        elif path.exists():
            matches = [path]
        else:
            matches = [Path(p) for p in sorted(glob.glob(text, recursive=True)) if Path(p).is_file()]
        if not matches:
            what = "a folder without images" if path.is_dir() else "no file, folder or glob with matches"
            problems.append(f"  {text}: {what}")
        found.update(dict.fromkeys(matches))
    if problems:
        raise InputError("\n".join(["inputs must be images, folders of images, or globs, got:", *problems]))
    inside = [str(p) for p in found if output_dir is not None and p.resolve().parent == output_dir.resolve()]
    if inside:
        raise InputError(
            f"--output-dir {output_dir} must contain none of the inputs, which drawn images could overwrite, got "
            f"{', '.join(inside[:3])}{', ...' if len(inside) > 3 else ''}; choose another folder"
        )
    return list(found)
