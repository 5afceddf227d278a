"""Other programs' detectors: the same detections after conversion, and one clear error for whatever cannot be taken over."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
import torchvision
from torch import Tensor

from detector.checkpoint import load_checkpoint
from detector.datasets.images import decode_image
from detector.errors import WeightsError
from detector.inference.predictor import load_predictor
from detector.weights.coco_classes import COCO
from detector.weights.foreign import Imported, import_detector
from detector.weights.name_maps import Said
from tests.weights import peer_models as theirs
from tests.weights.peer_models import MAX_SIZE, MIN_SIZE, R18, R50, R101, X101_32, X101_64, Body, Objects, State
from tools.convert_weights import main as convert

SIZES = {"min_size": MIN_SIZE, "max_size": MAX_SIZE}
SET_SIZES = [f"data.min_size={MIN_SIZE}", f"data.max_size={MAX_SIZE}", "postprocess.detections_per_img=10000"]


def save_pickle(state: State, path: Path) -> None:
    """As detectron2's model zoo: a bare pickle of arrays."""
    content = {"model": {k: v.numpy() for k, v in state.items()}, "__author__": "somebody", "matching_heuristics": True}
    path.write_bytes(pickle.dumps(content, protocol=4))


def save_mmdet(state: State, path: Path, **meta: Any) -> None:
    torch.save({"meta": {"epoch": 12, "iter": 88, **meta}, "state_dict": state, "optimizer": {"state": {}}}, path)


class Case:
    """A build of another program's network, how it is stored, and how it detects."""

    def __init__(
        self,
        state: State,
        bias: str,
        detect: Callable[..., tuple[Objects, list[Tensor]]],
        name: str,
        save: Callable[..., None],
        **how: Any,
    ) -> None:
        self.state, self.bias, self.detect, self.name, self.save, self.how = state, bias, detect, name, save, how


def detectron2(save: Callable[..., None], name: str, body: Body = R50, **changes: Any) -> Case:
    state = theirs.detectron2_state(body, **changes)
    return Case(state, "head.cls_score.bias", theirs.detectron2_detect, name, save, body=body)


def mmdet(name: str, body: Body = R50, *, caffe: bool = False) -> Case:
    state = theirs.mmdet_state(body, caffe=caffe)
    return Case(state, "bbox_head.retina_cls.bias", theirs.mmdet_detect, name, save_mmdet, body=body, caffe=caffe)


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
def test_converted_networks_compute_and_find_the_same(name: str, tmp_path: Path) -> None:
    case = CASES[name]()
    paths = theirs.pictures(tmp_path / "in")[: 6 if case.how["body"] in (R18, R50) else 2]
    _, logits = case.detect(case.state, paths[0], **SIZES, **case.how)
    theirs.calibrate(case.state, case.bias, logits)
    case.save(case.state, tmp_path / case.name)
    checkpoint = tmp_path / "ours.pt"
    assert convert([str(tmp_path / case.name), str(checkpoint), *SET_SIZES]) == 0
    predictor = load_predictor(checkpoint, device=torch.device("cpu"))
    total = 0
    for path, ours in zip(paths, theirs.by_us(tmp_path / "out", checkpoint, paths), strict=True):
        found, logits = case.detect(case.state, path, **SIZES, **case.how)
        expected = found._replace(labels=torch.tensor(COCO.ids)[found.labels])
        theirs.assert_same(ours, expected)
        total += len(found.scores)
        computed = predictor.outputs(decode_image(path, apply_exif=True)).cls_logits
        assert len(computed) == len(logits)
        for level, (one, other) in enumerate(zip(computed, logits, strict=True)):
            height, width = other.shape[-2:]
            by_anchor = other.view(9, -1, height, width).permute(2, 3, 0, 1).reshape(-1, 9, len(COCO))
            if "detectron2" in name:  # a = scale * 3 + ratio there
                by_anchor = by_anchor.view(-1, 3, 3, len(COCO)).transpose(1, 2).reshape(-1, 9, len(COCO))
            difference = (one[0].view(-1, 9, len(COCO)) - by_anchor).abs().max()
            assert difference <= 1e-5 * other.abs().max(), f"P{level + 3}"
    assert total >= 100 * len(paths), "weights that find nothing prove nothing"


