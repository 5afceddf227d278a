"""Read weight files from untrusted sources: .pt, .pth, .pkl, .npz, .safetensors. Nothing in a file is ever run.

safetensors can only return arrays. Zip files (.pt, .pth, .npz) are checked against their checksums. Pickles could call
any function, so they are interpreted by `detector.weights.safe_pickle`, which knows a fixed list of harmless names.
"""

from __future__ import annotations

import math
import os
import pickle
import struct
import tokenize
import zipfile
import zlib
from io import BufferedReader, BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from detector.errors import WeightsError
from detector.file_kinds import LONGEST, other_kind
from detector.files import open_regular, os_error_reason
from detector.text import printable
from detector.weights.pickle_names import DTYPES, Budget, tensor_of
from detector.weights.torch_file import read_pickles, read_zip
from detector.weights.zip_records import ZipRecords, is_zip

SUFFIXES = (".pt", ".pth", ".pkl", ".npz", ".safetensors")

READ_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, AssertionError,
    ArithmeticError, MemoryError, SyntaxError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile,
    safetensors.SafetensorError,
)  # fmt: skip
"""What torch, numpy, zipfile and safetensors were seen to raise on truncated files and on random changes of bytes."""

MAX_COPY_RATIO = 6
"""Bytes that reading a pickle may copy, in multiples of the file size (plus `COPY_ALLOWANCE`)."""
COPY_ALLOWANCE = 2**20
MAX_NAME_LENGTH = 500
"""Characters of a tensor's name."""
MAX_SHARING = 4
"""Bytes of all tensors together, in multiples of what is stored."""


def read_content(path: Path, *, mmap: bool = False) -> Any:
    """Read a weight file as tensors, plain containers and `InertObject` records.

    Every record of a zip file is compared with its checksum before anything in it is used. The other formats have none.

    Args:
        path: the file, with one of `SUFFIXES`.
        mmap: leave tensors on disk until they are used, where the format allows it.

    Raises:
        DamagedError: a checksum differs.
        WeightsError: the file is missing, damaged, or could run code.
    """
    shown_path = printable(str(path), 1000)
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights file must end in {', '.join(SUFFIXES)}, got {shown_path}")
    try:
        with open_regular(path) as file:
            kind = other_kind(file.read(LONGEST), expected=("zip archive",))
            if kind:
                raise WeightsError(f"weights file {shown_path} {kind}")
            return _read(file, path, map_file=mmap)
    except FileNotFoundError:
        raise WeightsError(f"weights file {shown_path} does not exist") from None
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights file {shown_path} was rejected: it is damaged, or contains more than tensors and could run code "
            f"({error_summary(error)}); save a state_dict instead"
        ) from None
    except RecursionError:
        text = f"weights file {shown_path} was rejected: its content is nested too deeply or in itself"
        raise WeightsError(text) from None
    except WeightsError:
        raise
    except READ_ERRORS as error:
        reason = os_error_reason(error) if isinstance(error, OSError) else error_summary(error)
        raise WeightsError(f"weights file {shown_path} cannot be read, it may be damaged: {reason}") from None


def _read(file: BufferedReader, path: Path, *, map_file: bool) -> Any:
    size = file.seek(0, 2)
    budget = Budget(MAX_COPY_RATIO * size + COPY_ALLOWANCE)
    if path.suffix == ".safetensors":
        return safetensors.torch.load_file(path)
    if is_zip(file):
        records = ZipRecords(file, f"weights file {printable(str(path), 1000)}")
        if path.suffix == ".npz":
            return {name.removesuffix(".npy"): _numpy_tensor(records.read(name)) for name in records.records}
        return read_zip(file, records, budget, map_file=map_file)
    if path.suffix == ".npz":
        raise zipfile.BadZipFile("it is no zip file")
    file.seek(0)
    return read_pickles(file, budget)


def _numpy_tensor(data: bytearray) -> Tensor:
    """Read a file of numpy.save, which must have as many bytes as its header declares."""
    file = BytesIO(data)
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError("arrays must hold plain numbers")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    start, count = file.seek(0, os.SEEK_CUR), math.prod(shape)
    if dtype.kind not in "biuf" or dtype.hasobject:
        raise ValueError(f"arrays must hold plain numbers, got dtype kind {dtype.kind}")
    if min(shape, default=0) < 0 or count * dtype.itemsize != len(data) - start:
        raise ValueError(f"an array must have {count * dtype.itemsize:,} bytes, got {len(data) - start:,}")
    numbers = np.frombuffer(data, dtype, count, start) if count else np.empty(0, dtype)
    array = numbers.reshape(shape, order="F" if fortran else "C")
    return tensor_of(array.astype(dtype.newbyteorder("="), order="C"))


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a weight file; see `read_content` and `tensors_in`."""
    return tensors_in(read_content(path), path)


def tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file's content, validated; see `state_dict_in`.

    Raises:
        WeightsError: the content holds anything but named, dense CPU tensors.
    """
    tensors, source = state_dict_in(content), f"weights file {printable(str(path), 1000)}"
    if not tensors or not all(map(_is_tensor, tensors.values())):
        odd = next((f"{printable(k)} being {type(v).__name__}" for k, v in tensors.items() if not _is_tensor(v)), "")
        got = type(content).__name__ + f", {odd}" * bool(odd)
        raise WeightsError(f"{source} must hold a mapping from names to tensors, got {got}")
    if len(tensors) < len(_innermost(content)):
        raise WeightsError(f"{source} must name each tensor once, got names that differ in the prefix module. only")
    stored: dict[int, int] = {}
    for name, tensor in tensors.items():
        where = f"{source}: {printable(name)}"
        if len(name) > MAX_NAME_LENGTH:
            raise WeightsError(f"{where} must have at most {MAX_NAME_LENGTH} characters")
        if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.dtype not in DTYPES.values():
            kind = f"{tensor.layout} {tensor.dtype} on {tensor.device}".replace("torch.", "")
            raise WeightsError(f"{where} must be a dense CPU tensor of plain numbers, got {kind}")
        stored[tensor.untyped_storage().data_ptr()] = storage_bytes = tensor.untyped_storage().nbytes()
        if tensor.numel() * tensor.element_size() > storage_bytes:
            raise WeightsError(
                f"{where} must store all its elements, got {tensor.numel():,} elements in {storage_bytes:,} bytes"
            )
    used = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if used > MAX_SHARING * sum(stored.values()) + COPY_ALLOWANCE:
        raise WeightsError(f"{source} must store every tensor, got {used:,} bytes in {sum(stored.values()):,}")
    return tensors


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _innermost(content: Any) -> dict[Any, Any]:
    for key in ("state_dict", "model", "params"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return content if isinstance(content, dict) else {}


def state_dict_in(content: Any) -> dict[str, Any]:
    """Return the named entries of a file's content: the innermost mapping under "state_dict", "model" or "params", with
    DDP's "module." prefix removed. Content without a mapping has none."""
    return {str(k).removeprefix("module."): v for k, v in _innermost(content).items()}


def error_summary(error: BaseException) -> str:
    """Return the informative line of an error; torch's long messages are mostly advice to load the file regardless."""
    lines = [printable(line.strip(), 500) for line in str(error).splitlines()]
    informative = [line for line in lines if line and "weights_only" not in line and "Weights only load" not in line]
    if not informative or isinstance(error, LookupError):  # whose text is only the key
        return type(error).__name__ + "".join(f" {line}" for line in informative[:1])
    summary = informative[0].removeprefix("WeightsUnpickler error: ")
    for advice in (" Please use", ". This is an internal miniz error"):
        summary = summary.partition(advice)[0]
    return summary
