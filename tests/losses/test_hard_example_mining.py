"""Bootstrapping and OHEM select what their papers describe."""

from __future__ import annotations

import pytest
import torch
from torchvision.ops import box_iou

from detector.losses import hardest_fraction, online_hard_examples, softmax_focal_loss


def test_bootstrapping_keeps_the_hardest_and_no_others() -> None:
    losses = torch.tensor([[1.0, 5.0, 3.0, 4.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    labels = torch.tensor([[-1, 0, -1, -1, -2], [-2, -2, -2, -2, -2]])
    assert hardest_fraction(losses, labels, fraction=0.5).tolist() == [[-2, 0, -2, -1, -2], [-2] * 5]
    assert hardest_fraction(losses, labels, fraction=1e-9).tolist()[0] == [-2, 0, -2, -2, -2], "at least one"


def test_hardest_examples_of_any_loss_are_selected_by_an_ignore_mask() -> None:
    random = torch.Generator().manual_seed(0)
    scores, classes = torch.randn(8, 3, generator=random), torch.randint(0, 3, (8,), generator=random)
    loss = softmax_focal_loss(scores, classes, gamma=0.0)
    selected = hardest_fraction(loss[None], classes[None], fraction=0.25)[0]
    actual = softmax_focal_loss(scores, classes, gamma=0.0, ignore=selected < -1, reduction="mean")
    torch.testing.assert_close(actual, loss.topk(2).values.mean())


def test_ohem_keeps_the_hardest_that_do_not_overlap() -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60], [80, 80, 90, 90], [0, 0, 9, 10]]]).float()
    losses = torch.tensor([[3.0, 4.0, 2.0, 1.0, 99.0]])
    labels = torch.tensor([[-1, -1, 0, -1, -2]])
    selected = online_hard_examples(losses, labels, boxes, batch_size=2, nms_thresh=0.7)
    assert selected.tolist() == [[-2, -1, 0, -2, -2]], (
        "the second suppresses the first; the ignored one suppresses none"
    )


@pytest.mark.parametrize("ratio", [1, 3])
def test_ohem_with_a_ratio_keeps_that_many_negatives_per_positive(ratio: int) -> None:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 500, 2, generator=random) * 2000
    boxes = torch.cat([corner, corner + 10], dim=-1)
    assert (torch.triu(box_iou(boxes[0], boxes[0]), 1) > 0.7).sum() < 5
    labels = torch.full((1, 500), -1)
    labels[0, :6] = 2
    losses = torch.rand(1, 500, generator=random)
    losses[0, :6] = 0.001  # easy positives are kept as well
    selected = online_hard_examples(losses, labels, boxes, batch_size=64, nms_thresh=0.7, negatives_per_positive=ratio)
    assert (selected >= 0).sum() == 6
    assert (selected == -1).sum() == 6 * ratio
    kept = losses[selected == -1]
    assert kept.min() >= losses[(selected < -1) & (labels == -1)].topk(5).values[-1]


def test_ohem_keeps_all_of_few_anchors() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    selected = online_hard_examples(torch.ones(1, 1), torch.tensor([[-1]]), boxes, batch_size=64, nms_thresh=0.7)
    assert selected.tolist() == [[-1]]
