"""Reading files of weights that anybody may have made. Nothing in a file is ever run.

safetensors and numpy's own reader (without pickles) can only give arrays. Pickles could call any function, so they are
read by two readers that know a fixed list of names and refuse all others before touching them: torch's own
(`weights_only`) for what torch wrote, and `_Reader` for bare pickles (detectron2's model zoo). Beside tensors, arrays and
plain containers the list has the classes that training programs of the field leave in their checkpoints (log buffers,
command-line arguments): those are neither imported nor built, an `Inert` record of their name stands in their place.
"""

from __future__ import annotations

import pickle
import pickletools
import re
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.errors import WeightsError

SUFFIXES = (".pt", ".pth", ".pkl", ".npz", ".safetensors")

# What torch, numpy, zipfile and safetensors were seen to raise on files with random bytes changed or cut off.
DAMAGE = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, AssertionError, ArithmeticError,
    MemoryError, struct.error, zlib.error, zipfile.BadZipFile, safetensors.SafetensorError,
)  # fmt: skip

MOST_UNPACKED = 2**30
"""Bytes that a compressed file may always unpack to; beyond, at most `MOST_COMPRESSED` times its size."""
MOST_COMPRESSED = 50
MOST_COPIED = 6
"""Bytes that the stand-ins for numpy's functions may make, in sizes of the file (and `SPARE` more)."""
SPARE = 2**20
MOST_OPERATIONS = 5_000_000
"""Of a bare pickle. A detector's has some ten thousand."""


