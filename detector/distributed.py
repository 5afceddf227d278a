"""Processes that train together: rank, device, sums. With a single process, all of it has no effect."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from detector.config import Device
from detector.errors import ConfigError, Interrupted, RankError, ReportedElsewhere, UserError
from detector.heartbeat import Heartbeat, of_this_start, wait_for_host
from detector.text import shortened

T = TypeVar("T")

MARGIN = timedelta(seconds=10)
MIN_JOINING_SECONDS = 30.0
"""Processes may start this far apart, whatever their timeout is."""

_heartbeat: Heartbeat | None = None
_cpu_group: dist.ProcessGroup | None = None
"""The group of our own exchanges of CPU tensors. (Gradients are exchanged by the default group.)"""


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
def process_group(wanted: Device, *, timeout: float = 600.0) -> Iterator[torch.device]:
    """Join the other processes if torchrun started several; yields this process's device.

    An error inside the block is raised on all processes, and named by one of them: the first that has an error of its
    own, or else the first that notices that another one died, hangs or is too slow.

    Args:
        wanted: `train.device`.
        timeout: seconds that processes wait for each other.

    Raises:
        RankError: another process died, hangs or is too slow.
        ReportedElsewhere: another process reports the error.
    """
    device = pick_device(wanted)
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    _join(device, timeout)
    assert _heartbeat is not None
    try:
        yield device
    except Exception as error:  # noqa: BLE001 - it is raised again
        _raise_once(error, _heartbeat, timeout)
    else:
        dist.destroy_process_group()
    finally:
        _leave(device)


def _join(device: torch.device, timeout: float) -> None:
    """Join the process group, and start the heartbeat."""
    global _heartbeat, _cpu_group
    seconds = timedelta(seconds=timeout)
    try:
        joining = max(seconds + MARGIN, timedelta(seconds=MIN_JOINING_SECONDS))
        wait_for_host(joining.total_seconds())
        # gloo in addition to nccl: sums of CPU tensors do not have to wait for the GPU. A timeout of nccl kills the
        # process, so that of our own exchanges, which is an error, comes first.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, own_rank, processes = next(rendezvous("env://", timeout=joining))
        store = of_this_start(store)
        dist.init_process_group(backend, store=store, rank=own_rank, world_size=processes, timeout=joining)
        group = dist.new_group(backend="gloo", timeout=seconds)
    except (RuntimeError, ValueError, OSError) as error:
        raise RankError(
            f"the {os.environ['WORLD_SIZE']} processes of the run did not find each other "
            f"({shortened(str(error).partition(chr(10))[0], 300)}); check that all of them were started, and "
            "MASTER_ADDR and MASTER_PORT"
        ) from error
    assert isinstance(group, dist.ProcessGroup), "every process is a member"
    _heartbeat, _cpu_group = Heartbeat(rank(), world_size()), group


def _leave(device: torch.device) -> None:
    """Leave the process group, if an error has not left it yet; end the heartbeat."""
    global _heartbeat, _cpu_group
    assert _heartbeat is not None
    _heartbeat.stop()
    _heartbeat, _cpu_group = None, None
    # Destroying nccl's group would wait for the process that is lost; the end of this one is enough.
    if dist.is_initialized() and device.type != "cuda":
        dist.destroy_process_group()


def _raise_once(error: Exception, heartbeat: Heartbeat, timeout: float) -> NoReturn:
    """Raise the error of this process, or `ReportedElsewhere` if another one reports it, or the cause."""
    lost = not isinstance(error, UserError) and _is_lost_connection(error)
    with _without_sigterm():
        reported = heartbeat.is_reported()
        culprit = heartbeat.culprit(timeout) if lost and not reported else ""
        reports = not reported and not isinstance(error, Interrupted) and heartbeat.first_to_report()
        heartbeat.leave(reports=reports)
    if not reports and (lost or isinstance(error, UserError)):
        raise ReportedElsewhere("another process of the run reports an error") from error
    if not lost:
        raise error
    named = RankError(culprit)
    for line in getattr(error, "__notes__", ()):
        named.add_note(line)
    raise named from error


@contextmanager
def _without_sigterm() -> Iterator[None]:
    """Ignore SIGTERM, which torchrun sends to all processes as soon as one has died: there is an error to report."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_lost_connection(error: Exception) -> bool:
    """Whether an exchange with other processes failed: gloo raises plain RuntimeErrors."""
    text = str(error)
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and ("gloo" in text or "NCCL" in text))


def note(doing: str) -> None:
    """Note what this process is doing, for the message of the others if it no longer answers."""
    if _heartbeat is not None:
        _heartbeat.note(doing)


def _waiting() -> AbstractContextManager[None]:
    return _heartbeat.waiting() if _heartbeat is not None else nullcontext()


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum a tensor over all processes, in place; returns it."""
    if dist.is_initialized():
        with _waiting():
            dist.all_reduce(values, group=_cpu_group if values.device.type == "cpu" else None)
    return values


def gather(value: T) -> list[T]:
    """Collect the values of all processes, on every process, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[T | None] = [None] * world_size()
    with _waiting():
        dist.all_gather_object(values, value, group=_cpu_group)
    return values  # type: ignore[return-value]


def sync_buffers(module: nn.Module) -> None:
    """Copy process 0's buffers to all processes: running statistics differ between processes."""
    if dist.is_initialized():
        with _waiting():
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)


def barrier() -> None:
    """Wait until all processes are here."""
    if dist.is_initialized():
        with _waiting():
            dist.barrier(group=_cpu_group)
