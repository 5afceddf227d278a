"""The benchmark: that it compares like with like, and refuses otherwise."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tools.benchmarks.cases
from detector.losses import RetinaNetLoss
from tests.emulated_gpu import pretended_gpu
from tools.benchmark import main
from tools.benchmarks.measure import Measured, interleaved, noise
from tools.benchmarks.pipeline import loading, opening, scoring
from tools.benchmarks.report import verdict

CPU = torch.device("cpu")
SMALL = ["--device", "cpu", "--size", "32x64", "--backbone", "resnet18", "--repeats", "2", "--classes", "5"]


def test_ways_are_timed_by_turns_and_the_first_one_twice() -> None:
    calls: list[str] = []
    measured = interleaved(
        {"ours": lambda: calls.append("ours"), "peer": lambda: calls.append("peer")}, repeats=3, warmup=1, device=CPU
    )
    assert calls[-12:] == ["ours", "peer"] * 6
    assert {name: len(one.seconds) for name, one in measured.items()} == {"ours": 3, "peer": 6, "again": 3}


def test_times_and_memory_are_those_of_the_work() -> None:
    kept: list[torch.Tensor] = []

    def works() -> None:
        block = torch.ones(25_000_000)
        time.sleep(0.02)
        kept[:] = [block[:1].clone()]

    one = interleaved({"ours": works}, repeats=2, warmup=1, device=CPU)["ours"]
    assert 0.02 <= one.median < 0.5
    assert 90e6 < one.peak_bytes < 160e6


def test_a_ratio_within_the_noise_is_no_difference() -> None:
    timed = {"ours": Measured([1.0, 1.0, 1.0]), "again": Measured([1.1, 1.1, 1.1])}
    assert noise(timed, "ours") == pytest.approx(0.1)
    assert "no difference" in verdict(1.05, 0.1)
    assert "no difference" in verdict(1 / 1.05, 0.1)
    assert verdict(1.5, 0.1).startswith("ratio 1.50")


CASES = [
    *(pytest.param(case, marks=pytest.mark.slow) for case in ("train", "feed")), "infer", "loss", "match", "postprocess",
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_case_ends_with_a_ratio_and_raw_figures(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL, "--precision", "fp32", "--json", str(tmp_path / "raw.json")]
    options += ["--images", "8", "--picture", "48x64"] if case == "feed" else []
    assert main([case, *options, *(["--trace", str(tmp_path / "trace")] if case == "train" else [])]) == 0
    written = json.loads((tmp_path / "raw.json").read_text())
    assert f"{case}, " in capsys.readouterr().out
    assert written["machine"]["threads"] >= 1
    for row in written["rows"]:
        assert row["ratio"] == pytest.approx(row["peer"]["median_ms"] / row["ours"]["median_ms"])
        assert len(row["ours"]["seconds"]) >= 2
    if case == "train":
        assert written["rows"][0]["loss_difference"] < 1e-5
        assert written["rows"][0]["gradient_difference"] < 1e-3
        assert any((tmp_path / "trace").iterdir())


@pytest.mark.parametrize("case", [*CASES[:-1], pytest.param("postprocess", marks=pytest.mark.slow)])
def test_every_case_knows_what_to_do_with_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools.benchmarks.cases, "machine_peak", lambda *_: 1e12)  # a product that a CPU takes long for
    options = [*SMALL, "--device", "cuda", "--compile", "no", "--images", "8", "--picture", "48x64"]
    with pretended_gpu():
        assert main([case, *options]) == 0


def test_different_losses_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def other(*_: Any, **named: Any) -> RetinaNetLoss:
        return RetinaNetLoss(**{**named, "box_weight": 1.001})

    monkeypatch.setattr(tools.benchmarks.cases, "RetinaNetLoss", other)
    assert main(["train", *SMALL, "--precision", "fp32"]) == 1
    assert "losses must agree" in capsys.readouterr().err


def test_different_matches_are_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def other(*_: Any, **named: Any) -> RetinaNetLoss:
        return RetinaNetLoss(**{**named, "fg_iou_thresh": 0.6})

    monkeypatch.setattr(tools.benchmarks.cases, "RetinaNetLoss", other)
    assert main(["match", *SMALL, "--boxes", "30"]) == 1
    assert "matches must be the same" in capsys.readouterr().err


def test_scoring_compares_engines_that_agree() -> None:
    row = scoring(20, repeats=2)
    assert row["ratio"] > 1
    assert len(row["peer"]["seconds"]) == 1


def test_loading_times_both_pipelines() -> None:
    row = loading((48, 64), workers=1, batch=4, repeats=1, pictures=12)
    assert row["ours"]["images_per_second"] > 0
    assert row["peer"]["images_per_second"] > 0
    assert row["kept"]["images_per_second"] > 0


def test_opening_compares_readers_that_find_the_same() -> None:
    row = opening(30, repeats=2)
    assert row["ratio"] > 0
    assert row["peer"]["seconds"]
