"""Training, resuming and scoring that begin with another program's detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from detector.checkpoint import load_checkpoint
from detector.config_yaml import load_config
from detector.errors import CheckpointError, ConfigError, WeightsError
from detector.training.train import train
from detector.weights.coco_classes import COCO
from detector.weights.foreign import import_detector
from tests.tiny import TinyData, last_checkpoint, write_coco, write_config
from tests.weights.peer_models import R18, mmdet_state
from tools.eval import main as evaluate
from tools.train import main as train_tool

CLASSES = {"Person": 3, "traffic_light": 5, "motorbike": 6, "widget": 9}
SHORT: dict[str, Any] = {
    "train__epochs": 1, "train__batch_size": 2, "optim__lr": 1e-12, "optim__warmup_steps": 0, "data__min_size": 64,
    "data__val": None,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("theirs") / "retinanet_r18.pth"
    torch.save({"meta": {"cfg": "style='pytorch'"}, "state_dict": mmdet_state(R18)}, path)
    return path


@pytest.fixture(scope="module")
def new_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("pictures") / "new.json", 4, seed=3, classes=CLASSES)


def config_of(folder: Path, new_data: Path, theirs: Path, model: dict[str, Any] | None = None, **more: Any) -> Path:
    """A recipe that says of the model only what is given."""
    data = TinyData(new_data, new_data)
    path = write_config(folder / "c.yaml", data, **{**SHORT, "train__init_from": str(theirs), **more})
    values = yaml.safe_load(path.read_text())
    values["model"] = model or {}
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_foreign_detector_is_fine_tuned_as_it_is(
    theirs: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything it computes stays; class rows are moved by name and anchor, new ones start from the prior."""
    monkeypatch.setenv("COLUMNS", "200")
    path = config_of(tmp_path, new_data, theirs)
    train(load_config(path), tmp_path / "run")
    said = capsys.readouterr().out
    assert "weights of mmdet's RetinaNet from retinanet_r18.pth" in said
    for expected in ("Person <- person", "traffic_light <- traffic light", "motorbike <- motorcycle", "prior: widget"):
        assert expected in said
    source, state = import_detector(theirs), last_checkpoint(tmp_path / "run")
    unsaid = {"backbone_weights", "trainable_layers"}
    assert state.config.model.model_dump(exclude=unsaid) == source.model.model_dump(exclude=unsaid)
    assert state.config.model.resize == "cv2_bilinear"
    for name, value in source.weights.items():
        if "cls_subnet.predictor" not in name:
            torch.testing.assert_close(state.model[name], value, rtol=0, atol=1e-6)
    ours = torch.unflatten(state.model["cls_subnet.predictor.weight"], 0, (9, len(CLASSES)))
    rows = torch.unflatten(source.weights["cls_subnet.predictor.weight"], 0, (9, 80))
    for label, name in enumerate(["person", "traffic light", "motorcycle"]):
        torch.testing.assert_close(ours[:, label], rows[:, COCO.names.index(name)], rtol=0, atol=1e-6)
    bias = torch.unflatten(state.model["cls_subnet.predictor.bias"], 0, (9, len(CLASSES)))
    torch.testing.assert_close(torch.sigmoid(bias[:, 3]), torch.full((9,), 0.01))


def test_the_run_goes_on_without_the_foreign_file(theirs: Path, new_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(theirs.read_bytes())
    path = config_of(tmp_path, new_data, source, train__epochs=2)
    train(load_config(path), tmp_path / "run")
    source.unlink()
    assert train_tool(["--config", str(path), "--output-dir", str(tmp_path / "run"), "--resume", "auto"]) == 0


@pytest.mark.parametrize("resize", ["float_bilinear", "pil_bilinear"])
def test_training_sees_pictures_as_the_model_says(resize: str, theirs: Path, new_data: Path, tmp_path: Path) -> None:
    path = config_of(tmp_path, new_data, theirs, {"resize": resize}, data__hflip=1.0, optim__lr=1e-3)
    train(load_config(path), tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").config.model.resize == resize


def test_other_pictures_than_the_network_is_used_to_are_warned_of(
    theirs: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of(tmp_path, new_data, theirs, {"resize": "area", "pixel_std": [1.0, 1.0, 1.0]})
    train(load_config(path), tmp_path / "run")
    said = " ".join(capsys.readouterr().out.split())
    assert "has seen its pictures otherwise" in said
    assert "model.resize: area in the config, cv2_bilinear in the checkpoint" in said
    assert "model.pixel_std" in said


def test_other_anchors_are_taken_over_where_they_agree(
    theirs: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = config_of(tmp_path, new_data, theirs, {"anchors": {"ratios": [0.5, 3.0, 2.0]}})
    train(load_config(path), tmp_path / "run")
    assert "the other anchors differ" in capsys.readouterr().out
    source, state = import_detector(theirs), last_checkpoint(tmp_path / "run")
    ours = torch.unflatten(state.model["box_subnet.predictor.weight"], 0, (3, 3, 4))
    rows = torch.unflatten(source.weights["box_subnet.predictor.weight"], 0, (3, 3, 4))
    torch.testing.assert_close(ours[[0, 2]], rows[[0, 2]], rtol=0, atol=1e-6)
    assert (ours[1] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ({"relu_before_p7": True}, "model.relu_before_p7: True in the config, False in the checkpoint"),
        ({"channel_order": "bgr"}, "model.channel_order: bgr in the config, rgb in the checkpoint"),
        ({"backbone": "resnet50"}, "model.backbone: resnet50 in the config, resnet18 in the checkpoint"),
    ],
)
def test_contradictions_name_both_values(
    model: dict[str, Any], told: str, theirs: Path, new_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=told):
        train(load_config(config_of(tmp_path, new_data, theirs, model)), tmp_path / "run")


def test_a_foreign_file_cannot_be_resumed(theirs: Path, new_data: Path, tmp_path: Path) -> None:
    path = config_of(tmp_path, new_data, theirs, train__init_from=None)
    with pytest.raises(CheckpointError, match="weights only and cannot be resumed; use --init-from"):
        train(load_config(path), tmp_path / "run", resume=str(theirs))


def test_a_foreign_file_is_scored_as_it_is(theirs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A val set of COCO's classes, matched by name; the checkpoint's own post-processing where the config is silent."""
    some = write_coco(tmp_path / "val.json", 2, seed=1, classes=dict(zip(COCO.names, COCO.ids, strict=True)))
    config = {
        "data": {"val": {"images": str(some.with_suffix("")), "annotations": str(some)}, "min_size": 64, "max_size": 96}
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"data": config["data"] | {"num_workers": 0}}))
    argv = ["--config", str(tmp_path / "c.yaml"), "--checkpoint", str(theirs), "--output-dir", str(tmp_path / "out")]
    assert evaluate(argv) == 0
    assert "weights of mmdet's RetinaNet" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {record["category_id"] for record in found} <= set(COCO.ids)
    assert found


def test_a_file_that_is_no_detector_is_told(new_data: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"bbox_head.retina_cls.weight": torch.ones(3)}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="lacks what every RetinaNet of mmdet has"):
        load_checkpoint(tmp_path / "w.pth")
    torch.save({"anything": 3}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="or a RetinaNet of torchvision, detectron2 or mmdetection"):
        load_checkpoint(tmp_path / "w.pth")
