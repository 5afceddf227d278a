"""ResNet and ResNeXt as backbones (He et al. 2016; Xie et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from detector.config import Norm, StrideIn
from detector.models.convolution import fold_norm, norm_layer, normed_conv, too_narrow_for_bf16

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")
"""From the image upwards; freezing starts at the stem."""


class Architecture(NamedTuple):
    """The dimensions of a network."""

    bottleneck: bool
    """Whether blocks are 1x1, 3x3 and 1x1 convolutions instead of two 3x3."""
    blocks: tuple[int, int, int, int]
    """Number of blocks in layer1 to layer4."""
    groups: int = 1
    """Groups of the 3x3 convolutions of bottleneck blocks."""
    width_per_group: int = 64
    """Channels per group of those convolutions in layer1."""
    channels: tuple[int, int, int, int, int] = (64, 64, 128, 256, 512)
    """Output channels of the stem and of layer1 to layer4; of the layers, a quarter in bottleneck blocks."""


ARCHITECTURES = {
    "resnet18": Architecture(False, (2, 2, 2, 2)),
    "resnet34": Architecture(False, (3, 4, 6, 3)),
    "resnet50": Architecture(True, (3, 4, 6, 3)),
    "resnet101": Architecture(True, (3, 4, 23, 3)),
    "resnet152": Architecture(True, (3, 8, 36, 3)),
    "resnext50_32x4d": Architecture(True, (3, 4, 6, 3), 32, 4),
    "resnext101_32x4d": Architecture(True, (3, 4, 23, 3), 32, 4),
    "resnext101_32x8d": Architecture(True, (3, 4, 23, 3), 32, 8),
    "resnext101_64x4d": Architecture(True, (3, 4, 23, 3), 64, 4),
}
"""Those of torchvision, and mmdetection's resnext101_32x4d."""


class ResNet(nn.Module):
    """A ResNet without its classifier.

    Parameters have torchvision's names, so its files load; with the same seed they have the same initial values.

    Args:
        name: a key of `ARCHITECTURES`.
        norm: the kind of all normalization layers.
        norm_eps: added to the variance.
        num_trainable_layers: 0..5 stages trained, counted from the top; the others are frozen, in `train()` too.
        stride_in: the convolution of a bottleneck block that has the stride.
    """

    def __init__(
        self, name: str, *, norm: Norm, norm_eps: float, num_trainable_layers: int, stride_in: StrideIn = "3x3"
    ) -> None:
        super().__init__()
        arch, norm_of = ARCHITECTURES[name], norm_layer(norm, norm_eps)
        in_channels = arch.channels[0]
        self.conv1 = nn.Conv2d(3, in_channels, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm_of(in_channels)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for stage, channels, blocks in zip(STAGES[1:], arch.channels[1:], arch.blocks, strict=True):
            layer = nn.Sequential()
            for number in range(blocks):
                stride = 2 if number == 0 and stage != "layer1" else 1
                block = ResidualBlock(in_channels, channels, arch, stride=stride, norm=norm_of, stride_in=stride_in)
                in_channels = block.out_channels
                layer.append(block)
            setattr(self, stage, layer)
        nn.Linear(in_channels, 1000)  # torchvision's classifier, which draws random numbers before the next lines do
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.num_trainable_layers = num_trainable_layers
        self.channels = (in_channels // 4, in_channels // 2, in_channels)
        self.strides = (8, 16, 32)
        self.checkpointing = False
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def _frozen_modules(self) -> Iterator[nn.Module]:
        for stage in STAGES[: len(STAGES) - self.num_trainable_layers]:
            yield from (self.conv1, self.bn1) if stage == "stem" else (self.get_submodule(stage),)

    def train(self, mode: bool = True) -> ResNet:
        """As usual, but frozen stages keep their normalization statistics."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' type."""
        return self.conv1.weight.dtype

    def fold_norms(self) -> None:
        """Make normalizations with constant statistics part of the convolutions before them, in place."""
        fold_norm(self, "conv1", "bn1")
        for block in self.modules():
            if isinstance(block, ResidualBlock):
                block.fold_norms()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """(B, 3, H, W) normalized images to C3, C4, C5: (B, C, H / 8, W / 8) and so on, sizes rounded up."""
        if too_narrow_for_bf16(images, stride=16):  # at the input of the last layer
            with torch.autocast("cpu", enabled=False):
                return self._features(images.to(self.dtype))
        return self._features(images)

    def _features(self, images: Tensor) -> tuple[Tensor, ...]:
        x = self.maxpool(normed_conv(self.conv1, self.bn1, images, relu=True))
        outputs = []
        for stage in STAGES[1:]:
            for block in getattr(self, stage):
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = block(x)
            outputs.append(x)
        return tuple(outputs[1:])


class ResidualBlock(nn.Module):
    """A basic or bottleneck block.

    Args:
        in_channels: channels of the input.
        channels: channels of a basic block; a quarter of a bottleneck block's output channels.
        arch: the network's dimensions.
        stride: of one of the convolutions, and of the shortcut.
        norm: the constructor of a normalization layer.
        stride_in: the convolution of a bottleneck block that has the stride.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        arch: Architecture,
        *,
        stride: int,
        norm: Callable[[int], nn.Module],
        stride_in: StrideIn,
    ) -> None:
        super().__init__()
        self.bottleneck = arch.bottleneck
        self.out_channels = channels * (4 if arch.bottleneck else 1)
        downsample = None
        if stride != 1 or in_channels != self.out_channels:  # built first, as torchvision draws its random numbers
            shortcut = nn.Conv2d(in_channels, self.out_channels, 1, stride=stride, bias=False)
            downsample = nn.Sequential(shortcut, norm(self.out_channels))
        if arch.bottleneck:
            width = channels * arch.width_per_group // 64 * arch.groups
            first, second = (stride, 1) if stride_in == "1x1" else (1, stride)
            self.conv1 = nn.Conv2d(in_channels, width, 1, stride=first, bias=False)
            self.bn1 = norm(width)
            self.conv2 = nn.Conv2d(width, width, 3, stride=second, padding=1, groups=arch.groups, bias=False)
            self.bn2 = norm(width)
            self.conv3 = nn.Conv2d(width, self.out_channels, 1, bias=False)
            self.bn3 = norm(self.out_channels)
        else:
            self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
            self.bn1 = norm(channels)
            self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
            self.bn2 = norm(channels)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) to (B, out_channels, H / stride, W / stride)."""
        out = normed_conv(self.conv1, self.bn1, x, relu=True)
        out = normed_conv(self.conv2, self.bn2, out, relu=self.bottleneck)
        if self.bottleneck:
            out = normed_conv(self.conv3, self.bn3, out)
        shortcut = x if self.downsample is None else normed_conv(self.downsample[0], self.downsample[1], x)
        return F.relu(out.add_(shortcut), inplace=True)

    def fold_norms(self) -> None:
        """See `ResNet.fold_norms`."""
        for number in (1, 2, 3) if self.bottleneck else (1, 2):
            fold_norm(self, f"conv{number}", f"bn{number}")
        if self.downsample is not None:
            fold_norm(self.downsample, "0", "1")
