"""Box arithmetic compared with torchvision's."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import box_area, box_convert, box_iou

from detector.boxes import (
    MAX_LOG_SIZE,
    area,
    decode,
    encode,
    paired_iou,
    pairwise_intersection,
    pairwise_iou,
    xyxy_to_xywh,
)

SIDE = st.floats(1, 500, width=32)
CORNER = st.floats(-200, 1000, width=32)


def random_boxes(n: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=random) * 800
    return torch.cat([corner, corner + 1 + torch.rand(n, 2, generator=random) * 400], dim=1)


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_conversion_to_xywh_equals_torchvisions(n: int) -> None:
    boxes = random_boxes(n, 0)
    torch.testing.assert_close(xyxy_to_xywh(boxes), box_convert(boxes, "xyxy", "xywh"), rtol=0, atol=0)


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_encode_and_decode_equal_torchvisions_coder(n: int) -> None:
    coder = BoxCoder((1.0, 1.0, 1.0, 1.0))
    boxes, anchors = random_boxes(n, 0), random_boxes(n, 1)
    torch.testing.assert_close(encode(boxes, anchors), coder.encode_single(boxes, anchors), rtol=1e-6, atol=1e-6)
    deltas = torch.randn(n, 4, generator=torch.Generator().manual_seed(2)) * 3  # some beyond the bound
    torch.testing.assert_close(decode(deltas, anchors), coder.decode_single(deltas, anchors), rtol=1e-6, atol=1e-4)


@given(CORNER, CORNER, SIDE, SIDE, CORNER, CORNER, st.floats(-3.9, 3.9), st.floats(-3.9, 3.9))
@settings(max_examples=100, deadline=None)
def test_decode_is_the_inverse_of_encode(
    x: float, y: float, width: float, height: float, box_x: float, box_y: float, log_w: float, log_h: float
) -> None:
    anchor = torch.tensor([x, y, x + width, y + height])
    box = torch.tensor([box_x, box_y, box_x + width * math.exp(log_w), box_y + height * math.exp(log_h)])
    # fp32 keeps 7 digits of the largest number on the way
    reach = torch.cat([anchor, box]).abs().max().item()
    torch.testing.assert_close(decode(encode(box, anchor), anchor), box, rtol=0, atol=2e-6 * reach + 1e-6)


def test_decode_takes_any_leading_shape() -> None:
    anchors = random_boxes(12, 0)
    deltas = torch.randn(2, 12, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decode(deltas, anchors)[1], decode(deltas[1], anchors))


@pytest.mark.parametrize("delta", [MAX_LOG_SIZE, 10.0, 1e6, math.inf])
def test_decoded_size_is_bounded_and_finite(delta: float) -> None:
    anchor = torch.tensor([[0.0, 0.0, 10.0, 20.0]])
    box = decode(torch.tensor([[0.0, 0.0, delta, delta]]), anchor)
    torch.testing.assert_close(box[:, 2:] - box[:, :2], torch.tensor([[625.0, 1250.0]]))


@pytest.mark.parametrize(("n", "m"), [(0, 0), (0, 3), (3, 0), (1, 1), (40, 50)])
def test_pairwise_iou_equals_torchvisions(n: int, m: int) -> None:
    one, two = random_boxes(n, 0), random_boxes(m, 1)
    assert torch.equal(pairwise_iou(one, two), box_iou(one, two))


def test_pairwise_iou_of_a_batch_equals_that_of_each_image() -> None:
    batch, anchors = random_boxes(10, 0).view(2, 5, 4), random_boxes(7, 1)
    ious = pairwise_iou(batch, anchors)
    assert ious.shape == (2, 5, 7)
    assert torch.equal(ious[1], box_iou(batch[1], anchors))


def test_pairs_of_empty_boxes_have_iou_0_and_not_nan() -> None:
    padding, box = torch.zeros(1, 4), torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    assert box_iou(padding, padding).isnan().all()  # the reason for a function of our own
    assert pairwise_iou(padding, torch.cat([padding, box])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("n", [0, 1, 1000])
def test_paired_iou_is_the_diagonal_of_the_pairwise_one(n: int) -> None:
    one, two = random_boxes(n, 0), random_boxes(n, 1)
    torch.testing.assert_close(paired_iou(one, two), box_iou(one, two).diagonal(), rtol=1e-6, atol=0)
    assert paired_iou(torch.zeros(1, 4), torch.zeros(1, 4)).tolist() == [0.0]


@pytest.mark.parametrize("n", [2, 17])
def test_a_distribution_that_is_certain_decodes_to_its_distance(n: int) -> None:
    anchor = torch.tensor([[100.0, 200.0, 140.0, 280.0]])  # 40 x 80, centre (120, 240)
    logits = torch.full((1, 4, n), -1e4)
    for side, distance in enumerate((1, 0, n - 1, 1)):
        logits[0, side, distance] = 1e4
    left, top, right, bottom = 120 - 1 * 5.0, 240 - 0 * 10.0, 120 + (n - 1) * 5.0, 240 + 1 * 10.0
    assert decode(logits.flatten(1), anchor).tolist() == [[left, top, right, bottom]]


def test_a_uniform_distribution_decodes_to_the_mean_distance() -> None:
    anchor = torch.tensor([0.0, 0.0, 16.0, 8.0])
    box = decode(torch.zeros(4 * 5), anchor)  # distances 0..4: 2 eighths on average
    torch.testing.assert_close(box, torch.tensor([8.0 - 4, 4.0 - 2, 8.0 + 4, 4.0 + 2]))


@pytest.mark.parametrize(
    ("box", "shared"),
    [
        ([10.0, 0.0, 20.0, 10.0], 0.0),  # half-open boxes that touch do not intersect
        ([9.0, 9.0, 20.0, 20.0], 1.0),
        ([2.0, 3.0, 4.0, 6.0], 6.0),
        ([11.0, 11.0, 20.0, 20.0], 0.0),  # two negative extents must not give a positive area
    ],
)
def test_intersection(box: list[float], shared: float) -> None:
    one = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    assert pairwise_intersection(one, torch.tensor([box])).item() == shared


def test_area_equals_torchvisions() -> None:
    boxes = random_boxes(100, 0)
    assert torch.equal(area(boxes), box_area(boxes))
    assert area(boxes.view(4, 25, 4)).shape == (4, 25)
