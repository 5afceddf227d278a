"""One training step: assigners that need outputs, two normalizers, and what targets and outputs can carry."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detector.assign.assignment import BACKGROUND, Assignment
from detector.assign.max_iou import MaxIoUAssigner
from detector.boxes import decode, paired_iou, pairwise_iou
from detector.config import Config
from detector.distributed import process_group
from detector.errors import ConfigError
from detector.losses.class_loss import CLASS_LOSSES, ClassLoss, ClassLossSpec
from detector.losses.dense import one_hot
from detector.losses.retinanet import RetinaNetLoss, assigned_labels
from detector.models import RetinaNet, build_model
from detector.structures import Batch, HeadOutputs, Targets
from detector.training.step import Learner, optimizer_step, train_step
from tests.tiny import ranks, start_process, wait

NUM_CLASSES = 3


class AlignedAssigner:
    """A second assigner for these tests: the anchors whose class score and predicted IoU agree best with an object.

    The three anchors with the highest score * IoU^2 of each object are positive, with that value as their target score
    and their predicted IoU as the weight of their box loss (the idea of Feng et al. 2021, "TOOD").
    """

    needs_outputs = True

    def __init__(self) -> None:
        self.calls = 0

    @torch.no_grad()
    def __call__(
        self,
        anchors: Tensor,
        targets: Targets,
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        outputs: HeadOutputs | None = None,
    ) -> Assignment:
        assert outputs is not None
        assert not outputs.cls_logits[0].requires_grad
        self.calls += 1
        batch, num_anchors = len(targets.boxes), len(anchors)
        matched = torch.full((batch, num_anchors), BACKGROUND)
        scores = torch.zeros(batch, num_anchors)
        weights = torch.zeros(batch, num_anchors)
        boxes = decode(outputs.all_box_deltas().float(), anchors)
        probabilities = outputs.all_cls_logits().float().sigmoid()
        for image in range(batch):
            for number in torch.nonzero(targets.labels[image] >= 0).flatten().tolist():
                iou = pairwise_iou(targets.boxes[image, number][None], boxes[image]).squeeze(0)
                aligned = probabilities[image, :, targets.labels[image, number]] * iou**2
                best = aligned.topk(3).indices
                matched[image, best] = number
                scores[image, best] = aligned[best]
                weights[image, best] = iou[best]
        return Assignment(matched, (matched >= 0).sum(dim=1), scores, weights)


def tiny_model(norm: str = "gn") -> RetinaNet:
    config = Config.model_validate_json(
        f"""{{"model": {{"backbone": "resnet18", "backbone_weights": "none", "norm": "{norm}", "fpn_channels": 32,
        "head": {{"depth": 1, "prior_prob": 0.2}}, "anchors": {{"sizes": [16, 32, 64, 128, 256]}}}}}}"""
    )
    torch.manual_seed(0)
    return build_model(config.model, NUM_CLASSES).train()


def learner_of(model: RetinaNet, loss: RetinaNetLoss, **settings: Any) -> Learner:
    return Learner(
        model, model, loss, torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler(enabled=False), "fp32",
        torch.device("cpu"), **settings,
    )  # fmt: skip


def batch_of(count: int, *, first: int = 0, **extra: Tensor) -> Batch:
    """Images `first`, `first` + 1, ... of an endless list, each with two objects."""
    images, boxes = [], []
    for number in range(first, first + count):
        random = torch.Generator().manual_seed(number)
        images.append(torch.randint(0, 256, (3, 64, 64), generator=random, dtype=torch.uint8))
        corner = torch.rand(2, 2, generator=random) * 30
        boxes.append(torch.cat([corner, corner + 12 + torch.rand(2, 2, generator=random) * 20], dim=1))
    labels = torch.tensor(
        [[number % NUM_CLASSES, (number + 1) % NUM_CLASSES] for number in range(first, first + count)]
    )
    sizes = torch.full((count, 2), 64)
    targets = Targets(torch.stack(boxes), labels, torch.zeros(count, 0, 4), **extra)
    index = torch.arange(first, first + count)
    return Batch(torch.stack(images), targets, index, sizes, sizes, index)


def gradients(model: RetinaNet) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def aligned_loss() -> RetinaNetLoss:
    return RetinaNetLoss(ClassLoss("varifocal"), assigner=AlignedAssigner(), box="giou")


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5 * float(value.abs().max()) + 1e-8)


@pytest.mark.parametrize("parts", [[1, 3], [2, 2], [1, 1, 1, 1]])
def test_normalizers_known_only_after_the_forward_pass_are_exact_over_micro_batches(parts: list[int]) -> None:
    whole, split = tiny_model(), tiny_model()
    expected = train_step(learner_of(whole, aligned_loss()), [batch_of(4)])
    starts = [sum(parts[:i]) for i in range(len(parts))]
    micro_batches = [batch_of(n, first=start) for start, n in zip(starts, parts, strict=True)]
    found = train_step(learner_of(split, aligned_loss()), micro_batches)
    assert float(expected.normalizers.cls) != float(expected.normalizers.box) != float(expected.num_pos)
    torch.testing.assert_close(torch.stack(found.normalizers), torch.stack(expected.normalizers))
    torch.testing.assert_close(found.loss_cls, expected.loss_cls, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.loss_box, expected.loss_box, rtol=1e-5, atol=0)
    assert_close_gradients(gradients(split), gradients(whole))


def test_a_step_with_soft_targets_is_the_formula_of_its_two_sums() -> None:
    model, loss = tiny_model(), aligned_loss()
    learner, batch = learner_of(model, loss), batch_of(2)
    with torch.no_grad():
        outputs = model(batch.images, batch.image_sizes)
        assignment = loss.assign(outputs.anchors, batch.targets, outputs=outputs)
    assert assignment.target_scores is not None
    assert assignment.box_weights is not None
    labels = assigned_labels(batch.targets, assignment)
    x = outputs.all_cls_logits()
    soft = one_hot(labels, NUM_CLASSES) * assignment.target_scores[..., None]
    cross_entropy = F.binary_cross_entropy_with_logits(x, soft, reduction="none")
    cls = (torch.where(soft > 0, soft, 0.75 * x.sigmoid() ** 2) * cross_entropy).sum() / max(
        1.0, float(assignment.target_scores.sum())
    )
    rows, anchors = torch.nonzero(assignment.matched >= 0, as_tuple=True)
    predicted = decode(outputs.all_box_deltas(), outputs.anchors)[rows, anchors]
    truth = batch.targets.boxes[rows, assignment.matched[rows, anchors]]
    hull = torch.cat([torch.minimum(predicted, truth)[:, :2], torch.maximum(predicted, truth)[:, 2:]], dim=1)
    hull_area = (hull[:, 2:] - hull[:, :2]).prod(dim=1)
    areas = [(b[:, 2:] - b[:, :2]).prod(dim=1) for b in (predicted, truth)]
    iou = paired_iou(predicted, truth)
    union = (areas[0] + areas[1]) / (1 + iou)
    giou_loss = 1 - iou + (hull_area - union) / hull_area
    weights = assignment.box_weights[rows, anchors]
    result = train_step(learner, [batch])
    torch.testing.assert_close(result.loss_cls, cls, rtol=1e-4, atol=0)
    torch.testing.assert_close(
        result.loss_box, (giou_loss * weights).sum() / max(1.0, float(weights.sum())), rtol=1e-4, atol=0
    )


def test_one_micro_batch_needs_no_extra_forward_pass_and_several_leave_the_statistics_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes: list[bool] = []
    forward = RetinaNet.forward

    def counted(self: RetinaNet, *arguments: Any) -> Any:
        passes.append(torch.is_grad_enabled())
        return forward(self, *arguments)

    monkeypatch.setattr(RetinaNet, "forward", counted)
    model = tiny_model("bn")
    train_step(learner_of(model, aligned_loss()), [batch_of(2)])
    assert passes == [True]
    passes.clear()
    model = tiny_model("bn")
    train_step(learner_of(model, aligned_loss()), [batch_of(2), batch_of(2, first=2)])
    assert passes == [False, False, True, True]
    seen_once = tiny_model("bn")
    with torch.no_grad():
        for batch in (batch_of(2), batch_of(2, first=2)):
            seen_once(batch.images, batch.image_sizes)
    for name, buffer in seen_once.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], buffer)


def step_as_one_of_several(out: Path) -> None:
    """The part of one process in a step of four images; the first one saves the gradients."""
    with process_group("cpu"):
        rank = torch.distributed.get_rank()
        model = tiny_model()
        learner = learner_of(model, aligned_loss(), processes=2)
        learner.network = torch.nn.parallel.DistributedDataParallel(model)
        result = train_step(learner, [batch_of(1 + 2 * rank, first=rank)])
        if rank == 0:
            torch.save({"gradients": gradients(model), "num_pos": float(result.num_pos)}, out)


def test_normalizers_known_only_after_the_forward_pass_are_exact_over_processes(tmp_path: Path) -> None:
    out, log = tmp_path / "gradients.pt", tmp_path / "log"
    codes = wait([start_process(step_as_one_of_several, (out,), log, env) for env in ranks(2)], log)
    assert codes == [0, 0], log.read_text()[-3000:]
    model = tiny_model()
    result = train_step(learner_of(model, aligned_loss()), [batch_of(4)])
    saved = torch.load(out, weights_only=True)
    assert saved["num_pos"] == float(result.num_pos)
    assert_close_gradients(saved["gradients"], gradients(model))


@pytest.mark.parametrize("kind", ["focal", "focal_star", "varifocal", "quality_focal", "poly1_focal"])
def test_weights_of_objects_multiply_their_class_and_box_loss(kind: Any) -> None:
    """Twice the weight of an object is what listing its anchors' losses twice would be."""
    model, batch = tiny_model(), batch_of(2)
    assigner = MaxIoUAssigner(low_quality_matches=True)
    loss = RetinaNetLoss(ClassLoss(kind), assigner=assigner)
    with torch.no_grad():
        outputs = model(batch.images, batch.image_sizes)

    def losses(weights: list[list[float]] | None) -> Tensor:
        targets = batch.targets if weights is None else batch.targets._replace(weights=torch.tensor(weights))
        parts = loss(outputs, targets)
        return torch.stack([parts["loss_cls"], parts["loss_box"]])

    plain = losses(None)
    torch.testing.assert_close(losses([[1.0, 1.0], [1.0, 1.0]]), plain)
    none, first, second = (
        losses([[0.0, 0.0], [0.0, 0.0]]),
        losses([[1.0, 0.0], [0.0, 0.0]]),
        losses([[0.0, 1.0], [1.0, 1.0]]),
    )
    torch.testing.assert_close(first + second - none, plain)
    torch.testing.assert_close(losses([[3.0, 1.0], [1.0, 1.0]]), plain + 2 * (first - none))
    assert float(none[1]) == 0
    assert float((first - none).min()) > 0