# ---- what a file says about itself ------------------------------------------------------------------------------


def import_of(content: Any, folder: Path, name: str = "w.pth", **said: Any) -> Imported:
    torch.save(content, folder / name)
    return import_detector(folder / name, said=Said(**said))


@pytest.fixture(scope="module")
def small() -> State:
    """The smallest whole file."""
    return theirs.mmdet_state(R18)


@pytest.fixture(scope="module")
def zoo() -> State:
    return theirs.detectron2_state()


NAMES = tuple(f"thing {i}" for i in range(80))


@pytest.mark.parametrize(
    "meta", [{"CLASSES": NAMES}, {"dataset_meta": {"classes": NAMES}}, {"dataset_meta": {"CLASSES": list(NAMES)}}]
)
def test_mmdetections_files_name_their_classes(meta: dict[str, Any], small: State, tmp_path: Path) -> None:
    found = import_of({"meta": meta, "state_dict": small}, tmp_path).categories
    assert (found.names, found.ids) == (NAMES, tuple(range(1, 81)))


@pytest.mark.parametrize("meta", [{}, {"CLASSES": COCO.names}, {"CLASSES": ("a", "b")}, {"CLASSES": 3}, None])
def test_eighty_outputs_are_cocos_classes_with_their_ids(meta: Any, small: State, tmp_path: Path) -> None:
    assert import_of({"meta": meta, "state_dict": small}, tmp_path).categories == COCO


@pytest.mark.parametrize(
    ("config", "name", "said", "style", "assumed"),
    [
        ("backbone=dict(style='caffe')", "w.pth", None, "caffe", False),
        ("backbone=dict(style='pytorch')", "w_caffe.pth", None, "pytorch", False),
        ('{"style": "caffe"}', "w.pth", None, "caffe", False),
        ("", "retinanet_r50_caffe_fpn.pth", None, "caffe", True),
        ("", "retinanet_r50_fpn.pth", None, "pytorch", True),
        ("backbone=dict(style='caffe')", "w.pth", "pytorch", "pytorch", False),
    ],
)
def test_the_style_is_read_or_assumed_aloud(
    config: str, name: str, said: Any, style: str, assumed: bool, small: State, tmp_path: Path
) -> None:
    for key in ("config", "cfg"):  # 2.x, 3.x
        imported = import_of({"meta": {key: config}, "state_dict": small}, tmp_path, name, style=said)
        order, stride = ("bgr", "1x1") if style == "caffe" else ("rgb", "3x3")
        assert (imported.model.channel_order, imported.model.stride_in) == (order, stride)
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
    ids=["2.x", "3.x", "silent"],
)
def test_what_the_config_in_a_file_says_of_pictures_is_believed(
    text: str, order: str, mean: Any, std: Any, sizes: tuple[int, int], small: State, tmp_path: Path
) -> None:
    torch.save({"meta": {"cfg": text}, "state_dict": small}, tmp_path / "w.pth")
    config = load_checkpoint(tmp_path / "w.pth").config
    assert (config.model.channel_order, config.model.pixel_mean, config.model.pixel_std) == (order, mean, std)
    assert (config.data.min_size, config.data.max_size) == sizes


@pytest.mark.parametrize("told", ["cfg", "said"])
def test_boxes_coded_otherwise_are_recoded(told: str, small: State, tmp_path: Path) -> None:
    """FreeAnchor's, which has RetinaNet's tensors."""
    text = "bbox_coder=dict(target_means=[.0, .0, .0, .0], target_stds=[0.1, 0.1, 0.2, 0.2])" if told == "cfg" else ""
    said = (10.0, 10.0, 5.0, 5.0) if told == "said" else None
    imported = import_of({"meta": {"cfg": text}, "state_dict": small}, tmp_path, box_weights=said)
    factors = torch.tensor([0.1, 0.1, 0.2, 0.2])
    rows = torch.unflatten(small["bbox_head.retina_reg.weight"], 0, (9, 4)) * factors.view(1, 4, 1, 1, 1)
    torch.testing.assert_close(imported.weights["box_subnet.predictor.weight"], rows.flatten(0, 1))
    assert any("boxes coded with weights 10, 10, 5, 5" in note for note in imported.notes)


