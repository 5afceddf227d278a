"""Reading files that anybody may have made: all formats, all kinds of damage, and that nothing in them ever runs."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import random
import struct
import sys
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.errors import WeightsError
from detector.weights import safe_load as reading
from detector.weights.safe_load import Inert, read_content, read_tensors


def some_tensors() -> dict[str, Tensor]:
    return {"conv1.weight": torch.arange(12.0).view(3, 4), "bn1.bias": torch.ones(5)}


def write_npz(tensors: dict[str, Tensor], path: Path) -> None:
    np.savez(path, allow_pickle=False, **{k: v.numpy() for k, v in tensors.items()})


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
def test_code_in_a_file_is_refused_and_not_run(name: str, tmp_path: Path) -> None:
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


def test_the_reason_is_told_without_torchs_advice_to_load_it_regardless(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"could run code \(Unsupported global: GLOBAL .*Linear") as caught:
        read_tensors(tmp_path / "w.pth")
    assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_truncated_and_damaged_files_are_told_with_their_name(name: str, tmp_path: Path) -> None:
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
        with contextlib.suppress(WeightsError):  # a changed number is no visible damage
            read_tensors(tmp_path / name)


@pytest.mark.parametrize("content", [[], {}, {"epoch": 3}, {"a": torch.ones(1), "b": "text"}, torch.ones(2)])
def test_anything_but_named_tensors_is_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="must hold a mapping from names to tensors"):
        read_tensors(tmp_path / "w.pth")


def test_arrays_of_text_and_a_lone_array_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "text.npz", names=np.array(["a", "b"]))
    with (tmp_path / "lone.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    for name in ("text.npz", "lone.npz"):
        with pytest.raises(WeightsError, match=name):
            read_tensors(tmp_path / name)


def test_missing_files_and_unknown_suffixes_are_told(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"gone\.pth does not exist"):
        read_tensors(tmp_path / "gone.pth")
    with pytest.raises(WeightsError, match=r"must end in \.pt, \.pth, \.pkl, \.npz, \.safetensors, got .*w\.onnx"):
        read_tensors(tmp_path / "w.onnx")


# ---- bare pickles, as detectron2's model zoo ----------------------------------------------------------------------

ARRAYS: dict[str, NDArray[Any]] = {
    "f32": np.arange(12, dtype=np.float32).reshape(3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big endian": np.arange(5, dtype=">f4"),
    "half": np.array([1.5, -2], np.float16),
    "int": np.array([[-3, 7]], np.int64),
    "unsigned": np.array([1, 65535], np.uint16),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 3), np.float32),
    "no axes": np.array(7, np.float32),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"], ids=["numpy 1", "numpy 2"])
def test_arrays_of_every_kind_come_back_from_every_protocol(protocol: int, core: str, tmp_path: Path) -> None:
    content = {"model": OrderedDict(ARRAYS), "__author__": "somebody", "scale": np.float32(2.5), "set": {1}}
    written = pickle.dumps(content, protocol=protocol)
    if protocol < 4:  # there, names are not preceded by their length
        written = written.replace(b"numpy._core.", core.encode() + b".")
    (tmp_path / "zoo.pkl").write_bytes(written)
    found = read_content(tmp_path / "zoo.pkl")
    assert (found["__author__"], found["scale"]) == ("somebody", 2.5)
    assert found["model"].keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        tensor = found["model"][name]
        assert isinstance(tensor, Tensor), name
        assert tensor.tolist() == array.tolist(), name
        assert tuple(tensor.shape) == array.shape, name
    assert found["model"]["f32"].dtype == torch.float32
    assert list(read_tensors(tmp_path / "zoo.pkl")) == list(ARRAYS)


def test_a_pickle_of_python_2_is_read(tmp_path: Path) -> None:
    """There, text and bytes were one: the numbers of an array are written as text."""
    data = struct.pack("<2f", 1.0, 200.5)
    pickled = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + data + b"tbs."
    )
    (tmp_path / "old.pkl").write_bytes(pickled)
    assert read_tensors(tmp_path / "old.pkl")["w"].tolist() == [1.0, 200.5]


def evil_pickles(trap: Path) -> dict[str, bytes]:
    """Each would make a folder at `trap`, by another way into the reader."""
    where = repr(str(trap)).encode()
    text = str(trap).encode()
    short = b"\x8c" + bytes([len(text)]) + text
    return {
        "reduce": b"cos\nmkdir\n(S" + where + b"\ntR.",
        "reduce, Python 2's name": b"c__builtin__\neval\n(S\"__import__('os').mkdir(" + where + b')"\ntR.',
        "instance": b"(S" + where + b"\nios\nmkdir\n.",
        "object": b"(cos\nmkdir\nS" + where + b"\no.",
        "by the stack": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + short + b"\x85R.",
        "nested in a dict": b"(dS'model'\n(dS'w'\ncos\nmkdir\n(S" + where + b"\ntRss.",
        "in an array of objects": (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\nI0\n"
            b"I1\ntRI00\n(lcos\nmkdir\n(S" + where + b"\ntRatb."
        ),
        "through getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'os'\ntR.",
        "what getattr gives, called": b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nS'__self__'\ntR(S'x'\ntR.",
        "into a stand-in's class": b"cnumpy\nndarray\n(N(dS'__setstate__'\ncos\nmkdir\nstb.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.mkdir\x93" + short + b"\x85R.",
        "state of a harmless object": b"cargparse\nNamespace\n)R(dS'a'\ncos\nmkdir\n(S" + where + b"\ntRsb.",
        "extension": b"\x80\x02\x82\x01.",
        "outside data": b"S'x'\nQ.",
    }


@pytest.mark.parametrize("way", evil_pickles(Path("x")))
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_way_into_a_pickle_runs_anything(way: str, suffix: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "ran", tmp_path / f"evil{suffix}"
    path.write_bytes(evil_pickles(trap)[way])
    with pytest.raises(WeightsError, match=r"evil\.p"):
        read_tensors(path)
    assert not trap.exists()


@pytest.mark.parametrize("way", ["reduce", "nested in a dict", "by the stack", "into a stand-in's class"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_nor_does_one_inside_a_file_of_torch(way: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"w": torch.ones(2)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, evil_pickles(trap)[way] if name.endswith("data.pkl") else data)
    with pytest.raises(WeightsError, match=r"evil\.pth"):
        read_tensors(path)
    assert not trap.exists()


def test_the_traps_would_work(tmp_path: Path) -> None:
    """Python's own reader does what ours must not: the tests above rest on it."""
    pickle.loads(evil_pickles(tmp_path / "ran")["reduce"])
    assert (tmp_path / "ran").is_dir()


