"""Class weights and sampling factors, from the number of objects per class in the training set."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from detector.config import DataConfig, LossConfig
from detector.datasets.coco import CocoDataset
from detector.datasets.sampling import balanced_factors, repeat_factors
from detector.errors import ConfigError
from detector.losses import effective_number, inverse_frequency
from detector.losses.class_loss import CLASS_LOSSES


def class_weights(loss: LossConfig, train_set: CocoDataset) -> list[float] | None:
    """Return the weight of each class's positives; None if the loss has no weight per class.

    `loss.alpha` lists the weights, or names the rule that computes them from the number of objects per class.

    Raises:
        ConfigError: the list has another length than there are classes.
    """
    num_classes = len(train_set.categories)
    if "alpha" not in CLASS_LOSSES[loss.cls].settings:
        return None
    if isinstance(loss.alpha, tuple):
        if len(loss.alpha) != num_classes:
            raise ConfigError(
                f"loss.alpha must give one weight for each of the {num_classes} classes "
                f"({', '.join(train_set.categories.names[:5])}{', ...' * (num_classes > 5)}), got {len(loss.alpha)}"
            )
        return list(loss.alpha)
    if not isinstance(loss.alpha, str):
        return None
    counts = torch.bincount(torch.from_numpy(train_set.boxes().labels), minlength=num_classes)
    if loss.alpha == "inverse_frequency":
        weights = inverse_frequency(counts, exponent=loss.alpha_exponent)
    else:
        weights = effective_number(counts, beta=loss.alpha_beta)
    return weights.tolist()


def class_weights_text(weights: list[float], train_set: CocoDataset) -> str:
    """Format class weights as a line for the log."""
    pairs = zip(train_set.categories.names, weights, strict=True)
    return "weights of positives by class: " + ", ".join(f"{name} {weight:.3g}" for name, weight in pairs)


def sampling_factors(data: DataConfig, train_set: CocoDataset) -> NDArray[np.float64] | None:
    """Return the average number of times that each training image is used per epoch, (N,); None: once each."""
    boxes = train_set.boxes()
    if data.sampling == "repeat_factor":
        return repeat_factors(boxes.image_index, boxes.labels, len(train_set), threshold=data.repeat_threshold)
    if data.sampling == "class_balanced":
        return balanced_factors(boxes.image_index, boxes.labels, len(train_set))
    return None