@pytest.mark.parametrize(
    ("meta", "told"),
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
        ({"CLASSES": ("a",) * 80}, "several classes the same name"),
    ],
)
def test_networks_that_would_be_misread_are_refused(meta: Any, told: str, small: State, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=told):
        import_of({"meta": meta, "state_dict": small}, tmp_path)


def test_what_the_config_in_a_file_says_of_boxes_is_believed(small: State, tmp_path: Path) -> None:
    text = """anchor_generator=dict(type='AnchorGenerator', octave_base_scale=4, scales_per_octave=3, ratios=[0.5, 1.0, 2.0],
        strides=[8, 16, 32, 64, 128]), relu_before_extra_convs=True, target_stds=[1e-1, 1e-1, 2e-1, 2e-1],
        test_cfg=dict(nms_pre=500, min_bbox_size=0, score_thr=0.1, nms=dict(type='nms', iou_threshold=0.6), max_per_img=50)"""
    imported = import_of({"meta": {"cfg": text}, "state_dict": small}, tmp_path)
    assert imported.model.relu_before_p7
    found = imported.postprocess
    assert (found.score_thresh, found.nms_thresh, found.topk_candidates, found.detections_per_img) == (
        0.1,
        0.6,
        500,
        50,
    )
    assert any("boxes coded with weights 10, 10, 5, 5" in note for note in imported.notes)


def test_what_ghm_remembers_is_no_part_of_the_network(small: State, tmp_path: Path) -> None:
    extra = {f"bbox_head.loss_{kind}.edges": torch.linspace(0, 1, 11) for kind in ("cls", "bbox")}
    assert import_of({"state_dict": {**small, **extra}}, tmp_path).model.backbone == "resnet18"


def test_detectron2s_own_mean_is_believed(zoo: State, tmp_path: Path) -> None:
    state = {**zoo, "pixel_mean": torch.tensor([1.0, 2, 3]).view(3, 1, 1), "pixel_std": torch.full((3, 1, 1), 57.0)}
    model = import_of({"model": state}, tmp_path).model
    assert (model.pixel_mean, model.pixel_std) == ((1.0, 2.0, 3.0), (57.0, 57.0, 57.0))


def test_detectron2s_own_anchors_are_checked(zoo: State, tmp_path: Path) -> None:
    cells = {f"anchor_generator.cell_anchors.{i}": anchors for i, anchors in enumerate(cell_anchors())}
    assert import_of({"model": {**zoo, **cells}}, tmp_path).model.anchors.center_offset == 0
    cells["anchor_generator.cell_anchors.2"] = cells["anchor_generator.cell_anchors.2"] * 0.5
    with pytest.raises(WeightsError, match="anchors of P5 must be detectron2's usual ones"):
        import_of({"model": {**zoo, **cells}}, tmp_path)


def cell_anchors() -> list[Tensor]:
    """As detectron2 stores them: by scale, then by ratio."""
    levels = []
    for level in range(5):
        shapes = torch.tensor(theirs._cell(level, "scale first"))
        levels.append(torch.cat([-shapes / 2, shapes / 2], dim=1))
    return levels


