"""Write complete files or none: into a temporary file, flushed to disk, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from detector.errors import RunError
from detector.files import os_error_remedy, read_bytes
from detector.text import printable, shown

JSON_FORMAT = 1
"""`format` of the JSON objects that `write_json` writes."""


def make_folder(path: Path, *, option: str = "--output-dir") -> None:
    """Create a folder for results and its parents, unless it exists.

    Raises:
        RunError: the folder cannot be created; the message names the command's `option`.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:  # ValueError: a name that no folder can have
        reason = error.strerror if isinstance(error, OSError) else error
        raise RunError(f"{option} must be a folder to write in, got {path}: {reason}; choose another") from None


@contextlib.contextmanager
def atomic_file(
    path: Path, *, single_writer: bool = False, previous: Path | None = None, durable: bool = True
) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` at the end of the block, after it is flushed to disk.

    Readers see the old file or the complete new one. If writing fails, the temporary file is removed and the old one is
    unchanged.

    Args:
        path: the file to write; its folder is created.
        single_writer: no other process writes `path` at the same time. The temporary file then always has the same
            name, so that the next write replaces the leftovers of a killed process.
        previous: where the replaced file is kept; None: nowhere.
        durable: whether the new file survives a power failure from now on, which takes milliseconds.

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
            if durable:
                os.fsync(file.fileno())
        if previous is not None and path.exists():
            _keep(path, previous)
        temporary.replace(path)
        if durable:
            _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _os_error_behind(error)
        if cause is None and "writ" not in str(error).lower():  # a RuntimeError of something else, such as CUDA
            raise
        reason = getattr(cause, "strerror", None) or error
        remedy = os_error_remedy(cause) if cause is not None else "; free disk space, or write to another folder"
        older = "; an older version of it is unchanged" if path.is_file() else ""
        raise RunError(f"{path} cannot be written: {reason}{older}{remedy}") from (cause or error)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def _os_error_behind(error: BaseException | None) -> OSError | None:
    """The error of the file system behind a RuntimeError, as which torch.save reports it."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _keep(path: Path, copy: Path) -> None:
    """Make `copy` another name of the file, so that both names always exist."""
    temporary = copy.with_name(f".{copy.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError:  # a file system without links, where `path` is missing for a moment
        path.replace(copy)
    else:
        temporary.replace(copy)
        temporary.unlink(missing_ok=True)  # where `copy` was this file already, rename leaves both names


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power failure."""
    with contextlib.suppress(OSError):  # not all file systems allow it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers from a folder that no other process writes to."""
    for path in folder.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            path.unlink()


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
        content = json.loads(read_bytes(path))
    except OSError as error:
        raise RunError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise RunError(f"{path} must be a JSON file, got {printable(str(error))}; it may be damaged") from None
    stored = content.pop("format", JSON_FORMAT) if isinstance(content, dict) else JSON_FORMAT
    if stored != JSON_FORMAT:
        raise RunError(
            f"{path} has format {shown(stored)}, this version reads up to {JSON_FORMAT}; update retinanet-detector"
        )
    return content
