"""Several processes as one: who am I, and adding things up. With one process, all of it does nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detector.errors import ConfigError

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0 for the one that writes and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device a setting means on this machine.

    Raises:
        ConfigError: there is none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device must be cpu or auto on this machine, got cuda: torch sees no CUDA device")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True  # a run has few shapes of input
    torch.backends.cudnn.allow_tf32 = False  # "fp32" shall mean fp32
    return torch.device("cuda")


@contextmanager
def process_group(wanted: Literal["auto", "cpu", "cuda"]) -> Iterator[torch.device]:
    """Join the other processes if torchrun started several; gives the device of this one."""
    device = pick_device(wanted)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # gloo beside nccl, for what is on the CPU anyway: a GPU's queue need not run empty for it
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's tensor, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """Every process's value, on every process."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def same_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers: running statistics are each process's own."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()
