"""Training, resuming and evaluation that start from another framework's detector."""

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
from tests.weights.peer_mmdetection import mmdet_state
from tests.weights.peer_models import R18
from tools.eval import main as evaluate
from tools.train import main as train_tool

CLASSES = {"Person": 3, "traffic_light": 5, "motorbike": 6, "widget": 9}
SHORT: dict[str, Any] = {
    "train__epochs": 1, "train__batch_size": 2, "optim__lr": 1e-12, "optim__warmup_steps": 0, "data__min_size": 64,
    "data__val": None,
}  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def peer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("peer") / "retinanet_r18.pth"
    torch.save({"meta": {"cfg": "style='pytorch'"}, "state_dict": mmdet_state(R18)}, path)
    return path


@pytest.fixture(scope="module")
def new_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("images") / "new.json", 4, seed=3, classes=CLASSES)


def config_of(folder: Path, new_data: Path, peer_file: Path, model: dict[str, Any] | None = None, **more: Any) -> Path:
    """A recipe with only the given model settings."""
    data = TinyData(new_data, new_data)
    path = write_config(folder / "c.yaml", data, **{**SHORT, "train__init_from": str(peer_file), **more})
    values = yaml.safe_load(path.read_text())
    values["model"] = model or {}
    path.write_text(yaml.safe_dump(values))
    return path


def test_fine_tuning_keeps_everything_but_the_classes(
    peer_file: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Class rows are transferred by name and anchor; those of new classes start from the prior."""
    monkeypatch.setenv("COLUMNS", "200")
    path = config_of(tmp_path, new_data, peer_file)
    train(load_config(path), tmp_path / "run")
    printed = capsys.readouterr().out
    assert "weights of mmdet's RetinaNet from retinanet_r18.pth" in printed
    for expected in ("Person <- person", "traffic_light <- traffic light", "motorbike <- motorcycle", "prior: widget"):
        assert expected in printed
    source, state = import_detector(peer_file), last_checkpoint(tmp_path / "run")
    only_for_training = {"backbone_weights", "trainable_layers"}
    assert state.config.model.model_dump(exclude=only_for_training) == source.model.model_dump(
        exclude=only_for_training
    )
    assert state.config.model.compat.resize == "cv2_bilinear"
    for name, value in source.weights.items():
        if "cls_subnet.predictor" not in name:
            torch.testing.assert_close(state.model[name], value, rtol=0, atol=1e-6)
    transferred = torch.unflatten(state.model["cls_subnet.predictor.weight"], 0, (9, len(CLASSES)))
    rows = torch.unflatten(source.weights["cls_subnet.predictor.weight"], 0, (9, 80))
    for label, name in enumerate(["person", "traffic light", "motorcycle"]):
        torch.testing.assert_close(transferred[:, label], rows[:, COCO.names.index(name)], rtol=0, atol=1e-6)
    bias = torch.unflatten(state.model["cls_subnet.predictor.bias"], 0, (9, len(CLASSES)))
    torch.testing.assert_close(torch.sigmoid(bias[:, 3]), torch.full((9,), 0.01))


def test_a_run_resumes_without_the_imported_file(peer_file: Path, new_data: Path, tmp_path: Path) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(peer_file.read_bytes())
    path = config_of(tmp_path, new_data, source, train__epochs=2)
    train(load_config(path), tmp_path / "run")
    source.unlink()
    assert train_tool(["--config", str(path), "--output-dir", str(tmp_path / "run"), "--resume", "auto"]) == 0


@pytest.mark.parametrize("resize", ["float_bilinear", "pil_bilinear"])
def test_training_resizes_images_as_the_model_requires(
    resize: str, peer_file: Path, new_data: Path, tmp_path: Path
) -> None:
    path = config_of(tmp_path, new_data, peer_file, {"resize": resize}, data__hflip=1.0, optim__lr=1e-3)
    train(load_config(path), tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").config.model.compat.resize == resize


def test_other_input_processing_is_a_warning(
    peer_file: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = config_of(tmp_path, new_data, peer_file, {"resize": "area", "pixel_std": [1.0, 1.0, 1.0]})
    train(load_config(path), tmp_path / "run")
    printed = " ".join(capsys.readouterr().out.split())
    assert "was trained with other input processing" in printed
    assert "model.compat.resize: area in the config, cv2_bilinear in the checkpoint" in printed
    assert "model.pixel_std" in printed


def test_rows_of_other_anchors_are_transferred_where_they_agree(
    peer_file: Path, new_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    path = config_of(tmp_path, new_data, peer_file, {"anchors": {"ratios": [0.5, 3.0, 2.0]}})
    train(load_config(path), tmp_path / "run")
    assert "the other anchors differ" in capsys.readouterr().out
    source, state = import_detector(peer_file), last_checkpoint(tmp_path / "run")
    transferred = torch.unflatten(state.model["box_subnet.predictor.weight"], 0, (3, 3, 4))
    rows = torch.unflatten(source.weights["box_subnet.predictor.weight"], 0, (3, 3, 4))
    torch.testing.assert_close(transferred[[0, 2]], rows[[0, 2]], rtol=0, atol=1e-6)
    assert (transferred[1] - rows[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"relu_before_p7": True}, "model.compat.relu_before_p7: True in the config, False in the checkpoint"),
        ({"channel_order": "bgr"}, "model.compat.channel_order: bgr in the config, rgb in the checkpoint"),
        ({"backbone": "resnet50"}, "model.backbone: resnet50 in the config, resnet18 in the checkpoint"),
    ],
)
def test_errors_of_contradictions_name_both_values(
    model: dict[str, Any], message: str, peer_file: Path, new_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(load_config(config_of(tmp_path, new_data, peer_file, model)), tmp_path / "run")


def test_an_imported_file_cannot_be_resumed(peer_file: Path, new_data: Path, tmp_path: Path) -> None:
    path = config_of(tmp_path, new_data, peer_file, train__init_from=None)
    with pytest.raises(CheckpointError, match="weights only and cannot be resumed; use --init-from"):
        train(load_config(path), tmp_path / "run", resume=str(peer_file))


def test_another_frameworks_file_is_evaluated_directly(
    peer_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a validation set of COCO's classes, matched by name; post-processing settings come from the file."""
    annotations = write_coco(tmp_path / "val.json", 2, seed=1, classes=dict(zip(COCO.names, COCO.ids, strict=True)))
    config = {
        "data": {
            "val": {"images": str(annotations.with_suffix("")), "annotations": str(annotations)},
            "min_size": 64,
            "max_size": 96,
        }
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config | {"data": config["data"] | {"num_workers": 0}}))
    argv = ["--config", str(tmp_path / "c.yaml"), "--checkpoint", str(peer_file), "--output-dir", str(tmp_path / "out")]
    assert evaluate(argv) == 0
    assert "weights of mmdet's RetinaNet" in capsys.readouterr().out
    detections = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert {record["category_id"] for record in detections} <= set(COCO.ids)
    assert detections


def test_a_file_that_is_not_a_detector_is_an_error(new_data: Path, tmp_path: Path) -> None:
    torch.save({"state_dict": {"bbox_head.retina_cls.weight": torch.ones(3)}}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="must hold a complete RetinaNet of mmdet"):
        load_checkpoint(tmp_path / "w.pth")
    torch.save({"anything": 3}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="or a RetinaNet of torchvision, detectron2 or mmdetection"):
        load_checkpoint(tmp_path / "w.pth")
