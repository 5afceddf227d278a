"""Writers of a run's records. To add a tracker, write a class with these methods and add it to `RunLog.writers`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from detector.atomic import write_text


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

    Args:
        path: the file; appended to.
        start_step: records of later steps, of an interrupted session, are dropped.
        evaluation_due: whether the evaluation after `start_step` will be repeated; its record is dropped, too.
    """

    def __init__(self, path: Path, *, start_step: int, evaluation_due: bool) -> None:
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _is_before(line, start_step, evaluation_due)]
            write_text("".join(line + "\n" for line in kept), path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def step(self, record: dict[str, Any]) -> None:
        """Append the record; numbers that are not finite become null."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")

    def evaluation(self, record: dict[str, Any], per_class: list[dict[str, Any]]) -> None:
        """Append the record."""
        self.step({**record, "per_class": per_class})

    def loss_concentration(self, concentration: Any, step: int) -> None:
        """Do nothing: tools/analyze_loss.py writes these numbers to files."""

    def images(self, name: str, images: list[Image.Image], step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """TensorBoard events.

    Args:
        folder: of the event files.
        start_step: events of later steps are purged.
    """

    def __init__(self, folder: Path, *, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, and needed only here

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


def _is_before(line: str, start_step: int, evaluation_due: bool) -> bool:
    """Whether a record belongs to what a resumed run does not repeat."""
    try:
        record = json.loads(line)
        step = int(record["step"])
    except (json.JSONDecodeError, KeyError, TypeError):  # a line cut off by a crash
        return False
    return step < start_step or (step == start_step and not (evaluation_due and "split" in record))
