"""Stop cleanly on SIGINT and SIGTERM, all processes before the same step."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

import torch

from detector import distributed
from detector.training.step_reader import StepReader


class StopRequest:
    """Whether a signal asked the run to stop."""

    signum: int | None = None


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
    """Turn the first SIGINT or SIGTERM into a request; a second SIGINT ends the process at once.

    (A second SIGTERM does not: torchrun and schedulers forward one that the process may have received already.)
    """
    request = StopRequest()

    def handle(signum: int, _: Any) -> None:
        if request.signum is not None and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        request.signum = signum

    before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
