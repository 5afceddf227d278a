"""Show the progress of downloading and unpacking in bytes."""

from __future__ import annotations

import sys
import time
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Meter:
    """Show bytes done: as a bar with the time left in a terminal, elsewhere as a plain line every `every_s` seconds."""

    def __init__(self, label: str, *, stream: IO[str] | None = None, every_s: float = 30.0) -> None:
        self.label = label
        self.stream = stream or sys.stderr
        self.every_s = every_s
        self.started: tuple[float, int] | None = None
        self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(file=self.stream))
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, total: int | None) -> None:
        """Show `done` of `total` bytes; `total` is None if the server does not report it."""
        now = time.monotonic()
        if self.started is None or done < self.started[1]:
            self.started = (now, done)
        if self.bar is not None:
            if self.task is None:  # a resumed download starts here: earlier bytes do not count for its speed
                self.task = self.bar.add_task(self.label, total=total, completed=done)
            self.bar.update(self.task, completed=done, total=total)
        elif now - self.last_line >= self.every_s:
            self.last_line = now
            print(self.line(done, total, now), file=self.stream, flush=True)

    def line(self, done: int, total: int | None, now: float) -> str:
        """Return the plain line, e.g. `train2017.zip: 1.9 GB of 19.3 GB (10 %), 50.0 MB/s, 5:48 left`."""
        since, first = self.started or (now, done)
        speed = (done - first) / (now - since) if now > since else 0.0
        text = f"{self.label}: {format_bytes(done)}"
        if total is not None:
            text += f" of {format_bytes(total)} ({100 * done // max(total, 1)} %)"
        if speed > 0:
            text += f", {format_bytes(speed)}/s"
            if total is not None:
                minutes, seconds = divmod(round((total - done) / speed), 60)
                text += f", {minutes}:{seconds:02d} left"
        return text


def format_bytes(count: float) -> str:
    """Return a number of bytes in decimal units, e.g. `1.9 GB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
