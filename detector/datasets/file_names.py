"""Find the files that an annotation file names in another way: the same names, as another system or program wrote them.

A name and a file match if they differ in how they are written only: backslashes, Unicode form, upper and lower case,
percent escapes, blanks or line ends at the end. An absolute path or a URL matches the file of its last part, but only
if all such names of the annotations do, each another file: else files of another folder could take their place.
"""

from __future__ import annotations

import os
import re
import unicodedata
import urllib.parse
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

MAX_FILES = 1_000_000
"""Files of a folder that are compared."""

_ABSOLUTE = re.compile(r"[A-Za-z]:[\\/]|[\\/]|[A-Za-z][A-Za-z0-9+.-]*://")


def is_absolute(name: str) -> bool:
    """Whether a file name is an absolute path of any system, or a URL."""
    return _ABSOLUTE.match(name) is not None


def last_parts(names: Iterable[str]) -> list[str] | None:
    """Return the last part of every absolute path or URL; None where two are equal or one is empty."""
    parts = []
    for name in names:
        path = re.split(r"[?#]", name)[0] if "://" in name else name
        parts.append(urllib.parse.unquote(re.split(r"[\\/]", path)[-1]).strip())
    return parts if all(parts) and len(set(parts)) == len(parts) else None


def find_files(root: Path, names: Iterable[str], *, taken: Collection[str]) -> dict[str, str]:
    """Find the files below a folder that names which are not there match, each if it is the only one.

    Args:
        root: the folder.
        names: of missing files.
        taken: files of other names.

    Returns:
        The path of the file, relative to the folder, by name.
    """
    files: defaultdict[str, set[str]] = defaultdict(set)
    for count, path in enumerate(_walk(root)):
        if count == MAX_FILES:
            break
        files[_folded(path)].add(path)
    found: dict[str, str] = {}
    for name in names:
        matches = files.get(_folded(name)) or files.get(_folded(urllib.parse.unquote(name))) or set()
        if len(matches) == 1:
            found[name] = next(iter(matches))
    times = Counter([*found.values(), *taken])  # two names of one file would be two images of it
    return {name: path for name, path in found.items() if times[path] == 1}


def _walk(root: Path) -> Iterator[str]:
    """All files below a folder, relative to it; links are followed, circles are not."""
    seen: set[tuple[int, int]] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        for file in files:
            yield os.path.relpath(os.path.join(folder, file), root)


def _folded(name: str) -> str:
    parts = name.replace("\\", "/").strip().split("/")
    return unicodedata.normalize("NFC", "/".join(part for part in parts if part not in ("", "."))).casefold()
