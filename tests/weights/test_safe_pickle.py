"""Pickles of any origin: arrays of every type, training checkpoints, no way to run code, bounded memory."""

from __future__ import annotations

import pickle
import random
import struct
import sys
import types
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.errors import WeightsError
from detector.weights import pickle_names, safe_pickle
from detector.weights.pickle_names import InertObject
from detector.weights.safe_load import read_content, read_tensors
from tests.weights.test_safe_load import some_tensors

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
def test_arrays_of_every_type_are_read_from_every_protocol(protocol: int, core: str, tmp_path: Path) -> None:
    content = {"model": OrderedDict(ARRAYS), "__author__": "somebody", "scale": np.float32(2.5), "set": {1}}
    written = pickle.dumps(content, protocol=protocol)
    if protocol < 4:  # in which names are not preceded by their length
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
    """Python 2 made no difference between text and bytes: the data of an array is stored as text."""
    data = struct.pack("<2f", 1.0, 200.5)
    pickled = (
        b"\x80\x02}U\x01wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\n"
        b"U\x02f4K\x00K\x01\x87R(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + data + b"tbs."
    )
    (tmp_path / "old.pkl").write_bytes(pickled)
    assert read_tensors(tmp_path / "old.pkl")["w"].tolist() == [1.0, 200.5]


