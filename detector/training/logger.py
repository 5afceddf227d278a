"""What a run says: a progress bar or lines on the terminal, metrics.jsonl, and TensorBoard."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from detector.reports.loss_analysis import LossHolders


class _Bars(Progress):
    """Progress bars, and under them a line of text that may be wider than what a bar leaves room for."""

    status = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status)


class RunLog:
    """Where a run's numbers go. Only the first process has one that does anything.

    Args:
        output_dir: holds metrics.jsonl and TensorBoard's events.
        start_step: steps already done; records of later ones (of an interrupted run) are dropped.
        evaluation_due: whether the evaluation after these steps comes (again); a record of it is dropped too.
        total_steps: of the run.
        enabled: False for a silent log.
    """

    def __init__(
        self, output_dir: Path, *, start_step: int, total_steps: int, evaluation_due: bool = False, enabled: bool = True
    ) -> None:
        self.enabled = enabled
        self.console = Console(highlight=False, quiet=not enabled)
        self.console.soft_wrap = not self.console.is_terminal  # lines of a file stay whole
        self.start_step, self.total_steps = start_step, total_steps
        self.started = time.monotonic()
        self._progress: _Bars | None = None
        if not enabled:
            return
        self.path = output_dir / "metrics.jsonl"
        if self.path.exists():
            lines = self.path.read_text().splitlines()
            kept = [line for line in lines if _is_past(line, start_step, evaluation_due)]
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(line + "\n" for line in kept))
            temporary.replace(self.path)
        self.file = self.path.open("a", encoding="utf-8", buffering=1)
        self.tensorboard = SummaryWriter(str(output_dir), purge_step=start_step + 1)
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

    def info(self, text: object) -> None:
        """Print a line, a table or several lines."""
        self.console.print(text, markup=False) if isinstance(text, str) else self.console.print(text)

    def warn(self, text: str) -> None:
        """Print something the user should act on."""
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def advance(self, step: int) -> None:
        """Move the bar, between two records too; no sync."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step, eta=f"eta {self.eta(step)}")

    def step(self, record: dict[str, Any]) -> None:
        """A record of training: `step`, `epoch`, losses, lr, grad_norm, images_per_s, data_wait, ..."""
        if not self.enabled:
            return
        self._write(record)
        for key, value in record.items():
            if key not in ("step", "epoch"):
                self.tensorboard.add_scalar(f"train/{key}", value, record["step"])
        status = (
            f"loss {record['loss']:.4f} (cls {record['loss_cls']:.4f} box {record['loss_box']:.4f}) "
            f"lr {record['lr']:.2e} grad {record['grad_norm']:.2f} {record['images_per_s']:.1f} images/s "
            f"waiting for data {record['data_wait']:.0%}"
        )
        if self._progress is not None:
            self._progress.update(self._task, description=f"epoch {record['epoch']:.1f}")
            self._progress.status = status
        else:
            place = f"epoch {record['epoch']:.2f} step {record['step']}/{self.total_steps}"
            self.info(f"{place} {status} eta {self.eta(record['step'])}")

    def evaluation(self, record: dict[str, Any], per_class: list[dict[str, Any]]) -> None:
        """A record of an evaluation: `step`, `epoch`, `split` and the metrics."""
        if not self.enabled:
            return
        self._write({**record, "per_class": per_class})
        for key, value in record.items():
            if key not in ("step", "epoch", "split"):
                self.tensorboard.add_scalar(f"{record['split']}/{key}", value, record["step"])
        for row in per_class:
            self.tensorboard.add_scalar(f"{record['split']}_AP_per_class/{row['name']}", row["AP"], record["step"])

    def loss_holders(self, found: LossHolders, step: int, *, started: float) -> None:
        """Who holds the class loss, for TensorBoard, and how long it took since `started` (monotonic) to know it."""
        for key, value in found.values.items():
            self.tensorboard.add_scalar(f"loss_holders/{key}", value, step)
        for key, probabilities in found.p_t.items():
            self.tensorboard.add_histogram(f"p_t/{key}", probabilities, step)
        for key, figure in found.figures.items():
            self.tensorboard.add_figure(f"loss_holders/{key}", figure, step)
        as_code = "\n".join(f"    {line}" for line in found.text)
        self.tensorboard.add_text("loss_holders/table", as_code, step)
        self.tensorboard.add_scalar("loss_holders/seconds", time.monotonic() - started, step)

    def pictures(self, name: str, pictures: list[Image.Image], step: int) -> None:
        """Pictures for TensorBoard."""
        for i, picture in enumerate(pictures):
            self.tensorboard.add_image(f"{name}/{i}", np.asarray(picture), step, dataformats="HWC")

    def progress(self, what: str) -> Callable[[int, int], None] | None:
        """A callback for a side job of (done, total), shown as a second bar; None where there is no terminal."""
        if self._progress is None:
            return None
        bar = self._progress
        task: TaskID | None = None

        def show(done: int, total: int) -> None:
            nonlocal task
            if task is None:
                task = bar.add_task(what, total=total, eta="")
            bar.update(task, completed=done)
            if done >= total:
                bar.remove_task(task)
                task = None

        return show

    def eta(self, step: int) -> str:
        """Time left at the pace of this session, evaluations included, as h:mm:ss."""
        done = step - self.start_step
        if done <= 0:
            return "?"
        return duration((time.monotonic() - self.started) / done * (self.total_steps - step))

    def close(self) -> None:
        """Flush everything."""
        if self.enabled:
            if self._progress is not None:
                self._progress.stop()
            self.file.close()
            self.tensorboard.close()

    def _write(self, record: dict[str, Any]) -> None:
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self.file.write(json.dumps(finite, allow_nan=False) + "\n")  # NaN and Infinity are no JSON


def duration(seconds: float) -> str:
    """h:mm:ss."""
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


def _is_past(line: str, start_step: int, evaluation_due: bool) -> bool:
    """Whether a record is of what a resumed run does not do again."""
    try:
        record = json.loads(line)
        step = int(record["step"])
    except (json.JSONDecodeError, KeyError, TypeError):  # a line cut off by a crash
        return False
    return step < start_step or (step == start_step and not (evaluation_due and "split" in record))
