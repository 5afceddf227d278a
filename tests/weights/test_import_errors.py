"""Files that cannot be imported, and invalid options of the conversion: one clear error each."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor

from detector.checkpoint import load_checkpoint
from detector.errors import WeightsError
from detector.weights.foreign import import_detector
from tests.weights.conftest import import_of
from tests.weights.peer_models import State, cell_shapes
from tools.convert_weights import main as convert


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"cfg": "anchor_generator=dict(type='LegacyAnchorGenerator')"}, "of mmdetection 1.x"),
        ({"mmdet_version": "1.2.0+abc"}, "of mmdetection 1.x"),
        ({"cfg": "target_means=[0.1, 0.0, 0.0, 0.0]"}, "target_means must be 0"),
        ({"cfg": "target_stds=[0.0, 0.1, 0.2, 0.2]"}, "target_stds must be positive"),
        ({"cfg": "target_stds=[0.1, 0.1]"}, "must give target_stds as numbers"),
        ({"cfg": "mean=[103.53, a, 2]"}, "must give mean as numbers"),
        (
            {"cfg": "anchor_generator=dict(ratios=[0.3, 1.0, 3.0])"},
            r"ratios of the anchors must be \[0.5, 1, 2\], got \[0.3, 1.0, 3.0\]",
        ),
        ({"cfg": "anchor_generator=dict(octave_base_scale=3)"}, r"octave_base_scale of the anchors must be \[4\], got"),
        ({"cfg": "neck=dict(add_extra_convs='on_lateral')"}, "P6 must come from C5 or P5"),
        ({"CLASSES": ("a",) * 80}, "must name each class once"),
    ],
)
def test_networks_with_unsupported_settings_are_rejected(
    meta: Any, message: str, mmdet_weights: State, tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        import_of({"meta": meta, "state_dict": mmdet_weights}, tmp_path)


def test_anchors_in_detectron2s_files_are_checked(detectron2_weights: State, tmp_path: Path) -> None:
    cells = {f"anchor_generator.cell_anchors.{i}": anchors for i, anchors in enumerate(cell_anchors())}
    assert import_of({"model": {**detectron2_weights, **cells}}, tmp_path).model.compat.anchor_center_offset == 0
    cells["anchor_generator.cell_anchors.2"] = cells["anchor_generator.cell_anchors.2"] * 0.5
    with pytest.raises(WeightsError, match="anchors of P5 must be detectron2's default ones"):
        import_of({"model": {**detectron2_weights, **cells}}, tmp_path)


def cell_anchors() -> list[Tensor]:
    """In detectron2's order: by scale, then by ratio."""
    levels = []
    for level in range(5):
        shapes = torch.tensor(cell_shapes(level, "scale first"))
        levels.append(torch.cat([-shapes / 2, shapes / 2], dim=1))
    return levels


def without(state: State, part: str) -> State:
    return {k: v for k, v in state.items() if part not in k}


def with_value(state: State, name: str, change: Callable[[Tensor], Tensor]) -> State:
    return {**state, name: change(state[name].clone())}


def with_nan(tensor: Tensor) -> Tensor:
    tensor.flatten()[:3] = torch.nan
    return tensor


FC = "bbox_head.cls_convs.1.conv.weight"
DAMAGE: dict[str, tuple[Callable[[State], State], str]] = {
    "a layer is missing": (
        lambda s: without(s, "layer2.1.conv1"),
        r"backbone must be one of resnet18.*got \(2, 1, 2, 2\)",
    ),
    "a tensor is missing": (lambda s: without(s, "layer2.1.bn1.bias"), r"missing: backbone\.layer2\.1\.bn1\.bias"),
    "the pyramid is missing": (lambda s: without(s, "neck"), r"complete RetinaNet of mmdet, but lacks fpn\.lateral"),
    "half of the head is missing": (lambda s: without(s, "retina_reg"), r"lacks .*box_subnet\.predictor\.bias"),
    "a tower layer is missing": (lambda s: without(s, "reg_convs.2"), r"missing: box_subnet\.tower\.4\.weight"),
    "a tensor is surplus": (
        lambda s: {**s, "roi_head.fc.weight": torch.ones(2)},
        r"not part of a RetinaNet: roi_head\.fc\.weight",
    ),
    "a shape is wrong": (
        lambda s: with_value(s, FC, lambda v: v[:, :100]),
        r"of another shape: cls_subnet\.tower\.2\.weight \(256, 100",
    ),
    "NaN": (
        lambda s: with_value(s, FC, with_nan),
        r"cls_subnet\.conv\.1\.weight must hold finite numbers, got 3 that are not",
    ),
    "infinity": (lambda s: with_value(s, FC, lambda v: v / 0), r"must hold finite numbers"),
    "integers": (lambda s: with_value(s, FC, lambda v: v.int()), r"must hold floating-point numbers, got int32"),
    "complex": (
        lambda s: with_value(s, FC, lambda v: v.to(torch.complex64)),
        r"must hold floating-point numbers, got complex64",
    ),
    "other anchors": (
        lambda s: with_value(
            with_value(s, "bbox_head.retina_reg.bias", lambda v: v[:12]),
            "bbox_head.retina_reg.weight",
            lambda v: v[:12],
        ),
        r"must have 9 anchors \(3 sizes, 3 ratios\), got 3",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_errors_of_incomplete_files_name_the_tensors(
    damage: str, mmdet_weights: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = DAMAGE[damage]
    torch.save({"state_dict": change(mmdet_weights)}, tmp_path / "w.pth")
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "converted.pt")]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error, re.DOTALL), error
    assert error.startswith(f"error: {tmp_path / 'w.pth'}")
    assert not (tmp_path / "converted.pt").exists()


