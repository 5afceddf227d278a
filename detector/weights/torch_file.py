"""Read the files of torch.save, of both formats, without torch's own reader.

A file holds a pickle, which describes tensors, and the numbers of their storages: in records of a zip file, or, as
torch did before version 1.6, one after the other behind the pickle.
"""

from __future__ import annotations

import mmap
import os
import zipfile
from collections.abc import Callable
from io import BufferedReader, BytesIO
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from detector.weights.pickle_names import Budget, Storage, StoredTensor
from detector.weights.safe_pickle import to_plain, unpickle
from detector.weights.zip_records import ZipRecords

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""The first pickle of an old file."""
PROTOCOL = 1001
"""The second pickle of an old file."""

Buffer = bytearray | memoryview


def read_zip(file: BufferedReader, records: ZipRecords, budget: Budget, *, map_file: bool) -> Any:
    """Read a file of torch.save from its records.

    Args:
        file: the zip file.
        records: of the file.
        budget: for copies.
        map_file: whether the tensors stay in the file until they are used; otherwise they are in memory.

    Raises:
        DamagedError: a record differs from its checksum.
        zipfile.BadZipFile, UnpicklingError: this is no file of torch.save.
    """
    names = [name for name in records.records if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(names) != 1:
        raise zipfile.BadZipFile("it must hold one data.pkl, as torch.save writes it")
    folder = names[0].removesuffix("data.pkl")
    data: dict[str, Buffer] = {}
    if map_file:
        records.verify()
        data = _mapped(file, records)
    data |= {name: records.read(name) for name in records.records if name not in data}
    if bytes(data.get(f"{folder}byteorder", b"little")) != b"little":
        raise UnpicklingError("it was written by a machine of another byte order")
    content = unpickle(BytesIO(data[names[0]]), budget, storages=True)

    def stored(storage: Storage) -> Buffer:
        return data[f"{folder}data/{storage.key}"]

    return to_plain(content, _TensorMaker(stored))


def _mapped(file: BufferedReader, records: ZipRecords) -> dict[str, Buffer]:
    """The records that are not compressed, as private copies that the system makes when they are written to."""
    whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    return {
        name: whole[record.start : record.start + record.size]
        for name, record in records.records.items()
        if record.is_stored
    }


class _TensorMaker:
    """Makes tensors that share the memory of their storages.

    Args:
        stored: returns the bytes of a storage.
    """

    def __init__(self, stored: Callable[[Storage], Buffer]) -> None:
        self.stored = stored
        self.storages: dict[str, Tensor] = {}

    def __call__(self, wanted: StoredTensor) -> Tensor:
        """Make a tensor. Raises UnpicklingError if it lies outside its storage."""
        numbers = self._numbers(wanted.storage).view(wanted.dtype)
        steps = zip(wanted.size, wanted.stride, strict=True)
        last = wanted.offset + sum((size - 1) * stride for size, stride in steps)
        if 0 in wanted.size:
            return numbers.as_strided(wanted.size, wanted.stride, 0)
        if last >= len(numbers):
            raise UnpicklingError(f"a tensor must lie in its storage of {len(numbers):,} numbers, got up to {last:,}")
        return numbers.as_strided(wanted.size, wanted.stride, wanted.offset)

    def _numbers(self, storage: Storage) -> Tensor:
        """(n,) uint8, the bytes of a storage."""
        if storage.key not in self.storages:
            data = self.stored(storage)
            size = storage.numel * storage.dtype.itemsize
            if size != len(data):
                raise UnpicklingError(f"a storage must have {size:,} bytes, got {len(data):,}")
            numbers = torch.frombuffer(data, dtype=torch.uint8) if size else torch.empty(0, dtype=torch.uint8)
            self.storages[storage.key] = numbers.clone() if numbers.data_ptr() % 16 else numbers
        return self.storages[storage.key]


class LimitedFile:
    """A file for `unpickle` that never makes room for more than the file has left, whatever length it declares.

    Args:
        file: positioned at the start.
    """

    def __init__(self, file: BufferedReader) -> None:
        self.file = file
        start = self.position()
        self.size = file.seek(0, os.SEEK_END)
        file.seek(start)

    def position(self) -> int:
        """Bytes before the next one to be read."""
        return self.file.seek(0, os.SEEK_CUR)

    def read(self, length: int = -1) -> bytes:
        """Read at most `length` bytes; all if it is negative."""
        left = max(0, self.size - self.position())
        return self.file.read(left if length < 0 else min(length, left))

    def readline(self) -> bytes:
        """Read to the end of the line."""
        return self.file.readline()


def read_pickles(file: BufferedReader, budget: Budget) -> Any:
    """Read an old file of torch.save, or a file that is one pickle.

    Raises:
        UnpicklingError: it is damaged, or holds anything that is not allowed.
    """
    reader: Any = LimitedFile(file)
    first = unpickle(reader, budget)
    if type(first) is not int or first != MAGIC_NUMBER:
        return to_plain(first, _no_storages)
    protocol, system = unpickle(reader, budget), unpickle(reader, budget)
    little = system.get("little_endian") if isinstance(system, dict) else None
    if type(protocol) is not int or protocol != PROTOCOL or little is not True:
        raise UnpicklingError("it was written by an unknown version of torch, or by a machine of another byte order")
    content = unpickle(reader, budget, storages=True)
    keys = unpickle(reader, budget)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise UnpicklingError("it must list its storages")
    starts: dict[str, tuple[int, int]] = {}
    sizes = _storages_in(content)
    for key in keys:
        numel = int.from_bytes(reader.read(8), "little", signed=True)
        storage = sizes.get(key)
        if storage is None or numel != storage.numel:
            raise UnpicklingError("its storages differ from its list of storages")
        length = numel * storage.dtype.itemsize
        starts[key] = (reader.position(), length)
        file.seek(length, os.SEEK_CUR)

    def stored(storage: Storage) -> Buffer:
        start, length = starts[storage.key]
        file.seek(start)
        return bytearray(reader.read(length))

    return to_plain(content, _TensorMaker(stored))


def _no_storages(_: StoredTensor) -> Tensor:
    raise UnpicklingError("it references data outside the file")


def _storages_in(content: Any) -> dict[str, Storage]:
    """The storages of all tensors in unpickled content, by key."""
    found: dict[str, Storage] = {}
    seen: set[int] = set()
    left = [content]
    while left:
        item = left.pop()
        if isinstance(item, StoredTensor):
            found.setdefault(item.storage.key, item.storage)
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            left += item.values() if isinstance(item, dict) else item
    return found
