"""Read weight files from untrusted sources: .pt, .pth, .pkl, .npz, .safetensors. Nothing in a file is ever run.

safetensors and NumPy's own reader (without pickles) can only return arrays. Pickles could call any function, so they go
through one of two restricted readers, which reject a name outside a fixed list before resolving it: torch's own
(`weights_only`) for files that torch wrote, and `detector.weights.safe_pickle` for bare pickles (detectron2's model
zoo).
"""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from detector.errors import WeightsError
from detector.weights.safe_pickle import ALLOWED_GLOBALS, copy_budget, load_pickle, to_plain

SUFFIXES = (".pt", ".pth", ".pkl", ".npz", ".safetensors")

READ_ERRORS = (
    OSError, ValueError, TypeError, LookupError, AttributeError, RuntimeError, EOFError, AssertionError,
    ArithmeticError, MemoryError, struct.error, zlib.error, zipfile.BadZipFile, safetensors.SafetensorError,
)  # fmt: skip
"""What torch, numpy, zipfile and safetensors were seen to raise on truncated files and on random changes of bytes."""

MAX_UNPACKED_BYTES = 2**30
"""Size to which any archive may unpack; a larger one may unpack to `MAX_COMPRESSION_RATIO` times its own size."""
MAX_COMPRESSION_RATIO = 50
MAX_COPY_RATIO = 6
"""Bytes that reading a pickle may copy, in multiples of the file size (plus `COPY_ALLOWANCE`)."""
COPY_ALLOWANCE = 2**20


def read_content(path: Path, *, mmap: bool = False) -> Any:
    """Read a weight file as tensors, plain containers and `InertObject` records.

    Args:
        path: the file, with one of `SUFFIXES`.
        mmap: leave tensors on disk until they are used, where the format allows it.

    Raises:
        WeightsError: the file is missing, damaged, or could run code.
    """
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"weights file must end in {', '.join(SUFFIXES)}, got {path}")
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist")
    copy_budget.set(MAX_COPY_RATIO * path.stat().st_size + COPY_ALLOWANCE)
    try:
        _reject_zip_bomb(path)
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            return load_pickle(path)
        allowed: Any = [(stand_in, name) for name, stand_in in ALLOWED_GLOBALS.items()]
        with torch.serialization.safe_globals(allowed):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipfile.is_zipfile(path))
        return to_plain(content)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"weights file {path} was rejected: it is damaged, or contains more than tensors and could run code "
            f"({error_summary(error)}); save a state_dict instead"
        ) from None
    except RecursionError:
        raise WeightsError(f"weights file {path} was rejected: its content is nested too deeply or in itself") from None
    except WeightsError:
        raise
    except READ_ERRORS as error:
        raise WeightsError(f"weights file {path} cannot be read, it may be damaged: {error_summary(error)}") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the named tensors of a weight file; see `read_content` and `tensors_in`."""
    return tensors_in(read_content(path), path)


def tensors_in(content: Any, path: Path) -> dict[str, Tensor]:
    """Return the state dict in a file's content, validated; see `state_dict_in`.

    Raises:
        WeightsError: the content holds anything but named, dense CPU tensors.
    """
    tensors = state_dict_in(content)
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        other = next((f", {k} being {type(v).__name__}" for k, v in tensors.items() if not isinstance(v, Tensor)), "")
        raise WeightsError(
            f"weights file {path} must hold a mapping from names to tensors, got {type(content).__name__}{other}"
        )
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.device.type != "cpu":
            raise WeightsError(
                f"weights file {path}: {name} must be a dense CPU tensor, got {tensor.layout} on {tensor.device}"
            )
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                f"weights file {path}: {name} must store all its elements, got {tensor.numel():,} elements in "
                f"{tensor.untyped_storage().nbytes():,} bytes"
            )
    return tensors


def state_dict_in(content: Any) -> dict[str, Any]:
    """Return the named entries of a file's content: the innermost mapping under "state_dict", "model" or "params", with
    DDP's "module." prefix removed. Content without a mapping has none."""
    for key in ("state_dict", "model", "params"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return {str(k).removeprefix("module."): v for k, v in content.items()} if isinstance(content, dict) else {}


def error_summary(error: BaseException) -> str:
    """Return the informative line of an error; torch's long messages are mostly advice to load the file regardless."""
    lines = [line.strip() for line in str(error).splitlines()]
    informative = [line for line in lines if line and "weights_only" not in line and "Weights only load" not in line]
    if not informative:
        return type(error).__name__
    summary = informative[0].removeprefix("WeightsUnpickler error: ")
    for advice in (" Please use", ". This is an internal miniz error"):
        summary = summary.partition(advice)[0]
    return summary


def _reject_zip_bomb(path: Path) -> None:
    with path.open("rb") as file:
        starts_as_zip = file.read(4) == b"PK\x03\x04"  # torch's criterion
        file.seek(max(0, path.stat().st_size - 22))
        ends_as_zip = file.read(4) == b"PK\x05\x06"
    if not starts_as_zip and not zipfile.is_zipfile(path):
        return
    # A comment after the directory can hide a second directory, and readers differ in which of the two they find.
    if not ends_as_zip:
        raise zipfile.BadZipFile("the archive does not end with its directory")
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    size = path.stat().st_size
    if unpacked > max(MAX_UNPACKED_BYTES, MAX_COMPRESSION_RATIO * size):
        raise WeightsError(
            f"weights file {path} was rejected: its {size:,} bytes would unpack to {unpacked:,}, "
            "which is typical of a zip bomb"
        )
