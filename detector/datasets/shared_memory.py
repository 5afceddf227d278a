"""Arrays in memory that processes share."""

from __future__ import annotations

import math
import mmap
import os
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import reduction
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)


class SharedArray(Generic[Scalar]):
    """An array of zeros that this process shares with those it is forked or pickled to, while any of them uses it.

    Its memory is a file without a name. On Linux that file is in memory and counts as memory of the processes, not
    against the size of /dev/shm, which is 64 MB in containers by default.

    Args:
        shape: of the array.
        dtype: of its values.

    Raises:
        OSError: the system refuses.
    """

    def __init__(self, shape: Sequence[int], dtype: type[Scalar]) -> None:
        self.shape, self.dtype = tuple(shape), dtype
        self._attach(nameless_file(max(1, math.prod(shape) * np.dtype(dtype).itemsize)))

    def _attach(self, file: IO[bytes]) -> None:
        self._file = file
        memory = mmap.mmap(file.fileno(), 0)
        self.array: NDArray[Scalar] = np.frombuffer(memory, self.dtype, math.prod(self.shape)).reshape(self.shape)

    def handle(self) -> dict[str, Any]:
        """Return what another process needs for `from_handle`; it keeps the memory until it is used there, once.

        Raises:
            OSError: too many files are open.
        """
        return {"shape": self.shape, "dtype": self.dtype, "descriptor": reduction.DupFd(self._file.fileno())}

    @classmethod
    def from_handle(cls, handle: dict[str, Any]) -> SharedArray[Scalar]:
        """Return the array of another process."""
        array = cls.__new__(cls)
        array.shape, array.dtype = handle["shape"], handle["dtype"]
        array._attach(os.fdopen(handle["descriptor"].detach(), "r+b"))
        return array

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedArray.from_handle, (self.handle(),)


def nameless_file(size: int, folder: Path | None = None) -> IO[bytes]:
    """Create a file of zeros that disappears with the last process that has it open.

    Args:
        size: in bytes.
        folder: whose disk to use; None: memory, except on Linux the folder for temporary files.

    Raises:
        OSError: the disk is too full, or the folder cannot be written to.
    """
    if folder is None and sys.platform == "linux":
        file: IO[bytes] = os.fdopen(os.memfd_create("detector"), "r+b")
        os.ftruncate(file.fileno(), size)
        return file
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - open for as long as it is used
    if sys.platform == "linux":
        os.posix_fallocate(file.fileno(), 0, size)  # a full disk raises here, and not as a bus error hours later
    else:
        os.ftruncate(file.fileno(), size)
    return file
