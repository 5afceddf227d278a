"""The feature pyramid (Lin et al. 2017b; the RetinaNet paper's footnote 2 for P6 and P7)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.config import PyramidInput
from detector.models.convolution import too_narrow_for_bf16


class FeaturePyramid(nn.Module):
    """C3..C5 to P3..P7, all with the same number of channels; or any other consecutive levels.

    Args:
        in_channels: channels of each of the backbone's feature maps, finest first.
        channels: channels of every level of the pyramid.
        in_strides: strides of the backbone's feature maps.
        num_extra_levels: levels after the backbone's, each at half the resolution of the one before.
        p6_from: the input of the first of them: "c5", the backbone's last feature map (the paper's choice), or "p5",
            the pyramid's level at its resolution.
        relu_before_p7: apply ReLU before each further one, as in the paper; mmdetection does not.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        channels: int,
        *,
        in_strides: Sequence[int] = (8, 16, 32),
        num_extra_levels: int = 2,
        p6_from: PyramidInput,
        relu_before_p7: bool,
    ) -> None:
        super().__init__()
        self.p6_from = p6_from
        self.relu_before_p7 = relu_before_p7
        extra_strides = [in_strides[-1] << n for n in range(1, num_extra_levels + 1)]
        self.strides = (*in_strides, *extra_strides)
        """Image size over feature map size of each level, finest first."""
        self.extra_levels = [f"p{stride.bit_length() - 1}" for stride in extra_strides]
        self.lateral = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in in_channels)
        self.output = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in in_channels)
        width = in_channels[-1] if p6_from == "c5" else channels
        for name in self.extra_levels:
            self.add_module(name, nn.Conv2d(width, channels, 3, stride=2, padding=1))
            width = channels
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """[(B, C_l, H_l, W_l)] of the backbone to [(B, channels, H_l, W_l)] of the pyramid, finest first."""
        merged = self.lateral[-1](features[-1])
        outputs = [self.output[-1](merged)]
        for level in range(len(features) - 2, -1, -1):
            lateral = self.lateral[level](features[level])
            merged = _add_upsampled(lateral, merged)
            outputs.insert(0, self.output[level](merged))
        x = features[-1] if self.p6_from == "c5" else outputs[-1]
        for number, name in enumerate(self.extra_levels):
            x = _strided(getattr(self, name), F.relu(x) if number > 0 and self.relu_before_p7 else x)
            outputs.append(x)
        return outputs


def _add_upsampled(fine: Tensor, coarse: Tensor) -> Tensor:
    """(B, C, H, W) plus (B, C, H / 2, W / 2), sizes rounded up, upsampled to it by repeating cells."""
    height, width = coarse.shape[-2:]
    if fine.shape[-2:] != (2 * height, 2 * width):
        return fine + F.interpolate(coarse, size=fine.shape[-2:], mode="nearest")
    # Adds each coarse cell to its four fine ones by broadcasting: no upsampled map, and no scatter of its gradient.
    blocks = fine.view(*fine.shape[:2], height, 2, width, 2) + coarse[:, :, :, None, :, None]
    added: Tensor = blocks.flatten(4, 5).flatten(2, 3)
    return added


def _strided(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """A 3x3 convolution of stride 2."""
    if too_narrow_for_bf16(x):
        with torch.autocast("cpu", enabled=False):
            narrow: Tensor = conv(x.to(conv.weight.dtype))
            return narrow
    out: Tensor = conv(x)
    return out