def test_classes_outside_the_mask_of_an_image_contribute_nothing() -> None:
    model, batch = tiny_model(), batch_of(2)
    mask = torch.tensor([[True, True, False], [True, True, True]])
    batch.targets.labels[0] = torch.tensor([0, 1])
    loss = RetinaNetLoss(assigner=MaxIoUAssigner(low_quality_matches=True))
    with torch.no_grad():
        outputs = model(batch.images, batch.image_sizes)
    logits = [x.detach().requires_grad_() for x in outputs.cls_logits]
    parts = loss(outputs._replace(cls_logits=tuple(logits)), batch.targets._replace(class_mask=mask))
    parts["loss_cls"].backward()
    gradient = torch.cat([x.grad for x in logits if x.grad is not None], dim=1)
    assert not gradient[0, :, 2].any()
    assert gradient[0, :, :2].any()
    assert gradient[1, :, 2].any()
    alone = [x.detach()[..., :2] for x in logits]
    first_image = Targets(batch.targets.boxes[:1], batch.targets.labels[:1], batch.targets.ignore_boxes[:1])
    two_classes = loss(
        outputs._replace(cls_logits=tuple(x[:1] for x in alone), box_deltas=tuple(x[:1] for x in outputs.box_deltas)),
        first_image,
    )
    first_only = loss(
        outputs._replace(
            cls_logits=tuple(x.detach()[:1] for x in logits), box_deltas=tuple(x[:1] for x in outputs.box_deltas)
        ),
        first_image._replace(class_mask=mask[:1]),
    )
    torch.testing.assert_close(first_only["loss_cls"], two_classes["loss_cls"])


