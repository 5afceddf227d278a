"""Write complete files or none: into a temporary file, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from detector.errors import RunError

JSON_FORMAT = 1
"""`format` of the JSON objects that `write_json` writes."""


def make_folder(path: Path, *, option: str = "--output-dir") -> None:
    """Create a folder for results and its parents, unless it exists.

    Raises:
        RunError: the folder cannot be created; the message names the command's `option`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{option} must be a folder to write in, got {path}: {error.strerror}; choose another") from None


@contextlib.contextmanager
def atomic_file(path: Path, *, single_writer: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end of the block, after it is flushed to disk.

    Readers see the old file or the complete new one. If writing fails, the temporary file is removed and the old one is
    unchanged.

    Args:
        path: the file to write; its folder is created.
        single_writer: no other process writes `path` at the same time. The temporary file then always has the same
            name, so that the next write replaces the leftovers of a killed process.

    Raises:
        RunError: the file system refuses.
    """
    unique = "" if single_writer else f".{os.getpid()}"
    temporary = path.with_name(f".{path.name}{unique}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError of its writer; others, such as CUDA's, are not the disk's
        if isinstance(error, RuntimeError) and "writ" not in str(error).lower():
            raise
        reason = getattr(error, "strerror", None) or error
        raise RunError(
            f"{path} cannot be written: {reason}; an older version of it is unchanged; free disk space, or write to "
            "another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write a complete UTF-8 file or none; lone surrogates, from file names that are not UTF-8, are escaped.

    Raises:
        RunError: the file system refuses.
    """
    with atomic_file(path) as file:
        file.write(text.encode("utf-8", "backslashreplace"))


def write_json(content: Any, path: Path, *, compact: bool = False) -> None:
    """Write a complete JSON file or none.

    Args:
        content: a mapping gets a `format` number, which `read_json` checks.
        path: the file.
        compact: write one line without a `format`, for large files whose layout is another program's, such as COCO's.

    Raises:
        RunError: the file system refuses.
    """
    if compact:
        text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    else:
        text = json.dumps({"format": JSON_FORMAT, **content} if isinstance(content, dict) else content, indent=1)
    write_text(text + "\n", path)


def read_json(path: Path) -> Any:
    """Read a file of `write_json`; a mapping is returned without its `format`.

    Raises:
        RunError: the file cannot be read, or has a newer format.
    """
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise RunError(f"{path} must be a JSON file, got {error}; it may be damaged") from None
    stored = content.pop("format", JSON_FORMAT) if isinstance(content, dict) else JSON_FORMAT
    if stored != JSON_FORMAT:
        raise RunError(f"{path} has format {stored}, this version reads up to {JSON_FORMAT}; update retinanet-detector")
    return content
