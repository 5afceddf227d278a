"""Import from detectron2 and mmdetection: equal logits and detections, and the facts that are read from the files."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from detector.checkpoint import load_checkpoint
from detector.datasets.images import decode_image
from detector.inference.predictor import load_predictor
from detector.weights.coco_classes import COCO
from detector.weights.foreign import import_detector
from tests.weights.conftest import import_of
from tests.weights.peer_detectron2 import detectron2_detect, detectron2_state
from tests.weights.peer_mmdetection import mmdet_detect, mmdet_state
from tests.weights.peer_models import (
    MAX_SIZE,
    MIN_SIZE,
    R18,
    R50,
    R101,
    X101_32,
    X101_64,
    Body,
    PeerDetections,
    State,
    assert_same_detections,
    calibrate,
    detect_with_package,
    write_images,
)
from tools.convert_weights import main as convert

SIZES = {"min_size": MIN_SIZE, "max_size": MAX_SIZE}
SET_SIZES = [f"data.min_size={MIN_SIZE}", f"data.max_size={MAX_SIZE}", "postprocess.detections_per_img=10000"]


def save_pickle(state: State, path: Path) -> None:
    """Save in the format of detectron2's model zoo: a bare pickle of arrays."""
    content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "somebody", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=4))


def save_mmdet(state: State, path: Path, **meta: Any) -> None:
    torch.save({"meta": {"epoch": 12, "iter": 88, **meta}, "state_dict": state, "optimizer": {"state": {}}}, path)


class Case:
    """A peer's network: weights, file format, and detection function."""

    def __init__(
        self,
        state: State,
        bias: str,
        detect: Callable[..., tuple[PeerDetections, list[Tensor]]],
        name: str,
        save: Callable[..., None],
        **network: Any,
    ) -> None:
        self.state, self.bias, self.detect = state, bias, detect
        self.name, self.save, self.network = name, save, network


def detectron2(save: Callable[..., None], name: str, body: Body = R50, **changes: Any) -> Case:
    state = detectron2_state(body, **changes)
    return Case(state, "head.cls_score.bias", detectron2_detect, name, save, body=body)


def mmdet(name: str, body: Body = R50, *, caffe: bool = False) -> Case:
    state = mmdet_state(body, caffe=caffe)
    return Case(state, "bbox_head.retina_cls.bias", mmdet_detect, name, save_mmdet, body=body, caffe=caffe)


CASES: dict[str, Callable[[], Case]] = {
    "detectron2 R50 pkl": lambda: detectron2(save_pickle, "model_final.pkl"),
    "detectron2 R101 pth": lambda: detectron2(lambda s, p: torch.save({"model": s, "iteration": 9}, p), "m.pth", R101),
    "detectron2 R50 GN": lambda: detectron2(save_pickle, "gn.pkl", group_norm=True),
    "mmdet R50": lambda: mmdet("retinanet_r50.pth"),
    "mmdet R50 caffe": lambda: mmdet("retinanet_r50_caffe.pth", caffe=True),
    "mmdet R18": lambda: mmdet("retinanet_r18.pth", R18),
    "mmdet X101 32x4d": lambda: mmdet("retinanet_x101_32x4d.pth", X101_32),
    "mmdet X101 64x4d": lambda: mmdet("retinanet_x101_64x4d.pth", X101_64),
}


