"""Read the records of zip files from untrusted sources: every byte is checked against its CRC-32 before it is used.

torch's own reader checks no checksum, so that a flipped bit in a checkpoint would become another weight.
"""

from __future__ import annotations

import os
import struct
import zipfile
import zlib
from collections.abc import Iterator
from io import BufferedReader, BytesIO
from typing import NamedTuple

from detector.errors import WeightsError
from detector.text import printable

MAX_UNPACKED_BYTES = 2**30
"""Size to which any archive may unpack; a larger one may unpack to `MAX_COMPRESSION_RATIO` times its own size."""
MAX_COMPRESSION_RATIO = 50
_CHUNK = 2**18
"""Bytes that are read at a time; they stay in the processor's cache while they are summed and copied."""
_LOCAL_HEADER = struct.Struct("<4s4xH16xHH")
"""Signature, method, lengths of name and extra field."""
_END_BYTES = 22


class DamagedError(WeightsError):
    """A record that differs from its checksum."""


class Record(NamedTuple):
    """A file within a zip file."""

    start: int
    """Of its (compressed) bytes in the zip file."""
    stored_size: int
    size: int
    crc: int
    is_stored: bool
    """Without compression."""


def is_zip(file: BufferedReader | BytesIO) -> bool:
    """Whether a file starts as a zip file with at least one record."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


class ZipRecords:
    """The records of a zip file by name. No two overlap or have the same name.

    Args:
        file: open for reading, as long as records are read.
        source: names the file in messages.

    Raises:
        zipfile.BadZipFile: damaged, encrypted, or compressed by another method than deflate.
        WeightsError: it would unpack to more than the limits.
    """

    def __init__(self, file: BufferedReader | BytesIO, source: str) -> None:
        self.file, self.source = file, source
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END_BYTES))
        # A comment after the directory can hide a second directory, and readers differ in which of the two they find.
        if file.read(4) != b"PK\x05\x06":
            raise zipfile.BadZipFile("the archive does not end with its directory")
        with zipfile.ZipFile(file) as archive:
            entries, end = sorted(archive.infolist(), key=lambda entry: entry.header_offset), archive.start_dir
        unpacked = sum(entry.file_size for entry in entries)
        if unpacked > max(MAX_UNPACKED_BYTES, MAX_COMPRESSION_RATIO * size):
            raise WeightsError(
                f"{source} was rejected: its {size:,} bytes would unpack to {unpacked:,}, which is typical of a zip "
                "bomb"
            )
        self.records: dict[str, Record] = {}
        limits = [*(entry.header_offset for entry in entries[1:]), end]
        for entry, limit in zip(entries, limits, strict=True):
            name = entry.orig_filename
            if name in self.records:
                raise zipfile.BadZipFile(f"it holds {printable(name)} twice")
            self.records[name] = self._record(entry, limit)

    def _record(self, entry: zipfile.ZipInfo, limit: int) -> Record:
        name = printable(entry.orig_filename)
        self.file.seek(entry.header_offset)
        header = self.file.read(_LOCAL_HEADER.size)
        if len(header) < _LOCAL_HEADER.size:
            raise zipfile.BadZipFile(f"{name} lies beyond its end")
        signature, method, name_length, extra_length = _LOCAL_HEADER.unpack(header)
        own_name = self.file.read(name_length)
        encoded = entry.orig_filename.encode("utf-8" if entry.flag_bits & 0x800 else "cp437")
        if signature != b"PK\x03\x04" or method != entry.compress_type or own_name != encoded:
            raise zipfile.BadZipFile(f"{name} differs from its entry in the directory")
        if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise zipfile.BadZipFile(f"{name} must be stored or deflated, and not encrypted")
        start = entry.header_offset + _LOCAL_HEADER.size + name_length + extra_length
        is_stored = entry.compress_type == zipfile.ZIP_STORED
        if start + entry.compress_size > limit or (is_stored and entry.compress_size != entry.file_size):
            raise zipfile.BadZipFile(f"{name} overlaps another record")
        return Record(start, entry.compress_size, entry.file_size, entry.CRC, is_stored)

    def verify(self) -> None:
        """Check every record.

        Raises:
            DamagedError: one differs from its checksum.
        """
        for name in self.records:
            for _ in self._checked_chunks(name):
                pass

    def read(self, name: str) -> bytearray:
        """Read and check a record. Raises like `verify`."""
        data, end = bytearray(self.records[name].size if self.records[name].is_stored else 0), 0
        for chunk in self._checked_chunks(name):
            data[end : end + len(chunk)] = chunk
            end += len(chunk)
        return data

    def _checked_chunks(self, name: str) -> Iterator[bytes | memoryview]:
        """The content of a record in parts, each valid until the next one."""
        record = self.records[name]
        crc = size = 0
        for chunk in self._stored_chunks(record) if record.is_stored else self._deflated_chunks(record):
            crc, size = zlib.crc32(chunk, crc), size + len(chunk)
            if size > record.size:
                break
            yield chunk
        if crc != record.crc or size != record.size:
            raise DamagedError(
                f"{self.source} is damaged (checksum of {printable(name)} differs); copy or download it again"
            )

    def _stored_chunks(self, record: Record) -> Iterator[memoryview]:
        self.file.seek(record.start)
        buffer, left = memoryview(bytearray(min(record.stored_size, _CHUNK))), record.stored_size
        while left > 0:
            count = self.file.readinto(buffer[: min(left, _CHUNK)])
            if not count:
                return
            left -= count
            yield buffer[:count]

    def _deflated_chunks(self, record: Record) -> Iterator[bytes]:
        self.file.seek(record.start)
        left, unpacker = record.stored_size, zlib.decompressobj(-zlib.MAX_WBITS)
        while left > 0:
            chunk = self.file.read(min(left, _CHUNK))
            if not chunk:
                return
            left -= len(chunk)
            more = True
            while more and not unpacker.eof:
                unpacked = unpacker.decompress(chunk, _CHUNK)
                yield unpacked
                chunk = unpacker.unconsumed_tail
                more = bool(chunk) or len(unpacked) == _CHUNK