def read_content(path: Path, *, mmap: bool = False) -> Any:
    """Whatever a .pt, .pth, .pkl, .npz or .safetensors file holds, as tensors, plain containers and `Inert` records.

    Args:
        path: of the file.
        mmap: leave tensors on the disk until they are used, where the format allows it.

    Raises:
        WeightsError: the file is missing, broken, or could run code.
    """
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights file must end in {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist")
    _left.set(MOST_COPIED * path.stat().st_size + SPARE)
    try:
        _refuse_zip_bombs(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            return _read_pickle(path)
        names: Any = [(stand_in, name) for name, stand_in in HARMLESS.items()]
        with torch.serialization.safe_globals(names):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
        return _plain(content)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights file {path} is not read: it is damaged, or holds more than tensors and could run code "
            f"({reason(error)}); save a state_dict instead"
        ) from None
    except RecursionError:
        raise WeightsError(f"weights file {path} is not read: its content is nested without end") from None
    except WeightsError:
        raise
    except DAMAGE as error:
        raise WeightsError(f"weights file {path} cannot be read, it may be damaged: {reason(error)}") from None


_left: ContextVar[int] = ContextVar("_left")


def _spend(size: int) -> None:
    """A text that is written once can be asked for as bytes a million times."""
    _left.set(_left.get() - size)
    if _left.get() < 0:
        raise pickle.UnpicklingError("it makes more of its data than it holds")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a file, wherever in it they are; see `read_content` and `tensors_in`."""
    return tensors_in(read_content(path), path)


def tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a file's content. A dict inside a dict under "state_dict", "model" or "params" is found; a "module."
    prefix (DDP's) is removed.

    Raises:
        WeightsError: it holds anything but named tensors.
    """
    tensors = named(content)
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        odd = next((f", {k} being {type(v).__name__}" for k, v in tensors.items() if not isinstance(v, Tensor)), "")
        raise WeightsError(
            f"weights file {path} must hold a mapping from names to tensors, got {type(content).__name__}{odd}"
        )
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise WeightsError(
                f"weights file {path}: {name} must be an ordinary tensor, got {tensor.layout} on {tensor.device}"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                f"weights file {path}: {name} claims {tensor.numel():,} numbers and stores fewer; no weights do"
            )
    return tensors


def named(content: Any) -> dict[str, Any]:
    """What stands under names in a file's content: the innermost mapping of "state_dict", "model" or "params", without DDP's
    "module."; nothing if it is no mapping."""
    for key in ("state_dict", "model", "params"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return {str(k).removeprefix("module."): v for k, v in content.items()} if isinstance(content, dict) else {}


def short(names: Sequence[str], limit: int = 6) -> str:
    """Some of a list of names, and how many more there are."""
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def reason(error: BaseException) -> str:
    """The telling line of an error; torch's long ones are mostly advice to load the file regardless."""
    lines = [line.strip() for line in str(error).splitlines()]
    telling = [line for line in lines if line and "weights_only" not in line and "Weights only load" not in line]
    if not telling:
        return type(error).__name__
    told = telling[0].removeprefix("WeightsUnpickler error: ")
    for advice in (" Please use", ". This is an internal miniz error"):
        told = told.partition(advice)[0]
    return told


def _refuse_zip_bombs(path: Path) -> None:
    with path.open("rb") as file:
        begins_as_zip = file.read(4) == b"PK\x03\x04"  # how torch tells
        file.seek(max(0, path.stat().st_size - 22))
        ends_as_zip = file.read(4) == b"PK\x05\x06"
    if not begins_as_zip and not zipfile.is_zipfile(path):
        return
    if (
        not ends_as_zip
    ):  # a comment behind the directory can hide another directory, and programs differ in which they find
        raise zipfile.BadZipFile("the archive does not end with its directory")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > max(MOST_UNPACKED, MOST_COMPRESSED * size):
        raise WeightsError(
            f"weights file {path} is not read: its {size:,} bytes would unpack to {unpacked:,}, which no weights do"
        )


# ---- stand-ins for what pickles name ----------------------------------------------------------------------------


class _Sealed(type):
    """A class that a pickle can call but not change."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"a pickle tried to change {cls.__name__}")


class Inert(metaclass=_Sealed):
    """In place of an object of a known, harmless class: nothing but whatever was stored with it."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # an object that also is a dict


class _Dtype(metaclass=_Sealed):
    """numpy.dtype, of plain numbers only."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([iu][1248]|f[248]|b1)", code):
            raise pickle.UnpicklingError(f"arrays must hold plain numbers, got dtype {code!r:.40}")
        self.code = code.lstrip("<>|=")
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"the byte order of an array must be < or >, got {state[1]!r:.40}")
        self.order = ">" if state[1] == ">" else "<"

    def array(self, data: Any, shape: Any, *, fortran: bool) -> NDArray[Any]:
        if isinstance(data, str):  # as Python 2 wrote bytes
            data = data.encode("latin1")
        _spend(len(data))
        flat = np.frombuffer(data, np.dtype(self.order + self.code))
        array: NDArray[Any] = flat.reshape(tuple(shape), order="F" if fortran else "C")
        return array.astype(array.dtype.newbyteorder("="), order="C")


class _Array(metaclass=_Sealed):
    """numpy.ndarray: becomes a tensor once the whole file is read."""

    array: NDArray[Any] | None

    def __init__(self, *_: Any) -> None:
        self.array = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("an array must hold plain numbers")
        self.array = dtype.array(data, shape, fortran=bool(fortran))


class _Reconstruct(metaclass=_Sealed):
    """numpy's function that makes an empty array, to be filled by `__setstate__`."""

    def __new__(cls, *_: Any) -> Any:
        return _Array()


class _FromBuffer(metaclass=_Sealed):
    """numpy's function that makes an array from bytes (protocol 5)."""

    def __new__(cls, data: Any, dtype: Any, shape: Any, order: Any) -> Any:
        made = _Array()
        made.__setstate__((1, shape, dtype, order == "F", data))
        return made


class _Scalar(metaclass=_Sealed):
    """numpy's function that makes a single number."""

    def __new__(cls, dtype: Any, data: Any) -> Any:
        if not isinstance(dtype, _Dtype):
            raise pickle.UnpicklingError("a numpy scalar must be a plain number")
        return dtype.array(data, (), fortran=False).item()


class _Encode(metaclass=_Sealed):
    """Python 3 writes bytes as text in old protocols."""

    def __new__(cls, text: Any, encoding: Any = "latin1") -> Any:
        if encoding != "latin1" or not isinstance(text, str):
            raise pickle.UnpicklingError(f"bytes must be stored as latin1 text, got {encoding!r:.40}")
        _spend(len(text))
        return text.encode("latin1")


class _NoBytes(metaclass=_Sealed):
    """The empty bytes in old protocols."""

    def __new__(cls, *arguments: Any) -> Any:
        if arguments:
            raise pickle.UnpicklingError("bytes must be stored as they are")
        return b""


class _Looked(metaclass=_Sealed):
    """getattr, by which methods are named: looks at nothing."""

    def __new__(cls, *names: Any) -> Any:
        return Inert(*names)


_NUMPY: dict[str, type] = {
    f"{core}.{name}": stand_in
    for core in ("numpy.core", "numpy._core")
    for name, stand_in in (
        ("multiarray._reconstruct", _Reconstruct),
        ("multiarray.scalar", _Scalar),
        ("numeric._frombuffer", _FromBuffer),
    )
}

HARMLESS: dict[str, type] = {
    **_NUMPY,
    "numpy.ndarray": _Array,
    "numpy.dtype": _Dtype,
    "_codecs.encode": _Encode,
    "builtins.getattr": _Looked,
    "builtins.set": set,
    "builtins.bytes": _NoBytes,
    "argparse.Namespace": Inert,  # torchvision's reference scripts
    "mmengine.logging.history_buffer.HistoryBuffer": Inert,
    "mmengine.config.config.ConfigDict": Inert,
    "pathlib.PosixPath": Inert,
    "pathlib.WindowsPath": Inert,
}
"""By their full names: what pickles may name beside what torch allows by itself."""


class _Reader(pickle.Unpickler):
    """Knows HARMLESS and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full = f"{module}.{name}"
        if full == "collections.OrderedDict":
            return OrderedDict
        if full not in HARMLESS:
            raise pickle.UnpicklingError(f"it names {full}, which is not among the harmless")
        return HARMLESS[full]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it refers to data outside of the file, {pid!r:.60}")


def _read_pickle(path: Path) -> Any:
    with path.open("rb") as file:
        _check_operations(file)
        file.seek(0)
        return _plain(_Reader(file, encoding="latin1").load())


def _check_operations(file: BinaryIO) -> None:
    """A pickle of a few bytes can ask for memory without end: by the number of what it remembers."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        remembered = argument if "PUT" in operation.name and isinstance(argument, int) else 0
        if max(count, remembered) > MOST_OPERATIONS:
            raise pickle.UnpicklingError(f"it has more than {MOST_OPERATIONS:,} operations or objects")


_UNFINISHED = object()


def _plain(content: Any, seen: dict[int, Any] | None = None) -> Any:
    """The same in new plain containers (those of a pickle can carry attributes that hide their methods), arrays replaced by
    tensors. What is shared stays shared."""
    seen = {} if seen is None else seen
    if isinstance(content, _Array):
        if content.array is None:
            raise pickle.UnpicklingError("an array is never filled")
        wide = content.array.dtype.kind == "u" and content.array.dtype.itemsize > 1  # which torch hardly knows
        return torch.from_numpy(content.array.astype(np.int64) if wide else content.array)
    if not isinstance(content, dict | list) and type(content) is not tuple:
        return content
    if id(content) in seen:
        if seen[id(content)] is _UNFINISHED:
            raise RecursionError
        return seen[id(content)]
    seen[id(content)] = _UNFINISHED
    made: Any
    if isinstance(content, dict):
        made = {key: _plain(value, seen) for key, value in dict.items(content)}
    else:
        made = [_plain(value, seen) for value in content]
        made = tuple(made) if isinstance(content, tuple) else made
    seen[id(content)] = made
    return made
