"""Anchors compared with torchvision's generator and reimplementations of detectron2's and mmdetection's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator as TorchvisionAnchors
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.retinanet import _default_anchorgen

from detector.anchors import STRIDES, AnchorGenerator, best_anchor_iou, pyramid_grids
from detector.boxes import pairwise_iou
from detector.config import ModelConfig
from detector.models import build_anchors

CPU = torch.device("cpu")
SIZES = [(128, 128), (256, 384), (320, 224), (800, 1344), (255, 333), (97, 65)]

OURS: dict[str, Any] = {}
TORCHVISION: dict[str, Any] = {
    "sizes": [[x, int(x * 2 ** (1 / 3)), int(x * 2 ** (2 / 3))] for x in (32, 64, 128, 256, 512)],
    "octave_scales": [1.0],
    "compat": {"anchor_spacing": "grid", "anchor_center_offset": 0.0, "anchor_rounding": "integer"},
}
DETECTRON2: dict[str, Any] = {
    "sizes": [[x * 2 ** (k / 3) for k in range(3)] for x in (32, 64, 128, 256, 512)],
    "octave_scales": [1.0],
    "compat": {"anchor_center_offset": 0.0},
}
MMDETECTION: dict[str, Any] = {
    "sizes": [4 * stride for stride in STRIDES],
    "compat": {"anchor_center_offset": 0.0},
}
STYLES = {"ours": OURS, "torchvision": TORCHVISION, "detectron2": DETECTRON2, "mmdetection": MMDETECTION}


def generator(style: dict[str, Any]) -> AnchorGenerator:
    """The anchors of settings of `model.anchors`, and of `model.compat` under "compat"."""
    anchors = {key: value for key, value in style.items() if key != "compat"}
    model = {"anchors": anchors, "compat": style.get("compat", {})}
    return build_anchors(ModelConfig.model_validate(model, strict=False))


def anchors_of(style: dict[str, Any], size: tuple[int, int]) -> Tensor:
    anchors: Tensor = generator(style)(size, pyramid_grids(size), CPU)
    return anchors


@pytest.mark.parametrize("size", SIZES)
def test_torchvisions_anchors_can_be_configured(size: tuple[int, int]) -> None:
    reference: TorchvisionAnchors = _default_anchorgen()
    features = [torch.zeros(1, 1, *grid) for grid in pyramid_grids(size)]
    expected = reference(ImageList(torch.zeros(1, 3, *size), [size]), features)[0]
    assert torch.equal(anchors_of(TORCHVISION, size), expected)


def detectron2_anchors(size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """detectron2's DefaultAnchorGenerator, (cells, sizes, ratios, 4): scale-major, unlike ours."""
    levels = []
    for base, stride in zip((32, 64, 128, 256, 512), STRIDES, strict=True):
        cell = []
        for side in (base * 2 ** (k / 3) for k in range(3)):
            for ratio in (0.5, 1.0, 2.0):
                w = (side**2 / ratio) ** 0.5
                h = ratio * w
                cell.append([-w / 2, -h / 2, w / 2, h / 2])
        for y in range(0, size[0], stride):
            levels += [np.array(cell) + np.array([x, y, x, y]) for x in range(0, size[1], stride)]
    return np.stack(levels).reshape(-1, 3, 3, 4)


