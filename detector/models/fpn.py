"""Feature pyramid P3..P7 (Lin et al. 2017b; the RetinaNet paper's footnote 2 for P6 and P7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.models.backbone import too_narrow_for_bf16


class FeaturePyramid(nn.Module):
    """C3..C5 to P3..P7, all with the same number of channels.

    Args:
        in_channels: of C3, C4, C5.
        channels: of every level.
        p6_from: the input of P6's strided convolution: "c5" (the paper) or "p5".
        relu_before_p7: as in the paper; mmdetection leaves it out.
    """

    def __init__(
        self, in_channels: Sequence[int], channels: int, *, p6_from: Literal["c5", "p5"], relu_before_p7: bool
    ) -> None:
        super().__init__()
        self.p6_from = p6_from
        self.relu_before_p7 = relu_before_p7
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        self.p6 = nn.Conv2d(in_channels[-1] if p6_from == "c5" else channels, channels, 3, stride=2, padding=1)
        self.p7 = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[(B, C_l, H_l, W_l)] of C3..C5 to [(B, channels, H_l, W_l)] of P3..P7."""
        merged = self.lateral[-1](features[-1])
        outputs = [self.output[-1](merged)]
        for level in range(len(features) - 2, -1, -1):
            lateral = self.lateral[level](features[level])
            merged = _plus_enlarged(lateral, merged)
            outputs.insert(0, self.output[level](merged))
        p6 = _strided(self.p6, features[-1] if self.p6_from == "c5" else outputs[-1])
        p7 = _strided(self.p7, F.relu(p6) if self.relu_before_p7 else p6)
        return [*outputs, p6, p7]


def _plus_enlarged(fine: Tensor, coarse: Tensor) -> Tensor:
    """(B, C, H, W) plus (B, C, H / 2, W / 2), or rounded up, enlarged to it by repeating."""
    height, width = coarse.shape[-2:]
    if fine.shape[-2:] != (2 * height, 2 * width):
        return fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
    # A sum with every cell's four: the enlarged map need not be made, nor its gradient be scattered.
    fours = fine.view(*fine.shape[:2], height, 2, width, 2) + coarse[:, :, :, None, :, None]
    enlarged: Tensor = fours.flatten(4, 5).flatten(2, 3)
    return enlarged


def _strided(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3x3 convolution of stride 2."""
    if too_narrow_for_bf16(x):
        with torch.autocast("cpu", enabled=False):
            narrow: Tensor = conv(x.to(conv.weight.dtype))
            return narrow
    out: Tensor = conv(x)
    return out
