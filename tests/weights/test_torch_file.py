"""Files of torch.save are read as torch reads them, in both of its formats, and never trusted with sizes."""

from __future__ import annotations

import pickle
import struct
import time
import zipfile
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detector.errors import WeightsError
from detector.weights.safe_load import read_content

SAVERS: dict[str, Any] = {"zip": torch.save, "before 1.6": partial(torch.save, _use_new_zipfile_serialization=False)}


def shared_storage() -> list[Tensor]:
    whole = torch.arange(24.0)
    return [whole, whole[4:12].view(2, 4), whole.view(4, 6).t(), whole[::3], whole.view(2, 3, 4).permute(2, 0, 1)]


def with_attribute() -> Tensor:
    tensor = torch.arange(3.0)
    tensor.origin = "somewhere"  # type: ignore[attr-defined]
    return tensor


class Parameter(nn.Parameter):
    """torch saves it with its attributes."""


CONTENTS: dict[str, Any] = {
    "nothing": {},
    "every type": {
        str(dtype): torch.tensor([0, 1, 3]).to(dtype)
        for dtype in (
            torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
            torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128,
        )
    },
    "views of one storage": shared_storage(),
    "without elements": [torch.empty(0), torch.empty(3, 0, 2), torch.empty(0, 4).t()],
    "without axes": torch.tensor(7.5),
    "expanded": torch.ones(1).expand(5, 3),
    "parameters": [nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2).half(), requires_grad=False)],
    "attributes": with_attribute(),
    "a state dict": nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).state_dict(),
    "containers": {
        "list": [1, 2.5, None, True, "é\ud800", b"\x00\xff", (1,), (), [], -(2**40), 10**30, float("inf")],
        "dict": OrderedDict([("b", 1), ("a", {3: "x", (1, "y"): 2, None: 0, 1.5: 1})]),
        "sets": [{1, 2}, set(), frozenset(["a"])], "size": torch.Size([2, 3]), "counter": Counter("aab"),
    },
}  # fmt: skip


def same(ours: Any, peer: Any) -> None:
    if isinstance(peer, Tensor):
        assert isinstance(ours, Tensor)
        assert (ours.dtype, ours.shape, ours.stride()) == (peer.dtype, peer.shape, peer.stride())
        assert torch.equal(ours, peer)
    elif isinstance(peer, dict):
        assert isinstance(ours, dict)
        assert list(ours) == list(peer)
        for key, value in peer.items():
            same(ours[key], value)
    elif isinstance(peer, list | tuple):
        assert isinstance(ours, list | tuple)
        assert len(ours) == len(peer)
        for one, other in zip(ours, peer, strict=True):
            same(one, other)
    else:
        assert ours == peer


