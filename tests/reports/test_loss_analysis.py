"""Loss concentration: against values computed by hand, and by the tools."""

from __future__ import annotations

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.checkpoint import load_checkpoint, save_checkpoint
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.opening import read_coco
from detector.evaluation.dataset_loop import eval_keys
from detector.inference.predictor import model_of
from detector.losses import ClassLoss, RetinaNetLoss, build_loss, sigmoid_focal_loss
from detector.losses.retinanet import Normalizers
from detector.reports import loss_analysis as module
from detector.reports import plots
from detector.reports.loss_analysis import curve_to_json, loss_concentration, loss_notes, write_analysis
from detector.reports.loss_examples import Examples, ImageEntries, collect_examples, subsample
from detector.reports.loss_statistics import CumulativeLoss, calibration, cumulate, focal_losses, loss_table
from detector.structures import HeadOutputs
from detector.training.train import train
from tests.conftest import Run
from tests.tiny import TinyData, images_of, last_checkpoint, tiny_config, write_coco
from tools.analyze_loss import main as analyze
from tools.plot import main as plot

CPU = torch.device("cpu")


LN2 = math.log(2)


def make_examples(x_t: list[float], positive: list[bool]) -> Examples:
    n = len(x_t)
    zeros, ones = np.zeros(n, np.int64), np.ones(n)
    return Examples(np.array(x_t, np.float32), np.array(positive), zeros, zeros, ones, ones)


def six() -> Examples:
    """Two positives and four negatives that represent a hundred, of two classes (a, b) and two levels (P3, P4).

    Their p_t are 1/2 and 1/4; 1/2, 3/4, 0.91 and 0.99. Negatives score 1 - p_t.
    """
    p_t = np.array([1 / 2, 1 / 4, 1 / 2, 3 / 4, 0.91, 0.99])
    return Examples(
        np.log(p_t / (1 - p_t)).astype(np.float32),
        np.array([True, True, False, False, False, False]),
        label=np.array([0, 1, 0, 1, 0, 1]),
        level=np.array([0, 1, 0, 1, 1, 0]),
        alpha=np.array([3, 5, 0.5, 0.5, 0.5, 0.5]),
        weight=np.array([1.0, 1, 10, 20, 30, 40]),
    )


OF_POSITIVES = {0.0: [3 * LN2, 10 * LN2], 2.0: [3 / 4 * LN2, 10 * 9 / 16 * LN2]}
"""Losses of `six`, easiest first."""
OF_NEGATIVES = {
    0.0: [-20 * math.log(0.99), -15 * math.log(0.91), -10 * math.log(3 / 4), 5 * LN2],
    2.0: [-20e-4 * math.log(0.99), -15 * 0.0081 * math.log(0.91), -10 / 16 * math.log(3 / 4), 5 / 4 * LN2],
}


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0, 5.0])
def test_the_losses_are_the_focal_losses(gamma: float) -> None:
    x_t = np.linspace(-90, 90, 61).astype(np.float32)
    expected = sigmoid_focal_loss(torch.from_numpy(x_t).double(), torch.ones(61), alpha=None, gamma=gamma)
    np.testing.assert_allclose(focal_losses(x_t, gamma), expected.numpy(), rtol=1e-9, atol=1e-300)


def test_the_share_of_the_hardest_is_counted_from_the_end() -> None:
    losses = np.array([1.0, 4.0, 2.0, 3.0])
    cumulative = cumulate(losses, np.ones(4))
    assert cumulative.share_of_hardest(0.25) == pytest.approx(0.4)
    assert cumulative.share_of_hardest(0.5) == pytest.approx(0.7)
    assert cumulative.share_of_hardest(1.0) == pytest.approx(1.0)
    double = cumulate(losses, np.array([1.0, 2.0, 1.0, 1.0]))  # the hardest represents two
    assert double.share_of_hardest(0.4) == pytest.approx(8 / 14)
    assert cumulate(np.zeros(0), np.zeros(0)).share_of_hardest(0.5) == 0
    assert cumulate(np.zeros(3), np.ones(3)).share_of_hardest(0.5) == 0


