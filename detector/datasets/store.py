"""Where image files are stored: a folder, or anything else with the methods of `ImageStore`."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, Protocol

from detector.files import open_regular, require_regular


class _ModestReader(io.BufferedReader):
    """A file whose `read` allocates no more than there is to read, where Python allocates as much as is asked for: a
    damaged length would cost gigabytes."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


class FileStat(NamedTuple):
    """What identifies the content of a file without reading it."""

    size: int
    """Bytes."""
    version: int
    """Differs after every change, and is the same in every process: a modification time, a checksum."""


class ImageStore(Protocol):
    """Image files by name. Several threads use a store together, and it is pickled to worker processes."""

    @property
    def key(self) -> str:
        """Identifies the store's files in the cache of image checks, in every process."""

    def open(self, name: str) -> BinaryIO:
        """Open a file for reading; the result is seekable, so that a header can be read without the rest.

        Raises:
            OSError: it cannot be opened, or is no regular file; FileNotFoundError if it does not exist.
            ValueError: no file can have this name.
        """

    def stat(self, name: str) -> FileStat:
        """Return the size and version of a file.

        Raises:
            OSError, ValueError: as from `open`.
        """

    def describe(self, name: str) -> str:
        """Name a file for messages, for example by its path."""


@dataclass(frozen=True)
class FolderStore:
    """The files below a folder, by their path relative to it."""

    root: Path

    @property
    def key(self) -> str:
        """The folder's real path."""
        return os.path.realpath(self.root)

    def open(self, name: str) -> BinaryIO:
        """Open the file `root / name`. Raises OSError or ValueError."""
        return _ModestReader(open_regular(os.path.join(self.root, name)).detach())

    def stat(self, name: str) -> FileStat:
        """Return its size and its modification time in nanoseconds. Raises OSError or ValueError."""
        path = os.path.join(self.root, name)
        found = os.stat(path)
        require_regular(found.st_mode, path)
        return FileStat(found.st_size, found.st_mtime_ns)

    def describe(self, name: str) -> str:
        """Return the path as text."""
        return str(self.root / name)

    def outside(self, name: str) -> str | None:
        """Return the real path of a name that leads out of the folder by ".."; None if it stays inside.

        Links in the folder are followed, because datasets are often linked together.
        """
        real = os.path.realpath(os.path.join(self.root, name))
        return None if real.startswith(self.key.rstrip(os.sep) + os.sep) else real


FILES = FolderStore(Path())
"""Files by their absolute path, or by their path relative to the working directory."""
