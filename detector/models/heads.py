"""The class and the box subnet (Lin et al. 2017, section 4): one small fully convolutional network for all levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from detector.config import HeadNorm
from detector.models.convolution import GroupNorm, conv_relu


class Subnet(nn.Module):
    """`depth` 3x3 convolutions with ReLU, then one that gives `outputs` numbers for each of a cell's anchors.

    Args:
        in_channels: channels of the pyramid.
        outputs: numbers per anchor: K classes or 4 deltas.
        num_anchors: anchors per cell.
        depth: number of hidden convolutions.
        channels: channels of the hidden convolutions.
        norm: "gn" adds GroupNorm with 32 groups after each hidden convolution, which then has no bias.
        bias_before_norm: keep the bias of convolutions before a norm.
        prior_prob: for the class subnet, the initial score of every anchor (section 4.1); None: biases start at 0.
        background: the last output of an anchor is the background's, and the scores are a softmax; the classes then
            share `prior_prob`.
    """

    def __init__(
        self,
        in_channels: int,
        outputs: int,
        *,
        num_anchors: int,
        depth: int,
        channels: int,
        norm: HeadNorm,
        bias_before_norm: bool = False,
        prior_prob: float | None = None,
        background: bool = False,
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.tower = nn.Sequential()
        for _ in range(depth):
            self.tower.append(nn.Conv2d(in_channels, channels, 3, padding=1, bias=norm == "none" or bias_before_norm))
            if norm == "gn":
                self.tower.append(GroupNorm(32, channels))
            self.tower.append(nn.ReLU(inplace=True))
            in_channels = channels
        self.predictor = nn.Conv2d(in_channels, num_anchors * outputs, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        bias: Any = self.predictor.bias
        if prior_prob is not None and background:
            nn.init.constant_(bias.detach().view(num_anchors, outputs)[:, -1], background_bias(prior_prob, outputs - 1))
        elif prior_prob is not None:
            nn.init.constant_(bias, prior_bias(prior_prob))

    def forward(self, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[(B, C, H_l, W_l)] to ((B, H_l * W_l * num_anchors, outputs)), cells row by row, anchors within."""
        return tuple(self._per_anchor(self.predictor(self._hidden(x))) for x in features)

    def _hidden(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() or (len(self.tower) and isinstance(self.tower[1], nn.GroupNorm)):
            hidden: Tensor = self.tower(x)
            return hidden
        for conv in self.tower[::2]:
            x = conv_relu(conv, x)
        return x

    def _per_anchor(self, x: Tensor) -> Tensor:
        # needs no copy where x is channels_last
        return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, self.outputs)


def prior_bias(prior_prob: float) -> float:
    """The bias whose sigmoid is `prior_prob` (section 4.1, "Initialization")."""
    return -math.log((1 - prior_prob) / prior_prob)


def background_bias(prior_prob: float, num_classes: int) -> float:
    """The background's bias for which the softmax gives the classes `prior_prob` together, all other biases being 0."""
    return math.log(num_classes * (1 - prior_prob) / prior_prob)
