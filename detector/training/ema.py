"""Exponential moving average of the weights."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class Ema:
    """Exponential moving average of a model's parameters and running statistics.

    The fraction of the average kept at a step is min(decay, (1 + step) / (10 + step)), so that short runs are averaged
    too.

    Args:
        model: copied as the initial average.
        decay: upper bound of the fraction kept.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        self.decay = decay

    @torch.no_grad()
    def update(self, model: nn.Module, step: int, *, applies: Tensor | None = None) -> None:
        """Update the average with the model after a step.

        Args:
            model: the current weights.
            step: number of the step, from 1.
            applies: () bool on the device: whether anything is to change, decided without a sync point; None: yes.
        """
        keep = min(self.decay, (1 + step) / (10 + step))
        averages, current = [], []
        for average, new in zip(self.model.state_dict().values(), model.state_dict().values(), strict=True):
            if average.is_floating_point():
                averages.append(average)
                current.append(new)
            else:
                average.copy_(new)
        if applies is None:
            torch._foreach_lerp_(averages, current, 1 - keep)
            return
        change = torch._foreach_sub(current, averages)
        torch._foreach_mul_(change, applies * (1 - keep))
        torch._foreach_add_(averages, change)
