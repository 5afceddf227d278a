"""Evaluation: ground truth survives the pipeline, and detections depend on nothing but the model and the image."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detector.boxes import decode, encode
from detector.config import Config
from detector.config_yaml import config_from_dict
from detector.datasets.coco import CocoDataset
from detector.datasets.images import decode_image
from detector.datasets.opening import read_coco
from detector.errors import DatasetError
from detector.evaluation import self_check as self_check_module
from detector.evaluation.coco_metrics import evaluate
from detector.evaluation.coco_results import CocoResults, detections_to_results
from detector.evaluation.dataset_loop import loop_over_dataset
from detector.evaluation.evaluate import detect, evaluate_model
from detector.evaluation.self_check import SelfCheckError, perfect_outputs, round_trip, self_check
from detector.evaluation.validation_loss import ValidationLoss
from detector.inference.postprocess import postprocess
from detector.inference.predictor import Predictor, model_of
from detector.losses import build_loss
from detector.models import RetinaNet, build_model
from detector.structures import Targets
from tests.conftest import Run
from tests.tiny import TinyData, images_of, last_checkpoint, tiny_config, write_coco

CPU = torch.device("cpu")
CLEAN = ["bccd", "coco_permissive", "deeppcb", "symbols54", "shapes"]
MESSY = ["messy_mix", "messy_coad"]
MAX_DETS = (1, 10, 10_000)
SIX = ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"]


def open_set(name: str, split: str, shared: Path, repo_root: Path) -> CocoDataset:
    root = repo_root / "data" / name if name == "shapes" else shared / "datasets" / name
    images = root / "images" / split if name == "shapes" else root / "images"
    on_error: Any = "skip" if name in MESSY else "fail"
    return read_coco(root / "annotations" / f"{split}.json", images, verify="header", on_error=on_error, progress=False)


def small_model(num_classes: int) -> tuple[Config, RetinaNet]:
    """The default geometry (short side 800, the paper's anchors) with a small network that is never run."""
    values = {
        "model": {
            "backbone": "resnet18", "backbone_weights": "none", "norm": "gn", "fpn_channels": 32, "head": {"depth": 0},
        },
        "train": {"batch_size": 2},
    }  # fmt: skip
    config = config_from_dict(values, "test")
    return config, build_model(config.model, num_classes)


def round_trip_results(coco: CocoDataset, indices: list[int]) -> CocoResults:
    config, model = small_model(len(coco.categories))
    return round_trip(model, build_loss(config).assign, coco, config, indices)


def published_annotations(coco: CocoDataset, indices: list[int]) -> dict[str, Any]:
    """The annotation file, read without our code, for these images; annotations renumbered, without zero-size boxes."""
    content = json.loads(coco.annotations.read_text())
    wanted = {int(coco.image_ids[i]) for i in indices}
    ids = {c["id"] for c in content["categories"]}
    records: list[dict[str, Any]] = []
    for a in content["annotations"]:
        usable = a["image_id"] in wanted and a["category_id"] in ids and len(a.get("bbox") or []) == 4
        if usable and np.isfinite(a["bbox"]).all() and min(a["bbox"][2:]) > 0:
            area = a.get("area", a["bbox"][2] * a["bbox"][3])
            crowd = a.get("iscrowd", 0)
            records.append({**a, "id": len(records) + 1, "area": area, "iscrowd": crowd})
    return {"images": [{"id": i} for i in sorted(wanted)], "categories": content["categories"], "annotations": records}


def metrics_of_pycocotools(content: dict[str, Any], results: CocoResults | None) -> NDArray[np.float64]:
    """The first six numbers; without results, those of the published boxes that are no crowds as detections.

    They get the same scores as the round trip's, because the order of scores decides which of two overlapping objects
    a box is matched to, and so which of them counts in a range of areas.
    """
    ground_truth, scored = COCO(), COCO()
    if results is None:
        detections = []
        positions: Counter[int] = Counter()
        for a in content["annotations"]:
            if not a["iscrowd"]:
                detections.append({**a, "score": 1 / (1 + np.exp(0.002 * positions[a["image_id"]] - 8))})
                positions[a["image_id"]] += 1
    else:
        detections = results.to_json_records()
    detections = [
        {**d, "id": i, "iscrowd": 0, "area": d["bbox"][2] * d["bbox"][3]} for i, d in enumerate(detections, start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        for coco, annotations in ((ground_truth, content["annotations"]), (scored, detections)):
            coco.dataset = {**content, "annotations": annotations}
            coco.createIndex()
        run = COCOeval(ground_truth, scored, "bbox")
        run.params.maxDets = list(MAX_DETS)
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., -1]
    parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., a] for a in (1, 2, 3))]
    return np.array([p[p > -1].mean() if (p > -1).any() else -1.0 for p in parts])


