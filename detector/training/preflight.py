"""Before the first step: open the data, and say what is about to happen and what looks wrong about it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from detector.anchors import AnchorGenerator, best_anchor_iou
from detector.boxes import area
from detector.config import Config
from detector.datasets.augment import Augmentation
from detector.datasets.coco import CocoDataset
from detector.datasets.transforms import padded_size, resized_size
from detector.errors import ConfigError
from detector.evaluation.coco_metrics import ground_truth_warnings
from detector.losses.retinanet import ConstantLoss
from detector.weights.safe_load import read_tensors

FIRST_LOSS_TOLERANCE = 0.1
"""Share by which the first class loss may differ from that of the prior: the class subnet's random weights spread it."""


def require_settings(config: Config, *, fresh: bool) -> None:
    """What the config alone, and files it names besides the data, can be wrong about: told at once, where looking at the data
    may take minutes.

    Args:
        fresh: whether the weights of the backbone will be needed.

    Raises:
        ConfigError, WeightsError: the first of it.
    """
    if config.data.train is None:
        raise ConfigError(
            "data.train must name images and annotations; set data.train.images and data.train.annotations"
        )
    if config.data.augment:
        # on no picture: how large a crop may be, the data will say
        Augmentation(config.data.augment, min_visibility=config.data.augment_min_visibility, sizes=())
    weights = config.model.backbone_weights
    if fresh and weights not in ("imagenet", "none") and not Path(weights).exists():
        read_tensors(Path(weights))  # which says so


def data_warnings(
    anchors: AnchorGenerator, train_set: CocoDataset, others: list[CocoDataset], config: Config
) -> list[str]:
    """What the data make one expect: objects out of the anchors' reach, scenes fuller than the metric looks at."""
    warnings = coverage_warnings(anchors, train_set, config)
    for dataset in others:
        for line in ground_truth_warnings(dataset.ground_truth(), config.eval.max_dets):
            warnings.append(f"{dataset.annotations.name}: {line}")
    return warnings


def coverage_warnings(anchors: AnchorGenerator, coco: CocoDataset, config: Config) -> list[str]:
    """Objects that no anchor overlaps enough to learn from (as the boxes are before augmentation)."""
    size = config.data.eval_size
    boxes, images, _ = coco.boxes()
    heights_widths = coco.sizes.astype(np.int64)
    best = torch.zeros(len(boxes))
    resized = np.array(
        [
            resized_size((h, w), min_size=size, max_size=config.data.max_size, resize=config.model.resize)
            for h, w in heights_widths
        ]
    )
    factors = (resized / heights_widths)[images][:, [1, 0, 1, 0]]
    scaled = torch.from_numpy((boxes * factors).astype(np.float32))
    canvases = [padded_size((int(h), int(w)), config.model.pad) for h, w in resized]
    for canvas in set(canvases):
        rows = torch.from_numpy(np.array([c == canvas for c in canvases])[images])
        best[rows] = best_anchor_iou(anchors, scaled[rows], canvas)
    lost = best < config.matching.fg_iou_thresh
    if not bool(lost.any()) or config.matching.low_quality_matches:
        return []
    sides = area(scaled[lost]).sqrt()
    return [
        f"{int(lost.sum())} of {len(boxes)} objects ({float(lost.float().mean()):.1%}) overlap no anchor by "
        f"{config.matching.fg_iou_thresh} at data.min_size {size} and will not be learnt; their sides are "
        f"{sides.min():.0f} to {sides.max():.0f} pixels there (median {sides.median():.0f}); larger data.min_size, other "
        "model.anchors.sizes or ratios, or matching.low_quality_matches=true would reach them"
    ]


def first_loss_text(constant: ConstantLoss, found: float, num_pos: int) -> tuple[str, bool]:
    """A line that compares the first class loss with what it must be before anything is learnt, and whether they agree.

    Args:
        constant: the loss of a network that says its prior of every anchor.
        found: what the network's first step gave.
        num_pos: positives that both were divided by.
    """
    arithmetic = (
        f"{constant.background:,} background anchors x {constant.background_loss:.3g} + {constant.positives:,} positive ones x "
        f"{constant.positive_loss:.3g}, over {max(1, num_pos):,}, gives {constant.total:.3f}"
    )
    agrees = abs(found / constant.total - 1) <= FIRST_LOSS_TOLERANCE if constant.total > 0 else found < 1e-3
    if agrees:
        return f"the first class loss is {found:.3f}, as it must be at the prior: {arithmetic}", True
    return (
        f"the first class loss is {found:.3f}, but at the prior {arithmetic}; look at model.head.prior_prob, at the loss and at "
        "whether the pictures look as they should (model.pixel_mean, pixel_std)"
    ), False
