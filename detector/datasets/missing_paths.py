"""Hints for paths that do not exist: what exists instead."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from detector.text import cut, printable

MAX_LISTED = 10_000
"""Names of a folder among which the nearest is searched."""
FETCHED = {"bccd": "bccd", "coco": "coco2017"}
"""Folders that `tools/get_data.py` creates, and the dataset's name there."""


def nearest_path(path: Path) -> str:
    """A hint for a missing path: the existing part of it and the most similar name there, or how to fetch it."""
    parent = path.absolute()
    missing = parent.name
    while not os.path.isdir(parent.parent) and parent != parent.parent:
        parent = parent.parent
        missing = parent.name
    parent = parent.parent
    if missing in FETCHED:
        return f"; python tools/get_data.py {FETCHED[missing]} creates {parent / missing}"
    try:
        there = [printable(name) for name in sorted(os.listdir(parent))[:MAX_LISTED]]
    except (OSError, ValueError):
        return ""
    near = difflib.get_close_matches(missing[:255], there, 1, 0.5)
    if near:
        return f"; nearest in {parent}: {near[0]}"
    hint = f"; {parent} has no {printable(missing)}" + (f", but {cut(there, 5)}" if there else " and is empty")
    if parent == Path.cwd():
        hint += "; relative paths start at the folder the program was started in"
    return hint


def missing_image_hint(root: Path, file_name: str) -> str:
    """A hint for a missing image: the same file in a folder up or down, or with another extension; "" without any."""
    name = Path(file_name.replace("\\", "/"))
    if not name.name:
        return ""
    if os.path.isfile(root / name.name):
        return f"{name} is not in {root}, but {name.name} is: remove the folders from file_name"
    folders = list(root.absolute().parents)[:3]
    try:
        folders += sorted(Path(entry.path) for entry in os.scandir(root) if entry.is_dir())[:MAX_LISTED]
    except OSError as error:
        return f"{root} cannot be listed: {error.strerror}"
    for folder in folders:
        if os.path.isfile(folder / name):
            return f"{name} exists in {folder}: set the image folder to that"
    for suffix in (".jpg", ".JPG", ".jpeg", ".JPEG", ".png", ".PNG"):
        if os.path.isfile(root / name.with_suffix(suffix)):
            return f"{name} does not exist, but {name.with_suffix(suffix)} does: another extension?"
    return ""
