"""Evaluation: ground truth survives the whole way, and what a model finds depends on nothing but model and picture."""

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
from detector.datasets.coco import CocoDataset, read_coco
from detector.datasets.images import decode_image
from detector.errors import DatasetError
from detector.evaluation import self_check as self_check_module
from detector.evaluation.coco_metrics import CocoResults, detections_to_results, evaluate
from detector.evaluation.evaluate import detect, evaluate_model
from detector.evaluation.self_check import PipelineError, perfect_outputs, perfect_score, prove_pipeline, round_trip
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
    """The default geometry (short side 800, the paper's anchors) around a network that is not used."""
    values = {
        "model": {
            "backbone": "resnet18", "backbone_weights": "none", "norm": "gn", "fpn_channels": 32, "head": {"depth": 0},
        },
        "train": {"batch_size": 2},
    }  # fmt: skip
    config = config_from_dict(values, "test")
    return config, build_model(config.model, num_classes)


def there_and_back(coco: CocoDataset, indices: list[int]) -> CocoResults:
    config, model = small_model(len(coco.categories))
    return round_trip(model, build_loss(config).match, coco, config, indices)


def published(coco: CocoDataset, indices: list[int]) -> dict[str, Any]:
    """The annotation file, read without any of our code, for these images; ids anew, boxes of no size left out."""
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


