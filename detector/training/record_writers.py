"""Writers of a run's records. To add a tracker, write a class with these methods and add it to `RunLog.writers`."""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from detector.atomic import write_text
from detector.errors import RunError
from detector.files import os_error_text, read_bytes


class RecordWriter(Protocol):
    """Receives every record of a run."""

    def step(self, record: dict[str, Any]) -> None:
        """Write a training record, means since the last one."""

    def evaluation(self, record: dict[str, Any], per_class: list[dict[str, Any]]) -> None:
        """Write the record of an evaluation and the metrics of each class."""

    def loss_concentration(self, concentration: Any, step: int) -> None:
        """Write scalars, histograms, figures and a table about the class loss."""

    def images(self, name: str, images: list[Image.Image], step: int) -> None:
        """Write images under a name."""

    def close(self) -> None:
        """Flush and close."""


class JsonLinesWriter:
    """metrics.jsonl: one JSON object per training record and evaluation.

    Records that cannot be written, for example because the disk is full, wait in memory for the next attempt.

    Args:
        path: the file; appended to.
        start_step: records of later steps, of an interrupted session, are dropped.
        evaluation_due: whether the evaluation after `start_step` will be repeated; its record is dropped, too.
        warn: called with a warning when writing fails and when it works again.

    Raises:
        RunError: the existing file cannot be read or written.
    """

    def __init__(self, path: Path, *, start_step: int, evaluation_due: bool, warn: Callable[[str], None]) -> None:
        self._path, self._warn = path, warn
        self._waiting = b""
        self._failed = False
        try:
            if path.exists():
                lines = read_bytes(path).splitlines()
                readable = [(line, record) for line in lines if (record := _parsed(line)) is not None]
                if len(lines) - len(readable) > 1:  # one line may have been cut off by a crash
                    warn(f"{len(lines) - len(readable):,} damaged lines of {path} are left out")
                kept = [line for line, record in readable if _is_before(record, start_step, evaluation_due)]
                write_text("".join(line.decode() + "\n" for line in kept), path)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise RunError(os_error_text(error, path)) from None

    def _write(self, data: bytes) -> None:
        """Append to what waits, and write as much of it as possible."""
        self._waiting += data
        try:
            if os.fstat(self._file.fileno()).st_nlink == 0:
                self._warn(f"{self._path} was removed with its records; it continues in a new file")
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file.close()
                self._file = self._path.open("ab", buffering=0)
            while self._waiting:
                self._waiting = self._waiting[self._file.write(self._waiting) :]
        except OSError as error:
            if not self._failed:
                self._warn(
                    f"{os_error_text(error, self._path)}; training continues, the records wait until it can be written"
                )
            self._failed = True
        else:
            if self._failed:
                self._warn(f"{self._path} is written again; no record is missing")
            self._failed = False

    def step(self, record: dict[str, Any]) -> None:
        """Append the record; numbers that are not finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._write(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def evaluation(self, record: dict[str, Any], per_class: list[dict[str, Any]]) -> None:
        """Append the record."""
        self.step({**record, "per_class": per_class})

    def loss_concentration(self, concentration: Any, step: int) -> None:
        """Do nothing: tools/analyze_loss.py writes these numbers to files."""

    def images(self, name: str, images: list[Image.Image], step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the file; warn of records that could not be written."""
        self._write(b"")
        if self._waiting:
            self._warn(f"{self._waiting.count(10):,} records are missing from {self._path}")
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events. Its methods raise OSError where an earlier event could not be written.

    Args:
        folder: of the event files.
        start_step: events of later steps are purged.

    Raises:
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed only here

        # The thread that writes re-raises its error after storing it for the next event: the traceback would be noise.
        threading.excepthook = _hide_os_errors
        self._events = SummaryWriter(str(folder), purge_step=start_step + 1)

    def step(self, record: dict[str, Any]) -> None:
        """Add a scalar per number."""
        for key, value in record.items():
            if key not in ("step", "epoch"):
                self._events.add_scalar(f"train/{key}", value, record["step"])

    def evaluation(self, record: dict[str, Any], per_class: list[dict[str, Any]]) -> None:
        """Add a scalar per metric, and one per class."""
        split, step = record["split"], record["step"]
        for key, value in record.items():
            if key not in ("step", "epoch", "split"):
                self._events.add_scalar(f"{split}/{key}", value, step)
        for row in per_class:
            self._events.add_scalar(f"{split}_AP_per_class/{row['name']}", row["AP"], step)

    def loss_concentration(self, concentration: Any, step: int) -> None:
        """Add scalars, histograms, figures and the table as text."""
        for key, value in concentration.scalars.items():
            self._events.add_scalar(f"loss_concentration/{key}", value, step)
        for key, probabilities in concentration.histograms.items():
            self._events.add_histogram(f"p_t/{key}", probabilities, step)
        for key, figure in concentration.figures.items():
            self._events.add_figure(f"loss_concentration/{key}", figure, step)
        self._events.add_text("loss_concentration/table", "\n".join(f"    {line}" for line in concentration.text), step)

    def images(self, name: str, images: list[Image.Image], step: int) -> None:
        """Add the images, numbered."""
        for i, image in enumerate(images):
            self._events.add_image(f"{name}/{i}", np.asarray(image), step, dataformats="HWC")

    def close(self) -> None:
        """Flush and close."""
        self._events.close()


def _hide_os_errors(failure: threading.ExceptHookArgs) -> None:
    if not issubclass(failure.exc_type, OSError):
        threading.__excepthook__(failure)


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if the line is damaged."""
    try:
        record = json.loads(line)
        return record if isinstance(record, dict) and type(record.get("step")) is int else None
    except (ValueError, RecursionError):
        return None


def _is_before(record: dict[str, Any], start_step: int, evaluation_due: bool) -> bool:
    """Whether a record belongs to what a resumed run does not repeat."""
    step = record["step"]
    return bool(step < start_step or (step == start_step and not (evaluation_due and "split" in record)))
