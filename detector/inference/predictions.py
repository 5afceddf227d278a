"""Predictions for files, written while they are made: detections.jsonl, drawn images, and detections.json at the end.

`detections.jsonl` has one JSON object per input, in their order, complete as soon as it is there:

- `format`: 1; `image_id`: the number of the input, from 0; `file_name`;
- of an image that was predicted: `height`, `width` (after its EXIF orientation is applied), `detections` (a list of
  `category_id`, `category_name`, `bbox` as x, y, width and height in pixels, `score`), and `drawn`, the name of the
  drawn image, or null if it could not be drawn; `note`, if it was drawn otherwise or not at all, states why;
- of any other input: `error`.

`detections.json` holds the same detections in COCO results format, with `file_name` and `category_name` added.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from detector.atomic import atomic_file
from detector.boxes import xyxy_to_xywh
from detector.datasets.images import decode_image
from detector.errors import RunError, UserError
from detector.files import os_error_remedy, os_error_text
from detector.inference.predictor import Predictor
from detector.structures import Categories, Detections
from detector.text import printable, shortened

RECORDS, RESULTS = "detections.jsonl", "detections.json"
FORMAT = 1

MAX_JPEG_SIDE = 65_500
"""Pixels; the encoder's limit."""
MAX_STEM_BYTES = 180
"""File systems allow 255 for a whole name; that of a temporary file is longer."""
SHOWN, MAX_REPORT = 10, 3900
"""Problems that the summary lists, and characters of the whole list."""

_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ENOENT)
"""Errors that the next file would have, too."""

Draw = Callable[[NDArray[np.uint8], Detections, Sequence[str]], Image.Image]


class Prediction(NamedTuple):
    """The result for one file."""

    path: Path
    image: NDArray[np.uint8] | None
    """(H, W, 3) RGB; None where the file cannot be predicted."""
    detections: Detections | None
    error: str | None
    """Why the file cannot be predicted."""


def predict_files(predictor: Predictor, paths: Sequence[Path]) -> Iterator[Prediction]:
    """Detect objects in one file after another; one that fails in any way is reported and does not stop the others."""
    for path in paths:
        try:
            image = decode_image(path, apply_exif=predictor.apply_exif)
            prediction = Prediction(path, image, predictor(image), None)
        except Exception as error:  # whatever one odd file causes, the others must not suffer
            if _is_broken_device(error):
                raise
            prediction = Prediction(path, None, None, _reason(path, error))
        yield prediction


def _is_broken_device(error: Exception) -> bool:
    """Whether an error leaves a GPU unusable, so that all other files would fail, too."""
    accelerator_error = getattr(torch, "AcceleratorError", ())
    return isinstance(error, accelerator_error) and not isinstance(error, torch.OutOfMemoryError)


def _reason(path: Path, error: Exception) -> str:
    """Explain in one line why a file cannot be predicted."""
    name = printable(str(path), 1000)
    if isinstance(error, UserError):
        return printable(str(error), 2000)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return f"{name}: needs more memory than the GPU has free; use --device cpu, or cut the image into tiles"
    if isinstance(error, MemoryError):
        return f"{name}: needs more memory than is free; cut the image into tiles"
    return f"{name}: {printable(f'{type(error).__name__}: {error}')}"


@dataclass
class Summary:
    """What was written for how many inputs."""

    inputs: int
    predicted: int = 0
    unreadable: int = 0
    """Inputs that could not be predicted."""
    undrawn: int = 0
    """Inputs that were predicted, but whose drawing could not be saved."""
    detections: int = 0
    problems: list[str] = field(default_factory=list)
    """Of the first inputs that are unreadable or not drawn."""
    warnings: list[str] = field(default_factory=list)
    """Of the first images that were drawn smaller."""
    signum: int | None = None
    """The signal that ended it early."""

    @property
    def done(self) -> int:
        """Number of inputs that are finished."""
        return self.predicted + self.unreadable

    @property
    def exit_code(self) -> int:
        """0 if everything was predicted and drawn."""
        if self.signum is not None:
            return 128 + self.signum
        return 2 if self.unreadable or self.undrawn else 0

    def report(self) -> str:
        """Lines about what did not go as usual; empty if nothing."""
        lines = [f"warning: {text}" for text in self.warnings]
        counts = [_are(self.unreadable, "input", "unreadable")] * bool(self.unreadable)
        counts += [_are(self.undrawn, "image", "not drawn")] * bool(self.undrawn)
        if counts:
            more = self.unreadable + self.undrawn - len(self.problems)
            lines.append(f"error: {' and '.join(counts)}:")
            lines += [f"  {text}" for text in self.problems]
            lines += [f"  and {more} more; {RECORDS} has the reason of each"] * (more > 0)
        if self.signum is not None:
            name = signal.Signals(self.signum).name
            lines.append(f"stopped by {name} after {self.done} of {self.inputs} inputs, whose results are complete")
        return shortened("".join(f"{line}\n" for line in lines), MAX_REPORT)

    def add_problem(self, text: str) -> None:
        """Keep one of the first problems."""
        if len(self.problems) < SHOWN:
            self.problems.append(text)


