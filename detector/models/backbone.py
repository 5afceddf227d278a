"""What a RetinaNet needs of its backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Backbone(Protocol):
    """An `nn.Module` that computes feature maps of several strides; `resnet.ResNet` is one.

    Frozen parameters have `requires_grad` False, and `train()` keeps the normalization layers among them in evaluation
    mode.
    """

    checkpointing: bool
    """Whether activations within blocks are recomputed in the backward pass instead of kept in memory."""

    @property
    def channels(self) -> Sequence[int]:
        """Channels of each feature map, finest first."""

    @property
    def strides(self) -> Sequence[int]:
        """Image size over size of each feature map: powers of two, each twice the one before."""

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type, in which images are expected."""

    def fold_norms(self) -> None:
        """Make normalizations with constant statistics part of the convolutions before them, in place."""

    def __call__(self, images: Tensor) -> Sequence[Tensor]:
        """(B, 3, H, W) normalized images to [(B, C_l, H / stride_l, W / stride_l)], sizes rounded up."""