def test_the_table_has_both_sides_of_every_class_and_level() -> None:
    table = loss_table(six(), gammas=[0.0, 2.0], names=["a", "b"])
    rows = {(r.group, r.gamma, r.side): r for r in table}
    assert {g for g, _, _ in rows} == {"all", "a", "b", "P3", "P4"}
    assert len(table) == len(rows) == 5 * 2 * 2
    for gamma in (0.0, 2.0):
        (one, two), (f, e, d, c) = OF_POSITIVES[gamma], OF_NEGATIVES[gamma]
        losses = {"all": (one + two, f + e + d + c), "a": (one, c + e), "b": (two, d + f), "P3": (one, c + f)}
        for group, (positive, negative) in {**losses, "P4": (two, d + e)}.items():
            assert rows[group, gamma, "positive"].loss == pytest.approx(positive, rel=1e-5)
            assert rows[group, gamma, "negative"].loss == pytest.approx(negative, rel=1e-5)
            assert rows[group, gamma, "negative"].ratio == pytest.approx(positive / negative, rel=1e-5)
    entries = {g: rows[g, 2.0, "negative"].entries for g in ("all", "a", "b", "P3", "P4")}
    assert entries == {"all": 100, "a": 40, "b": 60, "P3": 50, "P4": 50}
    # 11 entries score 0.5, one is right; 21 score 0.25, one is right; 30 score 0.09; 40 score too little to count.
    errors = {"all": 11.45 / 62, "a": 7.2 / 41, "b": 4.25 / 21, "P3": 4.5 / 11, "P4": 6.95 / 51}
    for group, error in errors.items():
        assert rows[group, 0.0, "positive"].calibration_error == pytest.approx(error, rel=1e-5)
    assert rows["all", 0.0, "positive"].hardest == pytest.approx([0.02 / 13, 0.2 / 13, 2 / 13, 4 / 13], rel=1e-5)
    kinds = {(r.kind, r.group) for r in table}
    assert kinds == {("all", "all"), ("class", "a"), ("class", "b"), ("level", "P3"), ("level", "P4")}
    unweighted = six()._replace(alpha=np.array([1.0, 1, 0, 0, 0, 0]))
    assert loss_table(unweighted, gammas=[0.0], names=["a", "b"])[0].ratio is None


def test_a_class_may_have_the_name_of_another_group(tmp_path: Path) -> None:
    lines = write_analysis(six(), ClassLoss(), names=["all", "P3"], gammas=[2.0], output_dir=tmp_path)
    assert len(lines) == 4, "number of entries, table head, one line for the gamma, calibration"
    with (tmp_path / "loss.csv").open() as file:
        places = [(row["kind"], row["group"], row["side"]) for row in csv.DictReader(file)]
    assert len(set(places)) == len(places) == 5 * 2


