"""Checks and reports before the first step, and the check of the first loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from detector import distributed
from detector.anchors import AnchorGenerator, best_anchor_iou
from detector.boxes import area
from detector.config import Config, HeadConfig
from detector.datasets.augment import Augmentation
from detector.datasets.coco import CocoDataset
from detector.datasets.sampling import StepPlanner
from detector.datasets.transforms import padded_size, resized_size
from detector.errors import ConfigError
from detector.evaluation.coco_metrics import ground_truth_warnings
from detector.losses.retinanet import ConstantLoss, RetinaNetLoss
from detector.models.heads import background_bias, prior_bias
from detector.structures import Batch
from detector.training.logger import RunLog
from detector.training.optim import scaled_lr, warmup_of
from detector.training.profiler import WARMUP_STEPS
from detector.training.step import Learner, StepResult
from detector.weights.safe_load import read_tensors

FIRST_LOSS_TOLERANCE = 0.1
"""Relative difference between the first class loss and that of the prior: the class subnet's random weights spread
it."""


def require_settings(config: Config, *, fresh: bool) -> None:
    """Check what can be wrong with the config and the files it names besides the data, before minutes are spent on the
    data.

    Args:
        config: of the run.
        fresh: whether the backbone's weights will be needed.

    Raises:
        ConfigError, WeightsError: the first problem.
    """
    if config.data.train is None:
        raise ConfigError(
            "data.train must name images and annotations; set data.train.images and data.train.annotations"
        )
    if config.data.augment:
        # for no image size: how large a crop may be is checked against the data
        Augmentation(config.data.augment, min_visibility=config.data.augment_min_visibility, sizes=())
    weights = config.model.backbone_weights
    if fresh and weights not in ("imagenet", "none") and not Path(weights).exists():
        read_tensors(Path(weights))  # raises the error


def summarize(
    config: Config, learner: Learner, planner: StepPlanner, log: RunLog, *, step: int, total_steps: int
) -> None:
    """Log what is about to be trained and how.

    Args:
        config, learner, planner: of the run.
        log: where to.
        step: number of steps done, above 0 for a resumed run.
        total_steps: of the run.
    """
    parameters = sum(p.numel() for p in learner.model.parameters())
    trained = sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    processes = distributed.world_size()
    log.info(
        f"{config.model.backbone}, {parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained; "
        f"{processes} process{'es' * (processes > 1)} on {learner.device}, {learner.precision}"
    )
    log.info(scaled_lr(config.optim, config.train.batch_size)[1])
    if config.optim.warmup_steps > total_steps:
        log.warn(f"optim.warmup_steps {config.optim.warmup_steps} is longer than the run: {total_steps} steps")
    remaining = total_steps - step
    if config.train.trace_steps and remaining < WARMUP_STEPS + config.train.trace_steps:
        log.warn(
            f"train.trace_steps={config.train.trace_steps} has no effect: only {remaining} steps remain, and the first "
            f"{WARMUP_STEPS} of a session are not profiled"
        )
    if planner.factors is not None:
        log.info(
            f"{config.data.sampling} sampling: {planner.images_per_epoch} images per epoch from {len(planner.sizes)}, "
            f"each {planner.factors.min():.2g} to {planner.factors.max():.2g} times"
        )
    log.info(
        f"{config.train.epochs} epoch{'s' * (config.train.epochs > 1)} of {planner.steps_per_epoch} steps, "
        f"{config.train.batch_size} images per step, {warmup_of(config.optim, total_steps)} steps of warm-up"
    )
    if step:
        log.info(f"resumed after step {step} of {total_steps}")


def data_warnings(
    anchors: AnchorGenerator, train_set: CocoDataset, others: list[CocoDataset], config: Config
) -> list[str]:
    """Warnings about the data: objects that no anchor reaches, images with more objects than the metric counts."""
    warnings = coverage_warnings(anchors, train_set, config)
    for dataset in others:
        for line in ground_truth_warnings(dataset.ground_truth(), config.eval.max_dets):
            warnings.append(f"{dataset.annotations.name}: {line}")
    return warnings


def coverage_warnings(anchors: AnchorGenerator, coco: CocoDataset, config: Config) -> list[str]:
    """Warn about objects whose IoU with every anchor is too low for a positive (boxes as before augmentation)."""
    size = config.data.eval_size
    boxes, images, _ = coco.boxes()
    heights_widths = coco.sizes.astype(np.int64)
    best = torch.zeros(len(boxes))
    resized = np.array(
        [
            resized_size((h, w), min_size=size, max_size=config.data.max_size, resize=config.model.compat.resize)
            for h, w in heights_widths
        ]
    )
    factors = (resized / heights_widths)[images][:, [1, 0, 1, 0]]
    scaled = torch.from_numpy((boxes * factors).astype(np.float32))
    canvases = [padded_size((int(h), int(w)), config.model.pad) for h, w in resized]
    for canvas in set(canvases):
        rows = torch.from_numpy(np.array([c == canvas for c in canvases])[images])
        best[rows] = best_anchor_iou(anchors, scaled[rows], canvas)
    unreached = best < config.matching.fg_iou_thresh
    if not bool(unreached.any()) or config.matching.low_quality_matches:
        return []
    sides, share = area(scaled[unreached]).sqrt(), float(unreached.float().mean())
    return [
        f"{int(unreached.sum())} of {len(boxes)} objects ({share:.1%}) have no anchor with IoU >= "
        f"{config.matching.fg_iou_thresh} at data.min_size {size} and get no positive; their sides are "
        f"{sides.min():.0f} to {sides.max():.0f} pixels there (median {sides.median():.0f}); a larger data.min_size, "
        "other model.anchors.sizes or ratios, or matching.low_quality_matches=true would reach them"
    ]


class FirstLossCheck(NamedTuple):
    """Whether the first class loss is what it must be before anything is learned."""

    text: str
    agrees: bool


def first_loss_check(
    head: HeadConfig, loss: RetinaNetLoss, micro_batches: Sequence[Batch], result: StepResult, num_classes: int
) -> FirstLossCheck | None:
    """Compare a fresh network's first class loss with its closed form at the prior.

    Args:
        head: of the network.
        loss: of the run.
        micro_batches: of this process in the first step.
        result: of the first step.
        num_classes: of the network.

    Returns:
        None where the loss has no closed form.
    """
    if head.activation == "softmax":
        bias = [0.0] * num_classes + [background_bias(head.prior_prob, num_classes)]
    else:
        bias = [prior_bias(head.prior_prob)] * num_classes
    at_prior = torch.tensor(bias, device=result.loss_cls.device)
    own = [
        loss.constant_class_loss(at_prior, batch.targets, assignment, normalizers=result.normalizers)
        for batch, assignment in zip(micro_batches, result.assignments, strict=True)
    ]
    known = [part for process in distributed.gather(own) for part in process]
    parts = [part for part in known if part is not None]
    if len(parts) < len(known):
        return None
    positives = sum(part.positives for part in parts)
    constant = ConstantLoss(
        sum(part.total for part in parts),
        sum(part.background for part in parts),
        parts[0].background_loss,
        positives,
        sum(part.positives * part.positive_loss for part in parts) / max(1, positives),
    )
    return _compare_first_loss(constant, float(result.loss_cls), int(result.normalizers.cls))


def _compare_first_loss(constant: ConstantLoss, loss_cls: float, num_pos: int) -> FirstLossCheck:
    arithmetic = (
        f"{constant.background:,} background anchors x {constant.background_loss:.3g} + {constant.positives:,} "
        f"positive anchors x {constant.positive_loss:.3g}, over {max(1, num_pos):,}, gives {constant.total:.3f}"
    )
    agrees = abs(loss_cls / constant.total - 1) <= FIRST_LOSS_TOLERANCE if constant.total > 0 else loss_cls < 1e-3
    if agrees:
        return FirstLossCheck(f"first class loss {loss_cls:.3f}, as expected at the prior: {arithmetic}", True)
    return FirstLossCheck(
        f"first class loss {loss_cls:.3f}, but at the prior {arithmetic}; check model.head.prior_prob, the loss, and "
        "whether the images are normalized as intended (model.pixel_mean, pixel_std)",
        False,
    )
