"""Loader workers: processes that read ahead. When one dies or hangs, there is one error that names it and its image."""

from __future__ import annotations

import atexit
import multiprocessing
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from detector.datasets.shared_memory import SharedArray
from detector.errors import WorkerError
from detector.memory import kills_for_memory
from detector.structures import Batch
from detector.text import printable

CHECK_SECONDS = 5.0
"""How long the main process waits for a batch before it checks its workers."""

_MEMORY_REMEDY = "use fewer workers (data.num_workers={fewer}; 0 reads in the training process) or less data.cache_gb"
_CAUSES = {
    signal.SIGKILL: "most likely the machine or its container ran out of memory; " + _MEMORY_REMEDY,
    signal.SIGBUS: "most likely memory, or the disk of data.cache_folder, ran full; " + _MEMORY_REMEDY,
    signal.SIGSEGV: "most likely a damaged image made its decoder crash; check that image, and remove or replace it",
    signal.SIGABRT: "most likely a damaged image made its decoder crash; check that image, and remove or replace it",
}
_RESOURCES = (
    ("shared memory", "memory or /dev/shm is full; set data.num_workers=0, or give a container more of it with "
    "`docker run --shm-size=2g`"),
    ("Too many open files", "raise the limit of open files with `ulimit -n 4096`, or set data.num_workers=0"),
    ("ancdata", "raise the limit of open files with `ulimit -n 4096`, or set data.num_workers=0"),
    ("Cannot allocate memory", "use fewer workers (data.num_workers)"),
    ("No space left on device", "/dev/shm is full; set data.num_workers=0, or give a container more of it with `docker "
    "run --shm-size=2g`"),
    ("Resource temporarily unavailable", "the limit of processes is reached; set data.num_workers=0"),
    ("MemoryError", "memory is full; use fewer workers (data.num_workers) or less data.cache_gb"),
)  # fmt: skip
"""Parts of messages of torch and the operating system, with the remedy."""


class WorkerLoader(Iterable[Batch]):
    """A loader with workers, which `WorkerPool` watches; arguments as there."""

    def __init__(
        self,
        loader: DataLoader[Batch],
        notes: SharedArray[np.int64],
        *,
        describe: Callable[[int], str],
        timeout: float,
    ) -> None:
        self._arguments = loader, notes, describe, timeout

    def __iter__(self) -> Iterator[Batch]:
        loader, notes, describe, timeout = self._arguments
        atexit.unregister(end_workers)
        atexit.register(end_workers)
        return WorkerPool(loader, notes, describe=describe, timeout=timeout)


class WorkerPool(Iterator[Batch]):
    """Iterates over the batches of a loader with workers.

    Args:
        loader: with a timeout of `CHECK_SECONDS`.
        notes: that its workers write.
        describe: returns the name of the image at an index.
        timeout: seconds that reading one image may take.

    Raises:
        WorkerError: a worker cannot be started, died or hangs.
    """

    def __init__(
        self,
        loader: DataLoader[Batch],
        notes: SharedArray[np.int64],
        *,
        describe: Callable[[int], str],
        timeout: float,
    ) -> None:
        self._watch = _Watch(notes.array, describe, timeout)
        before, handler = set(multiprocessing.active_children()), signal.getsignal(signal.SIGCHLD)
        try:
            _require_semaphores(8 + 3 * loader.num_workers)
            self._batches = iter(loader)
        except OSError as error:
            remedy = _remedy(str(error)) or "set data.num_workers=0"
            raise WorkerError(f"loader workers cannot be started: {error}; {remedy}") from error
        finally:
            self._watch.processes = [p for p in multiprocessing.active_children() if p not in before]
        _check_instead_of_raising_anywhere(handler)
        self._watch.start()

    def __next__(self) -> Batch:
        watch = self._watch
        with _Waiting(watch):
            try:
                return self._next()
            except StopIteration:
                watch.stopped.set()
                raise
            except WorkerError:
                watch.has_failed = True
                watch.kill()
                raise

    def _next(self) -> Batch:
        while True:
            self._watch.check()
            try:
                batch: Batch = next(self._batches)
                return batch
            except WorkerError:
                raise
            except (RuntimeError, OSError, EOFError, MemoryError) as error:
                self._watch.check(waits=True)
                if "DataLoader timed out" in str(error):
                    continue
                text = str(error).rstrip().splitlines()[-1] if str(error) else type(error).__name__
                remedy = _remedy(text)
                if remedy is None:
                    raise
                raise WorkerError(f"a loader worker failed: {printable(text)}; {remedy}") from error

    def __del__(self) -> None:
        self._watch.stopped.set()


def _require_semaphores(count: int) -> None:
    """Check that as many semaphores as the queues of workers need fit into /dev/shm, because torch's loader, if it
    fails halfway, prints a traceback when it is deleted. Raises OSError."""
    [multiprocessing.Semaphore() for _ in range(count)]


