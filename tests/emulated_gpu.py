"""An emulated GPU: tensors in main memory that report a CUDA device.

The code that only a GPU runs can so be run anywhere, and its results compared. An operation on tensors of two devices
is an error, as on a GPU (and stricter: some take an index or a value from main memory there), and where the processor
would have to wait for the GPU is recorded. Not emulated: several streams,
generated code, the Triton kernel (tests/test_nms.py has it), speed, memory.
"""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from detector.inference.nms import has_triton
from detector.models import convolution, fpn, resnet

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")

WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "bincount",
}  # fmt: skip
"""What gives a number, or a shape that the values decide; so does an index of booleans."""

FROM_MEMORY = ("tensor", "as_tensor", "asarray", "new_tensor")
"""What copies numbers from main memory and waits for that."""

UNPLACED = {
    "copy_", "set_", "backward", "__get__", "__set__", "__deepcopy__", "_has_compatible_shallow_copy_type",
}  # fmt: skip
"""What may be given tensors of two devices."""


class OnGpu(Tensor):
    """A tensor that reports a CUDA device."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied: Any = _put(self.detach().clone()).requires_grad_(self.requires_grad)
            copied._is_param = isinstance(self, nn.Parameter)
            memo[id(self)] = copied
        found: Tensor = memo[id(self)]
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A file contains ordinary tensors."""
        with torch._C.DisableTorchFunction():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class TwoDevicesError(AssertionError):
    """An operation on tensors of two devices."""


class EmulatedGpu(TorchFunctionMode):
    """While it is active, "cuda" is a device.

    `waits`: for each time that a GPU would be waited for, the functions that led there, outermost first, and the
        operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[tuple[str, ...]] = []
        self.under_way = 0
        """Operations on the GPU, one within the other."""
        self.captured: Graph | None = None
        """Where operations are remembered at the moment."""

    @contextmanager
    def graph(self, graph: Graph, **_: Any) -> Iterator[None]:
        """In place of torch.cuda.graph."""
        self.captured = graph
        try:
            yield
        finally:
            self.captured = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name, of = getattr(func, "__name__", ""), getattr(func, "__self__", None)
        first = args[0] if args else None
        if name == "__get__" and of in (Tensor.device, Tensor.is_cuda, Tensor.is_cpu):
            on_gpu = isinstance(first, OnGpu)
            return (GPU if on_gpu else func(*args)) if of is Tensor.device else on_gpu == (of is Tensor.is_cuda)
        if name in ("to", "cpu", "cuda") and isinstance(first, Tensor):
            return self._moved(name, first, args[1:], kwargs)
        tensors = [] if name == "__deepcopy__" else [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        there = [isinstance(t, OnGpu) for t in tensors]
        if name == "copy_" and any(there) and not all(there) and not kwargs.get("non_blocking"):
            self.wait(name)
        if any(there) and name not in UNPLACED:
            least = 0 if name in ("cat", "stack") else 1  # others take numbers from main memory
            if any(t.dim() >= least for t, is_there in zip(tensors, there, strict=True) if not is_there):
                raise TwoDevicesError(f"{name} of tensors of two devices")
        if any(there) and name in ("tolist", "numpy", "__array__"):
            self.wait(name)
        device = kwargs.get("device")
        made_there = device is not None and torch.device(device).type == "cuda"
        if device is not None:
            kwargs["device"] = CPU
        if name in FROM_MEMORY and (made_there or isinstance(first, OnGpu)) and not any(there[name == "new_tensor" :]):
            self.wait(name)
        self.under_way += any(there)
        try:
            result = func(*args, **kwargs)
        finally:
            self.under_way -= any(there)
        return tree_map(_put, result) if made_there or any(there) else result

    def _moved(self, name: str, tensor: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """`Tensor.to`, `cuda` and `cpu`."""
        on_gpu = isinstance(tensor, OnGpu)
        device, dtype, non_blocking, memory_format, copy = GPU if name == "cuda" else CPU, None, False, None, False
        if name == "to":
            copy = kwargs.pop("copy", False)
            if args and isinstance(args[0], Tensor):
                args = (GPU if isinstance(args[0], OnGpu) else CPU, args[0].dtype, *args[1:])
            device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
        to_gpu = on_gpu if device is None else device.type == "cuda"
        moves = to_gpu != on_gpu
        if moves and not non_blocking:
            self.wait(name)
        layout: dict[str, Any] = {} if memory_format is None else {"memory_format": memory_format}
        with torch._C.DisableTorchFunction():
            result: Any = tensor.to(dtype=dtype or tensor.dtype, copy=moves or copy, **layout)
            if not to_gpu and on_gpu:
                result = result.as_subclass(Tensor)
        found: Tensor = _put(result) if to_gpu else result
        return found

    def wait(self, operation: str) -> None:
        """Record a wait for the GPU; while a graph is captured, waiting is an error."""
        if self.captured is not None:
            raise AssertionError(f"{operation} in a graph")
        functions = []
        frame = sys._getframe(1)
        while frame.f_back is not None:
            if "/detector/" in frame.f_code.co_filename:
                functions.append(frame.f_code.co_qualname)
            frame = frame.f_back
        self.waits.append((*reversed(functions), operation))


class _Parts(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees what an operation consists of."""

    def __init__(self, gpu: EmulatedGpu) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.gpu = gpu

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.split("::")[1]
        by_mask = name.startswith("index") and isinstance(args[1], list | tuple) and _waits_for_mask(*args)
        counted = name == "repeat_interleave" and not (kwargs or {}).get("output_size")
        if self.gpu.under_way and (name in WAITING or by_mask or counted):
            self.gpu.wait(name)
        result = func(*args, **(kwargs or {}))
        if self.gpu.captured is not None:
            self.gpu.captured.operations.append((func, args, kwargs or {}, result))
        return result


