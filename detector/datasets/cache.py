"""Pictures kept from one epoch to the next, in memory or on disk, shared by all worker processes."""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray


class PictureCache:
    """Room for as many pictures as fit, each of which is put in when it is first read and stays.

    Nothing is replaced: an epoch asks for the pictures in an order without pattern, so that no choice of pictures is
    better than another, and what had to give way would be missed as often as what came for it.

    The room is a file without a name, which is gone when the last process is, however it ends. In memory (elsewhere than
    on Linux: in the folder for temporary files) it counts as memory of the processes, not against the size of /dev/shm,
    which in containers is small.

    Args:
        sizes: for every size that pictures are wanted at (the number is a name: the short side in multi-scale training)
            the (N, 2) heights and widths of all N.
        limit: bytes.
        folder: for a cache on disk.
        shared: the `path` of the cache that another process made with the same arguments; this becomes the same one.

    Raises:
        OSError: there is not so much room on the disk, or the folder cannot be written to, or knows no locks.
    """

    def __init__(
        self,
        sizes: Mapping[int, NDArray[np.integer]],
        limit: int,
        *,
        folder: Path | None = None,
        shared: str | None = None,
    ) -> None:
        self.places = {name: place for place, name in enumerate(sizes)}
        # picture by picture, so that of a picture that fits all sizes do
        self.sizes = np.stack([np.asarray(s, np.int64) for s in sizes.values()], axis=1)  # (N, S, 2)
        self.num_pictures = len(self.sizes)
        amount = 3 * self.sizes.prod(axis=2).reshape(-1)
        ends = amount.size + np.cumsum(amount)  # first a byte for each: whether it is there
        self.num_kept = int((ends <= limit).sum()) // len(self.places)
        count = self.num_kept * len(self.places)
        self.starts = (ends - amount)[:count]
        self.num_bytes = int(ends[count - 1]) if count else 0
        if count:
            self.file = _nameless_file(self.num_bytes, folder) if shared is None else open(shared, "r+b")  # noqa: SIM115
            self._map()
            self._is_there(0)  # an error about locks is told now

    @property
    def path(self) -> str | None:
        """By which another process of this machine and user finds the file while this one lives; None where it cannot."""
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}" if self.num_bytes and sys.platform == "linux" else None

    def get(self, index: int, name: int) -> NDArray[np.uint8] | None:
        """A copy of picture `index` (H, W, 3) at the size called `name`, if it is there."""
        entry = self._entry(index, name)
        if entry is None or not self._is_there(entry):
            return None
        return self._pixels(entry).copy()

    def put(self, index: int, name: int, picture: NDArray[np.uint8]) -> None:
        """Keep a picture, if there is room for it and it has the size that was promised."""
        entry = self._entry(index, name)
        if entry is None or picture.shape[:2] != tuple(self.sizes.reshape(-1, 2)[entry]) or self._is_there(entry):
            return
        self._pixels(entry)[:] = picture
        self._is_there(entry, now=True)

    def _entry(self, index: int, name: int) -> int | None:
        if index >= self.num_kept:
            return None
        return index * len(self.places) + self.places[name]

    def _pixels(self, entry: int) -> NDArray[np.uint8]:
        height, width = self.sizes.reshape(-1, 2)[entry].tolist()
        start = int(self.starts[entry])
        return self.bytes[start : start + height * width * 3].reshape(height, width, 3)

    def _is_there(self, entry: int, *, now: bool = False) -> bool:
        # Locked, because without it a processor may let others see this byte before the pixels.
        fcntl.lockf(self.file, fcntl.LOCK_EX)
        try:
            if now:
                self.bytes[entry] = 1
            return bool(self.bytes[entry])
        finally:
            fcntl.lockf(self.file, fcntl.LOCK_UN)

    def _map(self) -> None:
        self.bytes: NDArray[np.uint8] = np.frombuffer(mmap.mmap(self.file.fileno(), self.num_bytes), np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """For worker processes that are not forked: they get the same file."""
        state = {key: value for key, value in vars(self).items() if key not in ("bytes", "file")}
        return state | ({"descriptor": reduction.DupFd(self.file.fileno())} if self.num_bytes else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In such a process."""
        descriptor = state.pop("descriptor", None)
        vars(self).update(state)
        if descriptor is not None:
            self.file = os.fdopen(descriptor.detach(), "r+b")
            self._map()


def _nameless_file(size: int, folder: Path | None) -> IO[bytes]:
    if folder is None and sys.platform == "linux":
        file: IO[bytes] = os.fdopen(os.memfd_create("detector-pictures"), "r+b")
        os.ftruncate(file.fileno(), size)
        return file
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open for as long as the cache is
    if sys.platform == "linux":
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk shows now, and not as a bus error hours later
    else:
        os.ftruncate(file.fileno(), size)
    return file
