"""COCO's numbers: against the published ones, against pycocotools on the original files, and the engines compared."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector.errors import ResultsError, RunError, UserError
from detector.evaluation.coco_metrics import Metrics, evaluate, ground_truth_warnings
from detector.evaluation.coco_results import CocoResults, detections_to_results, write_results
from detector.evaluation.results_file import load_results
from detector.structures import Categories, Detections, GroundTruth
from tests.tiny import REPO

Engine = Literal["hotcoco", "pycocotools"]
ENGINES: tuple[Engine, ...] = ("hotcoco", "pycocotools")
KEYS = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]
KEYS += ["AR@1", "AR@10", "AR@100", "AR_small", "AR_medium", "AR_large"]
REFERENCE_SETS = ("val2014_fakebbox100 (bbox)", "mask_rcnn_r50_fpn_1x on 12 val2017 images (bbox)")
# Image ids, category ids: gaps, 0, and not in order.
CATEGORIES = Categories((7, 0, 90), ("seven", "zero", "ninety"))


def make_ground_truth(
    objects: list[tuple[int, int, list[float], float, bool]],
    image_ids: list[int],
    categories: Categories = CATEGORIES,
) -> GroundTruth:
    """From (image id, category id, xywh, area, crowd)."""
    return GroundTruth(
        categories,
        np.array(image_ids, np.int64),
        np.array([o[0] for o in objects], np.int64),
        np.array([o[1] for o in objects], np.int64),
        np.array([o[2] for o in objects], np.float64).reshape(-1, 4),
        np.array([o[3] for o in objects], np.float64),
        np.array([o[4] for o in objects], bool),
    )


def make_results(found: list[tuple[int, int, list[float], float]]) -> CocoResults:
    """From (image id, category id, xywh, score)."""
    return CocoResults(
        np.array([f[0] for f in found], np.int64),
        np.array([f[1] for f in found], np.int64),
        np.array([f[2] for f in found], np.float64).reshape(-1, 4),
        np.array([f[3] for f in found], np.float64),
    )


def read_ground_truth(path: Path, most_images: int | None = None) -> GroundTruth:
    """The file's annotations without zero-size boxes; of many images a few, those with crowds first."""
    file = json.loads(path.read_text())
    crowded = {a["image_id"] for a in file["annotations"] if a["iscrowd"]}
    image_ids = sorted((i["id"] for i in file["images"]), key=lambda i: (i not in crowded, i * 7919 % 1000))
    kept = set(image_ids[:most_images])
    objects = [
        (a["image_id"], a["category_id"], a["bbox"], a["area"], bool(a["iscrowd"]))
        for a in file["annotations"]
        if a["image_id"] in kept and min(a["bbox"][2:]) > 0
    ]
    categories = Categories(
        tuple(c["id"] for c in file["categories"]), tuple(str(c["name"]) for c in file["categories"])
    )
    return make_ground_truth(objects, [i for i in image_ids if i in kept], categories)