def assert_round_trip(coco: CocoDataset, indices: list[int]) -> None:
    results = round_trip_results(coco, indices)
    content = published_annotations(coco, indices)
    reached, expected = metrics_of_pycocotools(content, results), metrics_of_pycocotools(content, None)
    np.testing.assert_allclose(reached, expected, atol=1e-9, err_msg=f"{SIX} of {coco.annotations}")
    assert len(results) == sum(not a["iscrowd"] for a in content["annotations"])
    if not any(name in str(coco.annotations) for name in MESSY):
        assert expected[0] == pytest.approx(1.0, abs=1e-12)
    if len(indices) == len(coco):
        ours = evaluate(coco.ground_truth(), results, max_dets=MAX_DETS).values
        np.testing.assert_allclose([ours[name] for name in SIX], reached, atol=1e-9)


@pytest.mark.parametrize("name", [*CLEAN, *MESSY])
def test_ground_truth_survives_the_whole_pipeline(name: str, shared: Path, repo_root: Path) -> None:
    """A few images of each set, among them those with the most objects."""
    coco = open_set(name, "val", shared, repo_root)
    assert_round_trip(coco, sorted({*np.argsort(coco.num_objects)[-2:].tolist(), 0, 1, len(coco) - 1}))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split"),
    [
        *itertools.product([*CLEAN, *MESSY], ["val", "train"]),
        ("bccd", "test"),
        ("symbols54", "test"),
    ],
)
def test_all_ground_truth_survives_the_whole_pipeline(name: str, split: str, shared: Path, repo_root: Path) -> None:
    coco = open_set(name, split, shared, repo_root)
    assert_round_trip(coco, list(range(len(coco))))


def test_boxes_that_reach_far_beyond_their_image_are_clipped(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "set.json", 1, seed=0, objects=1)
    content = json.loads(annotations.read_text())
    content["annotations"][0].update(bbox=[-40, 10, 100, 60])
    annotations.write_text(json.dumps(content))
    results = round_trip_results(read_coco(annotations, images_of(annotations), progress=False), [0])
    np.testing.assert_allclose(results.boxes, [[0, 10, 60, 60]], atol=1e-4)


def test_perfect_outputs_detect_each_object_once_even_if_many_share_their_anchors() -> None:
    _, model = small_model(2)
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    anchors = model.anchors_of(images)
    box = torch.tensor([20.0, 20.0, 52.0, 52.0])
    boxes = torch.stack([box, box, box + 0.5, torch.tensor([3.0, 3.0, 5.0, 5.0]), torch.zeros(4)])[None]
    targets = Targets(boxes, torch.tensor([[0, 1, 0, 1, -1]]), torch.zeros(1, 0, 4))
    assignment = build_loss(small_model(2)[0]).assign(anchors, targets)
    outputs = perfect_outputs(anchors, targets, assignment, 2)
    image, anchor, label = torch.nonzero(outputs.all_cls_logits() > 0, as_tuple=True)
    assert image.tolist() == [0] * 4
    assert len(set(anchor.tolist())) == 4
    boxes_decoded = decode(outputs.all_box_deltas()[0, anchor], anchors[anchor]).tolist()
    detected = sorted((k, *[round(v, 3) for v in b]) for k, b in zip(label.tolist(), boxes_decoded, strict=True))
    expected = sorted((k, *b) for k, b in zip([0, 1, 0, 1], boxes[0, :4].tolist(), strict=True))
    assert detected == expected


