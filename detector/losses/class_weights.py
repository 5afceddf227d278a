"""Class weights from the number of examples of each class."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequency(counts: Tensor, *, exponent: float = 1.0) -> Tensor:
    """Weight each class by (1 / count)^exponent, scaled so that the mean weight is 1.

    Args:
        counts: (K,) number of examples of each class. A class without any gets the weight of the rarest other class.
        exponent: 0 gives equal weights, 0.5 the common square root.

    Returns:
        (K,) fp32 weights, for the `alpha` of a loss.

    Raises:
        ValueError: no class has an example.

    Example:
        >>> inverse_frequency(torch.tensor([30, 10, 10]))
        tensor([0.4286, 1.2857, 1.2857])
    """
    return _scale_to_mean_1(_fill_empty_classes(counts).double() ** -exponent)


def effective_number(counts: Tensor, *, beta: float = 0.999) -> Tensor:
    """Weight each class by (1 - beta) / (1 - beta^count), scaled so that the mean weight is 1.

    The inverse of the "effective number" of examples (Cui et al. 2019, "Class-Balanced Loss Based on Effective Number
    of Samples", equation 5).

    Args:
        counts: (K,) number of examples of each class. A class without any gets the weight of the rarest other class.
        beta: 0 gives equal weights; towards 1 the weights approach the inverse frequency.

    Returns:
        (K,) fp32 weights, for the `alpha` of a loss.

    Raises:
        ValueError: no class has an example, or beta is not in [0, 1).

    Example:
        >>> effective_number(torch.tensor([30, 10, 10]), beta=0.9)
        tensor([0.7613, 1.1193, 1.1193])
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    filled = _fill_empty_classes(counts).double()
    # 1 - beta^n from expm1, for a beta near 1
    return _scale_to_mean_1(1 / -torch.expm1(filled * torch.log(torch.tensor(beta, dtype=torch.float64))))


def _fill_empty_classes(counts: Tensor) -> Tensor:
    """Replace counts of 0 by the smallest other count."""
    positive = counts[counts > 0]
    if not len(positive):
        raise ValueError(f"counts must contain at least one class with an example, got {counts.tolist()}")
    return torch.where(counts > 0, counts, positive.min())


def _scale_to_mean_1(weights: Tensor) -> Tensor:
    return (weights / weights.mean()).float()
