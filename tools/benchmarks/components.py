"""Benchmarks of parts of the training step: focal loss and anchor assignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from detector.anchors import pyramid_grids
from detector.assign.max_iou import MaxIoUAssigner
from detector.config import ModelConfig
from detector.losses import RetinaNetLoss
from detector.losses.dense import dense_focal_loss
from detector.models import build_anchors
from detector.precision import DTYPES
from tools.benchmarks.measure import interleaved
from tools.benchmarks.peers import MODEL, make_inputs
from tools.benchmarks.rows import MismatchError, Options, Row, figures


def loss(options: Options) -> list[Row]:
    """Time the focal loss of all anchors and its gradient; torchvision's one-hot targets are prepared beforehand."""
    device = options.device
    num_anchors = len(_anchors(options))
    generator = torch.Generator().manual_seed(0)
    labels = torch.full((options.batch, num_anchors), -1)
    labels[:, torch.randperm(num_anchors, generator=generator)[: num_anchors // 1200 + 1]] = 3 % options.classes
    labels[:, torch.randperm(num_anchors, generator=generator)[: num_anchors // 240]] = -2
    labels = labels.to(device)
    logits = torch.randn(options.batch, num_anchors, options.classes, generator=generator).to(device) - 4
    one_hot = torch.nn.functional.one_hot(labels.clamp(min=0), options.classes) * (labels >= 0)[..., None]
    targets = one_hot.float()
    mask = (labels >= -1)[..., None].float()
    our_loss: Any = dense_focal_loss
    if options.compiles:
        our_loss = torch.compile(dense_focal_loss, dynamic=False)
    rows = []
    for precision in options.precisions:
        x = logits.detach().to(DTYPES[precision]).requires_grad_()

        def run_ours(x: Tensor = x) -> Tensor:
            x.grad = None
            total: Tensor = our_loss(x, labels).sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total.detach()

        def run_peer(x: Tensor = x) -> Tensor:
            x.grad = None
            total: Tensor = (torchvision_focal_loss(x, targets.to(x.dtype), alpha=0.25, gamma=2.0) * mask).sum()
            total.backward()  # type: ignore[no-untyped-call]
            return total.detach()

        value, gradient = float(run_ours()), x.grad
        expected, expected_gradient = float(run_peer()), x.grad
        assert gradient is not None
        assert expected_gradient is not None
        apart = (gradient.float() - expected_gradient.float()).norm() / expected_gradient.float().norm()
        facts = {"loss_difference": abs(value - expected) / expected, "gradient_difference": float(apart)}
        if precision == "fp32" and (facts["loss_difference"] > 1e-5 or facts["gradient_difference"] > 1e-4):
            raise MismatchError(f"losses and gradients must agree, got {facts}")
        del gradient, expected_gradient
        x.grad = None
        timings = interleaved(
            {"ours": run_ours, "peer": run_peer}, repeats=options.repeats, warmup=options.warmup, device=device
        )
        rows.append({"case": "loss", "row": precision, **options.workload, **facts, **figures(timings)})
    return rows


def match(options: Options) -> list[Row]:
    """Time the assignment of anchors to objects, with and without low-quality matches."""
    device = options.device
    anchors = _anchors(options)
    inputs = make_inputs(options.batch, options.size, options.boxes, options.classes, device)
    rows = []
    for low_quality in (True, False):
        assign: Any = RetinaNetLoss(assigner=MaxIoUAssigner(low_quality_matches=low_quality)).assign
        if options.compiles:
            assign = torch.compile(assign, dynamic=False)
        matcher = Matcher(0.5, 0.4, allow_low_quality_matches=low_quality)

        def run_ours(assign: Any = assign) -> Tensor:
            matched: Tensor = assign(anchors, inputs.batch.targets, grids=pyramid_grids(options.size)).matched
            return matched

        def run_peer(matcher: Matcher = matcher) -> Tensor:
            return torch.stack([matcher(box_iou(one["boxes"], anchors)) for one in inputs.peer_targets])

        different = int((run_ours() != run_peer()).sum())
        if different > (0 if device.type == "cpu" else 10 * options.batch):
            raise MismatchError(f"assignments must be the same, got {different} anchors that differ")
        timings = interleaved(
            {"ours": run_ours, "peer": run_peer}, repeats=options.repeats, warmup=options.warmup, device=device
        )
        title = "with low-quality matches" if low_quality else "without low-quality matches"
        rows.append({"case": "match", "row": title, **options.workload, "different": different, **figures(timings)})
    return rows


def _anchors(options: Options) -> Tensor:
    generator = build_anchors(ModelConfig.model_validate(MODEL, strict=False))
    anchors: Tensor = generator(options.size, pyramid_grids(options.size), options.device)
    return anchors