def test_stand_ins_cannot_be_changed_by_a_pickle(tmp_path: Path) -> None:
    before = {name: dict(vars(stand_in)) for name, stand_in in reading.HARMLESS.items()}
    for number, attribute in enumerate([b"__setstate__", b"__new__", b"array", b"anything"]):
        for name in (
            b"numpy\nndarray",
            b"numpy\ndtype",
            b"argparse\nNamespace",
            b"numpy.core.multiarray\n_reconstruct",
        ):
            path = tmp_path / f"{number}.pkl"
            path.write_bytes(b"c" + name + b"\n(N(dS'" + attribute + b"'\nNstb.")
            with pytest.raises(WeightsError):
                read_content(path)
            path.write_bytes(b"c" + name + b"\n(dS'" + attribute + b"'\nNsb.")
            with pytest.raises(WeightsError):
                read_content(path)
    assert before == {name: dict(vars(stand_in)) for name, stand_in in reading.HARMLESS.items()}


# ---- what training programs leave in their checkpoints -----------------------------------------------------------


@pytest.fixture
def history_buffer() -> Iterator[Any]:
    """mmengine's class of this name as far as pickles show it, with functions among its state; gone after the test."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([1, 1])
            self.max_length = 1000000

        def mean(self) -> None:
            raise AssertionError("nothing in a file may run")

        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

        def __setstate__(self, state: Any) -> None:
            raise AssertionError("nothing in a file may run")

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    HistoryBuffer.mean.__module__, HistoryBuffer.mean.__qualname__ = module.__name__, "HistoryBuffer.mean"
    vars(module)["HistoryBuffer"] = HistoryBuffer
    parents = ("mmengine", "mmengine.logging")
    sys.modules |= {name: types.ModuleType(name) for name in parents} | {module.__name__: module}
    yield HistoryBuffer
    for name in (*parents, module.__name__):
        sys.modules.pop(name, None)


def test_mmengines_training_checkpoints_are_read_without_mmengine(history_buffer: Any, tmp_path: Path) -> None:
    content = {
        "meta": {"cfg": "style='caffe'", "dataset_meta": {"classes": ("a", "b")}, "seed": 3},
        "state_dict": OrderedDict(some_tensors()),
        "message_hub": {"log_scalars": OrderedDict({"train/loss": history_buffer()}), "resumed_keys": OrderedDict()},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}},
    }
    torch.save(content, tmp_path / "epoch_12.pth")
    for name in [n for n in sys.modules if n.startswith("mmengine")]:
        del sys.modules[name]
    found = read_content(tmp_path / "epoch_12.pth")
    assert found["meta"]["dataset_meta"]["classes"] == ("a", "b")
    buffer = found["message_hub"]["log_scalars"]["train/loss"]
    assert type(buffer) is Inert
    assert read_tensors(tmp_path / "epoch_12.pth").keys() == some_tensors().keys()
    assert not any(name.startswith("mmengine") for name in sys.modules), "nothing is imported"


def test_arguments_of_torchvisions_reference_scripts_do_no_harm(tmp_path: Path) -> None:
    torch.save({"model": some_tensors(), "args": Namespace(lr=0.02), "epoch": 3}, tmp_path / "model_3.pth")
    assert read_tensors(tmp_path / "model_3.pth").keys() == some_tensors().keys()


def test_what_is_not_known_as_harmless_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": random.Random(0)}))
    with pytest.raises(WeightsError, match=r"names random\.Random, which is not among the harmless"):
        read_content(tmp_path / "w.pkl")


# ---- bombs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".pth", ".pt", ".pkl"])
def test_zip_bombs_are_refused_before_they_unpack(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_UNPACKED", 2**20)
    path = tmp_path / f"bomb{suffix}"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a/data.pkl", "w") as entry:
        entry.write(bytes(2**22))
    assert path.stat().st_size < 2**22 / reading.MOST_COMPRESSED
    with pytest.raises(WeightsError, match=r"would unpack to 4,194,304"):
        read_content(path)


@pytest.mark.parametrize(
    "bomb",
    [
        b"(lr\xff\xff\xff\xff.",  # remembered as number 2**32 - 1
        b"(lp4000000000\n.",
        b"]" + b"2" * 1010 + b".",  # more operations than are allowed below
        b"\x8e" + struct.pack("<Q", 2**60) + b"x.",  # a text of 2**60 bytes
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(L999999999999999L\ntcnumpy\ndtype\n(S'f4'"
        b"\nI0\nI1\ntRI00\nS'xxxx'\ntb.",
        b"]" * 20_000 + b"a" * 19_999 + b".",
    ],
    ids=["memo", "memo in text", "operations", "length", "shape", "depth"],
)
def test_small_pickles_that_ask_for_much_are_refused(
    bomb: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reading, "MOST_OPERATIONS", 100_000 if bomb.startswith(b"]]") else 1000)
    (tmp_path / "bomb.pkl").write_bytes(bomb)
    with pytest.raises(WeightsError, match=r"bomb\.pkl"):
        read_content(tmp_path / "bomb.pkl")


@pytest.mark.parametrize("comment", [b"PK\x05\x06", b"harmless", b"PK\x05\x06" + bytes(18)])
def test_no_comment_hides_a_zip_bomb(comment: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs differ in which directory they find where a comment looks like one."""
    monkeypatch.setattr(reading, "MOST_UNPACKED", 2**20)
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", bytes(2**22))
        archive.comment = comment
    with pytest.raises(WeightsError, match=r"bomb\.pth cannot be read"):
        read_content(path)


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_containers_shared_a_thousand_times_are_looked_at_once(suffix: str, tmp_path: Path) -> None:
    nest: Any = []
    for _ in range(100):
        nest = [nest, nest]
    path = tmp_path / f"shared{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps({"x": nest}))
    else:
        torch.save({"x": nest}, path)
    found = read_content(path)["x"]
    assert found[0] is found[1]