def evil_pickles(trap: Path) -> dict[str, bytes]:
    """Each would create a folder at `trap`, by another path through the unpickler."""
    where = repr(str(trap)).encode()
    text = str(trap).encode()
    short_text = b"\x8c" + bytes([len(text)]) + text
    return {
        "reduce": b"cos\nmkdir\n(S" + where + b"\ntR.",
        "reduce, Python 2's name": b"c__builtin__\neval\n(S\"__import__('os').mkdir(" + where + b')"\ntR.',
        "instance": b"(S" + where + b"\nios\nmkdir\n.",
        "object": b"(cos\nmkdir\nS" + where + b"\no.",
        "by the stack": b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93" + short_text + b"\x85R.",
        "nested in a dict": b"(dS'model'\n(dS'w'\ncos\nmkdir\n(S" + where + b"\ntRss.",
        "in an array of objects": (
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\ntcnumpy\ndtype\n(S'O8'\nI0\n"
            b"I1\ntRI00\n(lcos\nmkdir\n(S" + where + b"\ntRatb."
        ),
        "through getattr": b"cbuiltins\ngetattr\n(cbuiltins\n__import__\nS'os'\ntR.",
        "call of the result of getattr": b"cbuiltins\ngetattr\n(cbuiltins\ngetattr\nS'__self__'\ntR(S'x'\ntR.",
        "state of a stand-in's class": b"cnumpy\nndarray\n(N(dS'__setstate__'\ncos\nmkdir\nstb.",
        "a dotted name": b"\x80\x04\x8c\x05numpy\x8c\x0dndarray.mkdir\x93" + short_text + b"\x85R.",
        "state of an inert object": b"cargparse\nNamespace\n)R(dS'a'\ncos\nmkdir\n(S" + where + b"\ntRsb.",
        "extension": b"\x80\x02\x82\x01.",
        "outside data": b"S'x'\nQ.",
    }


@pytest.mark.parametrize("way", evil_pickles(Path("x")))
@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_operation_of_a_pickle_runs_code(way: str, suffix: str, tmp_path: Path) -> None:
    trap, path = tmp_path / "ran", tmp_path / f"evil{suffix}"
    path.write_bytes(evil_pickles(trap)[way])
    with pytest.raises(WeightsError, match=r"evil\.p"):
        read_tensors(path)
    assert not trap.exists()


@pytest.mark.parametrize("way", ["reduce", "nested in a dict", "by the stack", "state of a stand-in's class"])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_operation_of_a_pickle_inside_a_torch_file_runs_code(way: str, tmp_path: Path) -> None:
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


def test_the_standard_unpickler_runs_the_same_pickles(tmp_path: Path) -> None:
    """Otherwise the tests above would prove nothing."""
    pickle.loads(evil_pickles(tmp_path / "ran")["reduce"])
    assert (tmp_path / "ran").is_dir()


CONTAINERS = ("DTYPES", "STORAGE_NAMES")


def test_a_pickle_cannot_change_the_stand_ins(tmp_path: Path) -> None:
    before = dict(pickle_names.FUNCTIONS), {name: dict(vars(pickle_names)[name]) for name in CONTAINERS}
    attributes = {kind: dict(vars(kind)) for kind in (pickle_names.EmptyArray, pickle_names.NumpyDtype, InertObject)}
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
    assert before == (dict(pickle_names.FUNCTIONS), {name: dict(vars(pickle_names)[name]) for name in CONTAINERS})
    assert attributes == {kind: dict(vars(kind)) for kind in attributes}


@pytest.fixture
def history_buffer() -> Iterator[Any]:
    """A class pickled as mmengine's of this name, with functions in its state; importable during the test only."""
    module = types.ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        def __init__(self) -> None:
            self._log_history, self._count_history = np.array([0.5, 0.25]), np.array([1, 1])
            self.max_length = 1000000

        def mean(self) -> None:
            raise AssertionError("nothing in a file may be run")

        def __getstate__(self) -> dict[str, Any]:
            return {**self.__dict__, "statistics_methods": {"mean": HistoryBuffer.mean}}

        def __setstate__(self, state: Any) -> None:
            raise AssertionError("nothing in a file may be run")

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
    assert type(buffer) is InertObject
    assert read_tensors(tmp_path / "epoch_12.pth").keys() == some_tensors().keys()
    assert not any(name.startswith("mmengine") for name in sys.modules), "nothing is imported"


def test_checkpoints_of_torchvisions_reference_scripts_are_read(tmp_path: Path) -> None:
    torch.save({"model": some_tensors(), "args": Namespace(lr=0.02), "epoch": 3}, tmp_path / "model_3.pth")
    assert read_tensors(tmp_path / "model_3.pth").keys() == some_tensors().keys()


def test_the_error_names_the_reference_that_is_not_allowed(tmp_path: Path) -> None:
    (tmp_path / "w.pkl").write_bytes(pickle.dumps({"w": random.Random(0)}))
    with pytest.raises(WeightsError, match=r"references random\.Random, which is not on the list of allowed names"):
        read_content(tmp_path / "w.pkl")


@pytest.mark.parametrize(
    "bomb",
    [
        b"(lr\xff\xff\xff\xff.",  # memo index 2**32 - 1
        b"(lp4000000000\n.",
        b"]" + b"2" * 1010 + b".",  # more operations than are allowed below
        b"\x8e" + struct.pack("<Q", 2**60) + b"x.",  # a text of 2**60 bytes
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(L999999999999999L\ntcnumpy\ndtype\n(S'f4'"
        b"\nI0\nI1\ntRI00\nS'xxxx'\ntb.",
        b"]" * 20_000 + b"a" * 19_999 + b".",
    ],
    ids=["memo", "memo in text", "operations", "length", "shape", "depth"],
)
def test_small_pickles_that_request_much_memory_are_rejected(
    bomb: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safe_pickle, "MAX_PICKLE_OPERATIONS", 100_000 if bomb.startswith(b"]]") else 1000)
    (tmp_path / "bomb.pkl").write_bytes(bomb)
    with pytest.raises(WeightsError, match=r"bomb\.pkl"):
        read_content(tmp_path / "bomb.pkl")


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
def test_shared_containers_are_converted_once(suffix: str, tmp_path: Path) -> None:
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


def test_attributes_of_a_container_cannot_hide_its_items(tmp_path: Path) -> None:
    odd: Any = OrderedDict(some_tensors())
    odd.get = None
    (tmp_path / "w.pkl").write_bytes(
        pickle.dumps(OrderedDict({k: v.numpy() for k, v in some_tensors().items()}), protocol=2)[:-1]
        + b"}U\x03getNsU\x05itemsNsb."
    )
    torch.save(odd, tmp_path / "w.pth")
    for name in ("w.pkl", "w.pth"):
        assert read_tensors(tmp_path / name).keys() == some_tensors().keys()


def test_data_that_is_decoded_again_and_again_is_rejected(tmp_path: Path) -> None:
    """Text stored once and decoded a thousand times."""
    text = b"X" + struct.pack("<I", 2**20) + b"x" * 2**20
    call = b"c_codecs\nencode\nh\x00U\x06latin1\x86Ra"
    (tmp_path / "bomb.pkl").write_bytes(b"\x80\x02" + text + b"q\x000]" + call * 1000 + b".")
    with pytest.raises(WeightsError, match=r"bomb\.pkl"):
        read_content(tmp_path / "bomb.pkl")


@pytest.mark.parametrize("reference", [b"cnumpy\ndtype\n", b"c_codecs\nencode\n(S'x'\n"])
def test_the_error_of_a_small_nested_argument_is_small(reference: bytes, tmp_path: Path) -> None:
    """The repr of lists that contain the previous one twice doubles with each level."""
    nested = b"]" + b"".join(b"p%d\n0(g%d\ng%d\nl" % (i, i, i) for i in range(100))
    call = reference + (b"(" if reference.endswith(b"dtype\n") else b"") + nested + b"tR."
    (tmp_path / "bomb.pkl").write_bytes(call)
    with pytest.raises(WeightsError, match=r"bomb\.pkl.*got .*list"):
        read_content(tmp_path / "bomb.pkl")