def test_written_results_equal_values_computed_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}
    monkeypatch.setattr(module, "save", lambda figure, path: figures.update({path.name: figure}))
    loss = ClassLoss(alpha=[3.0, 5.0], negative_weight=0.5)
    lines = write_analysis(six(), loss, names=["a", "b"], gammas=[0.0, 2.0], output_dir=tmp_path, notes=["a note"])
    assert lines[:2] == [
        "a note", "analyzed all 2 positive entries (an anchor and a class) and a sample of 4 of the 100 negative ones",
    ]  # fmt: skip
    ratio = {g: sum(OF_POSITIVES[g]) / sum(OF_NEGATIVES[g]) for g in (0.0, 2.0)}
    assert [line.split()[-1] for line in lines[3:5]] == [f"{ratio[0]:.3g}", f"{ratio[2]:.3g}"]

    record: dict[str, Any] = json.loads((tmp_path / "loss.json").read_text())
    assert record["alpha"] == {"a": 3, "b": 5}
    assert record["negative_weight"] == 0.5
    assert record["analyzed"] == {"positive": {"entries": 2, "of": 2}, "negative": {"entries": 4, "of": 100}}
    last = record["rows"][-1]
    assert (last["group"], last["gamma"], last["side"]) == ("P4", 2.0, "negative")
    assert last["ratio"] == pytest.approx(OF_POSITIVES[2][1] / sum(OF_NEGATIVES[2][1:3]), rel=1e-5)
    assert last["calibration_error"] == pytest.approx(6.95 / 51, rel=1e-5)
    bins = {"positive": {12: 1, 25: 1}, "negative": {25: 10, 37: 20, 45: 30, 49: 40}}
    for side, wanted in bins.items():
        assert {i: count for i, count in enumerate(record["p_t"][side]) if count} == wanted
    reliability = {k: [v for v in values if v] for k, values in record["reliability"].items()}
    assert reliability["score"] == pytest.approx([0.09, 0.25, 0.5], abs=1e-6)
    assert reliability["frequency"] == pytest.approx([1 / 21, 1 / 11], abs=1e-6)
    assert reliability["entries"] == pytest.approx([30, 21, 11])
    assert record["reliability"]["score"][1] is None

    drawn, both = figures["cumulative_loss.svg"].axes, {"positive": OF_POSITIVES, "negative": OF_NEGATIVES}
    for axes, (side, losses), examples in zip(drawn, both.items(), ([0.5, 1], [0.4, 0.7, 0.9, 1]), strict=True):
        assert axes.get_title() == f"{side}s"
        for gamma, line in zip((0.0, 2.0), axes.lines, strict=True):
            shares = np.cumsum(losses[gamma]) / sum(losses[gamma])
            curve = record["curves"][side][f"{gamma:g}"]
            assert curve["examples"] == pytest.approx(examples)
            assert curve["loss"] == pytest.approx(shares, abs=1e-6)
            assert line.get_label() == f"gamma {gamma:g}"
            np.testing.assert_allclose(line.get_xydata(), np.c_[examples, shares], rtol=1e-5)
    for bars in figures["probabilities.svg"].axes[0].containers:
        wanted = bins[bars.get_label().removesuffix("s")]
        assert {i: bar.get_height() for i, bar in enumerate(bars) if bar.get_height()} == wanted
    filled = ~np.isnan(figures["calibration.svg"].axes[0].lines[1].get_ydata())
    points = figures["calibration.svg"].axes[0].lines[1].get_xydata()[filled]
    np.testing.assert_allclose(points, [[0.09, 0], [0.25, 1 / 21], [0.5, 1 / 11]], atol=1e-6)

    with (tmp_path / "loss.csv").open() as file:
        head, first, *_ = csv.reader(file)
    assert dict(zip(head, first, strict=True)) == {
        "kind": "all", "group": "all", "gamma": "0.0", "side": "positive", "entries": "2", "loss": f"{13 * LN2:.6g}",
        "held by hardest 0.1%": "0.0015", "held by hardest 1.0%": "0.0154", "held by hardest 10.0%": "0.1538",
        "held by hardest 20.0%": "0.3077", "positive : negative loss": f"{ratio[0]:.4g}", "calibration error": "0.1847",
    }  # fmt: skip


def test_curves_in_json_have_at_most_a_hundred_points_and_the_same_end() -> None:
    x = np.linspace(0.001, 1, 5000)
    points = curve_to_json(CumulativeLoss(x, x**9))
    assert 65 < len(points["loss"]) <= 100
    assert (points["examples"][-1], points["loss"][-1]) == (1, 1)


def test_the_record_for_tensorboard_equals_values_computed_by_hand() -> None:
    found = loss_concentration(six(), ClassLoss(gamma=2.0))
    hardest = OF_NEGATIVES[2][3] / sum(OF_NEGATIVES[2])  # a tenth of the negatives
    others = OF_NEGATIVES[2][2] / sum(OF_NEGATIVES[2])  # the next fifth
    assert found.scalars == pytest.approx(
        {
            "calibration_error": 11.45 / 62,
            "positive_loss_of_hardest_0.1_percent": 0.002 * 15 / 17,  # of the harder half, which has 15 of 17
            "positive_loss_of_hardest_1_percent": 0.02 * 15 / 17,
            "positive_loss_of_hardest_10_percent": 0.2 * 15 / 17,
            "positive_loss_of_hardest_20_percent": 0.4 * 15 / 17,
            "negative_loss_of_hardest_0.1_percent": 0.01 * hardest,
            "negative_loss_of_hardest_1_percent": 0.1 * hardest,
            "negative_loss_of_hardest_10_percent": hardest,
            "negative_loss_of_hardest_20_percent": hardest + others / 2,
            "positive_over_negative_loss": sum(OF_POSITIVES[2]) / sum(OF_NEGATIVES[2]),
        },
        rel=1e-5,
    )
    np.testing.assert_allclose(found.histograms["positives"], [1 / 2, 1 / 4], rtol=1e-6)
    np.testing.assert_allclose(found.histograms["negatives"], [1 / 2, 3 / 4, 0.91, 0.99], rtol=1e-6)
    assert set(loss_concentration(six().select(~six().positive), ClassLoss()).scalars) == {"calibration_error"}