def test_a_head_with_distributions_and_quality_trains_and_improves() -> None:
    """Eight bins for each side of a box, read by the one `decode`; GIoU needs nothing else."""
    model = tiny_model()
    torch.manual_seed(1)
    predictor: Any = model.box_subnet.predictor
    model.box_subnet.outputs = 4 * 8
    model.box_subnet.predictor = torch.nn.Conv2d(predictor.in_channels, model.anchors.num_per_cell * 32, 3, padding=1)
    loss = RetinaNetLoss(box="giou", assigner=MaxIoUAssigner(low_quality_matches=True))
    learner = learner_of(model, loss, clip_grad_norm=5.0)
    history = []
    for step in range(8):
        result = train_step(learner, [batch_of(2)])
        history.append(float(result.loss_box))
        optimizer_step(learner, result, step=step + 1)
    assert history[-1] < 0.9 * history[0]


def test_a_class_loss_is_added_with_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def squared_error(loss: ClassLoss, logits: Tensor, labels: Tensor, _quality: Tensor) -> Tensor:
        return (logits.sigmoid() - one_hot(labels, logits.shape[-1]).float()).square().sum(dim=1) * (1 + loss.gamma)

    monkeypatch.setitem(CLASS_LOSSES, "squared_error", ClassLossSpec(("gamma",), squared_error))  # type: ignore[misc]
    kind: Any = "squared_error"
    loss = RetinaNetLoss(ClassLoss(kind, gamma=1.0), assigner=MaxIoUAssigner(low_quality_matches=True))
    model, batch = tiny_model(), batch_of(2)
    result = train_step(learner_of(model, loss), [batch])
    with torch.no_grad():
        outputs = model(batch.images, batch.image_sizes)
    labels = assigned_labels(batch.targets, result.assignments[0])
    errors = (outputs.all_cls_logits().sigmoid() - one_hot(labels, NUM_CLASSES).float()).square().sum(dim=2)
    expected = 2 * errors[labels >= -1].sum() / result.num_pos.clamp(min=1)
    torch.testing.assert_close(result.loss_cls, expected, rtol=1e-4, atol=0)