def _are(count: int, what: str, how: str) -> str:
    return f"{count} {what}{'s are' if count != 1 else ' is'} {how}"


def predict_to_folder(
    predictor: Predictor,
    paths: Sequence[Path],
    folder: Path,
    *,
    draw: Draw,
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Predict files, and write the results to a folder; see the module.

    A SIGINT, SIGTERM or SIGHUP ends it after the file at hand, with complete results of the files so far.

    Args:
        predictor: what detects.
        paths: the files.
        folder: exists; files of earlier results in it are replaced.
        draw: draws detections, given the image and the class names.
        progress: called with the number of files done and their total.

    Raises:
        RunError: the folder cannot be written to; the message states what is safe.
    """
    summary, used = Summary(len(paths)), set[str]()
    results = folder / RESULTS
    _remove_leftovers(folder)
    with _Lines(folder / RECORDS) as lines, _until_signal() as stop:
        with contextlib.suppress(FileNotFoundError):
            results.unlink()  # or results of an earlier run would lie next to these
        try:
            for image_id, prediction in enumerate(predict_files(predictor, paths)):
                lines.write(_finished(image_id, prediction, predictor.categories, folder, draw, used, summary))
                if progress is not None:
                    progress(summary.done, len(paths))
                if stop:
                    summary.signum = stop[0]
                    break
            write_results(lines.path, results)
        except BaseException as error:
            safe = f"{RECORDS} holds the results of the first {lines.count:,} of {len(paths):,} inputs"
            with contextlib.suppress(RunError):
                write_results(lines.path, results)
                safe += f", and so does {RESULTS}"
            if isinstance(error, RunError):
                raise RunError(f"{error}; {safe}") from error
            raise
    return summary


def _finished(
    image_id: int,
    prediction: Prediction,
    categories: Categories,
    folder: Path,
    draw: Draw,
    used: set[str],
    summary: Summary,
) -> dict[str, Any]:
    """Draw a prediction, add it to the summary, and return its record."""
    record: dict[str, Any] = {"format": FORMAT, "image_id": image_id, "file_name": str(prediction.path)}
    image, detections, name = prediction.image, prediction.detections, printable(str(prediction.path), 1000)
    if image is None or detections is None:
        summary.unreadable += 1
        summary.add_problem(str(prediction.error))
        return record | {"error": prediction.error}
    boxes = xyxy_to_xywh(detections.boxes.double()).tolist()
    record["height"], record["width"] = image.shape[:2]
    record["detections"] = [
        {"category_id": categories.ids[label], "category_name": categories.names[label], "bbox": box, "score": score}
        for box, score, label in zip(boxes, detections.scores.tolist(), detections.labels.tolist(), strict=True)
    ]
    drawn = _unused_name(prediction.path.stem, image_id, used)
    shrunk, problem = _save_drawing(folder / drawn, image, detections, draw, categories.names)
    record["drawn"] = drawn if problem is None else None
    summary.predicted += 1
    summary.detections += len(detections)
    if problem is not None:
        record["note"] = f"not drawn: {problem}"
        summary.undrawn += 1
        summary.add_problem(f"{name}: {record['note']}")
    elif shrunk > 1:
        record["note"] = (
            f"drawn at 1/{shrunk} of its size, because a JPEG has at most {MAX_JPEG_SIDE:,} pixels per side"
        )
        summary.warnings += [f"{name}: {record['note']}"] if len(summary.warnings) < SHOWN else []
    return record


def _unused_name(stem: str, image_id: int, used: set[str]) -> str:
    """A printable name for a drawn image, different from those in use, which it joins.

    Names that differ in upper and lower case are the same for some file systems.
    """
    stem = "".join(c if c.isprintable() else "_" for c in stem).strip(". ")
    stem = stem.encode()[:MAX_STEM_BYTES].decode(errors="ignore") or "image"
    while stem.casefold() in used:  # a file of the same name in another folder
        stem += f"_{image_id}"
    used.add(stem.casefold())
    return f"{stem}.jpg"


def _save_drawing(
    path: Path, image: NDArray[np.uint8], detections: Detections, draw: Draw, names: Sequence[str]
) -> tuple[int, str | None]:
    """Draw detections and save the drawing atomically.

    Returns:
        By what factor it was shrunk, and why it was not saved, if so.

    Raises:
        RunError: the disk fails, or is full.
    """
    try:
        drawn = draw(image, detections, names)
        shrunk = -(-max(drawn.size) // MAX_JPEG_SIDE)
        if shrunk > 1:
            drawn = drawn.reduce(shrunk)
        encoded = io.BytesIO()  # because Pillow's errors of writing to a file do not name a full disk
        drawn.save(encoded, "JPEG", quality=92)
        with atomic_file(path, durable=False) as file:
            file.write(encoded.getbuffer())
    except RunError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and cause.errno in _DISK_ERRORS:
            raise
        return 1, printable(str(error), 1000)
    except Exception as error:  # noqa: BLE001 - the detections are there, whatever drawing fails with
        return 1, _reason(path, error)
    return shrunk, None


def _remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of an earlier process that was killed."""
    for path in folder.glob(".*.tmp"):
        found = re.fullmatch(rf"\.(?:.+\.jpg|{re.escape(RESULTS)})\.([0-9]{{1,10}})\.tmp", path.name)
        if found is not None and not Path("/proc", found[1]).exists():
            path.unlink(missing_ok=True)


class _Lines:
    """A JSON Lines file that at any moment holds complete lines only.

    Args:
        path: the file, which is created or emptied.

    Raises:
        RunError: it cannot be written; the lines before are complete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        """Number of complete lines."""

    def __enter__(self) -> _Lines:
        try:
            self._file = open(self.path, "wb", buffering=0)
        except OSError as error:
            text = os_error_text(error, self.path)
            raise RunError(f"--output-dir must be a folder to write in, but {text}") from error
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())
        with contextlib.suppress(OSError):
            self._file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Append a record."""
        if not os.fstat(self._file.fileno()).st_nlink:
            raise RunError(f"{self.path} was removed while it was written; keep --output-dir until the end")
        rest, start = memoryview(json.dumps(record).encode() + b"\n"), self._file.tell()
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self._file.truncate(start)
            raise RunError(f"{self.path} cannot be written: {error.strerror}{os_error_remedy(error)}") from error
        self.count += 1


def write_results(records: Path, results: Path) -> None:
    """Write detections.json from detections.jsonl, atomically, and with one record in memory at a time.

    Raises:
        RunError: the file system refuses.
    """
    with atomic_file(results) as file, records.open("rb") as lines:
        separator = b"["
        for line in lines:
            record = json.loads(line)
            for found in record.get("detections", ()):
                result = {
                    "image_id": record["image_id"],
                    "category_id": found["category_id"],
                    "bbox": found["bbox"],
                    "score": found["score"],
                    "file_name": record["file_name"],
                    "category_name": found["category_name"],
                }
                file.write(separator + json.dumps(result).encode())
                separator = b",\n"
        file.write((b"[" if separator == b"[" else b"") + b"]\n")


@contextlib.contextmanager
def _until_signal() -> Iterator[list[int]]:
    """Yield a list to which the first SIGINT, SIGTERM or SIGHUP is added; a second one ends the process at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def handle(signum: int, _: object) -> None:
        received.append(signum)
        for number, handler in before.items():
            signal.signal(number, handler)

    wanted = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before: dict[int, Any] = {s: signal.getsignal(s) for s in wanted}
    for wanted_signal in wanted:
        signal.signal(wanted_signal, handle)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
