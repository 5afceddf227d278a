"""The image files that a command's inputs refer to. This module imports no torch."""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path

from detector.datasets.image_formats import is_image_name
from detector.errors import InputError
from detector.text import printable

MAX_SHOWN, MAX_SHOWN_NAME = 12, 250
"""Inputs that an error lists, and characters of each."""


def find_images(inputs: Sequence[str], *, output_dir: Path | None = None) -> list[Path]:
    """The files that names, folders (searched recursively) and globs refer to, each once, in order.

    In folders, the files that are images by their name are used; files that are named one by one may have any name.

    Raises:
        InputError: an input that refers to no image (all of them are listed); or images in `output_dir`, which drawn
            images could overwrite.
    """
    found: dict[Path, None] = {}
    problems = []
    for text in inputs:
        if os.path.isdir(text):
            matches = sorted(path for path in Path(text).rglob("*") if is_image_name(path.name))
        elif os.path.lexists(text):
            matches = [Path(text)]
        else:
            matches = _without_repeated_folders(sorted(glob.glob(text, recursive=True)))
        if not matches:
            what = "a folder without images" if os.path.isdir(text) else "no file, folder or glob with matches"
            problems.append(f"  {printable(text, MAX_SHOWN_NAME)}: {what}")
        found.update(dict.fromkeys(matches))
    if problems:
        more = f"  and {len(problems) - MAX_SHOWN} more" if len(problems) > MAX_SHOWN else ""
        lines = ["inputs must be images, folders of images, or globs, got:", *problems[:MAX_SHOWN], more]
        raise InputError("\n".join(filter(None, lines)))
    output = None if output_dir is None else os.path.realpath(output_dir)
    inside = [str(p) for p in found if os.path.realpath(p.parent) == output]
    if inside:
        shown = ", ".join(printable(name, MAX_SHOWN_NAME) for name in inside[:3])
        raise InputError(
            f"--output-dir {output_dir} must contain none of the inputs, which drawn images could overwrite, got "
            f"{shown}{', ...' if len(inside) > 3 else ''}; choose another folder"
        )
    return list(found)


def _without_repeated_folders(names: Sequence[str]) -> list[Path]:
    """The paths that are no folders; of a file that links between folders lead to by several paths, the first."""
    seen = set()
    paths = []
    for name in names:
        folder, base = os.path.split(name)
        if not os.path.isdir(name) and (os.path.realpath(folder), base) not in seen:
            seen.add((os.path.realpath(folder), base))
            paths.append(Path(name))
    return paths
