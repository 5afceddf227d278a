"""What ends a run before its time."""

from __future__ import annotations

import signal


class RunError(ValueError):
    """A run that cannot start or go on; `str` says why and what to do."""


class DivergedError(RunError):
    """A loss or gradient is no longer a number."""


class Interrupted(Exception):  # noqa: N818 (no error: the user asked for it)
    """A signal ended the run, after a checkpoint was written."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Stop:
    """Whether a signal asked the run to stop."""

    signum: int | None = None