def imitate_detector(gt: GroundTruth, seed: int) -> CocoResults:
    """Jittered objects, some missed, duplicated or misclassified, with tied scores; filled crowds; random boxes."""
    rng = np.random.default_rng(seed)
    copies = rng.choice([0, 1, 1, 1, 2], len(gt.areas)) + 4 * gt.iscrowd
    source = rng.permutation(np.repeat(np.arange(len(gt.areas)), copies))
    size = np.tile(gt.boxes[source, 2:], 2)
    boxes = gt.boxes[source] + size * rng.normal(0, 1, (len(source), 4)) * rng.choice([0, 0.03, 0.1], (len(source), 1))
    inside = gt.iscrowd[source]
    boxes[inside, 2:] *= 0.3
    other = rng.choice(gt.categories.ids, len(source))
    random_boxes = len(gt.image_ids)
    found = CocoResults(
        np.concatenate([gt.ann_image_ids[source], rng.choice(gt.image_ids, random_boxes)]),
        np.concatenate(
            [
                np.where(rng.random(len(source)) < 0.1, other, gt.ann_category_ids[source]),
                rng.choice(gt.categories.ids, random_boxes),
            ]
        ).astype(np.int64),
        np.abs(np.concatenate([boxes, rng.uniform(0, 300, (random_boxes, 4))])),
        np.round(rng.random(len(source) + random_boxes), 2),
    )
    empty = rng.choice(gt.image_ids, len(gt.image_ids) // 10)  # images without detections
    keep = ~np.isin(found.image_ids, empty)
    return CocoResults(found.image_ids[keep], found.category_ids[keep], found.boxes[keep], found.scores[keep])


def assert_engines_agree(
    gt: GroundTruth, results: CocoResults, max_dets: tuple[int, int, int] = (1, 10, 100)
) -> Metrics:
    ours, oracle = (evaluate(gt, results, engine=e, max_dets=max_dets) for e in ENGINES)
    assert list(ours.values) == list(oracle.values)
    assert ours == oracle  # every number of both, bit for bit
    return ours


@pytest.fixture
def reference(shared: Path) -> Path:
    return shared / "datasets" / "coco_eval_reference"


@pytest.mark.parametrize("name", REFERENCE_SETS)
@pytest.mark.parametrize("engine", ENGINES)
def test_reference_sets_give_the_published_numbers(reference: Path, engine: Engine, name: str) -> None:
    expected = json.loads((reference / "expected.json").read_text())
    case = expected[name]
    gt = read_ground_truth(reference / case["gt"])
    values = evaluate(gt, load_results(reference / case["dt"], gt), engine=engine).values
    assert list(values) == KEYS
    assert values == pytest.approx(case["pycocotools"], abs=1e-12, rel=0)
    if case["published_3dp"]:
        assert {k: round(v, 3) for k, v in values.items()} == case["published_3dp"]
        for fingerprint in (v for k, v in expected.items() if k.startswith("WRONG")):
            assert {k: round(v, 6) for k, v in values.items()} != fingerprint


@pytest.mark.parametrize("interpretation", ["crowds dropped", "crowds as normal boxes", "area = w*h"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_wrong_interpretation_of_the_ground_truth_changes_the_numbers(
    reference: Path, engine: Engine, interpretation: str
) -> None:
    expected = json.loads((reference / "expected.json").read_text())
    case = expected[REFERENCE_SETS[0]]
    gt = read_ground_truth(reference / case["gt"])
    keep = ~gt.iscrowd if interpretation == "crowds dropped" else np.ones(len(gt.areas), bool)
    wrong = GroundTruth(
        gt.categories,
        gt.image_ids,
        gt.ann_image_ids[keep],
        gt.ann_category_ids[keep],
        gt.boxes[keep],
        (gt.boxes[:, 2] * gt.boxes[:, 3] if interpretation == "area = w*h" else gt.areas)[keep],
        gt.iscrowd[keep] & (interpretation != "crowds as normal boxes"),
    )
    values = evaluate(wrong, load_results(reference / case["dt"], gt), engine=engine).values
    assert {k: round(v, 6) for k, v in values.items()} == expected[f"WRONG: {interpretation}"]


@pytest.mark.parametrize("max_dets", [(1, 10, 100), (3, 50, 100)])
@pytest.mark.parametrize("name", REFERENCE_SETS)
def test_numbers_equal_those_of_pycocotools_on_the_original_files(
    reference: Path, name: str, max_dets: tuple[int, int, int]
) -> None:
    case = json.loads((reference / "expected.json").read_text())[name]
    oracle_gt = COCO(str(reference / case["gt"]))
    run = COCOeval(oracle_gt, oracle_gt.loadRes(str(reference / case["dt"])), "bbox")
    run.params.maxDets = list(max_dets)
    run.evaluate()
    run.accumulate()
    run.summarize()

    gt = read_ground_truth(reference / case["gt"])
    for engine in ENGINES:
        metrics = evaluate(gt, load_results(reference / case["dt"], gt), engine=engine, max_dets=max_dets)
        np.testing.assert_allclose(list(metrics.values.values()), run.stats, rtol=0, atol=1e-12)
        assert [c.category_id for c in metrics.per_class] == run.params.catIds
        assert [c.name for c in metrics.per_class] == [c["name"] for c in oracle_gt.loadCats(run.params.catIds)]
        for k, c in enumerate(metrics.per_class):
            curves = run.eval["precision"][:, :, k, 0, -1]
            for ours, oracle in ((c.AP, curves), (c.AP50, curves[0])):
                assert ours == (np.mean(oracle[oracle > -1]) if (oracle > -1).any() else -1)
            assert c.num_gt == len(oracle_gt.getAnnIds(catIds=[c.category_id], iscrowd=False))
        assert list(metrics.values)[6:9] == [f"AR@{m}" for m in max_dets]


@pytest.mark.parametrize(
    "file",
    [
        "bccd/annotations/train.json",
        "bccd/annotations/val.json",
        "bccd/annotations/test.json",
        "coco_eval_reference/annotations/detvisgui_val2017_12.json",
        "coco_eval_reference/annotations/instances_val2014_100.json",
        "coco_permissive/annotations/train.json",
        "coco_permissive/annotations/val.json",
        "deeppcb/annotations/train.json",
        "deeppcb/annotations/val.json",
        "messy_coad/annotations/train.json",
        "messy_coad/annotations/val.json",
        "messy_mix/annotations/train.json",
        "messy_mix/annotations/val.json",
        "messy_taco_json/annotations/train.json",
        "messy_taco_json/annotations/val.json",
        "symbols54/annotations/train.json",
        "symbols54/annotations/val.json",
        "symbols54/annotations/test.json",
    ],
)
def test_engines_agree_on_imitated_detections_of_every_dataset(shared: Path, file: str) -> None:
    path = shared / "datasets" / file
    if not path.exists():
        pytest.skip(f"{path} does not exist")
    gt = read_ground_truth(path, most_images=40)
    for seed, max_dets in enumerate([(1, 10, 100), (2, 4, 8)]):
        metrics = assert_engines_agree(gt, imitate_detector(gt, seed), max_dets)
        assert 0.1 < metrics.values["AP"] < 0.95


@pytest.mark.parametrize("split", ["train", "val"])
def test_engines_agree_on_imitated_detections_of_shapes(split: str) -> None:
    paths = sorted((Path(__file__).parents[2] / "data" / "shapes").rglob(f"*{split}*.json"))
    if not paths:
        pytest.skip("data/shapes does not exist")
    for path in paths:
        gt = read_ground_truth(path, most_images=40)
        assert_engines_agree(gt, imitate_detector(gt, 0))


IMAGE_IDS = [30, 0, 4, 11]
# Few coordinates, so that boxes coincide, touch and nest; sizes 0 and on either side of the area bounds 32^2, 96^2.
BOX = st.tuples(*[st.sampled_from([0, 1, 2, 16])] * 2, *[st.sampled_from([0, 1, 2, 16, 32, 33, 96, 97])] * 2)
OBJECT = st.builds(
    lambda image, category, box, area, crowd: (image, category, [float(v) for v in box], area, crowd),
    st.sampled_from(IMAGE_IDS),
    st.sampled_from(CATEGORIES.ids),
    BOX.filter(lambda box: min(box[2:]) > 0),
    st.sampled_from([1.0, 1024.0, 1024.5, 9216.0, 9217.0, 1e10, 1.1e10]),
    st.sampled_from([False, False, True]),
)
FOUND = st.builds(
    lambda image, category, box, score: (image, category, [float(v) for v in box], score),
    st.sampled_from(IMAGE_IDS),
    st.sampled_from(CATEGORIES.ids),
    BOX,
    st.sampled_from([0.9, 0.5, 0.5, 0.3, 0.1 + 0.2, 0.0, -0.0, -1.0]),
)


@settings(max_examples=300, deadline=None)
@given(
    objects=st.lists(OBJECT, max_size=12),
    found=st.lists(FOUND, max_size=25),
    extra=st.sampled_from(["as drawn", "only crowds", "perfect detections first"]),
    max_dets=st.sampled_from([(1, 10, 100), (1, 2, 3)]),
)
def test_engines_agree_on_ties_empties_crowds_and_degenerate_boxes(
    objects: list[tuple[int, int, list[float], float, bool]],
    found: list[tuple[int, int, list[float], float]],
    extra: str,
    max_dets: tuple[int, int, int],
) -> None:
    if extra == "only crowds":
        objects = [(*o[:4], True) for o in objects]
    if extra == "perfect detections first":
        found = [(*o[:3], 0.5) for o in objects] + found
    assert_engines_agree(make_ground_truth(objects, IMAGE_IDS), make_results(found), max_dets)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_detections_score_zero_if_there_are_objects_and_are_undefined_otherwise(engine: Engine) -> None:
    no_results = CocoResults.concatenate([])
    gt = make_ground_truth([(5, 90, [0.0, 0.0, 40.0, 40.0], 900.0, False)], [5, 6])
    metrics = evaluate(gt, no_results, engine=engine)
    assert metrics.values == {
        k: -1 if k in ("AP_medium", "AP_large", "AR_medium", "AR_large") else 0 for k in KEYS
    }  # the area is the published 900, not 40 * 40
    assert [(c.name, c.num_gt, c.AP, c.AP50) for c in metrics.per_class] == [
        ("seven", 0, -1, -1),
        ("zero", 0, -1, -1),
        ("ninety", 1, 0, 0),
    ]
    assert set(evaluate(make_ground_truth([], [5, 6]), no_results, engine=engine).values.values()) == {-1}
    assert set(evaluate(make_ground_truth([], []), no_results, engine=engine).values.values()) == {-1}


@pytest.mark.parametrize("engine", ENGINES)
def test_detections_equal_to_the_ground_truth_score_one_whatever_the_ids(engine: Engine) -> None:
    objects = [(i, c, [3.0, 4.0 * k, 10.0, 20.0], 200.0, False) for k, c in enumerate(CATEGORIES.ids) for i in (-2, 0)]
    gt = make_ground_truth(objects, [0, -2, 9])
    parts = [
        detections_to_results(
            i,
            Detections(
                torch.tensor([[3.0, 4 * k, 13, 20 + 4 * k] for k in range(3)]),
                torch.tensor([0.5, 0.6, 0.7]),
                torch.arange(3),
            ),
            CATEGORIES,
        )
        for i in (0, -2)
    ]
    metrics = evaluate(gt, CocoResults.concatenate(parts), engine=engine)
    assert metrics.values["AP"] == pytest.approx(1, abs=1e-12)
    assert [c.AP for c in metrics.per_class] == pytest.approx([1, 1, 1], abs=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_scores_rank_by_image_id_and_then_by_position_in_the_results(engine: Engine) -> None:
    box, elsewhere = [0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 10.0, 10.0]
    gt = make_ground_truth([(3, 7, box, 100.0, False)], [8, 3])
    across_images = make_results([(8, 7, elsewhere, 0.5), (3, 7, box, 0.5)])
    assert evaluate(gt, across_images, engine=engine).values["AP"] == pytest.approx(1)
    within_image = make_results([(3, 7, elsewhere, 0.5), (3, 7, box, 0.5)])
    assert evaluate(gt, within_image, engine=engine).values["AP"] == pytest.approx(0.5)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_objects_than_max_dets_cap_recall_until_max_dets_is_raised(engine: Engine) -> None:
    boxes = [[20.0 * (i % 15), 20.0 * (i // 15), 10.0, 10.0] for i in range(150)]
    gt = make_ground_truth([(1, 7, b, 100.0, False) for b in boxes], [1])
    results = make_results([(1, 7, b, 0.9 - i / 1000) for i, b in enumerate(boxes)])
    capped = evaluate(gt, results, engine=engine)
    assert capped.values["AR@100"] == pytest.approx(100 / 150)
    assert capped.values["AP"] == pytest.approx(67 / 101)  # of the 101 recall points, those up to 2/3
    raised = evaluate(gt, results, engine=engine, max_dets=(1, 10, 300))
    assert raised.values["AR@300"] == pytest.approx(1)
    assert raised.values["AP"] == pytest.approx(1)
    assert "AR@100" not in raised.values


@pytest.mark.parametrize("engine", ENGINES)
def test_evaluation_prints_nothing(engine: Engine, capfd: pytest.CaptureFixture[str]) -> None:
    gt = make_ground_truth([(5, 90, [0.0, 0.0, 40.0, 40.0], 900.0, False)], [5, 6])
    evaluate(gt, imitate_detector(gt, 0), engine=engine, max_dets=(1, 2, 50))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("objects", "image_ids", "found", "message"),
    [
        ([], [1], [(2, 7, [0.0, 0, 1, 1], 0.5)], "image ids of the results must be among the 1 images .* got also 2"),
        ([], [1], [(1, 8, [0.0, 0, 1, 1], 0.5)], "category ids of the results must .* got also 8"),
        ([(3, 7, [0.0, 0, 1, 1], 1.0, False)], [1], [], "image ids of the objects must .* got also 3"),
        ([(1, 9, [0.0, 0, 1, 1], 1.0, False)], [1], [], "category ids of the objects must .* got also 9"),
        ([(1, 7, [0.0, 0, 1, 1], math.nan, False)], [1], [], "areas of the ground truth must be finite"),
        ([(1, 7, [0.0, 0, math.inf, 1], 1.0, False)], [1], [], "areas of the ground truth must be finite"),
        ([], [1, 2, 1], [], "image ids of the ground truth must differ, got 1 more than once"),
    ],
)
def test_input_that_the_engines_treat_differently_is_refused(
    engine: Engine, objects: Any, image_ids: list[int], found: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(make_ground_truth(objects, image_ids), make_results(found), engine=engine)


@pytest.mark.parametrize("max_dets", [(1, 10, 10), (0, 1, 2), (100, 10, 1)])
def test_max_dets_must_increase(max_dets: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="three increasing numbers"):
        evaluate(make_ground_truth([], [1]), make_results([]), max_dets=max_dets)


@pytest.mark.parametrize(
    ("box", "score", "message"),
    [
        ([0.0, 0, 1, 1], math.nan, "finite, got 1 .* number 1: image 4"),
        ([0.0, 0, 1, 1], math.inf, "finite"),
        ([math.nan, 0, 1, 1], 0.5, "finite"),
        ([0.0, 0, 1e200, 1e200], 0.5, "finite"),
        ([0.0, 0, -1, 1], 0.5, "width and height >= 0, got 1"),
    ],
)
def test_results_that_cannot_be_scored_are_refused(box: list[float], score: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_results([(4, 7, [0.0, 0, 1, 1], 0.5), (4, 7, box, score)])


def test_results_of_other_shapes_and_types_are_refused() -> None:
    ids, boxes, scores = np.zeros(2, np.int64), np.zeros((2, 4)), np.zeros(2)
    with pytest.raises(ValueError, match=r"\(2, 4\), \(1,\)"):
        CocoResults(ids, ids, boxes, scores[:1])
    with pytest.raises(ValueError, match="float32"):
        CocoResults(ids, ids, boxes.astype(np.float32), scores)


def test_detections_are_converted_to_category_ids_and_xywh() -> None:
    empty = Detections(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert len(detections_to_results(9, empty, CATEGORIES)) == 0
    found = Detections(torch.tensor([[1.1, 2, 4, 8], [0, 0, 5, 5]]), torch.tensor([0.75, 0.1]), torch.tensor([2, 1]))
    results = detections_to_results(9, found, CATEGORIES)
    x = float(np.float32(1.1))
    assert results.to_json_records() == [
        {"image_id": 9, "category_id": 90, "bbox": [x, 2.0, 4 - x, 6.0], "score": 0.75},
        {"image_id": 9, "category_id": 0, "bbox": [0.0, 0.0, 5.0, 5.0], "score": float(np.float32(0.1))},
    ]
    for label in (-1, 3):
        wrong = Detections(found.boxes, found.scores, torch.tensor([0, label]))
        with pytest.raises(ValueError, match=r"labels must lie in 0\.\.2, got .* image 9"):
            detections_to_results(9, wrong, CATEGORIES)


def columns(results: CocoResults) -> list[NDArray[Any]]:
    return [results.image_ids, results.category_ids, results.boxes, results.scores]


def test_written_results_read_back_bit_identical_here_and_in_pycocotools(tmp_path: Path) -> None:
    gt = make_ground_truth([], IMAGE_IDS)
    rng = np.random.default_rng(0)
    n = 200
    results = CocoResults(
        rng.choice(IMAGE_IDS, n), rng.choice(CATEGORIES.ids, n), rng.uniform(0, 1e4, (n, 4)), rng.random(n) ** 9
    )
    for case in (CocoResults.concatenate([]), results, CocoResults.concatenate([results, results])):
        write_results(tmp_path / "detections.json", case)
        for ours, read in zip(columns(case), columns(load_results(tmp_path / "detections.json", gt)), strict=True):
            np.testing.assert_array_equal(ours, read, strict=True)
    assert [p.name for p in tmp_path.iterdir()] == ["detections.json"]
    oracle = COCO()
    oracle.dataset = {"images": [{"id": i} for i in IMAGE_IDS], "categories": []}
    oracle.createIndex()
    annotations = oracle.loadRes(str(tmp_path / "detections.json")).dataset["annotations"]
    assert [a["bbox"] for a in annotations] == results.boxes.tolist() * 2


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(_: int) -> None:
        raise OSError("no space left")

    path = tmp_path / "detections.json"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match="no space left"):
        write_results(path, CocoResults.concatenate([]))
    assert path.read_text() == "old"


GOOD = {"image_id": 4, "category_id": 7, "bbox": [1, 2, 3, 4.5], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "messages"),
    [
        ("", ["is empty; expected a COCO results file"]),
        ("[{", ["must be JSON", "written completely"]),
        ('{"images": [], "annotations": []}', ["must be a COCO results file", "the keys 'images', 'annotations'"]),
        ("3", ["must be a COCO results file", "got 3"]),
        ([GOOD, 5], ["not an object, 1 times: 5 (result 1)"]),
        ([{"image_id": 4, "score": 1}], ['keys missing, 1 times: ["category_id", "bbox"] (result 0)']),
        (
            [{**GOOD, "image_id": 99}] * 5,
            ["image_id unknown, 5 times: 99 (result 0), 99", "4 images with ids 0, 4, 11"],
        ),
        ([{**GOOD, "image_id": " "}], ["image_id is no id, 1 times: ' '"]),
        ([{**GOOD, "image_id": [4]}], ["image_id is no id"]),
        ([{**GOOD, "image_id": True}], ["image_id is no id"]),
        ([{**GOOD, "image_id": "img-4"}], ["image_id unknown, 1 times: 'img-4'"]),
        ([{**GOOD, "image_id": 10**30}], ["image_id unknown"]),
        ([{**GOOD, "category_id": 8}], ["category_id unknown, 1 times: 8 (result 0)", "0, 7, 90"]),
        (
            [{**GOOD, "category_id": i} for i in (0, 1, 2)],
            ["category_id unknown, 2 times: 1 (result 1), 2 (result 2)", "look like class indices 0..2"],
        ),
        ([{**GOOD, "category_id": 1.5}], ["category_id is no id"]),
        ([{**GOOD, "score": math.nan}], ["score not finite, 1 times: nan"]),
        ([{**GOOD, "score": 10**400}], ["score not finite"]),
        ([{**GOOD, "score": None}], ["score not finite, 1 times: null"]),
        (
            [{**GOOD, "score": True}, {**GOOD, "bbox": [1, 2, 3, False]}],
            ["score not finite, 1", "bbox not four numbers, 1"],
        ),
        ([{**GOOD, "bbox": [1, 2, 3]}], ["bbox not four numbers, 1 times: [1, 2, 3]"]),
        ([{**GOOD, "bbox": [1, 2, 3, "4px"]}], ["bbox not four numbers"]),
        ([{**GOOD, "bbox": None}], ["bbox not four numbers"]),
        ([{**GOOD, "bbox": [1, 2, math.inf, 4]}], ["bbox not finite"]),
        ([{**GOOD, "bbox": [1, 2, 1e200, 1e200]}], ["bbox not finite"]),
        ([{**GOOD, "bbox": [9, 9, -3, 4]}], ["bbox negative", "not two corners"]),
        (
            [{"image_id": 4, "category_id": 7, "segmentation": {}, "score": 1}],
            ["masks without bbox", "segmentation results", "boxes are scored here"],
        ),
        (
            [GOOD, {**GOOD, "image_id": 5, "score": math.inf}, {**GOOD, "category_id": 3, "bbox": [0, 0, -1, 1]}],
            ["3 results with problems", "image_id unknown", "score not finite", "category_id unknown", "bbox negative"],
        ),
    ],
)
def test_all_problems_of_a_results_file_are_reported(tmp_path: Path, content: Any, messages: list[str]) -> None:
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ResultsError) as error:
        load_results(path, make_ground_truth([], IMAGE_IDS))
    assert str(path) in str(error.value)
    for message in messages:
        assert message in str(error.value)


def test_a_missing_results_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match=r"nowhere\.json must be a readable file"):
        load_results(tmp_path / "nowhere.json", make_ground_truth([], [1]))


def test_segmentation_results_without_boxes_are_refused(reference: Path, tmp_path: Path) -> None:
    gt = read_ground_truth(reference / "annotations" / "instances_val2014_100.json")
    with pytest.raises(ResultsError, match="masks without bbox, 734 times"):
        load_results(reference / "instances_val2014_fakesegm100_results.json", gt)
    both = tmp_path / "both.json"
    both.write_text(json.dumps([{**GOOD, "segmentation": [], "image_id": float(gt.image_ids[0])}]))
    assert len(load_results(both, gt)) == 1


def test_metrics_are_formatted_as_json_and_as_a_table() -> None:
    objects = [(1, 7, [0.0, 0, 10, 10], 100.0, False), (1, 7, [50.0, 0, 10, 10], 100.0, False)]
    gt = make_ground_truth([*objects, (1, 0, [0.0, 0, 99, 99], 9801.0, True)], [1])
    metrics = evaluate(gt, make_results([(1, 7, [0.0, 0, 10, 10], 0.5)]))
    record = json.loads(json.dumps(metrics.to_json()))
    assert list(record) == [*KEYS, "per_class"]
    ap = pytest.approx(51 / 101)
    assert record["per_class"] == [
        {"category_id": 7, "name": "seven", "num_gt": 2, "AP": ap, "AP50": ap},
        {"category_id": 0, "name": "zero", "num_gt": 0, "AP": -1, "AP50": -1},
        {"category_id": 90, "name": "ninety", "num_gt": 0, "AP": -1, "AP50": -1},
    ]
    lines = metrics.table().splitlines()
    assert lines[0].split() == ["AP", "0.5050", "AP50", "0.5050", "AP75", "0.5050"]
    assert lines[1].split() == ["AP_small", "0.5050", "AP_medium", "-", "AP_large", "-"]
    assert [line.split() for line in lines[-3:]] == [
        ["seven", "7", "2", "0.5050", "0.5050"],
        ["zero", "0", "0", "-", "-"],
        ["ninety", "90", "0", "-", "-"],
    ]
    assert len({len(line) for line in lines[-4:]}) == 1


def test_annotations_that_cap_the_metric_or_leave_it_undefined_are_warned_of() -> None:
    def with_objects(counts: dict[int, int], crowds: int = 0) -> GroundTruth:
        objects = [(1, c, [0.0, 0, 9, 9], 81.0, False) for c, n in counts.items() for _ in range(n)]
        return make_ground_truth([*objects, *[(1, 7, [0.0, 0, 9, 9], 81.0, True)] * crowds], [1, 2])

    assert ground_truth_warnings(with_objects({}, crowds=3), (1, 2, 3)) == [
        "none of the 2 images holds an object: every metric is undefined (-1)"
    ]
    assert ground_truth_warnings(with_objects({7: 3, 0: 3, 90: 3}, crowds=9), (1, 2, 9)) == []
    (dense,) = ground_truth_warnings(with_objects({7: 1, 0: 4, 90: 1}), (1, 2, 3))
    assert dense.startswith("1 images hold more than 3 objects of one class (up to 4)")
    assert "eval.max_dets" in dense
    (full,) = ground_truth_warnings(with_objects({7: 3, 0: 3, 90: 1}), (1, 2, 3))
    assert full.startswith("1 images hold more than 3 objects (up to 7)")
    assert "postprocess.detections_per_img" in full
    (absent,) = ground_truth_warnings(with_objects({90: 1}), (1, 10, 100))
    assert absent.startswith("2 of 3 classes have no objects here")
    assert "seven (id 7), zero (id 0)" in absent


@pytest.mark.parametrize(
    ("engine", "module", "other"),
    [("hotcoco", "hotcoco", "pycocotools"), ("pycocotools", "pycocotools.coco", "hotcoco")],
)
def test_a_missing_engine_is_reported_with_the_other_one(
    engine: Engine, module: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"eval.engine={engine} needs {engine}: .*pip install {engine}, .*={other}"):
        evaluate(make_ground_truth([], [1]), make_results([]), engine=engine)


def test_the_package_imports_no_engine_at_the_top_of_a_file() -> None:
    """So that it works without the engine that is not used."""
    for path in (REPO / "detector").rglob("*.py"):
        imports = re.findall(r"^\s*(?:import|from) (?:hotcoco|pycocotools)", path.read_text(), re.MULTILINE)
        assert not imports, path