def test_batch_norms_without_statistics_are_detectron2s_identity(zoo: State, tmp_path: Path) -> None:
    bare = {k: v for k, v in zoo.items() if "running" not in k}
    imported = import_of({"model": bare}, tmp_path)
    assert (imported.weights["backbone.bn1.running_mean"] == 0).all()
    assert (imported.weights["backbone.layer4.2.bn3.running_var"] == 1).all()
    assert any("without statistics" in note for note in imported.notes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floating_point_numbers_become_float32_aloud(dtype: torch.dtype, small: State, tmp_path: Path) -> None:
    other = {k: v.to(dtype) if v.is_floating_point() else v for k, v in small.items()}
    imported = import_of({"state_dict": other}, tmp_path)
    assert all(v.dtype == torch.float32 for v in imported.weights.values())
    assert any(f"converted from {str(dtype)[6:]}" in note for note in imported.notes)


def test_safetensors_and_npz_files_are_taken_over_too(small: State, tmp_path: Path) -> None:
    torch.save(small, tmp_path / "w.pth")
    safetensors.torch.save_file(small, tmp_path / "w.safetensors")
    np.savez(tmp_path / "w.npz", allow_pickle=False, **{k: v.numpy() for k, v in small.items()})
    expected = import_detector(tmp_path / "w.pth")
    for name in ("w.safetensors", "w.npz"):
        found = load_checkpoint(tmp_path / name)
        assert found.config.model == expected.model
        assert all(torch.equal(found.model[k], v) for k, v in expected.weights.items())


# ---- what cannot be taken over ----------------------------------------------------------------------------------


def without(state: State, part: str) -> State:
    return {k: v for k, v in state.items() if part not in k}


def with_value(state: State, name: str, change: Callable[[Tensor], Tensor]) -> State:
    return {**state, name: change(state[name].clone())}


def with_nan(tensor: Tensor) -> Tensor:
    tensor.flatten()[:3] = torch.nan
    return tensor


FC = "bbox_head.cls_convs.1.conv.weight"
BROKEN: dict[str, tuple[Callable[[State], State], str]] = {
    "a layer is missing": (lambda s: without(s, "layer2.1.conv1"), r"backbone must be one of resnet18.*got \(2, 1, 2, 2\)"),
    "a tensor is missing": (lambda s: without(s, "layer2.1.bn1.bias"), r"missing: backbone\.layer2\.1\.bn1\.bias"),
    "the pyramid is missing": (lambda s: without(s, "neck"), r"lacks what every RetinaNet of mmdet has: fpn\.lateral"),
    "half of the head is missing": (lambda s: without(s, "retina_reg"), r"lacks .*box_subnet\.predictor\.bias"),
    "a tower layer is missing": (lambda s: without(s, "reg_convs.2"), r"missing: box_subnet\.tower\.4\.weight"),
    "surplus": (lambda s: {**s, "roi_head.fc.weight": torch.ones(2)}, r"not part of a RetinaNet: roi_head\.fc\.weight"),
    "another shape": (lambda s: with_value(s, FC, lambda v: v[:, :100]), r"of another shape: cls_subnet\.tower\.2\.weight \(256, 100"),
    "NaN": (lambda s: with_value(s, FC, with_nan), r"cls_subnet\.conv\.1\.weight holds 3 numbers that are not finite"),
    "infinite": (lambda s: with_value(s, FC, lambda v: v / 0), r"are not finite"),
    "whole numbers": (lambda s: with_value(s, FC, lambda v: v.int()), r"must hold floating-point numbers, got int32"),
    "complex": (lambda s: with_value(s, FC, lambda v: v.to(torch.complex64)), r"must hold floating-point numbers, got complex64"),
    "other anchors": (
        lambda s: with_value(with_value(s, "bbox_head.retina_reg.bias", lambda v: v[:12]), "bbox_head.retina_reg.weight", lambda v: v[:12]),
        r"must have 9 anchors \(3 sizes, 3 ratios\), got 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_not_whole_is_told_by_name(
    what: str, small: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, told = BROKEN[what]
    torch.save({"state_dict": change(small)}, tmp_path / "w.pth")
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "ours.pt")]) == 2
    error = capsys.readouterr().err
    assert re.search(told, error, re.DOTALL), error
    assert error.startswith(f"error: {tmp_path / 'w.pth'}")
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize(
    "shape",
    [
        (), (0,), (64, 64, 3, 3),
        *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(7,), (1, 1, 1), (90, 256, 3, 3), (0, 256, 3, 3)]),
    ],
)  # fmt: skip
def test_no_shape_of_any_tensor_ends_in_anything_but_an_error(
    shape: tuple[int, ...], small: State, tmp_path: Path
) -> None:
    for name in (n for n in small if not n.endswith("num_batches_tracked")):
        part = re.search(r"layer1\.0\.(conv|bn)2|conv1|lateral_convs\.[02]|fpn_convs\.[034]|cls_convs\.0|retina", name)
        if small[name].shape != shape and part:
            content = {"state_dict": {**small, name: torch.zeros(shape)}}
            with pytest.raises(WeightsError, match=r"w\.pth"):
                import_detector(tmp_path / "w.pth", content)