def open_val(data: TinyData) -> CocoDataset:
    return read_coco(data.val, images_of(data.val), verify="none", progress=False)


def sorted_by_box(results: CocoResults) -> NDArray[np.float64]:
    """(D, 7): image, class, box and score, in an order that does not depend on the last bits of the scores."""
    boxes, scores = results.boxes.round(1), results.scores
    order = np.lexsort((*boxes.T, results.category_ids, results.image_ids))
    return np.column_stack([results.image_ids, results.category_ids, results.boxes, scores])[order]


@pytest.mark.parametrize("resize", ["area", "float_bilinear", "pil_bilinear", "cv2_bilinear"])
def test_detections_do_not_depend_on_the_batch_size_and_are_those_of_single_files(
    resize: str, whole: Run, data: TinyData
) -> None:
    state = last_checkpoint(whole.out)
    compat = state.config.model.compat.model_copy(update={"resize": resize})
    network = state.config.model.model_copy(update={"compat": compat})
    state.config = state.config.model_copy(update={"model": network})
    coco, model = open_val(data), model_of(state, CPU)
    settings = state.config.postprocess.model_copy(update={"score_thresh": 0.0, "detections_per_img": 20})
    config = state.config.model_copy(update={"postprocess": settings})
    found = {}
    for batch_size in (1, 4):
        part = config.model_copy(update={"eval": config.eval.model_copy(update={"batch_size": batch_size})})
        found[batch_size], _ = detect(model, coco, part, device=CPU)
    assert len(found[1]) == 20 * len(coco)
    assert found[1].image_ids.tolist() == sorted(found[1].image_ids.tolist())
    for one, four in zip(*(sorted_by_box(found[batch_size]) for batch_size in (1, 4)), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found[1].scores, found[4].scores, rtol=1e-4)

    predictor = Predictor(state, device=CPU, score_thresh=0.0)
    predictor.detector.settings["detections_per_img"] = 20
    for i in range(len(coco)):
        alone = predictor(decode_image(Path(coco.describe(i)), apply_exif=False))
        rows = found[1].image_ids == coco.image_ids[i]
        np.testing.assert_array_equal(found[1].scores[rows], alone.scores.double().numpy())
        xy = alone.boxes.double().numpy()
        np.testing.assert_array_equal(found[1].boxes[rows], np.concatenate([xy[:, :2], xy[:, 2:] - xy[:, :2]], axis=1))


def test_detections_of_some_images_equal_those_of_the_whole_dataset(whole: Run, data: TinyData) -> None:
    state = last_checkpoint(whole.out)
    settings = state.config.postprocess.model_copy(update={"score_thresh": 0.0, "detections_per_img": 3})
    config = state.config.model_copy(update={"postprocess": settings})
    some, _ = detect(model_of(state, CPU), open_val(data), config, device=CPU, indices=[1, 3])
    assert sorted(set(some.image_ids.tolist())) == [20, 40]


