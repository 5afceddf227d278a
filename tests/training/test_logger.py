"""What a run writes down."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from detector.training.logger import RunLog, duration

STEP = {
    "step": 20, "epoch": 1.0, "loss": 1.5, "loss_cls": 1.0, "loss_box": 0.5, "lr": 0.01, "grad_norm": 3.0,
    "num_pos": 7.0, "images_per_s": 11.0, "data_wait": 0.25,
}  # fmt: skip


def test_a_silent_log_writes_and_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, start_step=0, total_steps=100, enabled=False)
    log.info("hello")
    log.warn("hello")
    log.step(STEP)
    log.evaluation({"step": 1, "epoch": 1, "split": "val", "AP": 0.5}, [])
    log.close()
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr().out == ""


def test_a_step_is_one_line_of_json_and_one_line_of_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, start_step=0, total_steps=100)
    log.step(STEP)
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == STEP, "on the disk before the log is closed"
    log.close()
    line = capsys.readouterr().out.strip()
    assert "\n" not in line
    for part in (
        "epoch 1.00",
        "step 20/100",
        "loss 1.5000",
        "lr 1.00e-02",
        "grad 3.00",
        "11.0 images/s",
        "data wait 25%",
    ):
        assert part in line


def test_what_is_no_number_is_null_because_json_knows_no_other(tmp_path: Path) -> None:
    log = RunLog(tmp_path, start_step=0, total_steps=100)
    log.step({**STEP, "grad_norm": float("nan"), "loss": float("inf")})
    log.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert json.loads(text) == {**STEP, "grad_norm": None, "loss": None}


@pytest.mark.parametrize("width", [50, 80, 140])
def test_a_terminal_of_any_width_shows_all_there_is_to_know(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Between two records the bar moves on, and the time left is never what a narrow terminal cuts off."""
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    log = RunLog(tmp_path, start_step=0, total_steps=100)
    log.step(STEP)
    log.advance(23)
    log.close()
    screen = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out).split("\r")[-1]
    shown = " ".join(screen.split())
    for part in (
        "epoch 1.0",
        " 23/100",
        "eta 0:0",
        "loss 1.5000",
        "grad 3.00",
        "11.0 images/s",
        "data wait 25%",
    ):
        assert part in shown
    assert max(len(line) for line in screen.splitlines()) <= width


def test_an_evaluation_is_recorded_with_its_classes_and_in_tensorboard(tmp_path: Path) -> None:
    log = RunLog(tmp_path, start_step=0, total_steps=100)
    log.evaluation({"step": 20, "epoch": 1, "split": "val", "AP": 0.5}, [{"name": "cat", "AP": 0.5}])
    log.close()
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert record["per_class"] == [{"name": "cat", "AP": 0.5}]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_square_brackets_in_texts_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = RunLog(tmp_path, start_step=0, total_steps=1)
    log.info("[bold]a class called [red][/red]")
    log.warn("[/x]")
    log.close()
    assert capsys.readouterr().out == "[bold]a class called [red][/red]\nwarning: [/x]\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3_725, "1:02:05"), (90_000, "25:00:00")]
)
def test_durations_read_as_hours_minutes_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_time_left_is_unknown_before_the_first_step(tmp_path: Path) -> None:
    log = RunLog(tmp_path, start_step=10, total_steps=100)
    assert log.eta(10) == "?"
    assert log.eta(20).count(":") == 2
    log.close()
