"""What each process of a run is doing, as the others see it, so that they can name one that died, hangs or is slow."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist

INTERVAL = 1.0
"""Seconds between beats."""

STORE_TIMEOUT = timedelta(seconds=10)
LEAVING_SECONDS = 5.0
"""How long the process that may host the exchange waits for the others to read it, before it ends with an error."""


class Beat(NamedTuple):
    """What a process published last."""

    number: int
    """Of the beats of this process so far."""
    progress: int
    """Number of exchanges with other processes that it has begun."""
    is_waiting: bool
    """Whether it waits for another process."""
    doing: str
    seconds: float
    """For how long."""
    host: str
    pid: int


class Heartbeat:
    """Publishes the state of this process every second, in the key-value store by which the processes found each other.

    Args:
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size
        self._progress, self._is_waiting = 0, False
        self._doing, self._since = "starting", time.monotonic()
        self._stopped = threading.Event()
        self._store = connect()
        self._thread = threading.Thread(target=self._run, daemon=True, name="heartbeat")
        self._thread.start()

    def note(self, doing: str) -> None:
        """Note what this process is doing from now on."""
        self._doing, self._since = doing, time.monotonic()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Within the block, this process waits for the others."""
        self._progress += 1
        self._is_waiting = True
        yield
        self._is_waiting = False  # not after an error, by which it still waits

    def stop(self) -> None:
        """End the beats."""
        self._stopped.set()
        self._thread.join(STORE_TIMEOUT.total_seconds())

    def _run(self) -> None:
        number, host, pid = 0, socket.gethostname(), os.getpid()
        with contextlib.suppress(RuntimeError):  # the store has ended; others notice the silence
            store = connect()
            while True:
                seconds = round(time.monotonic() - self._since, 1)
                beat = Beat(number, self._progress, self._is_waiting, self._doing, seconds, host, pid)
                store.set(f"beat{self.rank}", json.dumps(beat))
                number += 1
                if self._stopped.wait(INTERVAL):
                    return

    def first_to_report(self) -> bool:
        """Whether no process has reported an error so far. Then this one does."""
        try:
            return int(self._answering_store().add("reports", 1)) == 1
        except (RuntimeError, OSError):
            return True

    def is_reported(self) -> bool:
        """Whether another process has reported an error."""
        try:
            return int(self._answering_store().add("reports", 0)) > 0
        except (RuntimeError, OSError):
            return False

    def leave(self, *, reports: bool) -> None:
        """Give the others time before this process ends with an error.

        The first process may host the store, which the others still read. torchrun ends all processes as soon as one
        ends, so the one that `reports` the error ends first.
        """
        with contextlib.suppress(RuntimeError, OSError):
            store = self._answering_store()
            store.add("left", 1)
            until = time.monotonic() + LEAVING_SECONDS
            while self.rank == 0 and time.monotonic() < until and int(store.add("left", 0)) < self.world_size:
                time.sleep(0.1)
        if not reports:
            time.sleep(INTERVAL)

    def culprit(self, timeout: float) -> str:
        """Describe the process that the others wait for, or cannot reach.

        Args:
            timeout: the seconds that they wait.
        """
        try:
            before = self._beats(self._answering_store())
            time.sleep(3 * INTERVAL)
            now = self._beats(self._answering_store())
        except (RuntimeError, OSError):
            return f"rank 0 of {self.world_size} {_SILENT}"
        silent = [r for r in now if r != self.rank and (now[r] is None or now[r] == before[r])]
        if silent:
            return f"{self._name(silent[0], now[silent[0]])} {_SILENT}{_doing(now[silent[0]])}"
        beats = {r: beat for r, beat in now.items() if beat is not None}
        behind = [r for r in beats if beats[r].progress < max(b.progress for b in beats.values())]
        behind = behind or [r for r in beats if not beats[r].is_waiting]
        if behind and len(behind) < self.world_size:
            late = min(behind, key=lambda r: beats[r].progress)
            return (
                f"{self._name(late, beats[late])} holds up the others: it has been {beats[late].doing} for "
                f"{beats[late].seconds:.0f} s, and train.rank_timeout is {timeout:g} s; find out why, or set a longer "
                "train.rank_timeout"
            )
        state = "; ".join(f"rank {r} has been {b.doing} for {b.seconds:.0f} s" for r, b in beats.items())
        return f"the {self.world_size} processes lost each other ({state}); check the network between them"

    def _answering_store(self) -> Any:
        """The store, if its host answers: torch would try for long, and print a lot. Raises OSError."""
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        with socket.create_connection(address, timeout=STORE_TIMEOUT.total_seconds()):
            return self._store

    def _beats(self, store: Any) -> dict[int, Beat | None]:
        ranks = range(self.world_size)
        return {r: Beat(*json.loads(store.get(f"beat{r}"))) if store.check([f"beat{r}"]) else None for r in ranks}

    def _name(self, rank: int, beat: Beat | None) -> str:
        where = f" (process {beat.pid} on {beat.host})" if beat is not None else ""
        return f"rank {rank} of {self.world_size}{where}"


_SILENT = (
    "does not answer: it was killed (by the system, if memory was full), is stopped, its machine cannot be reached, or "
    "it ended with an error of its own, which its output states"
)


def _doing(beat: Beat | None) -> str:
    return f"; when last heard of, it was {beat.doing}" if beat is not None else ""


def wait_for_host(seconds: float) -> None:
    """Wait until the process that hosts the store listens: torch would print its stack while it waits.

    Raises:
        OSError: it does not.
    """
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    until = time.monotonic() + seconds
    while os.environ.get("RANK", "0") != "0":
        try:
            socket.create_connection(address, timeout=STORE_TIMEOUT.total_seconds()).close()
            return
        except OSError as error:
            if time.monotonic() > until:
                raise OSError(f"nothing listens on port {address[1]} of {address[0]}: {error.strerror}") from error
        time.sleep(0.1)


def connect() -> Any:
    """Connect to the store of the processes that torchrun, or the environment, put together. Raises RuntimeError."""
    store = dist.TCPStore(  # type: ignore[attr-defined]  # public, but not declared so
        os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=STORE_TIMEOUT,
        wait_for_workers=False,
    )  # fmt: skip
    return of_this_start(store)


def of_this_start(store: Any) -> Any:
    """Return the part of a store for this start of the processes.

    Where torchrun starts them again after a failure, it may keep its store, with the addresses of the lost processes.
    """
    prefix = f"detector/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # public, but not declared so