QUICK = ("mmdet R18",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_converted_networks_have_the_same_logits_and_detections(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    paths = write_images(tmp_path / "in")[: 6 if case.network["body"] in (R18, R50) else 2]
    _, logits = case.detect(case.state, paths[0], **SIZES, **case.network)
    calibrate(case.state, case.bias, logits)
    case.save(case.state, tmp_path / case.name)
    checkpoint = tmp_path / "converted.pt"
    assert convert([str(tmp_path / case.name), str(checkpoint), *SET_SIZES]) == 0
    predictor = load_predictor(checkpoint, device=torch.device("cpu"))
    total = 0
    for path, detections in zip(paths, detect_with_package(tmp_path / "out", checkpoint, paths), strict=True):
        expected, logits = case.detect(case.state, path, **SIZES, **case.network)
        assert_same_detections(detections, expected._replace(labels=torch.tensor(COCO.ids)[expected.labels]))
        total += len(expected.scores)
        computed = predictor.outputs(decode_image(path, apply_exif=True)).cls_logits
        assert len(computed) == len(logits)
        for level, (one, other) in enumerate(zip(computed, logits, strict=True)):
            height, width = other.shape[-2:]
            by_anchor = other.view(9, -1, height, width).permute(2, 3, 0, 1).reshape(-1, 9, len(COCO))
            if "detectron2" in name:  # whose order is scale * 3 + ratio
                by_anchor = by_anchor.view(-1, 3, 3, len(COCO)).transpose(1, 2).reshape(-1, 9, len(COCO))
            difference = (one[0].view(-1, 9, len(COCO)) - by_anchor).abs().max()
            assert difference <= 1e-5 * other.abs().max(), f"P{level + 3}"
    assert total >= 100 * len(paths), "too few detections for a meaningful test"


NAMES = tuple(f"thing {i}" for i in range(80))


@pytest.mark.parametrize(
    "meta", [{"CLASSES": NAMES}, {"dataset_meta": {"classes": NAMES}}, {"dataset_meta": {"CLASSES": list(NAMES)}}]
)
def test_class_names_are_read_from_mmdetections_files(
    meta: dict[str, Any], mmdet_weights: State, tmp_path: Path
) -> None:
    categories = import_of({"meta": meta, "state_dict": mmdet_weights}, tmp_path).categories
    assert (categories.names, categories.ids) == (NAMES, tuple(range(1, 81)))


@pytest.mark.parametrize("meta", [{}, {"CLASSES": COCO.names}, {"CLASSES": ("a", "b")}, {"CLASSES": 3}, None])
def test_eighty_outputs_are_the_classes_of_coco_with_their_ids(meta: Any, mmdet_weights: State, tmp_path: Path) -> None:
    assert import_of({"meta": meta, "state_dict": mmdet_weights}, tmp_path).categories == COCO


@pytest.mark.parametrize(
    ("config", "name", "option", "style", "assumed"),
    [
        ("backbone=dict(style='caffe')", "w.pth", None, "caffe", False),
        ("backbone=dict(style='pytorch')", "w_caffe.pth", None, "pytorch", False),
        ('{"style": "caffe"}', "w.pth", None, "caffe", False),
        ("", "retinanet_r50_caffe_fpn.pth", None, "caffe", True),
        ("", "retinanet_r50_fpn.pth", None, "pytorch", True),
        ("backbone=dict(style='caffe')", "w.pth", "pytorch", "pytorch", False),
    ],
)
def test_the_style_is_read_or_assumed_with_a_note(
    config: str, name: str, option: Any, style: str, assumed: bool, mmdet_weights: State, tmp_path: Path
) -> None:
    for key in ("config", "cfg"):  # 2.x, 3.x
        imported = import_of({"meta": {key: config}, "state_dict": mmdet_weights}, tmp_path, name, style=option)
        order, stride = ("bgr", "1x1") if style == "caffe" else ("rgb", "3x3")
        assert (imported.model.compat.channel_order, imported.model.compat.stride_in) == (order, stride)
        assert any("style is assumed" in note for note in imported.notes) == assumed


V2_CONFIG = """
img_norm_cfg = dict(mean=[102.9801, 115.9465, 122.7717], std=[1.0, 1.0, 1.0], to_rgb=False)
test_pipeline = [dict(type='LoadImageFromFile'), dict(type='MultiScaleFlipAug', img_scale=(1000, 600), flip=False)]
model = dict(backbone=dict(style='pytorch'))
"""
V3_CONFIG = """
model = dict(
    data_preprocessor=dict(
        bgr_to_rgb=False, mean=[103.53, 116.28, 123.675,], std=[57.375, 57.12, 58.395,]),
    backbone=dict(style='pytorch'))
train_pipeline = [dict(scale=(300, 200))]
test_pipeline = [dict(type='Resize', keep_ratio=True, scale=(640, 640,))]
"""


@pytest.mark.parametrize(
    ("text", "order", "mean", "std", "sizes"),
    [
        (V2_CONFIG, "bgr", (102.9801, 115.9465, 122.7717), (1.0, 1.0, 1.0), (600, 1000)),
        (V3_CONFIG, "bgr", (103.53, 116.28, 123.675), (57.375, 57.12, 58.395), (640, 640)),
        ("style='caffe'", "bgr", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0), (800, 1333)),
    ],
    ids=["2.x", "3.x", "style only"],
)
def test_input_settings_are_read_from_the_config_in_a_file(
    text: str, order: str, mean: Any, std: Any, sizes: tuple[int, int], mmdet_weights: State, tmp_path: Path
) -> None:
    torch.save({"meta": {"cfg": text}, "state_dict": mmdet_weights}, tmp_path / "w.pth")
    config = load_checkpoint(tmp_path / "w.pth").config
    assert (config.model.compat.channel_order, config.model.pixel_mean, config.model.pixel_std) == (order, mean, std)
    assert (config.data.min_size, config.data.max_size) == sizes


@pytest.mark.parametrize("given_by", ["config", "option"])
def test_weights_of_the_box_encoding_are_folded_into_the_last_convolution(
    given_by: str, mmdet_weights: State, tmp_path: Path
) -> None:
    """As for FreeAnchor, which has the tensors of a RetinaNet."""
    text = (
        "bbox_coder=dict(target_means=[.0, .0, .0, .0], target_stds=[0.1, 0.1, 0.2, 0.2])"
        if given_by == "config"
        else ""
    )
    option = (10.0, 10.0, 5.0, 5.0) if given_by == "option" else None
    imported = import_of({"meta": {"cfg": text}, "state_dict": mmdet_weights}, tmp_path, box_weights=option)
    factors = torch.tensor([0.1, 0.1, 0.2, 0.2])
    rows = torch.unflatten(mmdet_weights["bbox_head.retina_reg.weight"], 0, (9, 4)) * factors.view(1, 4, 1, 1, 1)
    torch.testing.assert_close(imported.weights["box_subnet.predictor.weight"], rows.flatten(0, 1))
    assert any("box encoding with weights 10, 10, 5, 5" in note for note in imported.notes)


def test_box_settings_are_read_from_the_config_in_a_file(mmdet_weights: State, tmp_path: Path) -> None:
    text = """anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3,
        ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        relu_before_extra_convs=True, target_stds=[1e-1, 1e-1, 2e-1, 2e-1],
        test_cfg=dict(nms_pre=500, min_bbox_size=0, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6),
        max_per_img=50)"""
    imported = import_of({"meta": {"cfg": text}, "state_dict": mmdet_weights}, tmp_path)
    assert imported.model.compat.relu_before_p7
    settings = imported.postprocess
    assert (settings.score_thresh, settings.nms_thresh, settings.topk_candidates, settings.detections_per_img) == (
        0.1,
        0.6,
        500,
        50,
    )
    assert any("box encoding with weights 10, 10, 5, 5" in note for note in imported.notes)


def test_statistics_of_ghm_are_dropped(mmdet_weights: State, tmp_path: Path) -> None:
    extra = {f"bbox_head.loss_{kind}.edges": torch.linspace(0, 1, 11) for kind in ("cls", "bbox")}
    assert import_of({"state_dict": {**mmdet_weights, **extra}}, tmp_path).model.backbone == "resnet18"


def test_mean_and_deviation_are_read_from_detectron2s_files(detectron2_weights: State, tmp_path: Path) -> None:
    state = {
        **detectron2_weights,
        "pixel_mean": torch.tensor([1.0, 2, 3]).view(3, 1, 1),
        "pixel_std": torch.full((3, 1, 1), 57.0),
    }
    model = import_of({"model": state}, tmp_path).model
    assert (model.pixel_mean, model.pixel_std) == ((1.0, 2.0, 3.0), (57.0, 57.0, 57.0))


def test_batch_norms_without_statistics_get_mean_0_and_variance_1(detectron2_weights: State, tmp_path: Path) -> None:
    bare = {k: v for k, v in detectron2_weights.items() if "running" not in k}
    imported = import_of({"model": bare}, tmp_path)
    assert (imported.weights["backbone.bn1.running_mean"] == 0).all()
    assert (imported.weights["backbone.layer4.2.bn3.running_var"] == 1).all()
    assert any("without statistics" in note for note in imported.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_types_are_converted_to_float32_with_a_note(
    dtype: torch.dtype, mmdet_weights: State, tmp_path: Path
) -> None:
    other = {k: v.to(dtype) if v.is_floating_point() else v for k, v in mmdet_weights.items()}
    imported = import_of({"state_dict": other}, tmp_path)
    assert all(v.dtype == torch.float32 for v in imported.weights.values())
    assert any(f"converted from {str(dtype)[6:]}" in note for note in imported.notes)


def test_safetensors_and_npz_files_are_imported_too(mmdet_weights: State, tmp_path: Path) -> None:
    torch.save(mmdet_weights, tmp_path / "w.pth")
    safetensors.torch.save_file(mmdet_weights, tmp_path / "w.safetensors")
    arrays: dict[str, Any] = {k: v.numpy() for k, v in mmdet_weights.items()}
    np.savez(tmp_path / "w.npz", **arrays)
    expected = import_detector(tmp_path / "w.pth")
    for name in ("w.safetensors", "w.npz"):
        state = load_checkpoint(tmp_path / name)
        assert state.config.model == expected.model
        assert all(torch.equal(state.model[k], v) for k, v in expected.weights.items())