def by_pycocotools(content: dict[str, Any], results: CocoResults | None) -> NDArray[np.float64]:
    """The first six numbers; the published boxes that are no crowds stand for the results if there are none.

    They have the same scores as the results, because the order of scores decides which of two overlapping objects a
    box is matched to, and so which count in a range of areas.
    """
    truth, found = COCO(), COCO()
    if results is None:
        detections = []
        positions: Counter[int] = Counter()
        for a in content["annotations"]:
            if not a["iscrowd"]:
                detections.append({**a, "score": perfect_score(np.array(positions[a["image_id"]]))})
                positions[a["image_id"]] += 1
    else:
        detections = results.to_json_records()
    detections = [
        {**d, "id": i, "iscrowd": 0, "area": d["bbox"][2] * d["bbox"][3]} for i, d in enumerate(detections, start=1)
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        for coco, annotations in ((truth, content["annotations"]), (found, detections)):
            coco.dataset = {**content, "annotations": annotations}
            coco.createIndex()
        run = COCOeval(truth, found, "bbox")
        run.params.maxDets = list(MAX_DETS)
        run.evaluate()
        run.accumulate()
    precision = run.eval["precision"][..., -1]
    parts = [precision[..., 0], precision[0, ..., 0], precision[5, ..., 0], *(precision[..., a] for a in (1, 2, 3))]
    return np.array([p[p > -1].mean() if (p > -1).any() else -1.0 for p in parts])


def assert_round_trip(coco: CocoDataset, indices: list[int]) -> None:
    back = there_and_back(coco, indices)
    content = published(coco, indices)
    reached, expected = by_pycocotools(content, back), by_pycocotools(content, None)
    np.testing.assert_allclose(reached, expected, atol=1e-9, err_msg=f"{SIX} of {coco.annotations}")
    assert len(back) == sum(not a["iscrowd"] for a in content["annotations"])
    if not any(name in str(coco.annotations) for name in MESSY):
        assert expected[0] == pytest.approx(1.0, abs=1e-12)
    if len(indices) == len(coco):
        ours = evaluate(coco.ground_truth(), back, max_dets=MAX_DETS).values
        np.testing.assert_allclose([ours[name] for name in SIX], reached, atol=1e-9)


@pytest.mark.parametrize("name", [*CLEAN, *MESSY])
def test_ground_truth_comes_back_from_the_whole_pipeline(name: str, shared: Path, repo_root: Path) -> None:
    """A few images of each set, those with most objects among them."""
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
def test_all_ground_truth_comes_back_from_the_whole_pipeline(
    name: str, split: str, shared: Path, repo_root: Path
) -> None:
    coco = open_set(name, split, shared, repo_root)
    assert_round_trip(coco, list(range(len(coco))))


def test_boxes_that_reach_far_out_of_their_image_come_back_clipped(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "set.json", 1, seed=0, objects=1)
    content = json.loads(annotations.read_text())
    content["annotations"][0].update(bbox=[-40, 10, 100, 60])
    annotations.write_text(json.dumps(content))
    back = there_and_back(read_coco(annotations, images_of(annotations), progress=False), [0])
    np.testing.assert_allclose(back.boxes, [[0, 10, 60, 60]], atol=1e-4)


def test_perfect_outputs_say_each_object_once_even_where_many_share_their_anchors() -> None:
    _, model = small_model(2)
    images = torch.zeros(1, 3, 128, 128, dtype=torch.uint8)
    anchors = model.anchors_of(images)
    box = torch.tensor([20.0, 20.0, 52.0, 52.0])
    boxes = torch.stack([box, box, box + 0.5, torch.tensor([3.0, 3.0, 5.0, 5.0]), torch.zeros(4)])[None]
    targets = Targets(boxes, torch.tensor([[0, 1, 0, 1, -1]]), torch.zeros(1, 0, 4))
    matches = build_loss(small_model(2)[0]).match(anchors, targets)
    outputs = perfect_outputs(anchors, targets, matches, 2)
    image, anchor, label = torch.nonzero(outputs.all_cls_logits() > 0, as_tuple=True)
    assert image.tolist() == [0] * 4
    assert len(set(anchor.tolist())) == 4
    found = decode(outputs.all_box_deltas()[0, anchor], anchors[anchor])
    said = sorted((k, *[round(v, 3) for v in b]) for k, b in zip(label.tolist(), found.tolist(), strict=True))
    wanted = sorted((k, *b) for k, b in zip([0, 1, 0, 1], boxes[0, :4].tolist(), strict=True))
    assert said == wanted


def open_val(data: TinyData) -> CocoDataset:
    return read_coco(data.val, images_of(data.val), verify="none", progress=False)


def by_place(results: CocoResults) -> NDArray[np.float64]:
    """(D, 7): image, class, box and score, so sorted that scores that differ in their last bits change no order."""
    boxes, scores = results.boxes.round(1), results.scores
    order = np.lexsort((*boxes.T, results.category_ids, results.image_ids))
    return np.column_stack([results.image_ids, results.category_ids, results.boxes, scores])[order]


@pytest.mark.parametrize("resize", ["area", "float_bilinear", "pil_bilinear", "cv2_bilinear"])
def test_detections_do_not_depend_on_the_batch_size_and_are_those_of_single_files(
    resize: str, whole: Run, data: TinyData
) -> None:
    state = last_checkpoint(whole.out)
    network = state.config.model.model_copy(update={"resize": resize})
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
    for one, four in zip(*(by_place(found[batch_size]) for batch_size in (1, 4)), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-2)
    np.testing.assert_allclose(found[1].scores, found[4].scores, rtol=1e-4)

    predictor = Predictor(state, device=CPU, score_thresh=0.0)
    predictor.detector.settings["detections_per_img"] = 20
    for i in range(len(coco)):
        alone = predictor(decode_image(coco.path(i), apply_exif=False))
        rows = found[1].image_ids == coco.image_ids[i]
        np.testing.assert_array_equal(found[1].scores[rows], alone.scores.double().numpy())
        xy = alone.boxes.double().numpy()
        np.testing.assert_array_equal(found[1].boxes[rows], np.concatenate([xy[:, :2], xy[:, 2:] - xy[:, :2]], axis=1))


def test_a_part_of_a_dataset_is_detected_as_in_the_whole(whole: Run, data: TinyData) -> None:
    state = last_checkpoint(whole.out)
    settings = state.config.postprocess.model_copy(update={"score_thresh": 0.0, "detections_per_img": 3})
    config = state.config.model_copy(update={"postprocess": settings})
    some, _ = detect(model_of(state, CPU), open_val(data), config, device=CPU, indices=[1, 3])
    assert sorted(set(some.image_ids.tolist())) == [20, 40]


def test_pictures_that_cannot_be_read_are_told_and_count_neither_as_seen_nor_as_missed(
    data: TinyData, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    annotations = write_coco(tmp_path / "val.json", 5, seed=2)
    config = tiny_config(tmp_path, TinyData(annotations, annotations), data__on_error="skip", data__num_workers=1)
    coco = read_coco(annotations, images_of(annotations), verify="none", progress=False)
    for i in (0, 3):
        coco.path(i).write_bytes(b"")
    model = build_model(config.model, 3)
    _, lost = detect(model, coco, config, device=CPU)
    assert sorted(lost) == [0, 3]
    metrics, _ = evaluate_model(model, coco, config, device=CPU)
    assert sum(row.num_gt for row in metrics.per_class) == sum(coco.num_objects[[1, 2, 4]])
    told = capfd.readouterr().err
    assert "0010.png" in told
    assert "0040.png" in told
    assert "AP50 1.000" in prove_pipeline(model, build_loss(config), coco, config, device=CPU)
    for i in range(5):
        coco.path(i).unlink(missing_ok=True)
    with pytest.raises(DatasetError, match="none of its pictures with objects can be read"):
        prove_pipeline(model, build_loss(config), coco, config, device=CPU)


def test_a_model_that_finds_nothing_scores_zero_and_keeps_its_mode(data: TinyData, tmp_path: Path) -> None:
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


def test_a_model_that_finds_nonsense_scores_about_zero(data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, postprocess__score_thresh=0.0)
    metrics, results = evaluate_model(build_model(config.model, 3), open_val(data), config, device=CPU)
    assert len(results) == 5 * 100
    assert 0 <= metrics.values["AP"] < 0.2


def prove(data: TinyData, config: Config) -> str:
    model = build_model(config.model, 3)
    return prove_pipeline(model, build_loss(config), open_val(data), config, device=CPU)


def test_a_sound_pipeline_is_proved(data: TinyData, tmp_path: Path) -> None:
    assert "ground truth comes back at AP50 1.000" in prove(data, tiny_config(tmp_path, data))


@pytest.mark.parametrize(
    "odd", [{"bbox": [-60, 10, 100, 40]}, {"bbox": [500, 500, 40, 40]}, {"ignore": 1}, {"iscrowd": 1}], ids=str
)
def test_what_training_does_not_see_as_published_is_no_fault_of_the_pipeline(
    odd: dict[str, Any], tmp_path: Path
) -> None:
    """Boxes that reach far out of their image, lie outside, or are to be ignored do not come back as they are."""
    annotations = write_coco(tmp_path / "odd.json", 2, seed=0)
    content = json.loads(annotations.read_text())
    content["annotations"][0].update(odd)
    annotations.write_text(json.dumps(content))
    config = tiny_config(tmp_path, TinyData(annotations, annotations))
    coco = read_coco(annotations, images_of(annotations), verify="none", progress=False)
    prove_pipeline(build_model(config.model, 3), build_loss(config), coco, config, device=CPU)


def test_images_without_any_objects_are_proved_too(data: TinyData, tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "empty.json", 3, seed=0, objects=0)
    config = tiny_config(tmp_path, data)
    coco = read_coco(annotations, images_of(annotations), verify="none", progress=False)
    prove_pipeline(build_model(config.model, 3), build_loss(config), coco, config, device=CPU)


@pytest.mark.parametrize("fault", ["encoding", "sizes", "labels"])
def test_a_pipeline_that_loses_boxes_is_found_out(
    fault: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, data)
    if fault == "encoding":
        monkeypatch.setattr(self_check_module, "encode", lambda box, anchor: encode(box, anchor) + 0.5)
    elif fault == "sizes":  # width and height of the original image exchanged

        def exchanged(*arguments: Any, original_sizes: torch.Tensor, **named: Any) -> Any:
            return postprocess(*arguments, original_sizes=original_sizes.flip(1), **named)

        monkeypatch.setattr(self_check_module, "postprocess", exchanged)
    else:

        def shifted(image_id: int, detections: Any, categories: Any) -> CocoResults:
            wrong = type(detections)(detections.boxes, detections.scores, (detections.labels + 1) % 3)
            return detections_to_results(image_id, wrong, categories)

        monkeypatch.setattr(self_check_module, "detections_to_results", shifted)
    with pytest.raises(PipelineError, match="do not come back"):
        prove(data, config)


def test_the_loss_of_the_val_set_is_tried_before_the_first_step_too(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("as on a device it was never tried on")

    monkeypatch.setattr(ValidationLoss, "add", broken)
    with pytest.raises(RuntimeError, match="never tried on"):
        prove(data, tiny_config(tmp_path, data))
    prove(data, tiny_config(tmp_path, data, eval__loss=False))
