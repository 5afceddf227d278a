"""Records of zip files are used only if they are what was written."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detector.checkpoint import TrainState, load_checkpoint, save_checkpoint
from detector.config import Config
from detector.errors import CheckpointError, UserError, WeightsError
from detector.structures import Categories
from detector.weights.safe_load import read_content
from detector.weights.zip_records import DamagedError, ZipRecords, is_zip


def archive_of(records: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return file.getvalue()


RECORDS = {"a": b"", "b": b"x" * 3_000_000, "c/d é": bytes(random.Random(0).randbytes(100_000)), "e": bytes(2**20)}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_records_are_read_in_full(method: int) -> None:
    file = io.BytesIO(archive_of(RECORDS, method))
    assert is_zip(file)
    records = ZipRecords(file, "x")
    records.verify()
    assert {name: bytes(records.read(name)) for name in records.records} == RECORDS


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("name", [name for name in RECORDS if name != "a"])
def test_a_changed_byte_of_a_record_is_noticed(name: str, method: int) -> None:
    data = archive_of(RECORDS, method)
    start, size, *_ = ZipRecords(io.BytesIO(data), "x").records[name]
    for position in (start, start + size // 2, start + size - 1):
        damaged = bytearray(data)
        damaged[position] ^= 255
        records = ZipRecords(io.BytesIO(damaged), "x")
        with pytest.raises((DamagedError, zlib.error)):
            records.verify()


def directory(data: bytes) -> int:
    """Where the directory starts."""
    return int(struct.unpack("<I", data[-6:-2])[0])


def with_entry(data: bytes, offset: int, value: bytes) -> bytes:
    """An archive whose first directory entry differs."""
    start = directory(data) + offset
    return data[:start] + value + data[start + len(value) :]


TWO = {"a": b"1234", "b": b"5678"}
SAME_PLACE = with_entry(archive_of(TWO), 42, struct.pack("<I", 35))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (archive_of(TWO)[:-1], "does not end with its directory"),
        (archive_of(TWO) + b"x", "does not end with its directory"),
        (archive_of(TWO).replace(b"b", b"a"), "it holds a twice"),
        (with_entry(archive_of(TWO), 46, b"c"), "c differs from its entry in the directory"),
        (with_entry(archive_of(TWO), 10, b"\x08"), "a differs from its entry in the directory"),
        (with_entry(archive_of(TWO), 20, struct.pack("<II", 40, 40)), "a overlaps another record"),
        (with_entry(archive_of(TWO), 20, struct.pack("<II", 4, 5)), "a overlaps another record"),
        (SAME_PLACE, "differs from its entry|overlaps another record"),
        (archive_of(TWO, zipfile.ZIP_BZIP2), "must be stored or deflated"),
        (with_entry(archive_of(TWO), 8, b"\x01"), "must be stored or deflated, and not encrypted"),
    ],
)  # fmt: skip
def test_archives_that_could_be_read_in_two_ways_are_errors(data: bytes, reason: str) -> None:
    with pytest.raises(zipfile.BadZipFile, match=reason):
        ZipRecords(io.BytesIO(data), "x")


def test_a_size_that_is_larger_than_the_data_is_damage() -> None:
    data = archive_of({"a": bytes(1000)}, zipfile.ZIP_DEFLATED)
    for size in (999, 1001, 10**6):
        records = ZipRecords(io.BytesIO(with_entry(data, 24, struct.pack("<I", size))), "x")
        with pytest.raises(DamagedError, match="x is damaged"):
            records.read("a")


@pytest.mark.parametrize("suffix", [".pt", ".npz"])
def test_a_damaged_record_is_one_error_with_the_record_and_a_remedy(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"w{suffix}"
    if suffix == ".pt":
        torch.save({"w": torch.ones(1000)}, path)
    else:
        np.savez(path, w=np.ones(1000, np.float32))
    data = bytearray(path.read_bytes())
    data[data.index(np.ones(100, np.float32).tobytes()) + 400] ^= 4
    path.write_bytes(data)
    for mmap in (False, True):
        with pytest.raises(WeightsError, match=r"is damaged \(checksum of .*w.* differs\); copy or download it again"):
            read_content(path, mmap=mmap)


def everything_in(value: Any) -> Any:
    """A value with tensors replaced by what they hold, for comparison."""
    if isinstance(value, Tensor):
        return str(value.dtype), tuple(value.shape), value.contiguous().view(-1).view(torch.uint8).tolist()
    if isinstance(value, TrainState):
        return everything_in(vars(value))
    if isinstance(value, dict):
        return [(key, everything_in(item)) for key, item in value.items()]
    return [everything_in(item) for item in value] if isinstance(value, list | tuple) else value


def checkpoint_or_error(path: Path) -> TrainState | UserError:
    try:
        return load_checkpoint(path)
    except UserError as error:
        return error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    numbers = torch.Generator().manual_seed(0)
    weights = {f"layer{k}.weight": torch.randn(8, 16, generator=numbers) for k in range(4)}
    state = TrainState(
        Config(), Categories((3, 7), ("cat", "dog")), weights, 5, ema=weights, unlogged=torch.ones(2, 5),
        optimizer={"state": {k: {"momentum_buffer": torch.ones(8, 16)} for k in range(4)}, "param_groups": []},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("checkpoint") / "last.pt"
    save_checkpoint(state, path)
    return path


def test_no_flipped_bit_gives_another_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """200 places, half of them anywhere, half of them outside the records (headers, directory), which no sum covers."""
    data, expected = checkpoint.read_bytes(), everything_in(load_checkpoint(checkpoint))
    with checkpoint.open("rb") as file:
        inside = {k for r in ZipRecords(file, "x").records.values() for k in range(r.start, r.start + r.stored_size)}
    outside = [k for k in range(len(data)) if k not in inside]
    draw, refused, equal = random.Random(0), 0, 0
    for position in [draw.randrange(len(data)) for _ in range(100)] + draw.choices(outside, k=100):
        damaged = bytearray(data)
        damaged[position] ^= 1 << draw.randrange(8)
        (tmp_path / "last.pt").write_bytes(damaged)
        loaded = checkpoint_or_error(tmp_path / "last.pt")
        refused += isinstance(loaded, CheckpointError)
        equal += isinstance(loaded, TrainState)
        assert isinstance(loaded, CheckpointError) or everything_in(loaded) == expected, position
        assert isinstance(loaded, CheckpointError) or position not in inside
    assert refused > 100
    assert equal > 0
