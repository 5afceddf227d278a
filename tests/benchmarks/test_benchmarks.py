"""The benchmark compares implementations that compute the same, and refuses others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.benchmarks.cases
import tools.benchmarks.components
import tools.benchmarks.inference
import tools.benchmarks.training
from detector.assign.max_iou import MaxIoUAssigner
from detector.losses import RetinaNetLoss
from tests.emulated_gpu import emulated_gpu
from tools.benchmark import build_parser, main
from tools.benchmarks.measure import Timings, interleaved, noise
from tools.benchmarks.pipeline import loading, opening, scoring
from tools.benchmarks.report import verdict

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--size", "32x64", "--backbone", "resnet18", "--repeats", "2", "--classes", "5"]


def test_implementations_are_timed_in_alternation_and_ours_twice() -> None:
    calls: list[str] = []
    timings = interleaved(
        {"ours": lambda: calls.append("ours"), "peer": lambda: calls.append("peer")}, repeats=3, warmup=1, device=CPU
    )
    assert calls[-12:] == ["ours", "peer"] * 6
    assert {name: len(one.seconds) for name, one in timings.items()} == {"ours": 3, "peer": 6, "again": 3}


def test_times_and_memory_are_of_one_repetition() -> None:
    kept: list[torch.Tensor] = []

    def works() -> None:
        block = torch.ones(25_000_000)
        time.sleep(0.02)
        kept[:] = [block[:1].clone()]

    one = interleaved({"ours": works}, repeats=2, warmup=1, device=CPU)["ours"]
    assert 0.02 <= one.median < 0.5
    assert 90e6 < one.peak_bytes < 160e6


def test_a_ratio_within_the_noise_is_no_difference() -> None:
    timings = {"ours": Timings([1.0, 1.0, 1.0]), "again": Timings([1.1, 1.1, 1.1])}
    assert noise(timings) == pytest.approx(0.1)
    assert "no difference" in verdict(1.05, 0.1)
    assert "no difference" in verdict(1 / 1.05, 0.1)
    assert verdict(1.5, 0.1).startswith("ratio 1.50")


CASES = [
    *(pytest.param(case, marks=pytest.mark.slow) for case in ("train", "feed")),
    "infer", "loss", "match", "postprocess",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_case_prints_a_row_and_writes_raw_figures(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--precision", "fp32", "--json", str(tmp_path / "raw.json")]
    options += ["--images", "8", "--image-size", "48x64"] if case == "feed" else []
    assert main([case, *options, *(["--trace", str(tmp_path / "trace")] if case == "train" else [])]) == 0
    written = json.loads((tmp_path / "raw.json").read_text())
    assert f"{case}, " in capsys.readouterr().out
    assert written["format"] == 1
    assert written["machine"]["threads"] >= 1
    for row in written["rows"]:
        assert row["ratio"] == pytest.approx(row["peer"]["median_ms"] / row["ours"]["median_ms"])
        assert len(row["ours"]["seconds"]) >= 2
    if case == "train":
        assert written["rows"][0]["loss_difference"] < 1e-5
        assert written["rows"][0]["gradient_difference"] < 1e-3
        assert any((tmp_path / "trace").iterdir())


@pytest.mark.parametrize(
    "case",
    [
        "loss",
        "match",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("train", "feed", "infer", "postprocess")),
    ],
)
def test_every_case_runs_on_an_emulated_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (tools.benchmarks.training, tools.benchmarks.inference):
        monkeypatch.setattr(module, "machine_peak", lambda *_: 1e12)  # the GPU's matrix product is slow on a CPU
    options = [*SMALL, "--device", "cuda", "--compile", "no", "--images", "8", "--image-size", "48x64"]
    with emulated_gpu():
        assert main([case, *options]) == 0


def test_different_losses_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def other(*_: Any, **named: Any) -> RetinaNetLoss:
        return RetinaNetLoss(**{**named, "box_weight": 1.001})

    monkeypatch.setattr(tools.benchmarks.training, "RetinaNetLoss", other)
    assert main(["train", *SMALL, "--precision", "fp32"]) == 1
    assert "losses must agree" in capsys.readouterr().err


def test_different_assignments_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def other(*_: Any, **named: Any) -> RetinaNetLoss:
        return RetinaNetLoss(**{**named, "assigner": MaxIoUAssigner(fg_iou_thresh=0.6)})

    monkeypatch.setattr(tools.benchmarks.components, "RetinaNetLoss", other)
    assert main(["match", *SMALL, "--boxes", "30"]) == 1
    assert "assignments must be the same" in capsys.readouterr().err


def test_scoring_compares_engines_with_equal_metrics() -> None:
    row = scoring(20, repeats=2)
    assert row["ratio"] > 1
    assert len(row["peer"]["seconds"]) == 1


def test_loading_times_both_pipelines() -> None:
    row = loading((48, 64), workers=1, batch=4, repeats=1, images=12)
    assert row["ours"]["images_per_second"] > 0
    assert row["peer"]["images_per_second"] > 0
    assert row["cached"]["images_per_second"] > 0


def test_opening_compares_readers_with_equal_annotations() -> None:
    row = opening(30, repeats=2)
    assert row["ratio"] > 0
    assert row["peer"]["seconds"]


@pytest.mark.parametrize("size", ["800", "800x", "x800", "800x-1", "axb"])
def test_sizes_must_be_height_and_width(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["loss", "--size", size])
    assert "must be HEIGHTxWIDTH, for example 800x1333, got" in capsys.readouterr().err


def test_the_help_lists_every_case_and_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f" {case} " in text for case in tools.benchmarks.cases.CASES)
    options = {action.option_strings[0] for action in build_parser()._actions if action.option_strings} - {"-h"}
    assert text.count("(default: ") == len(options)
