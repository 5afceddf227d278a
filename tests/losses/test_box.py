"""Box losses against torchvision's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import BoxCoder, _box_loss

from detector.boxes import decode, encode
from detector.config import BoxLossKind
from detector.losses.box import box_loss, matched_boxes

KINDS: list[BoxLossKind] = ["smooth_l1", "l1", "giou"]


def random_case(n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deltas, anchors and the boxes they should become."""
    random = torch.Generator().manual_seed(0)

    def boxes() -> Tensor:
        corner = torch.rand(n, 2, generator=random) * 100
        return torch.cat([corner, corner + 5 + torch.rand(n, 2, generator=random) * 80], dim=1)

    return torch.randn(n, 4, generator=random) * 0.4, boxes(), boxes()


@pytest.mark.parametrize("n", [0, 1, 300])
@pytest.mark.parametrize("kind", ["l1", "giou"])
def test_sum_and_gradient_equal_torchvisions(kind: BoxLossKind, n: int) -> None:
    deltas, anchors, boxes = random_case(n)
    ours, reference = deltas.clone().requires_grad_(), deltas.clone().requires_grad_()
    losses = box_loss(ours, anchors, boxes, kind=kind)
    assert losses.shape == (n,)
    expected = _box_loss(kind, BoxCoder((1.0, 1.0, 1.0, 1.0)), anchors, boxes, reference)
    torch.testing.assert_close(losses.sum(), expected, rtol=1e-5, atol=1e-6)
    torch.autograd.backward(losses.sum())
    torch.autograd.backward(expected)
    torch.testing.assert_close(ours.grad, reference.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", [1 / 9, 1.0])
def test_smooth_l1_is_the_papers_with_its_corner_at_beta(beta: float) -> None:
    deltas, anchors, boxes = random_case(300)
    distance = (deltas - encode(boxes, anchors)).abs()
    expected = torch.where(distance < beta, 0.5 * distance**2 / beta, distance - 0.5 * beta).sum(dim=1)
    torch.testing.assert_close(box_loss(deltas, anchors, boxes, kind="smooth_l1", beta=beta), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_box_has_no_loss_for_any_leading_shape(kind: BoxLossKind) -> None:
    _, anchors, boxes = random_case(12)
    deltas = encode(boxes, anchors).view(3, 4, 4)
    losses = box_loss(deltas, anchors.view(3, 4, 4), boxes.view(3, 4, 4), kind=kind)
    torch.testing.assert_close(losses, torch.zeros(3, 4), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_deltas_give_an_fp32_loss(kind: BoxLossKind) -> None:
    deltas, anchors, boxes = random_case(10)
    losses = box_loss(deltas.bfloat16(), anchors, boxes, kind=kind)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, box_loss(deltas.bfloat16().float(), anchors, boxes, kind=kind))


@pytest.mark.parametrize("kind", KINDS)
def test_unmatched_anchors_are_their_own_boxes_with_finite_gradients(kind: BoxLossKind) -> None:
    deltas, anchors, boxes = random_case(6)
    index = torch.tensor([[-1, -2, 0, 1, -1, 0]])
    matched = matched_boxes(anchors, boxes[None, :2], index)
    expected = torch.stack([anchors[0], anchors[1], boxes[0], boxes[1], anchors[4], boxes[0]])
    assert torch.equal(matched[0], expected)
    leaf = deltas[None].clone().requires_grad_()
    torch.autograd.backward(box_loss(leaf, anchors, matched, kind=kind).sum())
    assert leaf.grad is not None
    assert leaf.grad.isfinite().all()


def test_in_a_batch_without_objects_all_anchors_are_their_own_boxes() -> None:
    _, anchors, _ = random_case(5)
    matched = matched_boxes(anchors, torch.zeros(2, 0, 4), torch.full((2, 5), -1))
    assert torch.equal(matched, anchors.expand(2, 5, 4))


def test_giou_loss_of_disjoint_boxes_is_between_one_and_two() -> None:
    anchors, far = torch.tensor([[0.0, 0.0, 10.0, 10.0]]), torch.tensor([[90.0, 90.0, 100.0, 100.0]])
    loss = box_loss(torch.zeros(1, 4), anchors, far, kind="giou")
    assert torch.equal(decode(torch.zeros(1, 4), anchors), anchors)
    assert loss.item() == pytest.approx(1 + (100 * 100 - 200) / (100 * 100), rel=1e-5)


def test_l1_is_the_plain_sum_of_distances() -> None:
    deltas, anchors, boxes = random_case(10)
    expected = F.l1_loss(deltas, encode(boxes, anchors), reduction="sum")
    torch.testing.assert_close(box_loss(deltas, anchors, boxes, kind="l1").sum(), expected)
