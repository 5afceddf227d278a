"""Stop cleanly on SIGINT and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any


class Stop:
    """Whether a signal asked the run to stop."""

    signum: int | None = None


@contextlib.contextmanager
def stop_on_signal() -> Iterator[Stop]:
    """The first SIGINT or SIGTERM asks; a second SIGINT is obeyed at once.

    (Not a second SIGTERM: torchrun and schedulers pass on what the process may have had already.)
    """
    stop = Stop()

    def ask(signum: int, _: Any) -> None:
        if stop.signum is not None and signum == signal.SIGINT:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        stop.signum = signum

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
