"""Stop cleanly on SIGINT, SIGTERM and SIGHUP, all processes before the same step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import torch

from detector import distributed
from detector.errors import Interrupted
from detector.training.step_reader import StepReader

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequest:
    """Whether a signal asked the run to stop."""

    signum: int | None = None
    waits_for_step: bool = False
    """Whether the run stops by itself, before its next step. Otherwise, the signal's handler raises `Interrupted`."""


def agree_to_stop(request: StopRequest, reader: StepReader) -> int | None:
    """Agree between all processes, in one exchange, whether to stop before the next step.

    Returns:
        The signal to stop for, if any process received one; None to continue. The same on every process.

    Raises:
        DatasetError: too many images of the epoch became unreadable.
    """
    own = request.signum  # read once: a signal may arrive while the processes communicate
    counts = torch.tensor([int(own is not None), len(reader.unreadable)])
    asked, unreadable = distributed.sum_over_processes(counts).tolist()
    reader.require_readable(unreadable)
    return (own or signal.SIGTERM) if asked else None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a request; a second SIGINT ends the process at once.

    (A second SIGTERM does not: torchrun and schedulers forward one that the process may have received already.) A
    signal that is ignored, as SIGHUP under nohup, stays so. Outside the main thread, Python handles no signals.

    Raises:
        Interrupted: a signal arrived while the request did not wait for a step: setup and final evaluation have nothing
            to save.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def handle(signum: int, _: Any) -> None:
        if request.signum is not None and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        request.signum = signum
        if not request.waits_for_step:
            raise Interrupted(signum, "continue with --resume auto")

    wanted = [s for s in STOP_SIGNALS if signal.getsignal(s) is not signal.SIG_IGN]
    before = {s: signal.signal(s, handle) for s in wanted}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
