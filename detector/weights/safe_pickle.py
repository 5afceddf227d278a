"""Unpickle data from untrusted sources without running anything in it.

A pickle can name any importable function and have it called. Here only the names in `ALLOWED_GLOBALS` are accepted, and
none of them resolves to the real object: NumPy's functions are replaced by stand-ins that make plain arrays, and the
classes that training programs leave in checkpoints (log buffers, command-line arguments) by `InertObject`, which is
neither imported nor constructed. The sizes of memo, operations and copied data are bounded.
"""

from __future__ import annotations

import pickle
import pickletools
import re
from collections import OrderedDict
from contextvars import ContextVar
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import torch
from numpy.typing import NDArray

MAX_PICKLE_OPERATIONS = 5_000_000
"""Operations, and memo size, of a bare pickle. A detector's has about ten thousand."""

copy_budget: ContextVar[int] = ContextVar("copy_budget")
"""Bytes that the stand-ins may still copy: text stored once can be decoded a million times. Set it before reading."""
_IN_PROGRESS = object()


def load_pickle(path: Path) -> Any:
    """Read a bare pickle as tensors, plain containers and `InertObject` records. Set `copy_budget` first.

    Raises:
        pickle.UnpicklingError: a name outside `ALLOWED_GLOBALS`, or a size beyond the limits; damaged files raise many
            other errors.
    """
    with path.open("rb") as file:
        _check_operations(file)
        file.seek(0)
        return to_plain(_RestrictedUnpickler(file, encoding="latin1").load())


def to_plain(content: Any, converted: dict[int, Any] | None = None) -> Any:
    """Copy unpickled content into new dicts, lists and tuples, with tensors in place of arrays.

    The containers of a pickle can carry attributes that hide their methods; the copies cannot. Shared containers stay
    shared.

    Raises:
        RecursionError: a container contains itself.
    """
    converted = {} if converted is None else converted
    if isinstance(content, _NumpyArray):
        if content.array is None:
            raise pickle.UnpicklingError("an array must be filled, got one without data")
        dtype = content.array.dtype
        wide_unsigned = dtype.kind == "u" and dtype.itemsize > 1  # hardly supported by torch
        return torch.from_numpy(content.array.astype(np.int64) if wide_unsigned else content.array)
    if not isinstance(content, dict | list) and type(content) is not tuple:
        return content
    if id(content) in converted:
        if converted[id(content)] is _IN_PROGRESS:
            raise RecursionError
        return converted[id(content)]
    converted[id(content)] = _IN_PROGRESS
    plain: Any
    if isinstance(content, dict):
        plain = {key: to_plain(value, converted) for key, value in dict.items(content)}
    else:
        plain = [to_plain(value, converted) for value in content]
        plain = tuple(plain) if isinstance(content, tuple) else plain
    converted[id(content)] = plain
    return plain


class _ImmutableClass(type):
    """Metaclass of classes that a pickle can call but not modify."""

    def __setattr__(cls, name: str, value: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"a pickle must not change classes, got an assignment to {cls.__name__}")


class InertObject(metaclass=_ImmutableClass):
    """Stand-in for an object of an allowed class: keeps the data stored with it and has no behaviour."""

    def __init__(self, *args: Any) -> None:
        self.args = args
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        pass  # the items of a dict subclass


class _NumpyDtype(metaclass=_ImmutableClass):
    """Stand-in for numpy.dtype; accepts plain numbers only."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([iu][1248]|f[248]|b1)", code):
            raise pickle.UnpicklingError(f"arrays must hold plain numbers, got dtype {_excerpt(code)}")
        self.code = code.lstrip("<>|=")
        self.order = "<"

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ("<", ">", "|", "="):
            raise pickle.UnpicklingError(f"the byte order of an array must be < or >, got {_excerpt(state[1])}")
        self.order = ">" if state[1] == ">" else "<"

    def array(self, data: Any, shape: Any, *, fortran: bool) -> NDArray[Any]:
        if isinstance(data, str):  # Python 2 pickles store bytes as text
            data = data.encode("latin1")
        _charge(len(data))
        flat = np.frombuffer(data, np.dtype(self.order + self.code))
        array: NDArray[Any] = flat.reshape(tuple(shape), order="F" if fortran else "C")
        return array.astype(array.dtype.newbyteorder("="), order="C")


class _NumpyArray(metaclass=_ImmutableClass):
    """Stand-in for numpy.ndarray and `_reconstruct`, which makes an empty one; `to_plain` converts it to a tensor."""

    array: NDArray[Any] | None

    def __init__(self, *_: Any) -> None:
        self.array = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, data = state
        if not isinstance(dtype, _NumpyDtype):
            raise pickle.UnpicklingError(f"arrays must hold plain numbers, got dtype {_excerpt(dtype)}")
        self.array = dtype.array(data, shape, fortran=bool(fortran))


class _FromBuffer(metaclass=_ImmutableClass):
    """Stand-in for numpy's `_frombuffer`: an array from bytes (protocol 5)."""

    def __new__(cls, data: Any, dtype: Any, shape: Any, order: Any) -> Any:
        array = _NumpyArray()
        array.__setstate__((1, shape, dtype, order == "F", data))
        return array


