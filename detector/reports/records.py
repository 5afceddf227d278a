"""Read the records of a run, metrics.jsonl, and its results, metrics.json; either may be cut off or damaged."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

from detector.atomic import read_json
from detector.errors import RunError
from detector.files import os_error_reason, read_bytes
from detector.json_text import JsonError, parse_json
from detector.text import printable

MAX_NUMBER = 1e15
"""Larger steps, epochs, losses and metrics are no measurements."""


class Records(NamedTuple):
    """What is in metrics.jsonl."""

    training: list[dict[str, Any]]
    """Records with finite `epoch`, and `loss` and `lr`, NaN where they were not finite."""
    validation: list[dict[str, Any]]
    """Records with finite `epoch` and `AP`, and `AP50`."""
    damaged: int
    """Lines that are no such record."""


def read_records(path: Path) -> Records:
    """Read the records of a run; damaged lines are left out and counted.

    Raises:
        RunError: the file cannot be read.
    """
    try:
        lines = read_bytes(path).splitlines()
    except OSError as error:
        raise RunError(f"{path} cannot be read: {os_error_reason(error)}") from None
    training, validation, damaged = [], [], 0
    for line in lines:
        record = _record(line)
        if record is None:
            damaged += 1
        elif record.get("split") == "val":
            validation.append(record)
        elif "split" not in record:
            training.append(record)
    return Records(training, validation, damaged)


def _record(line: bytes) -> dict[str, Any] | None:
    try:
        record = parse_json(line)
    except JsonError:
        return None
    if not isinstance(record, dict):
        return None
    is_validation = record.get("split") == "val"
    if not all(is_number(record.get(key)) for key in (["epoch", "AP"] if is_validation else ["epoch"])):
        return None
    for key in ("loss", "lr", "AP50"):  # null where the number was not finite
        if key in record and not is_number(record[key]):
            record[key] = math.nan
    return {"AP50": math.nan, **record} if is_validation else {"loss": math.nan, **record}


def is_number(value: object) -> bool:
    """Whether a value is a number that a measurement can be."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -MAX_NUMBER <= value <= MAX_NUMBER


def read_metrics(path: Path) -> dict[str, Any]:
    """Read the metrics of a run on its validation set from metrics.json.

    Raises:
        RunError: the file cannot be read, or is damaged.
    """
    content = read_json(path)
    content = content if isinstance(content, dict) else {}
    require_metrics(content, path)
    numbers = {key: value for key, value in content.items() if is_number(value)}
    return {**numbers, "per_class": [{**row, "name": printable(row["name"])} for row in content["per_class"]]}


def require_metrics(content: object, path: Path) -> None:
    """Check that parsed JSON holds what an evaluation writes.

    Raises:
        RunError: it does not, and names the file.
    """
    content = content if isinstance(content, dict) else {}
    rows = content.get("per_class")
    rows = rows if isinstance(rows, list) else [None]
    complete = all(isinstance(r, dict) and isinstance(r.get("name"), str) and is_number(r.get("AP")) for r in rows)
    if not complete or not all(is_number(content.get(key)) for key in ("AP", "AP50")):
        raise RunError(f"{path} must hold AP, AP50 and per_class, as an evaluation writes them; it may be damaged")