def test_target_scores_normalize_only_losses_that_have_soft_targets() -> None:
    model, batch = tiny_model(), batch_of(2)
    hard = train_step(learner_of(model, RetinaNetLoss(assigner=AlignedAssigner(), box="giou")), [batch])
    assert float(hard.normalizers.cls) == float(hard.num_pos)
    soft = train_step(learner_of(tiny_model(), aligned_loss()), [batch])
    assert float(soft.normalizers.cls) < float(soft.num_pos)


def test_the_class_of_an_object_counts_as_annotated_whatever_the_mask_contains() -> None:
    model, batch = tiny_model(), batch_of(2)
    loss = RetinaNetLoss(assigner=MaxIoUAssigner(low_quality_matches=True))
    with torch.no_grad():
        outputs = model(batch.images, batch.image_sizes)
        nothing = loss(outputs, batch.targets._replace(class_mask=torch.zeros(2, NUM_CLASSES, dtype=torch.bool)))
        present = torch.zeros(2, NUM_CLASSES, dtype=torch.bool).scatter_(1, batch.targets.labels, True)
        stated = loss(outputs, batch.targets._replace(class_mask=present))
    torch.testing.assert_close(nothing["loss_cls"], stated["loss_cls"], rtol=0, atol=0)
    assert float(nothing["loss_cls"]) < 100


@pytest.mark.parametrize("kind", ["ghm", "ohem", "bootstrap"])
@pytest.mark.parametrize("extra", ["weights", "class_mask"])
def test_losses_that_choose_or_count_refuse_weights_and_masks(kind: Any, extra: str) -> None:
    model, batch = tiny_model(), batch_of(1)
    values = {"weights": torch.ones(1, 2), "class_mask": torch.ones(1, NUM_CLASSES, dtype=torch.bool)}
    targets = batch.targets._replace(**{extra: values[extra]})
    with torch.no_grad(), pytest.raises(ConfigError, match=f"got {kind}; use focal"):
        RetinaNetLoss(ClassLoss(kind))(model(batch.images, batch.image_sizes), targets)


def test_what_a_head_outputs_and_no_loss_trains_is_an_error() -> None:
    model, batch = tiny_model(), batch_of(1)
    with torch.no_grad():
        outputs = model(batch.images, batch.image_sizes)
    quality = tuple(x[..., :1] for x in outputs.cls_logits)
    with pytest.raises(ConfigError, match="can be scored, but not trained"):
        RetinaNetLoss()(outputs._replace(quality=quality), batch.targets)
    distributions = tuple(torch.cat([x] * 8, dim=-1) for x in outputs.box_deltas)
    with pytest.raises(ConfigError, match=r"loss\.box must be giou"):
        RetinaNetLoss()(outputs._replace(box_deltas=distributions), batch.targets)