def test_figures_for_tensorboard_have_curves_of_several_gammas_and_the_runs_own() -> None:
    found = loss_concentration(six(), ClassLoss(gamma=3.0))
    both = found.figures["cumulative_loss"].axes
    gammas = ["0", "0.5", "1", "2", "3", "5"]
    assert [[line.get_label() for line in axes.lines] for axes in both] == [[f"gamma {g}" for g in gammas]] * 2
    for axes, losses in zip(both, (OF_POSITIVES, OF_NEGATIVES), strict=True):
        np.testing.assert_allclose(axes.lines[3].get_ydata(), np.cumsum(losses[2]) / sum(losses[2]), rtol=1e-5)
    points = found.figures["calibration"].axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(points[~np.isnan(points)], [0, 1 / 21, 1 / 11], atol=1e-6)
    assert [line.split()[0] for line in found.text[2:8]] == gammas
    assert "training used ghm with sigmoid" in loss_concentration(six(), ClassLoss("ghm")).text[0]


def test_without_matplotlib_the_record_for_tensorboard_has_a_remedy_instead_of_figures(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = loss_concentration(six(), ClassLoss())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    found = loss_concentration(six(), ClassLoss())
    assert (found.figures, found.scalars) == ({}, whole.scalars)
    assert found.text[:-1] == whole.text
    assert "pip install 'retinanet-detector[plots]'" in found.text[-1]


@pytest.mark.parametrize("settings", [{}, {"alpha": None}, {"alpha": [3.0, 5.0]}, {"negative_weight": 0.1}])
def test_the_balance_is_that_of_the_loss(settings: dict[str, Any]) -> None:
    """The loss of logits of 0 is ln 2 without a balance."""
    loss = ClassLoss(gamma=0.0, **settings)
    positive, negative = loss.balance(2)
    each = loss.per_anchor(torch.zeros(3, 2), torch.tensor([0, 1, -1]), torch.zeros(3))
    expected = [float(positive[0]) + negative, float(positive[1]) + negative, 2 * negative]
    assert (each / LN2).tolist() == pytest.approx(expected)


def test_a_note_reports_that_training_had_another_loss() -> None:
    assert loss_notes(ClassLoss()) == []
    assert "training used ohem with sigmoid" in loss_notes(ClassLoss("ohem"))[0]
    assert "training used focal with softmax" in loss_notes(ClassLoss(activation="softmax"))[0]


class ConstantNetwork(torch.nn.Module):
    """Returns the same logits of three anchors for every image: two on P3, one on P4."""

    def forward(self, images: torch.Tensor, image_sizes: torch.Tensor) -> HeadOutputs:
        anchors = torch.tensor([[0.0, 0, 16, 16], [32, 32, 48, 48], [0, 0, 64, 64]])
        logits = torch.tensor([[[-1.0, -2], [-3, 4]]]), torch.tensor([[[5.0, -6]]])
        return HeadOutputs(logits, (torch.zeros(1, 2, 4), torch.zeros(1, 1, 4)), anchors)


def test_every_entry_has_its_class_level_side_and_weight(data: TinyData, tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    boxes = [{"category_id": 1, "bbox": [0, 0, 64, 64]}, {"category_id": 2, "bbox": [32, 32, 16, 16]}]
    content = {
        "images": [{"id": 1, "file_name": "0.png", "width": 64, "height": 64}],
        "annotations": [{"id": i + 1, "image_id": 1, "iscrowd": 0, "area": 99, **box} for i, box in enumerate(boxes)],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }
    (tmp_path / "val.json").write_text(json.dumps(content))
    coco = read_coco(tmp_path / "val.json", tmp_path, verify="none", progress=False)
    loss = RetinaNetLoss(ClassLoss(alpha=[3.0, 5.0], negative_weight=0.5))
    model: Any = ConstantNetwork()
    found = collect_examples(model, loss, coco, tiny_config(tmp_path, data), device=CPU)
    entries = sorted(zip(*(field.tolist() for field in found), strict=True))
    assert entries == [  # x_t, positive, label, level, alpha, weight
        (1, False, 0, 0, 0.5, 1), (2, False, 1, 0, 0.5, 1), (3, False, 0, 0, 0.5, 1), (4, True, 1, 0, 5, 1),
        (5, True, 0, 1, 3, 1), (6, False, 1, 1, 0.5, 1),
    ]  # fmt: skip


def test_a_sample_of_negatives_is_unique_and_has_the_sum_of_all_on_average() -> None:
    x = -torch.arange(40.0).reshape(20, 2)
    label = torch.tensor([1, -2, *[-1] * 18])  # of 40 entries one is positive, two are ignored
    image = ImageEntries(x, label, torch.zeros(20, dtype=torch.int64), torch.ones(2), 1.0)
    assert sorted(image.negatives(1.0, seed=0).x_t.tolist()) == [0.0, *range(4, 40)]
    sums = []
    for seed in range(400):
        half = image.negatives(0.5, seed=seed)
        for some in (half, subsample(half, 0.2)):
            assert len(set(some.x_t.tolist())) == len(some.x_t)
            assert some.weight.sum() == pytest.approx(37)
        assert len(some.x_t) == 7
        sums.append(some.x_t @ some.weight)
    assert np.mean(sums) == pytest.approx(sum(range(4, 40)), rel=0.03)


def test_calibration_compares_scores_with_the_share_of_positives() -> None:
    """Of scores of 0.8, three of four are positive; of 0.2, none; scores below 0.05 do not count."""
    logit = math.log(4)
    examples = make_examples([logit] * 3 + [-logit] + [logit] * 2 + [9.0] * 5, [True] * 3 + [False] * 8)
    found = calibration(examples, bins=4)
    filled = found.entries > 0
    np.testing.assert_allclose(found.score[filled], [0.2, 0.8], rtol=1e-6)
    np.testing.assert_allclose(found.frequency[filled], [0.0, 0.75])
    assert found.expected_error == pytest.approx((2 * 0.2 + 4 * 0.05) / 6)
    assert calibration(make_examples([9.0], [False])).expected_error == 0


def test_all_positives_are_collected_and_negatives_represent_all(whole: Run, data: TinyData) -> None:
    state = last_checkpoint(whole.out)
    coco = read_coco(data.val, images_of(data.val), verify="none", progress=False)
    model, loss = model_of(state, CPU), build_loss(state.config)
    found = collect_examples(model, loss, coco, state.config, device=CPU, max_negatives=2000)
    again = collect_examples(model, loss, coco, state.config, device=CPU, max_negatives=2000)
    assert np.array_equal(found.x_t, again.x_t)
    assert np.array_equal(found.label, again.label)
    every = collect_examples(model, loss, coco, state.config, device=CPU, max_negatives=10**7)
    assert found.positive.sum() == every.positive.sum() > 0
    assert 1990 < (~found.positive).sum() <= 2000
    assert (every.weight == 1).all()
    count = int((~every.positive).sum())
    just = collect_examples(model, loss, coco, state.config, device=CPU, max_negatives=count)
    assert np.array_equal(np.sort(just.x_t), np.sort(every.x_t))  # although images have several sizes
    less = collect_examples(model, loss, coco, state.config, device=CPU, max_negatives=count - 1)
    assert len(less.x_t) < len(every.x_t)
    assert found.weight[~found.positive].sum() == pytest.approx(every.weight[~every.positive].sum())
    few, many = (focal_losses(e.x_t, 0.0)[~e.positive] for e in (found, every))
    total, exact = (few * found.weight[~found.positive]).sum(), (many * every.weight[~every.positive]).sum()
    assert total == pytest.approx(exact, rel=0.05)
    some = collect_examples(model, loss, coco, state.config, device=CPU, indices=[1, 3], max_negatives=2000)
    assert 0 < some.positive.sum() < found.positive.sum()


def test_the_positive_loss_equals_that_of_training(whole: Run, data: TinyData, tmp_path: Path) -> None:
    """Entry by entry, it adds up to the training loss with a weight of 0 for negatives."""
    state = last_checkpoint(whole.out)
    coco = read_coco(data.val, images_of(data.val), verify="none", progress=False)
    model, loss = model_of(state, CPU), build_loss(state.config)
    found = collect_examples(model, loss, coco, state.config, device=CPU)
    positive = loss_table(found, gammas=[2.0], names=coco.categories.names)[0]
    loss.class_loss.negative_weight = 0.0
    total = 0.0
    dataset = DetectionDataset(coco, max_size=state.config.data.max_size)
    for batch in build_loader(dataset, eval_keys(coco, state.config), num_workers=0):
        with torch.no_grad():
            outputs = model(batch.images, batch.image_sizes)
            one = torch.tensor(1.0)
            total += float(loss(outputs, batch.targets, normalizers=Normalizers(one, one, one))["loss_cls"])
    assert positive.loss == pytest.approx(total, rel=1e-4)


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
    assert {("all", "all"), ("class", "disc"), ("level", "P3")} <= {(row["kind"], row["group"]) for row in rows}
    assert analyze([*argv, "model.fpn_channels=64"]) == 2
    assert "model.fpn_channels: 64 in the config, 32 in the checkpoint" in capsys.readouterr().err


def test_the_tool_uses_the_checkpoints_weights_and_reports_differences(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = load_checkpoint(whole.out / "checkpoints" / "best.pt")
    trained = {"cls": "focal_star", "alpha": "inverse_frequency", "negative_weight": 0.1}
    state.config = state.config.model_copy(update={"loss": state.config.loss.model_copy(update=trained)})
    state.alpha = [1.0, 2.0, 3.0]
    save_checkpoint(state, tmp_path / "weighted.pt")
    argv = ["--config", str(whole.config), "--checkpoint", str(tmp_path / "weighted.pt"), "--gammas", "2"]
    assert analyze([*argv, "--output-dir", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "loss.alpha is the checkpoint's inverse_frequency, not the config's 0.25" in printed
    assert "the analyzed loss is not the training loss: training used focal_star with sigmoid" in printed
    record: dict[str, Any] = json.loads((tmp_path / "out" / "loss.json").read_text())
    assert list(record["alpha"].values()) == [1, 2, 3]
    assert record["negative_weight"] == 0.1
    assert len(record["notes"]) == 4  # cls, alpha, negative_weight; the analyzed loss
    by = {(row["group"], row["side"]): row for row in record["rows"]}
    total = sum(by[name, "positive"]["loss"] for name in record["alpha"] if (name, "positive") in by)
    assert by["all", "positive"]["loss"] == pytest.approx(total)


def test_missing_matplotlib_is_reported_before_any_work(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    unread = tmp_path / "unread.pt"
    unread.touch()
    argv = ["--config", str(whole.config), "--checkpoint", str(unread), "--output-dir", str(tmp_path / "out")]
    assert analyze(argv) == 2
    assert "pip install 'retinanet-detector[plots]'" in capsys.readouterr().err


def test_losses_are_drawn_and_invalid_forms_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--against", "x_t", "--gradient", "focal:gamma=2,alpha=0.25", "focal_star:gamma=2,beta=1"]):
        out = tmp_path / f"{len(more)}.svg"
        assert plot(["losses", *more, "--output", str(out)]) == 0
        assert out.read_text().startswith("<?xml")
    for form in ("nothing", "focal:gamma", "focal:gam=1", "focal:gamma=-1"):
        assert plot(["losses", form, "--output", str(tmp_path / "x.svg")]) == 2
    assert plot(["losses", "ce", "--output", str(tmp_path / "x.txt")]) == 2
    assert "must be a .svg or .png file" in capsys.readouterr().err


SHARED_FORMS = ["ce", "focal:gamma=2", "focal_star:gamma=2,beta=1", "focal_star:gamma=4,beta=0"]
"""Of the paper's figures 5 and 6."""


@pytest.mark.parametrize("against", ["p_t", "x_t"])
@pytest.mark.parametrize("gradient", [False, True])
def test_losses_and_their_derivatives_are_drawn_over_probability_or_logit(
    against: str, gradient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forms and derivatives of the paper's appendices A and B, for a positive."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.append(figure))
    argv = [
        "losses",
        *SHARED_FORMS,
        "--against",
        against,
        *["--gradient"] * gradient,
        "--output",
        str(tmp_path / "x.svg"),
    ]
    assert plot(argv) == 0
    (axes,) = drawn[0].axes
    labels = {"p_t": "p_t, probability of the ground truth", "x_t": "x_t, logit of the ground truth"}
    assert (axes.get_xlabel(), axes.get_ylabel()) == (labels[against], "derivative by x_t" if gradient else "loss")
    assert [line.get_label() for line in axes.lines] == SHARED_FORMS
    for line, (gamma, beta) in zip(axes.lines, [(0, None), (2, None), (2, 1), (4, 0)], strict=True):
        x = line.get_xdata()
        assert (x.min(), x.max()) == pytest.approx((0.001, 0.999) if against == "p_t" else (-7, 7))
        p = x if against == "p_t" else 1 / (1 + np.exp(-x))
        if beta is not None:
            star = 1 / (1 + np.exp(-(gamma * np.log(p / (1 - p)) + beta)))
            expected = star - 1 if gradient else -np.log(star) / gamma
        else:
            slope = (1 - p) ** gamma * (gamma * p * np.log(p) + p - 1)
            expected = slope if gradient else -((1 - p) ** gamma) * np.log(p)
        np.testing.assert_allclose(line.get_ydata(), expected, rtol=1e-6, atol=1e-12)


def test_training_logs_the_loss_concentration(data: TinyData, tmp_path: Path) -> None:
    weighted = {"loss__alpha": [1.0, 2.0, 3.0], "loss__negative_weight": 0.1}
    config = tiny_config(tmp_path, data, train__epochs=1, train__loss_every_epochs=1, train__loss_images=5, **weighted)
    train(config, tmp_path / "run")
    coco = read_coco(data.val, images_of(data.val), verify="none", progress=False)
    model = model_of(last_checkpoint(tmp_path / "run"), CPU)
    found = collect_examples(
        model, build_loss(config), coco, config, device=CPU, indices=range(5), max_negatives=100_000
    )
    expected = loss_concentration(found, build_loss(config).class_loss)
    events = EventAccumulator(str(tmp_path / "run"), size_guidance={"histograms": 0})
    events.Reload()
    assert len(expected.scalars) == 10
    for key, value in expected.scalars.items():
        assert [event.value for event in events.Scalars(f"loss_concentration/{key}")] == pytest.approx(
            [value], rel=1e-4
        )
    for key, probabilities in expected.histograms.items():
        histogram = events.Histograms(f"p_t/{key}")[0].histogram_value
        assert (histogram.num, histogram.sum) == pytest.approx((len(probabilities), probabilities.sum()), rel=1e-4)
    assert set(expected.figures) == {"cumulative_loss", "calibration"}
    for key, figure in expected.figures.items():
        image = Image.open(io.BytesIO(events.Images(f"loss_concentration/{key}")[0].encoded_image_string))
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        apart = np.abs(np.asarray(image) - np.asarray(canvas.buffer_rgba())[..., :3].astype(float))
        assert apart.mean() < 0.5, "of 255; the last digits of losses may move a line by part of a pixel"
    (table,) = events.Tensors("loss_concentration/table/text_summary")
    written = table.tensor_proto.string_val[0].decode().splitlines()
    assert [line.strip() for line in written[:2]] == [line.strip() for line in expected.text[:2]]
    assert len(written) == len(expected.text)

    (seconds,) = (event.value for event in events.Scalars("loss_concentration/seconds"))
    assert 0 < seconds < 60


@pytest.mark.parametrize(("every", "epochs"), [(0, []), (1, [1, 2, 3]), (2, [2])])
def test_loss_concentration_is_logged_at_the_configured_epochs(every: int, epochs: list[int], tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "one.json", 1, seed=1)  # one image: an epoch is a step
    data = TinyData(annotations, annotations)
    settings = {"train__epochs": 3, "train__loss_every_epochs": every, "train__loss_images": 1}
    train(tiny_config(tmp_path, data, **settings), tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    tag = "loss_concentration/seconds"
    assert [event.step for event in (events.Scalars(tag) if tag in events.Tags()["scalars"] else [])] == epochs
