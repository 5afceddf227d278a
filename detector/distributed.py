"""Processes that train together: rank, device, sums. With a single process, all of it has no effect."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from detector.config import Device
from detector.errors import ConfigError

T = TypeVar("T")


def rank() -> int:
    """This process's number; process 0 writes files and prints."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def pick_device(device: Device) -> torch.device:
    """Return the device of a setting on this machine, and configure cuDNN.

    Raises:
        ConfigError: the machine has no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device must be cpu or auto on this machine, got cuda: torch sees no CUDA device")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.benchmark = True  # a run has few input shapes
    torch.backends.cudnn.allow_tf32 = False  # precision "fp32" is fp32
    return torch.device("cuda")


@contextmanager
def process_group(wanted: Device) -> Iterator[torch.device]:
    """Join the other processes if torchrun started several; yields this process's device."""
    device = pick_device(wanted)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # gloo in addition to nccl: sums of CPU tensors do not have to wait for the GPU
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; returns it."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(value: T) -> list[T]:
    """Collect the values of all processes, on every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values  # type: ignore[return-value]


def sync_buffers(module: nn.Module) -> None:
    """Copy process 0's buffers to all processes: running statistics differ between processes."""
    if dist.is_initialized():
        for buffer in module.buffers():
            dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        dist.barrier()
