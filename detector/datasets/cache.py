"""A cache of decoded images, in memory or on disk, shared by all worker processes."""

from __future__ import annotations

import fcntl
import mmap
import os
import sys
from collections.abc import Mapping
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.datasets.shared_memory import nameless_file


class ImageCache:
    """A cache for as many images as fit; each is stored when it is first read, and stays.

    Nothing is evicted: an epoch reads the images in random order, so no choice of images is better than another.

    The cache is a file without a name, which disappears with the last process, however that ends. In memory (except on
    Linux: in the folder for temporary files) it counts as memory of the processes, not against the size of /dev/shm,
    which is small in containers.

    Args:
        sizes: for each size that images are cached at (the key names it: the short side in multi-scale training) the
            (N, 2) heights and widths of all N images.
        limit: in bytes.
        folder: for a cache on disk.
        shared: the `path` of the cache that another process created with the same arguments; this becomes the same one.

    Raises:
        OSError: the disk is too full, or the folder cannot be written to, or does not support locks.
    """

    def __init__(
        self,
        sizes: Mapping[int, NDArray[np.integer]],
        limit: int,
        *,
        folder: Path | None = None,
        shared: str | None = None,
    ) -> None:
        self.columns = {key: column for column, key in enumerate(sizes)}
        # image by image, so that all sizes of an image fit or none
        self.sizes = np.stack([np.asarray(s, np.int64) for s in sizes.values()], axis=1)  # (N, S, 2)
        self.num_images = len(self.sizes)
        amount = 3 * self.sizes.prod(axis=2).reshape(-1)
        ends = amount.size + np.cumsum(amount)  # the first bytes, one per image and size, mark what is present
        self.num_cached = int((ends <= limit).sum()) // len(self.columns)
        count = self.num_cached * len(self.columns)
        self.starts = (ends - amount)[:count]
        self.num_bytes = int(ends[count - 1]) if count else 0
        if count:
            if shared is None:
                self.file = nameless_file(self.num_bytes, folder)
            else:
                self.file = open(shared, "r+b")  # noqa: SIM115 - open for as long as the cache is
            self._map()
            self._is_present(0)  # raises here, and not with the first image, if there are no locks

    @property
    def path(self) -> str | None:
        """The file's path for other processes of this user, while this process lives; None if it has none."""
        return f"/proc/{os.getpid()}/fd/{self.file.fileno()}" if self.num_bytes and sys.platform == "linux" else None

    def get(self, index: int, key: int) -> NDArray[np.uint8] | None:
        """Return a copy of image `index`, (H, W, 3), at the size named `key`; None if it is not cached."""
        entry = self._entry(index, key)
        if entry is None or not self._is_present(entry):
            return None
        return self._pixels(entry).copy()

    def put(self, index: int, key: int, image: NDArray[np.uint8]) -> None:
        """Store an image, if it fits into the cache and has the declared size."""
        entry = self._entry(index, key)
        if entry is None or image.shape[:2] != tuple(self.sizes.reshape(-1, 2)[entry]) or self._is_present(entry):
            return
        self._pixels(entry)[:] = image
        self._is_present(entry, now=True)

    def _entry(self, index: int, key: int) -> int | None:
        if index >= self.num_cached:
            return None
        return index * len(self.columns) + self.columns[key]

    def _pixels(self, entry: int) -> NDArray[np.uint8]:
        height, width = self.sizes.reshape(-1, 2)[entry].tolist()
        start = int(self.starts[entry])
        return self.bytes[start : start + height * width * 3].reshape(height, width, 3)

    def _is_present(self, entry: int, *, now: bool = False) -> bool:
        # Locked, because a processor may otherwise let others see this byte before the pixels.
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
        """Pickle the cache for worker processes that are not forked: they get the same file."""
        state = {key: value for key, value in vars(self).items() if key not in ("bytes", "file")}
        return state | ({"descriptor": reduction.DupFd(self.file.fileno())} if self.num_bytes else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle the cache in such a process."""
        descriptor = state.pop("descriptor", None)
        vars(self).update(state)
        if descriptor is not None:
            self.file = os.fdopen(descriptor.detach(), "r+b")
            self._map()
