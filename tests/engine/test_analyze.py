"""Who holds the loss: counted by hand, and by the tools."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

from detector.datasets.coco import read_coco
from detector.datasets.loader import DetectionDataset, build_loader
from detector.engine.analyze import (
    HARDEST,
    Examples,
    calibration,
    collect_examples,
    cumulate,
    focal_losses,
    loss_table,
)
from detector.engine.evaluate import eval_keys
from detector.engine.predict import model_of
from detector.engine.train import train
from detector.losses import build_loss, sigmoid_focal_loss
from tests.engine.conftest import Run
from tests.tiny import TinyData, images_of, last_checkpoint, tiny_config
from tools.analyze_loss import main as analyze
from tools.plot_losses import main as plot

CPU = torch.device("cpu")


def made(x_t: list[float], positive: list[bool], weight: list[float] | None = None) -> Examples:
    n = len(x_t)
    return Examples(
        np.array(x_t, np.float32), np.array(positive), np.zeros(n, np.int64), np.zeros(n, np.int64),
        np.array(weight or [1.0] * n),
    )  # fmt: skip


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_the_losses_are_the_focal_losses(gamma: float) -> None:
    x_t = np.linspace(-90, 90, 61).astype(np.float32)
    expected = sigmoid_focal_loss(torch.from_numpy(x_t).double(), torch.ones(61), alpha=None, gamma=gamma)
    np.testing.assert_allclose(focal_losses(x_t, gamma), expected.numpy(), rtol=1e-9, atol=1e-300)


def test_the_share_of_the_hardest_is_counted_from_the_end() -> None:
    losses = np.array([1.0, 4.0, 2.0, 3.0])
    cumulated = cumulate(losses, np.ones(4))
    assert cumulated.held_by_hardest(0.25) == pytest.approx(0.4)
    assert cumulated.held_by_hardest(0.5) == pytest.approx(0.7)
    assert cumulated.held_by_hardest(1.0) == pytest.approx(1.0)
    double = cumulate(losses, np.array([1.0, 2.0, 1.0, 1.0]))  # the hardest stands for two
    assert double.held_by_hardest(0.4) == pytest.approx(8 / 14)
    assert cumulate(np.zeros(0), np.zeros(0)).held_by_hardest(0.5) == 0
    assert cumulate(np.zeros(3), np.ones(3)).held_by_hardest(0.5) == 0


def test_the_table_has_every_side_with_its_alpha() -> None:
    examples = made([1.0, 2.0, -1.0], [True, False, False], [1, 10, 10])
    rows = {(r.group, r.side): r for r in loss_table(examples, gammas=[0.0], alpha=0.25, names=["cat"])}
    assert set(rows) == {(g, s) for g in ("all", "cat", "P3") for s in ("positive", "negative")}
    cross = [math.log1p(math.exp(-x)) for x in (1, 2, -1)]
    assert rows["all", "positive"].loss == pytest.approx(0.25 * cross[0])
    assert rows["all", "negative"].loss == pytest.approx(0.75 * 10 * (cross[1] + cross[2]))
    assert rows["all", "negative"].entries == 20
    assert len(rows["all", "negative"].hardest) == len(HARDEST)


def test_calibration_compares_scores_with_what_is_true() -> None:
    """Scores of 0.8: three of four are right; of 0.2: none; below 0.05 nothing counts."""
    logit = math.log(4)
    examples = made([logit] * 3 + [-logit] + [logit] * 2 + [9.0] * 5, [True] * 3 + [False] * 8)
    found = calibration(examples, bins=4)
    filled = found.entries > 0
    np.testing.assert_allclose(found.score[filled], [0.2, 0.8], rtol=1e-6)
    np.testing.assert_allclose(found.frequency[filled], [0.0, 0.75])
    assert found.expected_error == pytest.approx((2 * 0.2 + 4 * 0.05) / 6)
    assert calibration(made([9.0], [False])).expected_error == 0


def test_all_positives_are_collected_and_negatives_stand_for_all(whole: Run, data: TinyData) -> None:
    state = last_checkpoint(whole.out)
    coco = read_coco(data.val, images_of(data.val), verify="none", progress=False)
    model, loss = model_of(state, CPU), build_loss(state.config)
    found = collect_examples(model, loss, coco, state.config, device=CPU, max_negatives=2000)
    again = collect_examples(model, loss, coco, state.config, device=CPU, max_negatives=2000)
    assert np.array_equal(found.x_t, again.x_t)
    assert np.array_equal(found.label, again.label)
    every = collect_examples(model, loss, coco, state.config, device=CPU, max_negatives=10**7)
    assert found.positive.sum() == every.positive.sum() > 0
    assert 1500 < (~found.positive).sum() <= 2000
    assert found.weight[~found.positive].sum() == pytest.approx(every.weight[~every.positive].sum())
    few, many = (focal_losses(e.x_t, 0.0)[~e.positive] for e in (found, every))
    total, exact = (few * found.weight[~found.positive]).sum(), (many * every.weight[~every.positive]).sum()
    assert total == pytest.approx(exact, rel=0.05)
    some = collect_examples(model, loss, coco, state.config, device=CPU, indices=[1, 3], max_negatives=2000)
    assert 0 < some.positive.sum() < found.positive.sum()


def test_the_positive_loss_is_that_of_training(whole: Run, data: TinyData, tmp_path: Path) -> None:
    """Collected entry by entry, it adds up to what the loss itself gives with negatives weighed by nothing."""
    state = last_checkpoint(whole.out)
    coco = read_coco(data.val, images_of(data.val), verify="none", progress=False)
    model, loss = model_of(state, CPU), build_loss(state.config)
    found = collect_examples(model, loss, coco, state.config, device=CPU)
    rows = {
        r.side: r for r in loss_table(found, gammas=[2.0], alpha=0.25, names=coco.categories.names) if r.group == "all"
    }
    loss.class_loss.negative_weight = 0.0
    total = 0.0
    dataset = DetectionDataset(coco, max_size=state.config.data.max_size)
    for batch in build_loader(dataset, eval_keys(coco, state.config), num_workers=0):
        with torch.no_grad():
            outputs = model(batch.images, batch.image_sizes)
            one = torch.tensor(1)
            total += float(loss(outputs, batch.targets, num_pos=one)["loss_cls"])
    assert rows["positive"].loss == pytest.approx(total, rel=1e-4)


def test_the_tool_writes_tables_and_figures(whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint = str(whole.out / "checkpoints" / "best.pt")
    argv = ["--config", str(whole.config), "--checkpoint", checkpoint, "--output-dir", str(tmp_path / "out")]
    assert analyze([*argv, "--gammas", "0,2"]) == 0
    assert "positive : negative loss" in capsys.readouterr().out
    for name in ("cumulative_loss.svg", "probabilities.svg", "calibration.svg"):
        assert (tmp_path / "out" / name).read_text().startswith("<?xml")
    record: dict[str, Any] = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert {row["gamma"] for row in record["rows"]} == {0.0, 2.0}
    with (tmp_path / "out" / "loss.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(record["rows"])
    assert {"all", "disc", "P3"} <= {row["group"] for row in rows}
    assert analyze([*argv, "model.fpn_channels=64"]) == 2
    assert "model.fpn_channels: 64 in the config, 32 in the checkpoint" in capsys.readouterr().err


def test_missing_matplotlib_is_told_before_any_work(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    argv = ["--config", str(whole.config), "--checkpoint", "none.pt", "--output-dir", str(tmp_path / "out")]
    assert analyze(argv) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_losses_are_drawn_and_odd_forms_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--against", "x_t", "--gradient", "focal:gamma=2,alpha=0.25", "focal_star:gamma=2,beta=1"]):
        out = tmp_path / f"{len(more)}.svg"
        assert plot([*more, "--output", str(out)]) == 0
        assert out.read_text().startswith("<?xml")
    for form in ("nothing", "focal:gamma", "focal:gam=1", "focal:gamma=-1"):
        assert plot([form, "--output", str(tmp_path / "x.svg")]) == 2
    assert plot(["ce", "--output", str(tmp_path / "x.txt")]) == 2
    assert "must end in .svg or .png" in capsys.readouterr().err


def test_training_watches_who_holds_the_loss(data: TinyData, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, data, train__epochs=1, train__loss_images=3), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    names = events.Tags()
    for key in ("calibration_error", "positive_over_negative_loss", "negative_loss_of_hardest_1_percent"):
        assert f"loss_holders/{key}" in names["scalars"]
    assert {"p_t/positives", "p_t/negatives"} <= set(names["histograms"])