def test_unreadable_images_are_reported_and_excluded_from_the_ground_truth(
    data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    annotations = write_coco(tmp_path / "val.json", 5, seed=2)
    config = tiny_config(tmp_path, TinyData(annotations, annotations), data__on_error="skip", data__num_workers=1)
    coco = read_coco(annotations, images_of(annotations), verify="none", progress=False)
    for i in (0, 3):
        Path(coco.describe(i)).write_bytes(b"")
    model = build_model(config.model, 3)
    _, missing = detect(model, coco, config, device=CPU)
    assert sorted(missing) == [0, 3]
    metrics, _ = evaluate_model(model, coco, config, device=CPU)
    assert sum(row.num_gt for row in metrics.per_class) == sum(coco.num_objects[[1, 2, 4]])
    reported = capfd.readouterr().err
    assert "0010.png" in reported
    assert "0040.png" in reported
    assert "AP50 1.000" in self_check(model, build_loss(config), coco, config, device=CPU)
    for i in range(5):
        Path(coco.describe(i)).unlink(missing_ok=True)
    with pytest.raises(DatasetError, match="none of its images with objects can be read"):
        self_check(model, build_loss(config), coco, config, device=CPU)


def test_a_model_without_detections_scores_zero_and_keeps_its_mode(data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data)
    model = build_model(config.model, 3).train()
    seen: list[tuple[int, int]] = []
    metrics, results = evaluate_model(
        model, open_val(data), config, device=CPU, progress=lambda done, total: seen.append((done, total))
    )
    assert len(results) == 0
    assert metrics.values["AP"] == 0
    assert model.training
    assert seen[-1] == (5, 5)


def test_the_dataset_loop_restores_the_mode_after_an_error(data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data)
    model = build_model(config.model, 3).train()

    def fail(*_: Any) -> None:
        assert not model.training
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        loop_over_dataset(model, open_val(data), config, fail, device=CPU)
    assert model.training


def test_a_model_with_random_detections_scores_about_zero(data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, postprocess__score_thresh=0.0)
    metrics, results = evaluate_model(build_model(config.model, 3), open_val(data), config, device=CPU)
    assert len(results) == 5 * 100
    assert 0 <= metrics.values["AP"] < 0.2


def run_self_check(data: TinyData, config: Config) -> str:
    model = build_model(config.model, 3)
    return self_check(model, build_loss(config), open_val(data), config, device=CPU)


def test_a_correct_pipeline_passes_the_self_check(data: TinyData, tmp_path: Path) -> None:
    assert "ground-truth round trip AP50 1.000" in run_self_check(data, tiny_config(tmp_path, data))


@pytest.mark.parametrize(
    "change", [{"bbox": [-60, 10, 100, 40]}, {"bbox": [500, 500, 40, 40]}, {"ignore": 1}, {"iscrowd": 1}], ids=str
)
def test_boxes_that_training_changes_on_purpose_pass_the_self_check(change: dict[str, Any], tmp_path: Path) -> None:
    """Boxes that reach far beyond their image, lie outside, or are ignored do not come back as published."""
    annotations = write_coco(tmp_path / "changed.json", 2, seed=0)
    content = json.loads(annotations.read_text())
    content["annotations"][0].update(change)
    annotations.write_text(json.dumps(content))
    config = tiny_config(tmp_path, TinyData(annotations, annotations))
    coco = read_coco(annotations, images_of(annotations), verify="none", progress=False)
    self_check(build_model(config.model, 3), build_loss(config), coco, config, device=CPU)


def test_images_without_objects_pass_the_self_check(data: TinyData, tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "empty.json", 3, seed=0, objects=0)
    config = tiny_config(tmp_path, data)
    coco = read_coco(annotations, images_of(annotations), verify="none", progress=False)
    self_check(build_model(config.model, 3), build_loss(config), coco, config, device=CPU)


@pytest.mark.parametrize("fault", ["encoding", "sizes", "labels"])
def test_a_pipeline_that_changes_boxes_fails_the_self_check(
    fault: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, data)
    if fault == "encoding":
        monkeypatch.setattr(self_check_module, "encode", lambda box, anchor: encode(box, anchor) + 0.5)
    elif fault == "sizes":  # width and height of the original image swapped

        def swapped(*arguments: Any, original_sizes: torch.Tensor, **named: Any) -> Any:
            return postprocess(*arguments, original_sizes=original_sizes.flip(1), **named)

        monkeypatch.setattr(self_check_module, "postprocess", swapped)
    else:

        def shifted(image_id: int, detections: Any, categories: Any) -> CocoResults:
            wrong = type(detections)(detections.boxes, detections.scores, (detections.labels + 1) % 3)
            return detections_to_results(image_id, wrong, categories)

        monkeypatch.setattr(self_check_module, "detections_to_results", shifted)
    with pytest.raises(SelfCheckError, match="must survive"):
        run_self_check(data, config)


def test_the_self_check_also_computes_the_validation_loss(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("no such kernel on this device")

    monkeypatch.setattr(ValidationLoss, "add", broken)
    with pytest.raises(RuntimeError, match="no such kernel"):
        run_self_check(data, tiny_config(tmp_path, data))
    run_self_check(data, tiny_config(tmp_path, data, eval__loss=False))
