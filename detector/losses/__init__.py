"""The focal loss, its family and baselines, box losses and the complete RetinaNet loss."""

from __future__ import annotations

from detector.losses.box import box_loss
from detector.losses.class_loss import ClassLoss
from detector.losses.class_weights import effective_number, inverse_frequency
from detector.losses.dense import dense_focal_loss
from detector.losses.focal import (
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
    softmax_focal_star_loss,
)
from detector.losses.focal_variants import ghm_loss, poly1_focal_loss, quality_focal_loss, varifocal_loss
from detector.losses.hard_example_mining import hardest_fraction, online_hard_examples
from detector.losses.retinanet import RetinaNetLoss, build_loss

__all__ = [
    "ClassLoss",
    "RetinaNetLoss",
    "box_loss",
    "build_loss",
    "dense_focal_loss",
    "effective_number",
    "ghm_loss",
    "hardest_fraction",
    "inverse_frequency",
    "online_hard_examples",
    "poly1_focal_loss",
    "quality_focal_loss",
    "sigmoid_focal_loss",
    "sigmoid_focal_star_loss",
    "softmax_focal_loss",
    "softmax_focal_star_loss",
    "varifocal_loss",
]
