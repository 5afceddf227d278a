"""What a run reports: a progress bar or lines on the terminal, and records for metrics.jsonl and TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from detector.files import os_error_text
from detector.text import printable_lines
from detector.training.record_writers import JsonLinesWriter, RecordWriter, TensorBoardWriter

MAX_LOGGED = 100_000
"""Characters of a text that the terminal shows."""


class _Bars(Progress):
    """Progress bars, and below them a line of text that may be wider than a bar leaves room for."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status)


class RunLog:
    """The log of a run. Of several processes only the first one's does anything.

    Args:
        output_dir: holds metrics.jsonl and TensorBoard's events.
        start_step: steps already done; records of later ones (of an interrupted session) are dropped.
        total_steps: of the run.
        evaluation_due: whether the evaluation after `start_step` will be repeated; its record is dropped, too.
        enabled: False for a silent log.
    """

    def __init__(
        self, output_dir: Path, *, start_step: int, total_steps: int, evaluation_due: bool = False, enabled: bool = True
    ) -> None:
        self.console = Console(highlight=False, quiet=not enabled)
        self.console.soft_wrap = not self.console.is_terminal  # keep the lines of a file whole
        self.start_step, self.total_steps = start_step, total_steps
        self.started = time.monotonic()
        self.writers: list[RecordWriter] = []
        self._progress: _Bars | None = None
        if not enabled:
            return
        metrics = output_dir / "metrics.jsonl"
        self.writers = [JsonLinesWriter(metrics, start_step=start_step, evaluation_due=evaluation_due, warn=self.warn)]
        try:
            self.writers.append(TensorBoardWriter(output_dir, start_step=start_step))
        except OSError as error:
            self._warn_of_end(TensorBoardWriter, error)
        if self.console.is_terminal:
            self._progress = _Bars(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[eta]}"),
                console=self.console,
            )
            self._progress.start()
            self._task = self._progress.add_task("training", total=total_steps, completed=start_step, eta="")

    def _each(self, write: Callable[[RecordWriter], None]) -> None:
        """Write a record with every writer; one that cannot write is left out from then on, and training continues."""
        for writer in [*self.writers]:
            try:
                write(writer)
            except OSError as error:
                self.writers.remove(writer)
                self._warn_of_end(type(writer), error)

    def _warn_of_end(self, writer: type, error: OSError) -> None:
        self.warn(
            f"{writer.__name__.removesuffix('Writer')} records end here: {os_error_text(error)}; training continues"
        )

    def info(self, text: object) -> None:
        """Print a line, a table or several lines."""
        if isinstance(text, str):
            self.console.print(printable_lines(text, MAX_LOGGED), markup=False)
        else:
            self.console.print(text)

    def warn(self, text: str) -> None:
        """Print something the user should act on."""
        self.console.print(f"warning: {printable_lines(text, MAX_LOGGED)}", style="yellow", markup=False)

    def advance(self, step: int) -> None:
        """Move the progress bar, between two records too; no sync point."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, eta=f"eta {self.eta(step)}")

    def step(self, record: dict[str, Any]) -> None:
        """Log a training record: `step`, `epoch`, losses, lr, grad_norm, images_per_s, data_wait, ..."""
        self._each(lambda writer: writer.step(record))
        status = (
            f"loss {record['loss']:.4f} (cls {record['loss_cls']:.4f} box {record['loss_box']:.4f}) "
            f"lr {record['lr']:.2e} grad {record['grad_norm']:.2f} {record['images_per_s']:.1f} images/s "
            f"data wait {record['data_wait']:.0%}"
        )
        if self._progress is not None:
            self._progress.update(self._task, description=f"epoch {record['epoch']:.1f}")
            self._progress.status = status
        else:
            position = f"epoch {record['epoch']:.2f} step {record['step']}/{self.total_steps}"
            self.info(f"{position} {status} eta {self.eta(record['step'])}")

    def evaluation(self, record: dict[str, Any], per_class: list[dict[str, Any]]) -> None:
        """Log the record of an evaluation: `step`, `epoch`, `split` and the metrics; and those of each class."""
        self._each(lambda writer: writer.evaluation(record, per_class))

    def loss_concentration(self, concentration: Any, step: int) -> None:
        """Log which share of the class loss the hardest examples hold (`reports.loss_analysis.LossConcentration`)."""
        self._each(lambda writer: writer.loss_concentration(concentration, step))

    def images(self, name: str, images: list[Image.Image], step: int) -> None:
        """Log images under a name."""
        self._each(lambda writer: writer.images(name, images, step))

    def progress(self, description: str) -> Callable[[int, int], None] | None:
        """Return a callback (done, total) that shows a second progress bar; None where there is no terminal."""
        if self._progress is None:
            return None
        bar = self._progress
        task: TaskID | None = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task(description, total=total, eta="")
            bar.update(task, completed=done)
            if done >= total:
                bar.remove_task(task)
                task = None

        return show

    def eta(self, step: int) -> str:
        """Remaining time at the pace of this session, evaluations included, as h:mm:ss."""
        done = step - self.start_step
        if done <= 0:
            return "?"
        return duration((time.monotonic() - self.started) / done * (self.total_steps - step))

    def close(self) -> None:
        """Flush and close everything."""
        if self._progress is not None:
            self._progress.stop()
        self._each(lambda writer: writer.close())


def duration(seconds: float) -> str:
    """Format seconds as h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"
