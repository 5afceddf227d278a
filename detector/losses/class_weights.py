"""Weights of classes from how often they occur."""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequency(counts: Tensor, *, exponent: float = 1.0) -> Tensor:
    """(1 / count)^exponent of each class, scaled so that the mean weight is 1.

    Args:
        counts: (K,) examples of each class. A class without any gets the weight of the rarest one that has some.
        exponent: 0 gives equal weights, 0.5 the common square root.

    Raises:
        ValueError: no class has an example.
    """
    return _scaled(_filled(counts).double() ** -exponent)


def effective_number(counts: Tensor, *, beta: float = 0.999) -> Tensor:
    """(1 - beta) / (1 - beta^count) of each class, scaled so that the mean weight is 1 (Cui et al. 2019, "Class-Balanced
    Loss Based on Effective Number of Samples", equation 5).

    Args:
        counts: as in `inverse_frequency`.
        beta: 0 gives equal weights; towards 1 it becomes the inverse frequency.

    Raises:
        ValueError: no class has an example; beta not within 0 and 1.
    """
    if not 0 <= beta < 1:
        raise ValueError(f"beta must be at least 0 and below 1, got {beta}")
    filled = _filled(counts).double()
    # 1 - beta^n by expm1, for a beta near 1
    return _scaled(1 / -torch.expm1(filled * torch.log(torch.tensor(beta, dtype=torch.float64))))


def _filled(counts: Tensor) -> Tensor:
    some = counts[counts > 0]
    if not len(some):
        raise ValueError("weights of classes need at least one class with an example, got none")
    return torch.where(counts > 0, counts, some.min())


def _scaled(weights: Tensor) -> Tensor:
    return (weights / weights.mean()).float()
