"""Break things on purpose: writes and reads that fail at a chosen moment, full disks, flipped bits."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import pathlib
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class FaultyDisk:
    """Counts the writes to files whose path contains `part`, and lets those from number `first` on fail.

    Args:
        part: of the path.
        first: number of the first write that fails, from 0; None: none fails.
        times: how many fail; None: all later ones.
        number: of the error.
    """

    def __init__(
        self, part: str, *, first: int | None = None, times: int | None = None, number: int = errno.ENOSPC
    ) -> None:
        self.part, self.first, self.times, self.number = part, first, times, number
        self.writes = 0
        self.failed = 0

    def check(self, path: str) -> None:
        """Count a write, and raise if it is to fail."""
        if self.part not in path:
            return
        position = self.writes
        self.writes += 1
        if self.first is None or position < self.first or (self.times is not None and self.failed >= self.times):
            return
        self.failed += 1
        raise OSError(self.number, os.strerror(self.number), path)


@contextlib.contextmanager
def faulty_disk(disk: FaultyDisk) -> Iterator[FaultyDisk]:
    """Within the block, every file that Python opens for writing is written through `disk`."""

    class Raw(io.FileIO):
        def write(self, data: Any) -> int:
            disk.check(str(self.name))
            return super().write(data)

    real = builtins.open

    def opened(file: Any, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        if isinstance(file, int) or not set(mode) & set("wax+"):
            return real(file, mode, buffering, *arguments, **options)
        raw = Raw(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        if "b" in mode:
            return buffered
        named = {k: v for k, v in options.items() if k in ("encoding", "errors", "newline")}
        return io.TextIOWrapper(buffered, line_buffering=buffering == 1, **named)

    def path_open(self: Path, mode: str = "r", buffering: int = -1, *arguments: Any, **options: Any) -> Any:
        return opened(self, mode, buffering, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builtins, "open", opened)
        patch.setattr(io, "open", opened)
        patch.setattr(pathlib.Path, "open", path_open)
        yield disk


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of a few megabytes in memory, mounted on `folder`; the test is skipped where that is forbidden."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted here: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def flip_bit(path: Path, position: int) -> None:
    """Change one bit of a file."""
    with path.open("r+b") as file:
        file.seek(position // 8)
        byte = file.read(1)[0]
        file.seek(position // 8)
        file.write(bytes([byte ^ (1 << position % 8)]))


class FaultyCalls:
    """Counts the calls of several functions together; the one with this number, from 0, raises.

    Args:
        number: of the call.
        error: what it raises.
    """

    def __init__(self, number: int, error: BaseException) -> None:
        self.number, self.error, self.calls = number, error, 0

    def counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A function that does what `call` does, and counts."""

        def faulty(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.number + 1:
                raise self.error
            return call(*arguments, **options)

        return faulty
