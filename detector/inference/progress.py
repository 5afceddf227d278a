"""Progress over many files, with the time left."""

from __future__ import annotations

import sys
import time
from typing import Any, Self

LINE_SECONDS = 30.0
"""Between the lines that are printed where there is no terminal."""


class CountProgress:
    """Shows on stderr how many of `total` things are done: as a bar in a terminal, elsewhere as a line now and then.

    Args:
        label: what is done.
        total: number of things.
    """

    def __init__(self, label: str, total: int) -> None:
        self.label, self.total = label, total
        self._bar: Any = None
        self._started = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task(self.label, total=self.total)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int) -> None:
        """Show `done` of `total`."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_SECONDS:
            self._last_line = now
            print(self.line(done, total, now - self._started), file=sys.stderr, flush=True)

    def line(self, done: int, total: int, seconds: float) -> str:
        """Return the line after some seconds, e.g. `predicting: 120 of 10,000, about 0:41:10 left`."""
        left = round(seconds / max(done, 1) * (total - done))
        minutes, seconds_left = divmod(left, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{self.label}: {done:,} of {total:,}, about {hours}:{minutes:02d}:{seconds_left:02d} left"