class _Watch:
    """Watches the workers of a pool, on a thread of its own: the main thread may be blocked by a worker that hangs.

    Args:
        notes: (N, 3) of the workers.
        describe, timeout: as in `WorkerPool`.
    """

    def __init__(self, notes: NDArray[np.int64], describe: Callable[[int], str], timeout: float) -> None:
        self.notes, self.describe, self.timeout = notes, describe, timeout
        self.processes: list[BaseProcess] = []
        self.is_awaited = False
        """Whether the main thread waits for a batch."""
        self.waiting_thread: int | None = None
        self.has_failed = False
        """Whether the main thread has an error already."""
        self.stopped = threading.Event()
        self.kills_before = kills_for_memory()
        self._verdict: str | None = None

    def start(self) -> None:
        """Start the thread, which ends when `stopped` is set."""
        threading.Thread(target=self._run, daemon=True, name="loader workers").start()

    def check(self, *, waits: bool = False) -> None:
        """Raise an error if a worker died or hangs.

        Args:
            waits: whether a worker may be about to die, because its connection is closed.

        Raises:
            WorkerError: it names the worker and its image.
        """
        if self._verdict is not None:
            raise WorkerError(self._verdict)
        for process in self.processes:
            if waits:
                process.join(0.1)
            if process.exitcode not in (None, 0):
                raise WorkerError(self._death(process))

    def kill(self) -> None:
        """Kill all workers: they ignore other signals, and nobody needs them any more."""
        self.stopped.set()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join(CHECK_SECONDS)  # not for ever: the kernel does not kill one that waits for a disk

    def _run(self) -> None:
        """Count the checks at which nothing has changed: unlike a clock, they stop while the whole job is stopped."""
        seconds = min(1.0, self.timeout / 10)
        seen, unchanged, awaited = self.notes[:, 1].copy(), np.zeros(len(self.notes)), 0.0
        while not self.stopped.wait(seconds):
            now = self.notes[:, 1].copy()
            unchanged = np.where(now == seen, unchanged + seconds, 0.0)
            awaited = awaited + seconds if self.is_awaited else 0.0
            seen = now
            late = unchanged >= self.timeout
            hung = np.flatnonzero(late & (self.notes[:, 0] >= 0))
            if self.is_awaited and len(hung):
                self._verdict = self._hang(int(hung[0]))
            elif awaited >= self.timeout and late.all():
                self._verdict = (
                    f"the loader workers have read nothing for {self.timeout:g} s (data.worker_timeout): they may be "
                    "stopped, or wait for a file system that does not answer; continue when it does, or set "
                    "data.num_workers=0"
                )
            if self._verdict is not None:
                self.kill()
            main_thread = threading.main_thread().ident or 0
            if self.is_awaited and self.waiting_thread == main_thread:
                # Interrupts even a read that a dead worker left unfinished; workers of a fork server cause no signal.
                signal.pthread_kill(main_thread, signal.SIGCHLD)

    def _hang(self, worker: int) -> str:
        return (
            f"{self._name(int(self.notes[worker, 2]))} has been reading {self._image(worker)} for more than "
            f"{self.timeout:g} s (data.worker_timeout): its file system does not answer, or its decoder hangs; check "
            "that file, or set a longer data.worker_timeout"
        )

    def _death(self, process: BaseProcess) -> str:
        pid, code = process.pid or 0, process.exitcode or 0
        workers = np.flatnonzero(self.notes[:, 2] == pid)
        doing = f"it read {self._image(int(workers[0]))}" if len(workers) else "it started"
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        cause = _CAUSES.get(signal.Signals(-code)) if code < 0 else None
        before, now = self.kills_before, kills_for_memory()
        if code == -signal.SIGKILL and before is not None and now is not None and now > before:
            cause = "the kernel killed a process because memory was full; " + _MEMORY_REMEDY
        cause = cause or "set data.num_workers=0 to see its error"
        return f"{self._name(pid)} {how} while {doing}: {cause.format(fewer=len(self.notes) // 2)}"

    def _name(self, pid: int) -> str:
        workers = np.flatnonzero(self.notes[:, 2] == pid)
        number = f" {workers[0] + 1} of {len(self.notes)}" if len(workers) else ""
        return f"loader worker{number} (process {pid})"

    def _image(self, worker: int) -> str:
        index = int(self.notes[worker, 0])
        return printable(self.describe(index), 1000) if index >= 0 else "no image"


_awaited: _Watch | None = None
"""The watch of the pool that the main thread waits for."""


class _Waiting:
    """Marks that a batch of a pool is waited for."""

    def __init__(self, watch: _Watch) -> None:
        self.watch = watch

    def __enter__(self) -> None:
        global _awaited
        self.watch.waiting_thread = threading.get_ident()
        self.watch.is_awaited = True
        if threading.current_thread() is threading.main_thread():
            _awaited = self.watch

    def __exit__(self, *_: object) -> None:
        global _awaited
        self.watch.is_awaited = False
        if threading.current_thread() is threading.main_thread():
            _awaited = None


_handler_before: Any = None
"""The user's handler of SIGCHLD, if any."""


def _check_instead_of_raising_anywhere(before: Any) -> None:
    """Replace torch's handler of SIGCHLD, which raises wherever the main thread is when a worker dies.

    Ours raises only where a batch is waited for. (Without any, a worker that dies while it sends a batch would leave
    the main process waiting for the rest of it.)

    Args:
        before: the handler from before torch's was installed.
    """
    global _handler_before
    if threading.current_thread() is not threading.main_thread():
        return
    if before is not _on_child_exit:
        is_torchs = getattr(before, "__module__", "").startswith("torch.")
        _handler_before = before if callable(before) and not is_torchs else None
    signal.signal(signal.SIGCHLD, _on_child_exit)


def _on_child_exit(signum: int, frame: Any) -> None:
    if _awaited is not None and not _awaited.has_failed:
        _awaited.check()
    if _handler_before is not None:
        _handler_before(signum, frame)


def _remedy(text: str) -> str | None:
    """Return what to do about a resource that ran out; None if the message is about something else."""
    return next((remedy for part, remedy in _RESOURCES if part in text), None)


def end_workers() -> None:
    """Kill the workers that an error left running, at exit.

    multiprocessing would send them SIGTERM and wait forever, because they ignore it; atexit runs this before.
    """
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end as a failure
    for process in left:
        process.kill()
        process.join()
