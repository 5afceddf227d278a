"""What runs in a loader worker: its start, its note of what it reads, and how it sends a batch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from detector.datasets.shared_memory import SharedArray
from detector.structures import Batch, Targets, Unresized

IDLE = -1
"""The index of no image."""


class WorkerNote:
    """What one worker is reading, as the other processes see it.

    Args:
        row: of `worker_notes`.
    """

    def __init__(self, row: NDArray[np.int64]) -> None:
        self._row = row

    def write(self, index: int) -> None:
        """Note the index of the image that is read from now on, or `IDLE`."""
        self._row[0] = index
        self._row[1] += 1


def worker_notes(num_workers: int) -> SharedArray[np.int64]:
    """Create the notes of all workers: the index of the image, the number of changes, and the process id of each."""
    notes = SharedArray((num_workers, 3), np.int64)
    notes.array[:, 0] = IDLE
    return notes


def start_worker(worker: int, notes: SharedArray[np.int64]) -> None:
    """Prepare a worker: use one thread, and ignore signals, because the main process handles them.

    It needs the last batches to end well. It stops its workers, and they end by themselves when it was killed.

    Args:
        worker: number of the worker, from 0.
        notes: of all workers.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True, name="end with parent").start()
    notes.array[worker, 2] = os.getpid()
    dataset: Any = torch.utils.data.get_worker_info().dataset  # type: ignore[union-attr]
    dataset.note = WorkerNote(notes.array[worker])


def _end_with_parent() -> None:
    """End this process as soon as the one that reads its batches has ended, however that happens.

    torch's workers watch the process that forked them. That may be a fork server, which lives as long as they do.
    """
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def new_zeros(shape: Sequence[int]) -> NDArray[np.uint8]:
    """Return an array of zeros in ordinary memory."""
    return np.zeros(shape, np.uint8)


def send(samples: Sequence[Any], collate: Callable[[Sequence[Any], Callable[..., NDArray[np.uint8]]], Batch]) -> Any:
    """Collate samples in a worker, into what the main process receives as a `Batch`."""
    if sys.platform != "linux":  # where memory for files is no better than that of torch's tensors
        return collate(samples, new_zeros)
    memory: list[SharedArray[np.uint8]] = []

    def shared_zeros(shape: Sequence[int]) -> NDArray[np.uint8]:
        memory.append(SharedArray(shape, np.uint8))
        return memory[0].array

    batch = collate(samples, shared_zeros)
    return _SentBatch(batch, memory[0])


class _SentBatch:
    """A batch on its way from a worker, which the main process unpickles as a `Batch`.

    The images are in memory that both share. The rest is so small that it is sent through a pipe. Neither needs room in
    /dev/shm, as tensors of torch do.
    """

    def __init__(self, batch: Batch, images: SharedArray[np.uint8]) -> None:
        targets = tuple(None if value is None else value.numpy() for value in batch.targets)
        rest = tuple(t.numpy() for t in (batch.image_ids, batch.image_sizes, batch.original_sizes, batch.index))
        # Here and not on pickling, which happens on a thread that loses its errors, and the batch with them.
        self._arguments = images.handle(), targets, rest, batch.unresized

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[object, ...]]:
        return _received, self._arguments


def _received(handle: dict[str, Any], targets: Any, rest: Any, unresized: Unresized | None) -> Batch:
    images: SharedArray[np.uint8] = SharedArray.from_handle(handle)
    image_ids, image_sizes, original_sizes, index = map(torch.from_numpy, rest)
    return Batch(
        torch.from_numpy(images.array).permute(0, 3, 1, 2),
        Targets(*(None if value is None else torch.from_numpy(value) for value in targets)),  # type: ignore[arg-type]
        image_ids=image_ids,
        image_sizes=image_sizes,
        original_sizes=original_sizes,
        index=index,
        unresized=unresized,
    )
