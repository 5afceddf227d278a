"""Naming the first thing of a step that is not finite, and the figures by level and part."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from detector.assign.max_iou import MaxIoUAssigner
from detector.config import Normalizer, Precision
from detector.losses.class_loss import ClassLoss
from detector.losses.retinanet import RetinaNetLoss
from detector.models.resnet import ARCHITECTURES
from detector.structures import Batch
from detector.training.diagnosis import Examination, examine
from detector.training.step import Learner, train_step
from tests.training.faults import NARROW
from tests.training.test_finite_step import batch_of, content, differing, new_learner
from tests.training.test_step import aligned_loss
from tests.training.test_step import batch_of as larger_batch_of


@pytest.fixture(autouse=True, scope="module")
def _narrow_network(short_network: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "resnet18", NARROW)
        yield


def described(index: int) -> str:
    return f"{index}.png"


def examined(learner: Learner, batch: Batch) -> Examination:
    return examine(learner, [batch_of(2, first=6), batch], describe=described)


def test_a_step_without_a_fault_has_none_and_changes_nothing() -> None:
    learner = new_learner(norm="bn")
    before = content(learner)
    examination = examined(learner, batch_of(2))
    assert examination.fault is None
    assert differing(content(learner), before) == []
    assert all(p.grad is None for p in learner.model.parameters())


@pytest.mark.parametrize("normalizer", ["global", "per_image"])
@pytest.mark.parametrize("parts", [1, 2])
def test_losses_by_level_and_norms_by_part_add_up_to_those_of_the_step(parts: int, normalizer: Normalizer) -> None:
    learner = new_learner(loss=RetinaNetLoss(normalizer=normalizer, assigner=MaxIoUAssigner(low_quality_matches=True)))
    batches = [larger_batch_of(2, first=2 * part) for part in range(parts)]
    for batch in batches:
        batch.targets.boxes[:, 0] = torch.tensor([8.0, 9.0, 40.0, 41.0])  # an object for P4
    examination = examine(learner, batches, describe=described)
    result = train_step(learner, batches)
    levels = examination.levels
    assert sum(level.cls or 0.0 for level in levels) == pytest.approx(float(result.loss_cls), rel=1e-5)
    assert sum(level.box for level in levels) == pytest.approx(float(result.loss_box), rel=1e-5)
    assert len([level for level in levels if level.box > 0]) > 1
    norms = dict(examination.gradient_norms)
    total = norms.pop("total")
    assert total == pytest.approx(float(result.grad_norm), rel=1e-5)
    assert sum(norm**2 for norm in norms.values()) == pytest.approx(total**2, rel=1e-5)


@pytest.mark.parametrize("kind", ["ghm", "ohem", "bootstrap"])
def test_class_losses_over_all_levels_together_have_no_figure_for_one(kind: Any) -> None:
    examination = examined(new_learner(loss=RetinaNetLoss(ClassLoss(kind))), batch_of(2))
    assert [level.cls for level in examination.levels] == [None] * 5


def test_an_assigner_that_needs_outputs_is_given_them() -> None:
    examination = examined(new_learner(loss=aligned_loss()), batch_of(2))
    assert examination.fault is None
    assert sum(level.box for level in examination.levels) > 0


def faulty_batch(what: str) -> Batch:
    batch = copy.deepcopy(batch_of(2, first=40, weights=torch.ones(2, 2)))
    targets = batch.targets
    assert targets.weights is not None
    if what == "pixel":
        batch = batch._replace(images=batch.images.float())
        batch.images[1, 2, 5, 7] = torch.inf
    if what == "box":
        targets.boxes[1, 0, 3] = torch.nan
    if what == "ignore region":
        regions = torch.zeros(2, 3, 4)
        regions[1, 2, 0] = torch.inf
        batch = batch._replace(targets=targets._replace(ignore_boxes=regions))
    if what == "weights":
        targets.weights[1, 1] = torch.nan
    return batch


@pytest.mark.parametrize(
    ("what", "detail"),
    [
        ("pixel", "pixel (7, 5) of channel 2 is inf"),
        ("box", "box 0 is ["),
        ("ignore region", "ignore region 2 is [inf, 0, 0, 0]"),
        ("weights", "weights of objects are [1, nan]"),
    ],
)
def test_the_image_and_the_place_in_it_are_named(what: str, detail: str) -> None:
    fault = examined(new_learner(), faulty_batch(what)).fault
    assert fault is not None
    assert (fault.stage, fault.name) == ("input", "image 41")
    assert fault.detail.startswith(f"41.png: {detail}")


@pytest.mark.parametrize(
    ("name", "found", "where", "precision"),
    [
        *(
            (name, found, where, precision)
            for name, found, where in [
                ("backbone.layer2.0.conv1.weight", "backbone.layer2.0", ""),
                ("fpn.p7.weight", "fpn.p7", ""),
                ("cls_subnet.tower.0.weight", "cls_subnet.tower.0", " at P3"),
                ("box_subnet.predictor.weight", "box_subnet.predictor", " at P3"),
            ]
            for precision in ("fp32", "bf16")
        ),
        ("fpn.output.0.weight", "fpn.output.0", "", "fp16"),
        ("fpn.p7.weight", "cls_subnet.tower.0", " at P7", "fp16"),  # inputs this narrow are computed in fp32
    ],
)
def test_the_module_whose_output_overflows_is_named(name: str, found: str, where: str, precision: Precision) -> None:
    """Weights that are finite, but too large for its sums."""
    learner = new_learner(norm="bn", precision=precision)
    with torch.no_grad():
        learner.model.get_parameter(name).fill_(60_000.0 if precision == "fp16" else 3e38)
    fault = examined(learner, batch_of(2)).fault
    assert fault is not None
    assert fault.stage == "module output"
    assert fault.name.startswith(found)
    assert f"{where}; its inputs are in " in fault.detail


def test_an_overflow_at_a_coarse_level_is_named_with_the_level() -> None:
    """The subnets share their weights between levels, so what differs is their input."""
    learner = new_learner()
    with torch.no_grad():
        learner.model.get_parameter("fpn.p6.bias").fill_(1e37)
        learner.model.get_parameter("cls_subnet.tower.0.weight").fill_(10.0)
    fault = examined(learner, batch_of(2)).fault
    assert fault is not None
    assert fault.name == "cls_subnet.tower.0"
    assert " at P6; its inputs are in " in fault.detail


def test_gradients_that_are_finite_but_whose_norm_is_not_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = new_learner()
    forward = RetinaNetLoss.forward
    monkeypatch.setattr(RetinaNetLoss, "forward", lambda *a, **k: {n: v * 1e25 for n, v in forward(*a, **k).items()})
    fault = examined(learner, batch_of(2)).fault
    assert fault is not None
    assert (fault.stage, fault.name) == ("gradient", "all parameters")
