"""What the names in a pickle stand for: functions that make plain containers, arrays and tensors.

See `detector.weights.safe_pickle`.
"""

from __future__ import annotations

import math
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class InertObject:
    """Stand-in for an object of a class in `INERT`. It has no behaviour and no data."""

    __slots__ = ()


class Name(NamedTuple):
    """A name that a pickle may use."""

    text: str


class Storage(NamedTuple):
    """A reference to the numbers of one or more tensors, which lie outside the pickle."""

    key: str
    dtype: torch.dtype
    numel: int


class StoredTensor(NamedTuple):
    """A tensor to be made from a storage."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class Budget:
    """Bytes that may still be copied: data stored once can be decoded a million times.

    Args:
        num_bytes: for everything that is read from one file.
    """

    def __init__(self, num_bytes: int) -> None:
        self.left = num_bytes

    def charge(self, num_bytes: int) -> None:
        """Count a copy. Raises UnpicklingError where the budget is exceeded."""
        self.left -= num_bytes
        if self.left < 0:
            raise UnpicklingError("it expands its data beyond the allowed size")


DTYPES = {
    "Float": torch.float32, "Double": torch.float64, "Half": torch.float16, "BFloat16": torch.bfloat16,
    "Long": torch.int64, "Int": torch.int32, "Short": torch.int16, "Char": torch.int8, "Byte": torch.uint8,
    "Bool": torch.bool, "ComplexFloat": torch.complex64, "ComplexDouble": torch.complex128,
}  # fmt: skip
"""Name of a storage in torch -> type of its numbers."""
_DTYPE_NAMES = {f"torch.{str(dtype).removeprefix('torch.')}": dtype for dtype in DTYPES.values()}
STORAGE_NAMES = {
    **{f"torch.{name}Storage": dtype for name, dtype in DTYPES.items()},
    "torch.storage.UntypedStorage": torch.uint8,
    "torch.UntypedStorage": torch.uint8,
}
_TENSOR_TYPES = ("torch.Tensor", "torch.nn.parameter.Parameter")

INERT = {
    "builtins.getattr",  # by which pickles refer to methods
    "torch.device",
    "argparse.Namespace",  # torchvision's reference scripts
    "mmengine.logging.history_buffer.HistoryBuffer",
    "mmengine.config.config.ConfigDict",
    "pathlib.PosixPath",
    "pathlib.WindowsPath",
}
"""Names whose objects are kept as `InertObject`."""


class NumpyDtype:
    """numpy.dtype of plain numbers."""

    def __init__(self, code: str) -> None:
        self.code, self.order = code, "<"


class EmptyArray:
    """numpy.ndarray, which pickles make empty first; `to_plain` converts it to a tensor."""

    def __init__(self) -> None:
        self.array: NDArray[Any] | None = None


def _dtype(args: tuple[Any, ...], _: Budget) -> NumpyDtype:
    code = args[0] if args else None
    if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([iu][1248]|f[248]|b1)", code):
        raise UnpicklingError(f"arrays must hold plain numbers, got dtype {excerpt(code)}")
    return NumpyDtype(code.lstrip("<>|="))


def numpy_array(dtype: Any, data: Any, shape: Any, budget: Budget, *, fortran: bool = False) -> NDArray[Any]:
    """Make an array from bytes. Raises UnpicklingError if its parts are of wrong types or do not fit together."""
    if not isinstance(dtype, NumpyDtype):
        raise UnpicklingError(f"arrays must hold plain numbers, got dtype {excerpt(dtype)}")
    if isinstance(data, str):  # Python 2 pickles store bytes as text
        data = data.encode("latin1")
    if not isinstance(data, bytes | bytearray) or not is_shape(shape):
        raise UnpicklingError(f"an array must have a shape and bytes, got {excerpt(shape)} and {excerpt(data)}")
    kind = np.dtype(dtype.order + dtype.code)
    if math.prod(shape) * kind.itemsize != len(data):
        raise UnpicklingError(f"an array must store all its elements, got {len(data):,} bytes")
    budget.charge(len(data))
    array: NDArray[Any] = np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")
    return array.astype(kind.newbyteorder("="), order="C")


def is_whole(values: object) -> bool:
    """Whether a value is a tuple of at most 32 integers from 0 to 2^62."""
    whole = values if isinstance(values, tuple) and len(values) <= 32 else (-1,)
    return all(type(value) is int and 0 <= value < 2**62 for value in whole)


def is_shape(value: object) -> bool:
    """Whether a value is a tuple of at most 32 sizes whose product is below 2^62."""
    return isinstance(value, tuple) and is_whole(value) and math.prod(value) < 2**62


def _array_from_buffer(args: tuple[Any, ...], budget: Budget) -> EmptyArray:
    data, dtype, shape, order = args
    array = EmptyArray()
    array.array = numpy_array(dtype, data, shape, budget, fortran=isinstance(order, str) and order == "F")
    return array


def _scalar(args: tuple[Any, ...], budget: Budget) -> Any:
    dtype, data = args
    return numpy_array(dtype, data, (), budget).item()


def _encoded(args: tuple[Any, ...], budget: Budget) -> bytes:
    """`_codecs.encode`: old protocols store bytes as text."""
    text, encoding = args if len(args) == 2 else (None, None)
    if not isinstance(text, str) or not isinstance(encoding, str) or encoding != "latin1":
        raise UnpicklingError(f"bytes must be stored as latin1 text, got {excerpt(encoding)}")
    budget.charge(len(text))
    return text.encode("latin1")


def _bytes(args: tuple[Any, ...], _: Budget) -> bytes:
    """`bytes` and `bytearray`, which old protocols call with nothing or with bytes."""
    data = args[0] if args else b""
    if len(args) > 1 or not isinstance(data, bytes | bytearray):
        raise UnpicklingError("bytes() must be called without arguments or with bytes")
    return bytes(data) if isinstance(data, bytearray) else data


def _set(args: tuple[Any, ...], budget: Budget) -> set[Any]:
    items = args[0] if args else []
    if not isinstance(items, list | tuple | set):
        raise UnpicklingError(f"a set must be made from a list, got {excerpt(items)}")
    budget.charge(64 * len(items))
    return set(map(checked_key, items))


def _ordered_dict(args: tuple[Any, ...], budget: Budget) -> OrderedDict[Any, Any]:
    items = args[0] if args else []
    if not isinstance(items, list) or not all(isinstance(item, list | tuple) and len(item) == 2 for item in items):
        raise UnpicklingError(f"an OrderedDict must be made from a list of pairs, got {excerpt(items)}")
    budget.charge(128 * len(items))
    return OrderedDict((checked_key(key), value) for key, value in items)


def _counter(args: tuple[Any, ...], _: Budget) -> dict[Any, Any]:
    return args[0] if args and isinstance(args[0], dict) else {}


def _size(args: tuple[Any, ...], _: Budget) -> tuple[int, ...]:
    if len(args) != 1 or not is_shape(args[0]):
        raise UnpicklingError("torch.Size must be made from a tuple of sizes")
    size: tuple[int, ...] = args[0]
    return size


def _tensor(args: tuple[Any, ...], _: Budget, dtype: Any = None) -> StoredTensor:
    storage, offset, size, stride = args[:4]
    if not isinstance(storage, Storage) or type(offset) is not int or not is_shape(size) or not is_whole(stride):
        raise UnpicklingError("a tensor must be made from a storage, an offset, sizes and strides")
    return StoredTensor(storage, dtype or storage.dtype, offset, size, stride)


def _tensor_of_type(args: tuple[Any, ...], budget: Budget) -> StoredTensor:
    """`_rebuild_tensor_v3`: the type is an argument, and the storage has none."""
    dtype = _DTYPE_NAMES.get(args[6].text) if isinstance(args[6], Name) else None
    if dtype is None:
        raise UnpicklingError(f"tensors must hold plain numbers, got dtype {excerpt(args[6])}")
    return _tensor(args, budget, dtype)


def _parameter(args: tuple[Any, ...], _: Budget) -> StoredTensor:
    if not isinstance(args[0], StoredTensor):
        raise UnpicklingError(f"a parameter must be made from a tensor, got {excerpt(args[0])}")
    return args[0]


def _tensor_with_attributes(args: tuple[Any, ...], budget: Budget) -> StoredTensor:
    """`_rebuild_from_type_v2(function, type, arguments, attributes)`."""
    function, kind, arguments, _ = args
    known = isinstance(function, Name) and FUNCTIONS.get(function.text) in (_tensor, _parameter)
    if not known or not isinstance(kind, Name) or kind.text not in _TENSOR_TYPES or not isinstance(arguments, tuple):
        raise UnpicklingError("a tensor with attributes must be a plain tensor or parameter")
    stored: StoredTensor = FUNCTIONS[function.text](arguments, budget)
    return stored


FUNCTIONS: dict[str, Callable[[tuple[Any, ...], Budget], Any]] = {
    **{
        f"{core}.{name}": function
        for core in ("numpy.core", "numpy._core")
        for name, function in (
            ("multiarray._reconstruct", lambda *_: EmptyArray()),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _array_from_buffer),
        )
    },
    "numpy.ndarray": lambda *_: EmptyArray(),
    "numpy.dtype": _dtype,
    "_codecs.encode": _encoded,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.bytes": _bytes,
    "builtins.bytearray": _bytes,
    "collections.OrderedDict": _ordered_dict,
    "collections.Counter": _counter,
    "torch.Size": _size,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_type,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_with_attributes,
    **dict.fromkeys(INERT, lambda *_: InertObject()),
}
"""Full name -> what takes its place."""
ALLOWED_NAMES = {*FUNCTIONS, *_DTYPE_NAMES, *STORAGE_NAMES, *_TENSOR_TYPES}


def checked_key(value: Any) -> Any:
    """Check a key of a dict or an item of a set: hashing nested tuples, or integers made to collide, takes too long."""
    parts: Iterable[Any] = value if type(value) is tuple and len(value) <= 8 else (value,)
    for part in parts:
        is_integer = type(part) is int and -(2**63) <= part < 2**63
        if not is_integer and not isinstance(part, str | bytes | float | bool | None | Name):
            raise UnpicklingError(f"keys must be text or numbers of 64 bits, got {excerpt(value)}")
    return value


def excerpt(value: Any) -> str:
    """Text for an error message; the repr of small nested containers can be of unbounded length."""
    return repr(value[:40]) if isinstance(value, str) else type(value).__name__


def tensor_of(array: NDArray[Any]) -> Tensor:
    """Convert an array of plain numbers; wide unsigned integers, which torch hardly supports, become int64."""
    wide_unsigned = array.dtype.kind == "u" and array.dtype.itemsize > 1
    return torch.from_numpy(array.astype(np.int64) if wide_unsigned else array)
