"""torchvision's ResNets as feature extractors (He et al. 2016; Xie et al. 2017)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, Literal

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from torchvision.models.resnet import BasicBlock, Bottleneck
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
        self.checkpointing = False
        """Whether activations within blocks are computed again for the gradient instead of being kept."""
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
        if too_narrow_for_bf16(images, stride=16):  # at the entrance of the last layer
            with torch.autocast("cpu", enabled=False):
                return self._features(images.to(self.conv1.weight.dtype))
        return self._features(images)

    def _features(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = self.maxpool(normed_conv(self.conv1, self.bn1, images, relu=True))
        outputs = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            for block in layer:
                if self.checkpointing and torch.is_grad_enabled():
                    x = checkpoint(residual, block, x, use_reentrant=False, preserve_rng_state=False)
                else:
                    x = residual(block, x)
            outputs.append(x)
        return outputs[1], outputs[2], outputs[3]


def too_narrow_for_bf16(x: Tensor, *, stride: int = 1) -> bool:
    """Whether oneDNN's 3x3 convolutions of stride 2 in bf16 cannot be trusted with an input of this width over `stride`.

    Where it is one cell wide, they make the gradient of their weights from memory that nobody wrote; on processors with AMX
    also the output, and up to two cells (torch 2.11 and 2.15). Such things are computed in fp32.
    """
    return x.device.type == "cpu" and x.shape[-1] <= 2 * stride


def residual(block: Any, x: Tensor) -> Tensor:
    """torchvision's BasicBlock and Bottleneck, with `normed_conv` for their pairs of layers."""
    bottleneck = isinstance(block, Bottleneck)
    out = normed_conv(block.conv1, block.bn1, x, relu=True)
    out = normed_conv(block.conv2, block.bn2, out, relu=bottleneck)
    if bottleneck:
        out = normed_conv(block.conv3, block.bn3, out)
    shortcut = x if block.downsample is None else normed_conv(block.downsample[0], block.downsample[1], x)
    return F.relu(out.add_(shortcut), inplace=True)


def normed_conv(conv: nn.Module, norm: nn.Module, x: Tensor, *, relu: bool = False) -> Tensor:
    """norm(conv(x)), then ReLU if asked. Under autocast, where the statistics are fixed, they are folded into the convolution's weight, which
    saves passes in fp32 over the feature map; the parameters stay as they are. (In fp32 the order of operations stays the
    reference implementations', whose outputs deep networks would otherwise leave by more than rounding.)"""
    if not (_is_fixed(norm) and torch.is_autocast_enabled(x.device.type)):
        if relu and isinstance(norm, nn.Identity):
            return conv_relu(conv, x)
        out: Tensor = norm(conv(x))
    else:
        layer: Any = conv
        out = F.conv2d(x, *_folded(conv, norm), layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.relu(out, inplace=True) if relu else out


def conv_relu(conv: Any, x: Tensor) -> Tensor:
    """relu(conv(x)), as one kernel where nothing is differentiated and the GPU's library has one."""
    plain = torch.is_grad_enabled() or not x.is_cuda or conv.weight.dtype != x.dtype or conv.bias is None
    if not plain and _has_fused(x.device, x.dtype):
        fused: Tensor = torch.cudnn_convolution_relu(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        return fused
    return F.relu(conv(x), inplace=True)


@cache
def _has_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN has convolution, bias and ReLU in one for the type: tried out, because no version says."""
    if dtype == torch.float32:
        return False  # where the order of operations is to stay the reference's
    x = torch.randn(1, 8, 8, 8, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(8, device=device, dtype=dtype)
    try:
        fused = torch.cudnn_convolution_relu(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)
    except RuntimeError:
        return False
    plain = F.relu(F.conv2d(x, weight, bias, padding=1))
    return bool(torch.allclose(fused, plain, rtol=0.05, atol=0.1))


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that does both."""
    layer: Any = conv
    fixed: Any = norm
    scale = fixed.weight * torch.rsqrt(fixed.running_var + fixed.eps)
    bias = torch.addcmul(fixed.bias, fixed.running_mean, scale, value=-1)
    return layer.weight * scale[:, None, None, None], bias


@torch.no_grad()
def fold_norms(backbone: ResNet) -> None:
    """Make normalisations of fixed statistics part of the convolutions before them, for good."""
    pairs = [(backbone, "conv1", "bn1")]
    for block in backbone.modules():
        if isinstance(block, BasicBlock | Bottleneck):
            pairs += [(block, f"conv{i}", f"bn{i}") for i in range(1, 4 if isinstance(block, Bottleneck) else 3)]
            if block.downsample is not None:
                pairs.append((block.downsample, "0", "1"))
    for parent, conv_name, norm_name in pairs:
        conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
        if _is_fixed(norm):
            weight, bias = _folded(conv, norm)
            conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
            setattr(parent, norm_name, nn.Identity())


def _is_fixed(norm: nn.Module) -> bool:
    return isinstance(norm, FrozenBatchNorm2d) or (isinstance(norm, _BatchNorm) and not norm.training)