@pytest.mark.parametrize("size", SIZES[:3] + SIZES[-2:])
def test_detectron2s_anchors_can_be_configured_but_for_their_order(size: tuple[int, int]) -> None:
    expected = detectron2_anchors(size).swapaxes(1, 2).reshape(-1, 4)
    np.testing.assert_allclose(anchors_of(DETECTRON2, size).numpy(), expected, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", SIZES[:3] + SIZES[-2:])
def test_mmdetections_anchors_can_be_configured(size: tuple[int, int]) -> None:
    scales = np.array([4 * 2 ** (i / 3) for i in range(3)])  # octave_base_scale 4, scales_per_octave 3
    h_ratios = np.sqrt([0.5, 1.0, 2.0])
    levels = []
    for stride in STRIDES:
        w = (stride * (1 / h_ratios)[:, None] * scales[None]).flatten()
        h = (stride * h_ratios[:, None] * scales[None]).flatten()
        cell = np.stack([-w / 2, -h / 2, w / 2, h / 2], axis=1)
        for y in range(0, size[0], stride):
            levels += [cell + np.array([x, y, x, y]) for x in range(0, size[1], stride)]
    np.testing.assert_allclose(anchors_of(MMDETECTION, size).numpy(), np.concatenate(levels), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("size", SIZES)
def test_default_anchors_have_the_papers_shapes_at_the_middle_of_every_cell(size: tuple[int, int]) -> None:
    anchors = anchors_of(OURS, size)
    start = 0
    for stride, side in zip(STRIDES, (32, 64, 128, 256, 512), strict=True):
        rows, columns = -(-size[0] // stride), -(-size[1] // stride)
        level = anchors[start : start + rows * columns * 9].view(rows, columns, 3, 3, 4)  # ratio, then scale
        start += rows * columns * 9
        w, h = level[..., 2] - level[..., 0], level[..., 3] - level[..., 1]
        ratios = torch.tensor([0.5, 1.0, 2.0])[:, None].expand_as(h)
        areas = (torch.tensor([side * 2 ** (k / 3) for k in range(3)]) ** 2).expand_as(h)
        torch.testing.assert_close(h / w, ratios, rtol=1e-4, atol=0)
        torch.testing.assert_close(h * w, areas, rtol=1e-4, atol=0)
        center = (level[-1, -1, ..., :2] + level[-1, -1, ..., 2:]) / 2  # of the last cell: (3, 3, 2)
        corner = torch.tensor([(columns - 0.5) * stride, (rows - 0.5) * stride])
        torch.testing.assert_close(center, corner.expand_as(center))
    assert start == len(anchors)


def test_mirrored_default_anchors_are_the_default_anchors() -> None:
    """The reason for the centre offset of 0.5; it does not hold for torchvision's offset of 0."""

    def rows(anchors: Tensor) -> set[tuple[float, ...]]:
        return {tuple(round(v, 2) for v in row) for row in anchors.tolist()}

    def mirrored(anchors: Tensor) -> Tensor:
        return torch.stack([256 - anchors[:, 2], anchors[:, 1], 256 - anchors[:, 0], anchors[:, 3]], dim=1)

    ours, torchvisions = anchors_of(OURS, (128, 256)), anchors_of(TORCHVISION, (128, 256))
    assert rows(mirrored(ours)) == rows(ours)
    assert rows(mirrored(torchvisions)) != rows(torchvisions)


def test_anchors_of_an_image_size_are_cached_for_a_bounded_number_of_sizes() -> None:
    anchors = generator(OURS)
    first = anchors((64, 64), pyramid_grids((64, 64)), CPU)
    assert anchors((64, 64), pyramid_grids((64, 64)), CPU) is first
    for width in range(1, 200):
        anchors((8, width), pyramid_grids((8, width)), CPU)
    assert len(anchors._cache) <= 64
    assert torch.equal(anchors((64, 64), pyramid_grids((64, 64)), CPU), first)


def test_grid_spacing_differs_between_the_axes_as_in_torchvision() -> None:
    # 320 rows make 3 cells on P7: 106 px apart, not 128; 224 columns make 2 cells, 112 px apart
    last = anchors_of(TORCHVISION, (320, 224))[-9:]
    center = (last[:, :2] + last[:, 2:]) / 2
    assert center.tolist() == [[112.0, 212.0]] * 9


def test_anchors_have_no_state_to_store_in_a_checkpoint() -> None:
    assert not generator(OURS).state_dict()


@pytest.mark.parametrize("style", STYLES)
def test_best_anchor_iou_of_no_boxes_is_empty(style: str) -> None:
    assert best_anchor_iou(generator(STYLES[style]), torch.zeros(0, 4), (128, 128)).shape == (0,)


@st.composite
def boxes_in_image(draw: st.DrawFn) -> tuple[tuple[int, int], Tensor]:
    size = draw(st.sampled_from([(128, 128), (256, 160), (97, 301), (64, 500), (8, 8)]))
    row = st.tuples(*[st.floats(0, 1, width=32)] * 4)
    unit = torch.tensor(draw(st.lists(row, min_size=1, max_size=20)))
    scale = torch.tensor([size[1], size[0]]).float()
    low, high = torch.minimum(unit[:, :2], unit[:, 2:]), torch.maximum(unit[:, :2], unit[:, 2:])
    return size, torch.cat([low * scale, (high * scale).maximum(low * scale + 0.5)], dim=1)


@pytest.mark.parametrize("style", [*STYLES, "small"])
@given(boxes_in_image())
@settings(max_examples=25, deadline=None)
def test_best_anchor_iou_is_the_maximum_over_all_anchors(style: str, image: tuple[tuple[int, int], Tensor]) -> None:
    size, boxes = image
    # anchors smaller than their stride, which leave gaps, also at the right and lower border
    small = {"sizes": (4, 20, 33, 60, 90), "octave_scales": [1.0, 1.7], "compat": {"anchor_center_offset": 0.0}}
    anchors = generator({**STYLES, "small": small}[style])
    corner = torch.tensor([[size[1] - 3.0, size[0] - 3.0, size[1], size[0]]])
    boxes = torch.cat([boxes, corner])
    every = pairwise_iou(boxes, anchors(size, pyramid_grids(size), CPU)).amax(dim=1)
    torch.testing.assert_close(best_anchor_iou(anchors, boxes, size), every, rtol=1e-4, atol=1e-5)