@pytest.mark.parametrize("classes", ["a,b,b", "a,,b", "gone.json", "list.json", "ids.json"])
def test_classes_that_cannot_be_are_told(
    classes: str, small: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": small}, tmp_path / "w.pth")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "ids.json").write_text('{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}')
    said = str(tmp_path / classes) if classes.endswith(".json") else classes
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "ours.pt"), "--categories", said]) == 2
    assert "--categories" in capsys.readouterr().err


def test_a_classifier_is_sent_to_where_it_belongs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), tmp_path / "r18.pth")
    assert convert([str(tmp_path / "r18.pth"), str(tmp_path / "ours.pt")]) == 2
    assert f"model.backbone_weights={tmp_path / 'r18.pth'}" in capsys.readouterr().err
    with pytest.raises(WeightsError, match=r"model\.backbone_weights="):
        load_checkpoint(tmp_path / "r18.pth")


def test_another_detector_is_told_from_a_retinanet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {"roi_heads.box_predictor.weight": torch.ones(2)}}, tmp_path / "frcnn.pth")
    for arguments in ([], ["--source", "torchvision"]):
        assert convert([str(tmp_path / "frcnn.pth"), str(tmp_path / "ours.pt"), *arguments]) == 2
        assert "roi_heads" in capsys.readouterr().err


@pytest.mark.parametrize("setting", ["model.backbone=resnet50", "model.anchors.ratios=[1.0]", "model.head.depth=3"])
def test_settings_that_describe_another_network_are_refused(
    setting: str, small: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": small}, tmp_path / "w.pth")
    assert convert([str(tmp_path / "w.pth"), str(tmp_path / "ours.pt"), setting]) == 2
    assert "do not fit the network that it describes" in capsys.readouterr().err
    assert not (tmp_path / "ours.pt").exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--box-weights", "nan,1,1,1"], ["--box-weights", "1,1"], ["--norm-eps", "-1"], ["--norm-eps", "nan"],
        ["--to", "torchvision", "--style", "caffe"], ["--to", "torchvision", "model.norm_eps=0"],
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: list[str], small: State, tmp_path: Path) -> None:
    torch.save({"state_dict": small}, tmp_path / "w.pth")
    with pytest.raises(SystemExit, match="2"):
        convert([str(tmp_path / "w.pth"), str(tmp_path / "ours.pt"), *options])
    with pytest.raises(SystemExit, match="2"):
        convert([str(tmp_path / "w.pth"), str(tmp_path / "nowhere" / "ours.pt")])
    assert not (tmp_path / "nowhere").exists()


def test_nothing_is_written_over(small: State, tmp_path: Path) -> None:
    torch.save({"state_dict": small}, tmp_path / "w.pth")
    (tmp_path / "ours.pt").write_text("precious")
    with pytest.raises(SystemExit, match="2"):
        convert([str(tmp_path / "w.pth"), str(tmp_path / "ours.pt")])
    assert (tmp_path / "ours.pt").read_text() == "precious"


def test_settings_given_by_hand_are_stored_and_mistakes_told(
    small: State, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"state_dict": small}, tmp_path / "w.pth")
    source, target = str(tmp_path / "w.pth"), tmp_path / "ours.pt"
    assert convert([source, str(target), "model.strid_in=1x1"]) == 2
    assert "did you mean model.stride_in" in capsys.readouterr().err
    assert convert([source, str(target), "model.stride_in=1x1", "postprocess.nms_thresh=0.6"]) == 0
    config = load_checkpoint(target).config
    assert (config.model.stride_in, config.postprocess.nms_thresh) == ("1x1", 0.6)
