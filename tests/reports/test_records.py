"""metrics.jsonl and metrics.json as a killed process, a full disk or an editor may leave them."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from detector.errors import RunError
from detector.reports.plots import plot_runs
from detector.reports.records import read_metrics, read_records

TRAINING = b'{"step": 1, "epoch": 0.5, "loss": 2.5, "lr": 0.1}\n'
VALIDATION = b'{"step": 2, "epoch": 1.0, "split": "val", "AP": 0.25, "AP50": 0.5}\n'
DAMAGED = {
    "cut off": b'{"step": 3, "epo',
    "no text": b"\xff\xfe\x80{\n",
    "a step of text": b'{"step": "three", "epoch": "two", "loss": 1, "lr": 1}\n',
    "infinite": b'{"step": 3, "epoch": 1e999, "loss": 1, "lr": 1}\n',
    "not a number": b'{"step": 3, "epoch": NaN, "loss": 1, "lr": 1}\n',
    "vast": b'{"step": 3, "epoch": ' + b"9" * 4000 + b', "loss": 1, "lr": 1}\n',
    "no object": b"3\n",
    "zeros": bytes(50) + b"\n",
    "deep": b"[" * 10_000 + b"\n",
    "a key twice": b'{"epoch": 1, "epoch": 2, "loss": 1, "lr": 1}\n',
    "validation without AP": b'{"step": 3, "epoch": 2, "split": "val"}\n',
}


@pytest.mark.parametrize("content", [b"", b"\n"])
def test_an_empty_file_has_no_records(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(content)
    assert read_records(tmp_path / "metrics.jsonl")[:2] == ([], [])


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_records_are_left_out_with_a_warning(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_bytes(TRAINING + VALIDATION + DAMAGED[kind])
    records = read_records(tmp_path / "metrics.jsonl")
    assert (len(records.training), len(records.validation), records.damaged) == (1, 1, 1)
    plot_runs([str(tmp_path)], tmp_path / "curves.png")
    assert "metrics.jsonl: 1 damaged records are left out" in capsys.readouterr().err


def test_numbers_that_were_not_finite_stay_gaps(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "epoch": 0.5, "loss": null, "lr": 0.1}\n' + VALIDATION)
    records = read_records(tmp_path / "metrics.jsonl")
    assert math.isnan(records.training[0]["loss"])
    assert records.damaged == 0


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir])
def test_what_is_no_file_is_an_error(make: Any, tmp_path: Path) -> None:
    make(tmp_path / "metrics.jsonl")
    with pytest.raises(RunError, match=r"metrics\.jsonl cannot be read: is a"):
        plot_runs([str(tmp_path)], tmp_path / "curves.png")


METRICS = {"AP": 0.25, "AP50": 0.5, "per_class": [{"category_id": 3, "name": "cat", "num_gt": 1, "AP": 0.25}]}


def test_metrics_are_read_without_those_of_the_test_set(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text(json.dumps({"format": 1, **METRICS, "test": {"AP": 1}}))
    assert read_metrics(tmp_path / "metrics.json") == METRICS


@pytest.mark.parametrize(
    "content",
    [
        "", '{"AP": 0.2', "[]", "3", json.dumps({**METRICS, "AP": "high"}), json.dumps({**METRICS, "AP": math.inf}),
        json.dumps({**METRICS, "per_class": 3}), json.dumps({**METRICS, "per_class": [{"name": 3, "AP": 0.1}]}),
        json.dumps({**METRICS, "per_class": [{"name": "cat"}]}), "[" * 10_000, "\ud800",
    ],
)  # fmt: skip
def test_damaged_metrics_are_an_error(content: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(RunError, match=r"metrics\.json"):
        read_metrics(tmp_path / "metrics.json")