def test_attributes_of_a_container_hide_nothing(tmp_path: Path) -> None:
    odd: Any = OrderedDict(some_tensors())
    odd.get = None
    (tmp_path / "w.pkl").write_bytes(
        pickle.dumps(OrderedDict({k: v.numpy() for k, v in some_tensors().items()}), protocol=2)[:-1]
        + b"}U\x03getNsU\x05itemsNsb."
    )
    torch.save(odd, tmp_path / "w.pth")
    for name in ("w.pkl", "w.pth"):
        assert read_tensors(tmp_path / name).keys() == some_tensors().keys()


def test_data_that_is_used_again_and_again_is_refused(tmp_path: Path) -> None:
    """A text written once, asked for as bytes a thousand times."""
    text = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20
    call = b"c_codecs\nencode\nh\x00U\x06latin1\x86Ra"
    (tmp_path / "bomb.pkl").write_bytes(b"\x80\x02" + text + b"q\x000]" + call * 1000 + b".")
    with pytest.raises(WeightsError, match=r"bomb\.pkl"):
        read_content(tmp_path / "bomb.pkl")


@pytest.mark.parametrize(
    "tensor",
    [torch.zeros(1).expand(2**20, 2**20), torch.eye(3).to_sparse(), torch.zeros(3, device="meta")],
    ids=["claims more than it stores", "sparse", "without data"],
)
def test_tensors_that_are_not_what_they_seem_are_refused(tensor: Tensor, tmp_path: Path) -> None:
    torch.save({"w": tensor}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth"):
        read_tensors(tmp_path / "w.pth")


def test_an_npz_that_claims_a_vast_array_is_told(tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (10**7, 10**7)})
    with zipfile.ZipFile(tmp_path / "vast.npz", "w") as archive:
        archive.writestr("w.npy", header.getvalue() + bytes(64))
    with pytest.raises(WeightsError, match=r"vast\.npz cannot be read"):
        read_content(tmp_path / "vast.npz")


def test_content_that_holds_itself_is_told(tmp_path: Path) -> None:
    endless: list[Any] = []
    endless.append(endless)
    torch.save(endless, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="nested without end"):
        read_content(tmp_path / "w.pth")