@pytest.mark.parametrize("saver", SAVERS)
@pytest.mark.parametrize("name", CONTENTS)
def test_what_torch_saves_is_read_as_torch_reads_it(name: str, saver: str, tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    SAVERS[saver](CONTENTS[name], path)
    expected = torch.load(path, weights_only=name != "containers")  # torch refuses sets that cannot change
    for mmap in (False, True):
        same(read_content(path, mmap=mmap), expected)


@pytest.mark.parametrize("mmap", [False, True])
def test_views_of_a_storage_share_it_and_writing_to_them_leaves_the_file_alone(mmap: bool, tmp_path: Path) -> None:
    torch.save(shared_storage(), tmp_path / "x.pt")
    before = (tmp_path / "x.pt").read_bytes()
    whole, part, *_ = read_content(tmp_path / "x.pt", mmap=mmap)
    whole.fill_(-1)
    assert bool((part == -1).all())
    assert (tmp_path / "x.pt").read_bytes() == before


def test_tensors_stay_in_a_mapped_file_although_it_is_replaced(tmp_path: Path) -> None:
    torch.save(torch.arange(1e5), tmp_path / "x.pt")
    tensor = read_content(tmp_path / "x.pt", mmap=True)
    torch.save(torch.zeros(10), tmp_path / "y.pt")
    (tmp_path / "y.pt").replace(tmp_path / "x.pt")
    assert torch.equal(tensor, torch.arange(1e5))


def test_a_compressed_archive_and_one_that_is_not_aligned_are_read(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(1000.0), "b": torch.arange(7, dtype=torch.int8)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        with zipfile.ZipFile(tmp_path / "y.pt", "w", method) as archive:
            for name, data in records:
                archive.writestr(name, data)
        for mmap in (False, True):
            assert torch.equal(read_content(tmp_path / "y.pt", mmap=mmap)["a"], torch.arange(1000.0))


def edited(path: Path, change: Any) -> Path:
    """The same archive with other records, and correct checksums."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    change(records)
    target = path.with_name("edited.pt")
    with zipfile.ZipFile(target, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data)
    return target


def replaced(old: bytes, new: bytes) -> Any:
    def change(records: dict[str, bytes]) -> None:
        name = next(name for name in records if name.endswith("data.pkl"))
        assert old in records[name]
        records[name] = records[name].replace(old, new)

    return change


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (replaced(b"K\x07K\x0b\x86", b"K\x08K\x0b\x86"), "must lie in its storage of 77 numbers, got up to 87"),
        (replaced(b"K\x07K\x0b\x86", b"J\xff\xff\xff\x7fK\x0b\x86"), "a tensor must lie in its storage of 77 numbers"),
        (replaced(b"K\x07K\x0b\x86", b"J\xff\xff\xff\xffK\x0b\x86"), "a tensor must be made from a storage, an offset"),
        (replaced(b"K\x0bK\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"), "a tensor must be made from a storage, an offset"),
        (replaced(b"K\x0bK\x01\x86", b"K\x0bK\x01K\x01\x87"), "argument 2 is longer|a tensor must"),
        (replaced(b"KMt", b"KNt"), "a storage must have 312 bytes, got 308"),
        (replaced(b"FloatStorage", b"DoubleStorage"), "a storage must have 616 bytes, got 308"),
        (replaced(b"FloatStorage", b"QInt8Storage"), r"references torch\.QInt8Storage, which is not on the list"),
        (replaced(b"_rebuild_tensor_v2", b"_rebuild_sparse_tensor"), "which is not on the list"),
        (lambda records: records.pop(next(n for n in records if n.endswith("data/0"))), "data/0"),
        (lambda records: records.update({"other/data.pkl": b"."}), "it must hold one data.pkl"),
        (lambda records: records.clear(), "it may be damaged"),
        (lambda records: records.update({next(n for n in records if "byteorder" in n): b"big"}), "another byte order"),
    ],
)  # fmt: skip
def test_a_description_that_does_not_fit_the_data_is_an_error(change: Any, reason: str, tmp_path: Path) -> None:
    torch.save(torch.zeros(7, 11), tmp_path / "x.pt")
    path = edited(tmp_path / "x.pt", change)
    for mmap in (False, True):
        with pytest.raises(WeightsError, match=reason):
            read_content(path, mmap=mmap)


@pytest.mark.parametrize("cut", [0.1, 0.5, 0.9, 0.999])
def test_an_old_file_that_is_cut_is_an_error(cut: float, tmp_path: Path) -> None:
    SAVERS["before 1.6"]({"a": torch.ones(100), "b": torch.ones(1000)}, tmp_path / "x.pth")
    data = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(WeightsError, match=r"x\.pth"):
        read_content(tmp_path / "x.pth")


def tower(levels: int) -> bytes:
    """A pickle's operations that make a tuple whose repr and hash take 2^levels steps."""
    return b")" + b"q\x00h\x00\x86" * levels


ENDLESS = {
    "made of a size": b"c__builtin__\nbytearray\n(L6000000000L\ntR.",
    "printed as a format": b"}X\x06\x00\x00\x00format" + tower(60) + b"s.",
    "printed as a type": b"cnumpy\ndtype\n" + tower(60) + b"\x85R.",
    "hashed as a key": b"}" + tower(60) + b"K\x01s.",
    "hashed in a set": b"\x8f(" + tower(60) + b"\x90.",
    "hashed as an argument": b"cbuiltins\nset\n(]" + tower(60) + b"atR.",
    "compared as an encoding": b"c_codecs\nencode\n(X\x01\x00\x00\x00x" + tower(60) + b"tR.",
    "printed as a reference": tower(60) + b"Q.",
    "colliding keys": b"}(" + b"".join(
        b"\x8a\x10" + (k * (2**61 - 1)).to_bytes(16, "little", signed=True) + b"N" for k in range(10**5)
    ) + b"u.",
    "copied lists": b"](" + b"N" * 1000 + b"eq\x010(" + b"c__builtin__\nset\nh\x01\x85R" * 10_000 + b"t.",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["zip", "bare"])
@pytest.mark.parametrize("name", ENDLESS)
def test_a_small_pickle_never_takes_long_or_much_memory(name: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / ("x.pt" if kind == "zip" else "x.pkl")
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", b"\x80\x02" + ENDLESS[name])
    else:
        path.write_bytes(b"\x80\x02" + ENDLESS[name])
    if name == "printed as a format":
        assert list(read_content(path)) == ["format"]
        return
    with pytest.raises(WeightsError, match=r"must|allowed size|references data") as caught:  # not after 2^60 steps
        read_content(path)
    assert len(str(caught.value)) < 1000


def test_lengths_that_a_file_declares_are_not_made_room_for(tmp_path: Path) -> None:
    for operation in (b"\x8e", b"\x8d", b"\x96"):
        (tmp_path / "x.pkl").write_bytes(operation + struct.pack("<Q", 6 * 10**9) + b"x.")
        with pytest.raises(WeightsError, match=r"x\.pkl cannot be read, it may be damaged: expected 6000000000 bytes"):
            read_content(tmp_path / "x.pkl")


def test_a_pickle_of_another_program_names_what_is_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Path("x")) + b"rest")
    assert type(read_content(tmp_path / "x.pt")).__name__ == "InertObject"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(time.localtime()))
    with pytest.raises(WeightsError, match=r"it references time\.struct_time, which is not on the list"):
        read_content(tmp_path / "x.pt")
