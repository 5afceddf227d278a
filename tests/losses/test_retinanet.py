"""The whole loss against torchvision's RetinaNet.compute_loss."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.models.detection.retinanet import RetinaNetHead

from detector.anchors import pyramid_grids
from detector.assign.assignment import Assignment
from detector.assign.max_iou import MaxIoUAssigner
from detector.boxes import encode
from detector.config import BoxLossKind, Config, ModelConfig
from detector.losses import RetinaNetLoss, build_loss
from detector.losses.retinanet import Normalizers
from detector.models import build_anchors
from detector.structures import HeadOutputs, Targets

SIZE = (128, 192)
CLASSES = 7
GRIDS = pyramid_grids(SIZE)
COUNTS = [h * w * 9 for h, w in GRIDS]
ANCHORS = build_anchors(ModelConfig())(SIZE, GRIDS, torch.device("cpu"))

Objects = tuple[Tensor, Tensor]


def objects(n: int, seed: int = 0) -> Objects:
    """Boxes (n, 4) and labels (n,) of an image."""
    random = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=random) * torch.tensor([150.0, 90.0])
    boxes = torch.cat([corner, corner + 6 + torch.rand(n, 2, generator=random) * 90], dim=1)
    return boxes, torch.randint(0, CLASSES, (n,), generator=random)


def pad_targets(images: Sequence[Objects]) -> Targets:
    boxes = pad_sequence([b for b, _ in images], batch_first=True)
    return Targets(boxes, pad_sequence([k for _, k in images], True, -1), torch.zeros(len(images), 0, 4))


def random_heads(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(B, A, K) logits and (B, A, 4) deltas that want a gradient."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, len(ANCHORS), CLASSES, generator=random) * 2 - 2
    deltas = torch.randn(batch, len(ANCHORS), 4, generator=random) * 0.3
    return logits.requires_grad_(), deltas.requires_grad_()


def outputs_of(logits: Tensor, deltas: Tensor) -> HeadOutputs:
    return HeadOutputs(torch.split(logits, COUNTS, dim=1), torch.split(deltas, COUNTS, dim=1), ANCHORS)


def torchvisions_losses(
    logits: Tensor, deltas: Tensor, images: Sequence[Objects], box: BoxLossKind
) -> dict[str, Tensor]:
    head = RetinaNetHead(8, 9, CLASSES)
    head.regression_head._loss_type = box
    model = SimpleNamespace(proposal_matcher=Matcher(0.5, 0.4, allow_low_quality_matches=True), head=head)
    targets = [{"boxes": boxes, "labels": labels} for boxes, labels in images]
    heads = {"cls_logits": logits, "bbox_regression": deltas}
    losses = TorchvisionRetinaNet.compute_loss(model, targets, heads, [ANCHORS] * len(images))
    return {"loss_cls": losses["classification"], "loss_box": losses["bbox_regression"]}


CASES: dict[str, list[Objects]] = {
    "no object": [objects(0)],
    "one object": [objects(1)],
    "many": [objects(20)],
    "three without any": [objects(0)] * 3,
    "three, one empty": [objects(5, 1), objects(0), objects(12, 2)],
    "three": [objects(1, 3), objects(30, 4), objects(4, 5)],
}


@pytest.mark.parametrize("box", ["l1", "giou"])
@pytest.mark.parametrize(
    ("case", "normalizer"),
    # torchvision divides image by image; by the positives of the batch is the same for one image only
    [(case, "per_image") for case in CASES] + [(case, "global") for case in CASES if len(CASES[case]) == 1],
)
def test_losses_and_gradients_equal_torchvisions(case: str, normalizer: Any, box: BoxLossKind) -> None:
    images = CASES[case]
    heads, torchvision_heads = random_heads(len(images)), random_heads(len(images))
    loss = RetinaNetLoss(box=box, normalizer=normalizer, assigner=MaxIoUAssigner(low_quality_matches=True))
    actual, expected = (
        loss(outputs_of(*heads), pad_targets(images)),
        torchvisions_losses(*torchvision_heads, images, box),
    )
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-7)
    torch.autograd.backward(sum(actual.values(), torch.zeros(())))
    torch.autograd.backward(sum(expected.values(), torch.zeros(())))
    for leaf, reference in zip(heads, torchvision_heads, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad, rtol=1e-4, atol=1e-8)


def test_global_normalizer_divides_by_the_positives_of_the_batch() -> None:
    images = CASES["three"]
    logits, deltas = random_heads(3)
    by_image = [
        RetinaNetLoss()(outputs_of(logits[i : i + 1], deltas[i : i + 1]), pad_targets([image]))
        for i, image in enumerate(images)
    ]
    assignment = RetinaNetLoss().assign(ANCHORS, pad_targets(images))
    whole = RetinaNetLoss()(outputs_of(logits, deltas), pad_targets(images))
    for name, value in whole.items():
        sums = torch.stack([losses[name] for losses in by_image]) * assignment.num_pos.clamp(min=1)
        torch.testing.assert_close(value, sums.sum() / assignment.num_pos.sum())


@pytest.mark.parametrize("normalizer", ["global", "per_image"])
@pytest.mark.parametrize("parts", [[3], [1, 2], [1, 1, 1]])
def test_micro_batches_add_up_to_the_batch(normalizer: Any, parts: list[int]) -> None:
    images = CASES["three, one empty"]
    whole, split = random_heads(3), random_heads(3)
    loss = RetinaNetLoss(normalizer=normalizer)
    expected = loss(outputs_of(*whole), pad_targets(images))
    torch.autograd.backward(sum(expected.values(), torch.zeros(())))
    normalizers = loss.normalizers(loss.assign(ANCHORS, pad_targets(images)), torch.tensor(3))
    start, total = 0, torch.zeros(())
    for size in parts:
        part = slice(start, start + size)
        targets = pad_targets(images[part])
        found = loss(
            outputs_of(split[0][part], split[1][part]),
            targets,
            assignment=loss.assign(ANCHORS, targets),
            normalizers=normalizers,
        )
        value = found["loss_cls"] + found["loss_box"]
        torch.autograd.backward(value)
        total += value.detach()
        start += size
    torch.testing.assert_close(total, expected["loss_cls"] + expected["loss_box"])
    for leaf, reference in zip(split, whole, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad)


@pytest.mark.parametrize("box", ["smooth_l1", "l1", "giou"])
@pytest.mark.parametrize("normalizer", ["global", "per_image"])
def test_without_anything_to_learn_losses_and_gradients_are_exactly_zero(normalizer: Any, box: BoxLossKind) -> None:
    logits, deltas = random_heads(2)
    ignored = Assignment(torch.full((2, len(ANCHORS)), -2), torch.zeros(2, dtype=torch.int64))
    losses = RetinaNetLoss(box=box, normalizer=normalizer)(
        outputs_of(logits, deltas), pad_targets([objects(0)] * 2), assignment=ignored
    )
    assert {name: value.item() for name, value in losses.items()} == {"loss_cls": 0.0, "loss_box": 0.0}
    torch.autograd.backward(losses["loss_cls"] + losses["loss_box"])
    for leaf in (logits, deltas):
        assert leaf.grad is not None
        assert not leaf.grad.any()


@pytest.mark.parametrize("box", ["smooth_l1", "l1", "giou"])
def test_images_without_objects_have_a_class_loss_only(box: BoxLossKind) -> None:
    logits, deltas = random_heads(2)
    losses = RetinaNetLoss(box=box)(outputs_of(logits, deltas), pad_targets([objects(0)] * 2))
    assert losses["loss_box"].item() == 0.0
    assert losses["loss_cls"].item() > 0
    torch.autograd.backward(losses["loss_cls"] + losses["loss_box"])
    assert logits.grad is not None
    assert logits.grad.all()
    assert deltas.grad is not None
    assert not deltas.grad.any()


def test_padding_does_not_change_the_loss() -> None:
    heads, targets = random_heads(1), pad_targets([objects(4)])
    padded = Targets(
        torch.cat([targets.boxes, torch.zeros(1, 3, 4)], dim=1),
        torch.cat([targets.labels, torch.full((1, 3), -1)], dim=1),
        torch.zeros(1, 2, 4),
    )
    expected = RetinaNetLoss()(outputs_of(*heads), targets)
    for name, value in RetinaNetLoss()(outputs_of(*heads), padded).items():
        assert torch.equal(value, expected[name])


def test_background_anchors_inside_ignore_regions_have_no_loss() -> None:
    logits, deltas = random_heads(1)
    region = torch.tensor([[[0.0, 0.0, 192.0, 128.0]]])
    targets = Targets(torch.zeros(1, 0, 4), torch.zeros(1, 0, dtype=torch.int64), region)
    torch.autograd.backward(RetinaNetLoss()(outputs_of(logits, deltas), targets)["loss_cls"])
    assert logits.grad is not None
    shared = (torch.minimum(ANCHORS[:, 2:], region[0, :, 2:]) - ANCHORS[:, :2].clamp(min=0)).clamp(min=0).prod(dim=1)
    inside = shared >= 0.5 * (ANCHORS[:, 2:] - ANCHORS[:, :2]).prod(dim=1)
    assert torch.equal(logits.grad[0].any(dim=1), ~inside)


def test_box_weight_scales_the_box_loss_alone() -> None:
    heads, targets = random_heads(1), pad_targets([objects(4)])
    plain, heavy = (
        RetinaNetLoss()(outputs_of(*heads), targets),
        RetinaNetLoss(box_weight=3.0)(outputs_of(*heads), targets),
    )
    torch.testing.assert_close(heavy["loss_box"], 3 * plain["loss_box"])
    assert torch.equal(heavy["loss_cls"], plain["loss_cls"])


@pytest.mark.parametrize("beta", [1 / 9, 2.0])
def test_smooth_l1_uses_the_given_beta(beta: float) -> None:
    logits, deltas = random_heads(1)
    targets = pad_targets([objects(9)])
    loss = RetinaNetLoss(smooth_l1_beta=beta)
    matched = loss.assign(ANCHORS, targets).matched[0]
    positive = torch.nonzero(matched >= 0).squeeze(1)
    distance = (deltas[0, positive] - encode(targets.boxes[0, matched[positive]], ANCHORS[positive])).abs()
    expected = torch.where(distance < beta, 0.5 * distance**2 / beta, distance - 0.5 * beta).sum() / len(positive)
    torch.testing.assert_close(loss(outputs_of(logits, deltas), targets)["loss_box"], expected)


@pytest.mark.parametrize("box", ["smooth_l1", "l1", "giou"])
def test_a_perfect_network_has_no_loss(box: BoxLossKind) -> None:
    boxes, labels = objects(5)
    loss = RetinaNetLoss(box=box)
    matched = loss.assign(ANCHORS, pad_targets([(boxes, labels)])).matched[0]
    logits = torch.full((1, len(ANCHORS), CLASSES), -50.0)
    positive = torch.nonzero(matched >= 0).squeeze(1)
    assert len(positive)
    logits[0, positive, labels[matched[positive]]] = 50.0
    deltas = torch.zeros(1, len(ANCHORS), 4)
    deltas[0, positive] = encode(boxes[matched[positive]], ANCHORS[positive])
    for value in loss(outputs_of(logits, deltas), pad_targets([(boxes, labels)])).values():
        assert value.item() == pytest.approx(0, abs=1e-5)


def test_half_precision_heads_give_fp32_losses() -> None:
    logits, deltas = random_heads(1)
    targets = pad_targets([objects(4)])
    rounded = RetinaNetLoss()(outputs_of(logits.bfloat16().float(), deltas.bfloat16().float()), targets)
    for name, value in RetinaNetLoss()(outputs_of(logits.bfloat16(), deltas.bfloat16()), targets).items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, rounded[name])


@pytest.mark.parametrize("normalizer", ["global", "per_image"])
def test_a_step_without_a_readable_image_has_zero_losses(normalizer: Any) -> None:
    logits, deltas = random_heads(1)
    everywhere = torch.tensor([[[-1e6, -1e6, 1e6, 1e6]]])
    targets = pad_targets([objects(0)])._replace(ignore_boxes=everywhere)
    zero = torch.tensor(0.0)
    losses = RetinaNetLoss(normalizer=normalizer)(
        outputs_of(logits, deltas), targets, normalizers=Normalizers(zero, zero, zero)
    )
    assert {k: v.item() for k, v in losses.items()} == {"loss_cls": 0.0, "loss_box": 0.0}


def test_build_loss_passes_every_setting() -> None:
    config = Config.model_validate_json(
        """{"loss": {"cls": "focal_star", "alpha": 0.4, "negative_weight": 0.7, "gamma": 1.5, "star_beta": 0.3,
        "poly_epsilon": 0.2,
        "varifocal_alpha": 0.6,
        "ghm_bins": 7, "ohem_batch": 9, "ohem_nms_thresh": 0.4, "ohem_negatives_per_positive": 2,
        "bootstrap_fraction": 0.5,
        "box": "giou", "smooth_l1_beta": 0.5, "box_weight": 2.0, "normalizer": "per_image"},
        "matching": {"fg_iou_thresh": 0.6, "bg_iou_thresh": 0.3, "low_quality_matches": true, "ignore_regions": false},
        "model": {"head": {"activation": "softmax"}}}"""
    )
    built = build_loss(config)
    settings = {**config.loss.model_dump(), **config.matching.model_dump(), "activation": "softmax"}
    for name in ("cls", "alpha_exponent", "alpha_beta"):
        del settings[name]
    for name, value in settings.items():
        found = {**vars(built.assigner), **vars(built.class_loss), **vars(built)}
        assert found[name] == value, name
    assert built.class_loss.kind == "focal_star"


def test_class_weights_counted_from_the_data_reach_the_loss() -> None:
    config = Config.model_validate_json('{"loss": {"alpha": "inverse_frequency"}}')
    assert build_loss(config, alpha=[1.5, 0.5]).class_loss.alpha.tolist() == [1.5, 0.5]  # type: ignore[union-attr]
