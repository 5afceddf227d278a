"""Weight files of any origin: all formats, all kinds of damage, and nothing in them is ever run."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from detector.errors import WeightsError
from detector.weights import zip_records
from detector.weights.safe_load import read_content, read_tensors


def some_tensors() -> dict[str, Tensor]:
    return {"conv1.weight": torch.arange(12.0).view(3, 4), "bn1.bias": torch.ones(5)}


def write_npz(tensors: dict[str, Tensor], path: Path) -> None:
    arrays: dict[str, Any] = {k: v.numpy() for k, v in tensors.items()}
    np.savez(path, **arrays)


def write_pickle(tensors: dict[str, Tensor], path: Path) -> None:
    path.write_bytes(pickle.dumps({k: v.numpy() for k, v in tensors.items()}))


WRITERS: dict[str, Callable[[dict[str, Tensor], Path], None]] = {
    "w.pth": torch.save,
    "w.pt": torch.save,
    "old.pth": partial(torch.save, _use_new_zipfile_serialization=False),
    "w.npz": write_npz,
    "w.safetensors": safetensors.torch.save_file,
    "w.pkl": write_pickle,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read(name: str, tmp_path: Path) -> None:
    WRITERS[name](some_tensors(), tmp_path / name)
    found = read_tensors(tmp_path / name)
    assert found.keys() == some_tensors().keys()
    assert all(torch.equal(found[k], v) for k, v in some_tensors().items())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda t: {"state_dict": t, "epoch": 3},
        lambda t: {"model": t, "optimizer": {"lr": 0.1}},
        lambda t: {f"module.{k}": v for k, v in t.items()},
        lambda t: {"state_dict": {f"module.{k}": v for k, v in t.items()}},
    ],
)
def test_nested_and_prefixed_weights_are_found(wrap: Callable[[Any], Any], tmp_path: Path) -> None:
    torch.save(wrap(some_tensors()), tmp_path / "w.pth")
    assert read_tensors(tmp_path / "w.pth").keys() == some_tensors().keys()


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["evil.pth", "evil.pt", "old.pth", "plain.pth", "evil.npz"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_file_is_rejected_and_not_run(name: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "ran", tmp_path / name
    content = {"conv1.weight": torch.ones(2), "x": Malicious(trap)}
    if name == "evil.npz":
        np.savez(path, x=np.array([Malicious(trap)], dtype=object))
    elif name == "plain.pth":
        path.write_bytes(pickle.dumps(content["x"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=name != "old.pth")
    with pytest.raises(WeightsError, match=name):
        read_tensors(path)
    assert not trap.exists()


def test_the_error_names_the_object_that_is_not_allowed(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"could run code \(it references torch\.nn\.modules\.linear\.Linear, which"):
        read_tensors(tmp_path / "w.pth")


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_errors_of_truncated_and_damaged_files_name_the_file(name: str, tmp_path: Path) -> None:
    WRITERS[name](some_tensors(), tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    changes = random.Random(0)
    for length in [0, 1, 10, len(whole) // 3, len(whole) // 2, len(whole) - 30]:
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(WeightsError, match=name):
            read_tensors(tmp_path / name)
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(5):
            damaged[changes.randrange(len(whole))] = changes.randrange(256)
        (tmp_path / name).write_bytes(damaged)
        with contextlib.suppress(WeightsError):  # a changed weight is not detectable
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("content", [[], {}, {"epoch": 3}, {"a": torch.ones(1), "b": "text"}, torch.ones(2)])
def test_anything_but_named_tensors_is_rejected(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="must hold a mapping from names to tensors"):
        read_tensors(tmp_path / "w.pth")


def test_text_arrays_and_an_unnamed_array_are_rejected(tmp_path: Path) -> None:
    np.savez(tmp_path / "text.npz", names=np.array(["a", "b"]))
    with (tmp_path / "unnamed.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    for name in ("text.npz", "unnamed.npz"):
        with pytest.raises(WeightsError, match=name):
            read_tensors(tmp_path / name)


def test_missing_files_and_unknown_suffixes_are_errors(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"missing\.pth does not exist"):
        read_tensors(tmp_path / "missing.pth")
    with pytest.raises(WeightsError, match=r"must end in \.pt, \.pth, \.pkl, \.npz, \.safetensors, got .*w\.onnx"):
        read_tensors(tmp_path / "w.onnx")


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".pt", ".pkl"])
def test_zip_bombs_are_rejected_before_unpacking(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zip_records, "MAX_UNPACKED_BYTES", 2**20)
    path = tmp_path / f"bomb{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as entry:
        entry.write(bytes(2**22))
    assert path.stat().st_size < 2**22 / zip_records.MAX_COMPRESSION_RATIO
    with pytest.raises(WeightsError, match=r"would unpack to 4,194,304"):
        read_content(path)


@pytest.mark.parametrize("comment", [b"PK\x05\x06", b"harmless", b"PK\x05\x06" + bytes(18)])
def test_a_comment_cannot_hide_a_zip_bomb(comment: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Zip readers differ in which directory they find if a comment looks like one."""
    monkeypatch.setattr(zip_records, "MAX_UNPACKED_BYTES", 2**20)
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**22))
        archive.comment = comment
    with pytest.raises(WeightsError, match=r"bomb\.pth cannot be read"):
        read_content(path)


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(2**20, 2**20), torch.eye(3).to_sparse(), torch.zeros(3, device="meta")],
    ids=["more elements than stored", "sparse", "without data"],
)
def test_tensors_that_do_not_store_all_their_elements_are_rejected(tensor: Tensor, tmp_path: Path) -> None:
    torch.save({"w": tensor}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_tensors(tmp_path / "w.pth")


def test_an_npz_header_of_a_vast_array_is_an_error(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)})
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue() + bytes(64))
    with pytest.raises(WeightsError, match=r"vast\.npz cannot be read"):
        read_content(tmp_path / "vast.npz")


def test_content_that_contains_itself_is_an_error(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    torch.save(endless, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="nested too deeply or in itself"):
        read_content(tmp_path / "w.pth")