class _Scalar(metaclass=_ImmutableClass):
    """Stand-in for numpy's `scalar`: a single number."""

    def __new__(cls, dtype: Any, data: Any) -> Any:
        if not isinstance(dtype, _NumpyDtype):
            raise pickle.UnpicklingError(f"a NumPy scalar must be a plain number, got dtype {_excerpt(dtype)}")
        return dtype.array(data, (), fortran=False).item()


class _CodecsEncode(metaclass=_ImmutableClass):
    """Stand-in for `_codecs.encode`: old protocols store bytes as text."""

    def __new__(cls, text: Any, encoding: Any = "latin1") -> Any:
        if encoding != "latin1" or not isinstance(text, str):
            raise pickle.UnpicklingError(f"bytes must be stored as latin1 text, got {_excerpt(encoding)}")
        _charge(len(text))
        return text.encode("latin1")


class _EmptyBytes(metaclass=_ImmutableClass):
    """Stand-in for `bytes`, which old protocols call for empty bytes only."""

    def __new__(cls, *args: Any) -> Any:
        if args:
            raise pickle.UnpicklingError("bytes() must be called without arguments")
        return b""


ALLOWED_GLOBALS: dict[str, type] = {
    **{
        f"{core}.{name}": stand_in
        for core in ("numpy.core", "numpy._core")
        for name, stand_in in (
            ("multiarray._reconstruct", _NumpyArray),
            ("multiarray.scalar", _Scalar),
            ("numeric._frombuffer", _FromBuffer),
        )
    },
    "numpy.ndarray": _NumpyArray,
    "numpy.dtype": _NumpyDtype,
    "_codecs.encode": _CodecsEncode,
    "builtins.getattr": InertObject,  # by which pickles refer to methods
    "builtins.set": set,
    "builtins.bytes": _EmptyBytes,
    "argparse.Namespace": InertObject,  # torchvision's reference scripts
    "mmengine.logging.history_buffer.HistoryBuffer": InertObject,
    "mmengine.config.config.ConfigDict": InertObject,
    "pathlib.PosixPath": InertObject,
    "pathlib.WindowsPath": InertObject,
}
"""Full name -> stand-in: what a pickle may reference in addition to what torch itself allows."""


class _RestrictedUnpickler(pickle.Unpickler):
    """Resolves `ALLOWED_GLOBALS` and OrderedDict, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
        full_name = f"{module}.{name}"
        if full_name == "collections.OrderedDict":
            return OrderedDict
        if full_name not in ALLOWED_GLOBALS:
            raise pickle.UnpicklingError(f"it references {full_name}, which is not on the list of allowed names")
        return ALLOWED_GLOBALS[full_name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise pickle.UnpicklingError(f"it references data outside the file, {_excerpt(pid)}")


def _excerpt(value: Any) -> str:
    """Text for an error message; the repr of small nested containers can be of unbounded length."""
    return f"{value!r:.40}" if isinstance(value, str) else type(value).__name__


def _charge(num_bytes: int) -> None:
    copy_budget.set(copy_budget.get() - num_bytes)
    if copy_budget.get() < 0:
        raise pickle.UnpicklingError("it expands its data beyond the allowed size")


def _check_operations(file: BinaryIO) -> None:
    """Reject a pickle of a few bytes that requests unbounded memory through the index of a memo entry."""
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        memo_index = argument if "PUT" in operation.name and isinstance(argument, int) else 0
        if max(count, memo_index) > MAX_PICKLE_OPERATIONS:
            raise pickle.UnpicklingError(f"it has more than {MAX_PICKLE_OPERATIONS:,} operations or memo entries")
