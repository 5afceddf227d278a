"""Comparisons: intervals equal closed forms, resampled AP equals the evaluator's, and noise is not significant."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from detector.evaluation.coco_metrics import evaluate
from detector.evaluation.coco_results import CocoResults, write_results
from detector.experiments.arm import Arm, interval_over_images, paired_difference
from detector.experiments.bootstrap import draw_counts, match_classes, resampled_ap
from detector.experiments.compare import compare, write_figure
from detector.experiments.statistics import independent_repetitions, standard_error
from detector.experiments.statistics import student_quantile as t
from detector.structures import Categories, GroundTruth
from tests.tiny import CLASSES, TinyData, write_config
from tools import compare as tool

# --- AP on resampled images


def scene(num_images: int, objects: int, detections: int, *, seed: int) -> tuple[GroundTruth, CocoResults]:
    """Objects, some of them crowds, and detections near them with distinct scores."""
    rng = np.random.default_rng(seed)
    categories = Categories((90, 3, 7), ("bar", "disc", "square"))
    image_ids = 1 + rng.permutation(10 * num_images)[:num_images].astype(np.int64)
    images = rng.choice(image_ids, objects)
    boxes = np.concatenate([rng.uniform(0, 80, (objects, 2)), rng.uniform(10, 40, (objects, 2))], axis=1)
    classes = rng.choice(np.array(categories.ids, np.int64), objects)
    truth = GroundTruth(
        categories, image_ids, images, classes, boxes, boxes[:, 2] * boxes[:, 3], rng.random(objects) < 0.2
    )
    if not objects:
        return truth, CocoResults.concatenate([])
    pick = rng.integers(0, objects, detections)
    near = np.abs(boxes[pick] + rng.normal(0, 2, (detections, 4)))
    guessed = np.where(rng.random(detections) < 0.8, classes[pick], rng.choice(categories.ids, detections))
    scores = rng.permutation(detections) / max(1, detections)
    return truth, CocoResults(images[pick], guessed.astype(np.int64), near, scores)


def copied(truth: GroundTruth, results: CocoResults, counts: NDArray[np.int64]) -> tuple[GroundTruth, CocoResults]:
    """A dataset with as many copies of each image as it was drawn, each with its own id."""
    order = np.sort(truth.image_ids)
    copies = [(old, new) for new, old in enumerate(np.repeat(order, counts).tolist(), start=1)]

    def rows(ids: NDArray[np.int64]) -> list[NDArray[np.intp]]:
        return [np.nonzero(ids == old)[0] for old, _ in copies]

    of_truth, of_results = rows(truth.ann_image_ids), rows(results.image_ids)

    def take(parts: list[NDArray[np.intp]]) -> tuple[NDArray[np.intp], NDArray[np.int64]]:
        new = [np.full(len(part), n, np.int64) for part, (_, n) in zip(parts, copies, strict=True)]
        return np.concatenate([np.empty(0, np.intp), *parts]), np.concatenate([np.empty(0, np.int64), *new])

    at, ids = take(of_truth)
    new_truth = GroundTruth(
        truth.categories, np.array([n for _, n in copies], np.int64), ids, truth.ann_category_ids[at], truth.boxes[at],
        truth.areas[at], truth.iscrowd[at],
    )  # fmt: skip
    at, ids = take(of_results)
    return new_truth, CocoResults(ids, results.category_ids[at], results.boxes[at], results.scores[at])


def test_ap_of_nothing_is_undefined() -> None:
    truth, results = scene(4, 0, 0, seed=0)
    assert np.isnan(resampled_ap(match_classes(truth, results), np.ones((3, 4), np.int64))).all()
    truth, _ = scene(4, 9, 0, seed=0)
    assert resampled_ap(match_classes(truth, CocoResults.concatenate([])), np.ones((1, 4), np.int64)) == [0.0]


@settings(max_examples=25, deadline=None)
@given(
    num_images=st.integers(1, 12), objects=st.integers(0, 40), detections=st.integers(0, 120), seed=st.integers(0, 99)
)  # fmt: skip
def test_every_image_once_gives_the_evaluators_ap(num_images: int, objects: int, detections: int, seed: int) -> None:
    truth, results = scene(num_images, objects, detections, seed=seed)
    found = resampled_ap(match_classes(truth, results), np.ones((1, num_images), np.int64))[0]
    expected = evaluate(truth, results).values["AP"]
    assert (np.isnan(found) and expected == -1) or found == pytest.approx(expected, abs=1e-12)


def test_a_resampling_gives_the_evaluators_ap_of_a_dataset_with_copies() -> None:
    truth, results = scene(15, 60, 200, seed=5)
    matched = match_classes(truth, results)
    counts = draw_counts(15, 20, seed=1)
    assert (counts.sum(axis=1) == 15).all()
    expected = [evaluate(*copied(truth, results, row)).values["AP"] for row in counts]
    np.testing.assert_allclose(resampled_ap(matched, counts), expected, atol=1e-12)
    assert np.std(expected) > 0.01, "the resamplings must differ, or the comparison proves nothing"


def test_max_dets_has_the_evaluators_meaning() -> None:
    truth, results = scene(3, 30, 200, seed=2)
    few = resampled_ap(match_classes(truth, results, max_dets=5), np.ones((1, 3), np.int64))[0]
    assert few == pytest.approx(evaluate(truth, results, max_dets=(1, 2, 5)).values["AP"], abs=1e-12)


# --- statistics


@pytest.mark.parametrize("p", [0.5, 0.6, 0.9, 0.975, 0.9995])
def test_student_quantiles_equal_their_closed_forms(p: float) -> None:
    assert t(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9, abs=1e-9)
    u = 2 * p - 1
    assert t(p, 2) == pytest.approx(u * math.sqrt(2 / (1 - u * u)), rel=1e-9, abs=1e-9)
    assert t(p, 10_000) == pytest.approx(statistics.NormalDist().inv_cdf(p), rel=2e-3, abs=1e-9)


def test_student_quantiles_equal_a_textbook_table() -> None:
    table = {(0.975, 3): 3.182446, (0.975, 4): 2.776445, (0.95, 9): 1.833113, (0.995, 29): 2.756386}
    for (p, freedom), value in table.items():
        assert t(p, freedom) == pytest.approx(value, abs=1e-6)


def arm(name: str, values: Sequence[float], *, boot: float | None = None, **more: Any) -> Arm:
    """An arm with seeds 0, 1, ...; `boot` is the spread of its bootstrap, with the same draws for all arms."""
    made = Arm(name, **more)
    for seed, value in enumerate(values):
        made.metrics[f"seed{seed}"] = {"AP": value, "AP50": value, "per_class": []}
        if boot is not None:
            made.replicates[f"seed{seed}"] = value + boot * np.linspace(-1, 1, 101)
    return made


def test_the_standard_error_equals_its_closed_form() -> None:
    assert math.isnan(standard_error({}))
    assert math.isnan(standard_error({"seed0": 0.3}))
    assert standard_error({"seed0": 0.1, "seed1": 0.2, "seed2": 0.3}) == pytest.approx(0.1 / math.sqrt(3))


def test_folds_are_repetitions_that_share_their_training_sets() -> None:
    values = {"seed0_fold0": 0.1, "seed1_fold0": 0.3, "seed0_fold1": 0.4, "seed1_fold1": 0.4}
    repetitions, correction = independent_repetitions(values)
    assert repetitions == pytest.approx([0.2, 0.4])
    assert correction == 1.0
    deviation = statistics.stdev([0.2, 0.4])
    assert standard_error(values) == pytest.approx(deviation * math.sqrt(1 / 2 + 1 / 1))


def test_the_paired_interval_equals_its_closed_form() -> None:
    a, b = arm("a", [0.31, 0.32, 0.36]), arm("b", [0.30, 0.30, 0.33])
    d = paired_difference(a, b)
    assert d is not None
    assert d.mean == pytest.approx(0.02)
    assert d.high - d.mean == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-4)
    assert not d.over_images
    three = paired_difference(a, b, comparisons=3)
    assert three is not None
    assert three.high - three.mean == pytest.approx(t(1 - 0.025 / 3, 2) * 0.01 / math.sqrt(3))


def test_noise_over_images_widens_the_interval() -> None:
    a, b = arm("a", [0.31, 0.32, 0.36], boot=0.02), arm("b", [0.30, 0.30, 0.33], boot=-0.01)
    d, seeds_only = (
        paired_difference(a, b),
        paired_difference(arm("a", [0.31, 0.32, 0.36]), arm("b", [0.30, 0.30, 0.33])),
    )
    assert d is not None
    assert seeds_only is not None
    assert d.over_images
    images = 1.959964 * float(np.std(0.03 * np.linspace(-1, 1, 101), ddof=1))
    assert d.high - d.mean == pytest.approx(math.hypot(seeds_only.high - seeds_only.mean, images), rel=1e-5)


def test_images_that_are_hard_for_both_arms_do_not_widen_the_interval() -> None:
    d = paired_difference(arm("a", [0.31, 0.32, 0.33], boot=0.1), arm("b", [0.30, 0.31, 0.32], boot=0.1))
    assert d is not None
    assert d.significant
    assert d.high - d.low < 1e-9


def test_the_interval_over_images_is_corrected_for_the_bias_of_the_bootstrap() -> None:
    one = arm("a", [0.3, 0.5], boot=0.1)
    one.replicates = {unit: values + 0.04 for unit, values in one.replicates.items()}
    assert interval_over_images(one) == pytest.approx((0.4 - 0.095, 0.4 + 0.095))
    one.replicates.popitem()
    assert interval_over_images(one) is None


def test_noise_is_significant_no_more_often_than_the_confidence_level_allows() -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(2000):
        seeds = rng.normal(0.3, 0.05, 3)  # common to the pairs
        arms = [arm(name, (seeds + rng.normal(0, 0.01, 3)).tolist()) for name in "abcd"]
        comparison = compare(arms)
        wrong += any(d is not None and d.significant for d in comparison.differences.values())
    assert wrong / 2000 < 0.07, "the best of four is compared with three others, at 5 % for all together"


def test_equal_arms_do_not_differ_significantly_and_a_clear_winner_does() -> None:
    equal = compare([arm("a", [0.30, 0.31, 0.32]), arm("b", [0.31, 0.30, 0.32])], preferred=[("b", "faster")])
    assert "Best: a, AP 0.310. Not significantly different: b." in equal.verdict
    assert "Of these, b is faster: an equally good choice." in equal.verdict
    identical = compare([arm("a", [0.30, 0.31, 0.32], boot=0.01), arm("b", [0.30, 0.31, 0.32], boot=0.01)])
    assert "Not significantly different: b." in identical.verdict
    clear = compare([arm("good", [0.50, 0.52, 0.51], boot=0.01), arm("bad", [0.10, 0.13, 0.11], boot=0.02)])
    assert clear.verdict == "Best: good, AP 0.510. Significantly worse: bad."
    against = compare([arm("good", [0.50, 0.52, 0.51]), arm("bad", [0.10, 0.13, 0.11])], baseline="bad")
    assert against.verdict == "Baseline: bad, AP 0.113. Significantly better: good."


def test_one_run_each_is_never_significant() -> None:
    comparison = compare([arm("a", [0.9], boot=0.01), arm("b", [0.1], boot=0.01)])
    assert "One run each is too few for a significance test: b." in comparison.verdict
    assert "Significantly" not in comparison.verdict
    assert compare([]).verdict == "No run has finished: nothing to compare."
    assert "nothing to compare it with" in compare([arm("a", [0.3])]).verdict


def test_failed_and_pruned_arms_are_listed_and_never_best() -> None:
    pruned = arm("early", [0.9], excluded="pruned: AP 0.1 at 40% of a run, in the lowest 25% of completed trials")
    failed = arm("broken", [], excluded="failed: seed0: out of memory (log: x/log.txt)")
    comparison = compare([pruned, failed, arm("a", [0.3, 0.3])])
    assert comparison.reference is not None
    assert comparison.reference.name == "a"
    table = comparison.markdown()
    assert "| early | 1 | 0.900 | - | - | pruned | 0.900 |" in table
    assert "| broken | 0 | - | - | - | failed | - |" in table
    assert "broken failed: seed0: out of memory (log: x/log.txt)" in table


def test_failed_and_pruned_arms_have_a_row_in_the_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    drawn: list[Any] = []
    monkeypatch.setattr("detector.experiments.compare.save", lambda figure, path: drawn.append(figure))
    arms = [arm("early", [0.2], excluded="pruned: AP"), arm("broken", [], excluded="failed: x"), arm("a", [0.3, 0.3])]
    write_figure(compare(arms), tmp_path / "f.svg")
    (axes,) = drawn[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["broken (failed)", "early (pruned)", "a"]


def test_seeds_that_only_one_arm_has_are_not_paired() -> None:
    d = paired_difference(arm("a", [0.3, 0.4, 0.5]), arm("b", [0.1, 0.2]))
    assert d is not None
    assert d.mean == pytest.approx(0.2)
    assert d.repetitions == 2
    other = arm("c", [0.3])
    other.val_sets["seed0"] = "another validation set"
    assert paired_difference(other, arm("b", [0.1])) is None


# --- the tool


def write_run(folder: Path, data: TinyData, *, seed: int, quality: float, detections: bool = True) -> None:
    """Write the output of a finished run that detected each object with probability `quality`."""
    folder.mkdir(parents=True)
    write_config(folder / "config.yaml", data, train__seed=seed)
    content = json.loads(data.val.read_text())
    rng = np.random.default_rng(seed)
    found = [a for a in content["annotations"] if rng.random() < quality]
    results = CocoResults(
        np.array([a["image_id"] for a in found], np.int64),
        np.array([a["category_id"] for a in found], np.int64),
        np.array([a["bbox"] for a in found], np.float64).reshape(-1, 4),
        rng.random(len(found)),
    )
    objects = content["annotations"]
    boxes = np.array([a["bbox"] for a in objects], np.float64)
    truth = GroundTruth(
        Categories(tuple(sorted(CLASSES.values())), tuple(sorted(CLASSES, key=lambda name: CLASSES[name]))),
        np.array([i["id"] for i in content["images"]]),
        np.array([a["image_id"] for a in objects]),
        np.array([a["category_id"] for a in objects]),
        boxes,
        boxes[:, 2] * boxes[:, 3],
        np.zeros(len(objects), bool),
    )
    (folder / "metrics.json").write_text(json.dumps(evaluate(truth, results).to_json()))
    if detections:
        write_results(folder / "detections.json", results)


def test_runs_are_grouped_by_folder_and_compared(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        write_run(tmp_path / "x" / "good" / f"seed{seed}", data, seed=seed, quality=1.0)
        write_run(tmp_path / "x" / "poor" / f"seed{seed}", data, seed=seed, quality=0.3)
    out = tmp_path / "out"
    out.mkdir()
    files = ["--json", str(out / "c.json"), "--markdown", str(out / "c.md"), "--figure", str(out / "c.svg")]
    assert tool.main([str(tmp_path / "x"), "--classes", "disc,bar", "--baseline", "poor", *files]) == 0
    assert "Significantly better: good" in capsys.readouterr().out
    content = json.loads((out / "c.json").read_text())
    assert [a["name"] for a in content["arms"]] == ["good", "poor"]
    assert content["arms"][0]["interval_over_images"] == pytest.approx([1, 1])
    assert content["arms"][0]["difference"]["over_images"]
    assert "| disc | bar |" in (out / "c.md").read_text()
    assert "<svg" in (out / "c.svg").read_text()
    assert tool.main([str(tmp_path / "x"), "--classes", "disk"]) == 2
    assert "--classes must be among bar, disc, square, got disk" in capsys.readouterr().err
    assert tool.main([str(tmp_path / "x"), "--baseline", "god"]) == 2


def test_runs_without_detections_are_compared_over_seeds_with_a_note(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(2):
        write_run(tmp_path / "a" / f"seed{seed}", data, seed=seed, quality=1.0, detections=False)
        write_run(tmp_path / "b" / f"seed{seed}", data, seed=seed, quality=0.5)
    stale = tmp_path / "b" / "seed0"
    write_results(stale / "detections.json", CocoResults.concatenate([]))
    assert tool.main([str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "a/seed0, a/seed1: no detections.json, so no bootstrap over images" in printed
    assert "b/seed0: detections.json scores AP 0.0000 but metrics.json holds" in printed
    assert "intervals without them cover seeds only" in printed
    assert tool.main([str(tmp_path / "nothing")]) == 2


def test_runs_with_different_validation_sets_are_rejected(
    data: TinyData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "a" / "seed0", data, seed=0, quality=1.0)
    write_run(tmp_path / "b" / "seed0", TinyData(data.val, data.train), seed=0, quality=1.0)
    assert tool.main([str(tmp_path)]) == 2
    assert (
        "must have the same validation set, got different ones for seed0: a/seed0, b/seed0" in capsys.readouterr().err
    )


@pytest.mark.slow
def test_detections_are_written_on_request_and_score_the_ap_of_the_run(whole: Any, tmp_path: Path) -> None:
    run = tmp_path / "tiny" / "seed0"
    run.parent.mkdir()
    run.symlink_to(whole.out)
    assert not (run / "detections.json").exists()
    assert tool.main([str(run), "--detect", "--json", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["arms"][0]["interval_over_images"] is not None
    (run / "detections.json").unlink()