@pytest.mark.parametrize(
    "shape",
    [
        (), (0,), (64, 64, 3, 3),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(7,), (1, 1, 1), (90, 256, 3, 3), (0, 256, 3, 3)]),
    ],
)  # fmt: skip
def test_a_wrong_shape_of_any_tensor_is_an_error(shape: tuple[int, ...], mmdet_weights: State, tmp_path: Path) -> None:
    for name in (n for n in mmdet_weights if not n.endswith("num_batches_tracked")):
        selected = re.search(
            r"layer1\.0\.(conv|bn)2|conv1|lateral_convs\.[02]|fpn_convs\.[034]|cls_convs\.0|retina", name
        )
        if mmdet_weights[name].shape != shape and selected:
            content = {"state_dict": {**mmdet_weights, name: torch.zeros(shape)}}
            with pytest.raises(WeightsError, match=r"w\.pth"):
                import_detector(tmp_path / "w.pth", content)


@pytest.mark.parametrize("classes", ["a,b,b", "a,,b", "missing.json", "list.json", "ids.json"])
def test_invalid_classes_are_errors(
    classes: str, mmdet_weights: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": mmdet_weights}, tmp_path / "w.pth")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "ids.json").write_text('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}')
    option = str(tmp_path / classes) if classes.endswith(".json") else classes
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "converted.pt"), "--categories", option]) == 2
    assert "--categories" in capsys.readouterr().err


def test_the_error_for_a_classifier_advises_backbone_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    assert convert([str(tmp_path / "r18.pth"), str(tmp_path / "converted.pt")]) == 2
    assert f"model.backbone_weights={tmp_path / 'r18.pth'}" in capsys.readouterr().err
    with pytest.raises(WeightsError, match=r"model\.backbone_weights="):
        load_checkpoint(tmp_path / "r18.pth")


def test_another_detector_is_rejected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"roi_heads.box_predictor.weight": torch.ones(2)}}, tmp_path / "frcnn.pth")
    for arguments in ([], ["--source", "torchvision"]):
        assert convert([str(tmp_path / "frcnn.pth"), str(tmp_path / "converted.pt"), *arguments]) == 2
        assert "roi_heads" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["model.backbone=resnet50", "model.anchors.ratios=[1.0]", "model.head.depth=3"])
def test_overrides_that_describe_another_network_are_rejected(
    setting: str, mmdet_weights: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": mmdet_weights}, tmp_path / "w.pth")
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "converted.pt"), setting]) == 2
    assert "do not fit the network that it describes" in capsys.readouterr().err
    assert not (tmp_path / "converted.pt").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--box-weights", "nan,1,1,1"], ["--box-weights", "1,1"], ["--norm-eps", "-1"], ["--norm-eps", "nan"],
        ["--to", "torchvision", "--style", "caffe"], ["--to", "torchvision", "--source", "mmdet"],
        ["--to", "torchvision", "model.compat.norm_eps=0"],
    ],
)  # fmt: skip
def test_invalid_options_are_rejected(options: list[str], mmdet_weights: State, tmp_path: Path) -> None:
    torch.save({"state_dict": mmdet_weights}, tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="2"):
        convert([str(tmp_path / "w.pth"), str(tmp_path / "converted.pt"), *options])
    with pytest.raises(SystemExit, match="2"):
        convert([str(tmp_path / "w.pth"), str(tmp_path / "nowhere" / "converted.pt")])
    assert not (tmp_path / "nowhere").exists()


def test_an_existing_file_is_not_overwritten(mmdet_weights: State, tmp_path: Path) -> None:
    torch.save({"state_dict": mmdet_weights}, tmp_path / "w.pth")
    (tmp_path / "converted.pt").write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        convert([str(tmp_path / "w.pth"), str(tmp_path / "converted.pt")])
    assert (tmp_path / "converted.pt").read_text() == "precious"


def test_overrides_are_stored_and_their_errors_reported(
    mmdet_weights: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": mmdet_weights}, tmp_path / "w.pth")
    source, target = str(tmp_path / "w.pth"), tmp_path / "converted.pt"
    assert convert([source, str(target), "model.strid_in=1x1"]) == 2
    assert "did you mean model.compat.stride_in" in capsys.readouterr().err
    assert convert([source, str(target), "model.compat.stride_in=1x1", "postprocess.nms_thresh=0.6"]) == 0
    config = load_checkpoint(target).config
    assert (config.model.compat.stride_in, config.postprocess.nms_thresh) == ("1x1", 0.6)
