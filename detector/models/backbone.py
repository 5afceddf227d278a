"""torchvision's ResNets as feature extractors (He et al. 2016; Xie et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Literal

import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from detector.config import Norm

PARTS = ("stem", "layer1", "layer2", "layer3", "layer4")
"""From the image upwards; freezing starts at the stem."""


def norm_layer(norm: Norm, eps: float) -> Callable[[int], nn.Module]:
    """The constructor of a normalisation layer, given its number of channels."""
    if norm == "gn":
        return partial(_group_norm, eps=eps)
    return partial({"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d, "sync_bn": nn.SyncBatchNorm}[norm], eps=eps)


def _group_norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


def _torchvision_resnet(name: str, norm: Callable[[int], nn.Module]) -> Any:
    if name == "resnext101_32x4d":  # mmdetection's, which torchvision does not list
        return torchvision.models.ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4, norm_layer=norm)
    return torchvision.models.get_model(name, weights=None, norm_layer=norm)


class ResNet(nn.Module):
    """A ResNet without its classifier; parameters are named as in torchvision, so its files load.

    Args:
        name: of the torchvision constructor, "resnet50" say.
        norm: of all layers.
        norm_eps: added to the variance.
        num_trainable_layers: 0..5 parts trained, counted from the top; the others are frozen, in `train()` too.
        stride_in: which convolution of a bottleneck has the stride.
    """

    def __init__(
        self,
        name: str,
        *,
        norm: Norm,
        norm_eps: float,
        num_trainable_layers: int,
        stride_in: Literal["3x3", "1x1"] = "3x3",
    ) -> None:
        super().__init__()
        body = _torchvision_resnet(name, norm_layer(norm, norm_eps))
        if stride_in == "1x1":
            for module in body.modules():
                if isinstance(module, Bottleneck):
                    module.conv1.stride, module.conv2.stride = module.conv2.stride, module.conv1.stride
        self.conv1, self.bn1, self.relu, self.maxpool = body.conv1, body.bn1, body.relu, body.maxpool
        self.layer1, self.layer2, self.layer3, self.layer4 = body.layer1, body.layer2, body.layer3, body.layer4
        self.num_trainable_layers = num_trainable_layers
        width: int = body.fc.in_features
        self.channels = (width // 4, width // 2, width)
        """Of C3, C4 and C5."""
        for module in self.frozen_parts():
            module.requires_grad_(False)

    def frozen_parts(self) -> Iterator[nn.Module]:
        """The modules that are not trained."""
        for part in PARTS[: len(PARTS) - self.num_trainable_layers]:
            yield from (self.conv1, self.bn1) if part == "stem" else (getattr(self, part),)

    def train(self, mode: bool = True) -> ResNet:
        """As usual, but frozen parts keep their normalisation statistics too."""
        super().train(mode)
        for module in self.frozen_parts():
            module.eval()
        return self

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 3, H, W) normalised images to C3, C4, C5: (B, C, H / 8, W / 8) and so on, rounded up."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        c3 = self.layer2(self.layer1(x))
        c4 = self.layer3(c3)
        return c3, c4, self.layer4(c4)