def _waits_for_mask(_: Tensor, indices: Any, value: Tensor | None = None, *__: Any) -> bool:
    """A single number is filled in without asking how many places there are."""
    masks = [i for i in indices if isinstance(i, Tensor) and i.dtype == torch.bool]
    return bool(masks) and (value is None or value.numel() > 1)


def _put(value: Any) -> Any:
    """On the GPU, if it is a tensor."""
    if not isinstance(value, Tensor) or isinstance(value, OnGpu):
        return value
    with torch._C.DisableTorchFunction():
        if value.is_leaf and value.requires_grad:
            return value.detach().as_subclass(OnGpu).requires_grad_()
        return value.as_subclass(OnGpu)


class Graph:
    """In place of torch.cuda.CUDAGraph: remembers operations, and does them again with the tensors they had."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, Any]] = []

    def replay(self) -> None:
        with torch._C.DisableTorchFunction():
            for func, args, kwargs, then in self.operations:
                now = func(*args, **kwargs)
                for old, new in zip(tree_leaves(then), tree_leaves(now), strict=True):
                    if isinstance(old, Tensor) and old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                        old.copy_(new)

    def pool(self) -> None:
        """None."""


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self) -> None:
        """Now."""
        self.at = time.perf_counter()

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        return (end.at - self.at) * 1e3


class Stream:
    """In place of torch.cuda.Stream, all work being in order here."""

    def wait_stream(self, other: Stream) -> None:
        """No need to."""


def _by_device(groups: Callable[..., Any]) -> Callable[..., Any]:
    """torch's grouping of tensors, which asks them in C++ where they are."""

    def grouped(tensors: Any, *rest: Any) -> Any:
        device = tensors[0][0].device
        return {(device, dtype): group for (_, dtype), group in groups(tensors, *rest).items()}

    return grouped


@contextmanager
def forgotten() -> Iterator[None]:
    """What was found out about a GPU, before and after; and settings of cuDNN as they were."""
    flags = torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32
    known = (convolution.has_fused_conv_relu, has_triton)
    try:
        for function in known:
            function.cache_clear()
        yield
    finally:
        for function in known:
            function.cache_clear()
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = flags


@contextmanager
def emulated_gpu() -> Iterator[EmulatedGpu]:
    """A GPU, with all that the package asks of one."""
    autocast, is_autocast_enabled = torch.autocast, torch.is_autocast_enabled
    loader = torch.utils.data.DataLoader
    with forgotten(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("detector.datasets.loader.DataLoader", lambda *a, **k: loader(*a, **{**k, "pin_memory": False}))
        answers: dict[str, Any] = {
            "current_stream": Stream(), "is_available": True, "is_bf16_supported": True,
            "is_current_stream_capturing": False, "device_count": 1,
            "get_device_name": "emulated", "get_device_capability": (0, 0), "mem_get_info": (1 << 34, 1 << 34),
            "max_memory_allocated": 0, "memory_allocated": 0,
            "memory_reserved": 0, "empty_cache": None, "synchronize": None, "reset_peak_memory_stats": None,
        }  # fmt: skip
        for name, answer in answers.items():
            patch.setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
        gpu = EmulatedGpu()
        for name, stand_in in {
            "Event": Event,
            "CUDAGraph": Graph,
            "graph": gpu.graph,
            "Stream": Stream,
            "stream": nullcontext,
        }.items():
            patch.setattr(torch.cuda, name, stand_in)
        for name in ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check"):  # new, old torch
            patch.setattr(torch.optim.Optimizer, name, lambda *_: None, raising=False)
        patch.setattr(torch, "autocast", lambda _device, **options: autocast("cpu", **options))
        patch.setattr(torch, "is_autocast_enabled", lambda _device: is_autocast_enabled("cpu"))
        for module in (resnet, fpn):  # it is a CPU that computes
            patch.setattr(module, "too_narrow_for_bf16", lambda x, *, stride=1: x.shape[-1] <= 2 * stride)
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        optimizers = importlib.import_module("torch.optim.optimizer")  # torch.optim hides it
        for module in (nn.utils.clip_grad, torch.utils._foreach_utils, optimizers):
            patch.setattr(
                module, "_group_tensors_by_device_and_dtype", _by_device(module._group_tensors_by_device_and_dtype)
            )
        with _Parts(gpu), gpu:
            yield gpu
