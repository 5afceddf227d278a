"""Convolutions with normalization and ReLU, computed and folded together where that is faster."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from detector.config import Norm


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization whose statistics and affine parameters are constants, hence buffers.

    The same buffer names, state dicts and numbers as torchvision.ops.FrozenBatchNorm2d.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)  # in files of ordinary batch norms
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        weight, bias, mean, var = (
            buffer.reshape(1, -1, 1, 1) for buffer in (self.weight, self.bias, self.running_mean, self.running_var)
        )
        scale = weight * (var + self.eps).rsqrt()
        return x * scale + (bias - mean * scale)

    def extra_repr(self) -> str:
        """Channels and eps."""
        return f"{len(self.weight)}, eps={self.eps}"


class GroupNorm(nn.GroupNorm):
    """Group normalization that is defined for a single value per group, too.

    torch refuses a batch of one image whose level has one cell, if every group has one channel: its variance is 0, and
    the result the bias.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        cudnn = torch.backends.cudnn.enabled
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps, cudnn)


def norm_layer(norm: Norm, eps: float) -> Callable[[int], nn.Module]:
    """The constructor of a normalization layer, which takes the number of channels."""
    if norm == "gn":
        return partial(GroupNorm, 32, eps=eps)
    return partial({"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d, "sync_bn": nn.SyncBatchNorm}[norm], eps=eps)


def too_narrow_for_bf16(x: Tensor, *, stride: int = 1) -> bool:
    """Whether oneDNN's 3x3 convolutions of stride 2 in bf16 are unreliable for an input of this width over `stride`.

    At a width of one cell they compute the gradient of their weights from uninitialized memory; on processors with AMX
    also the output, and up to two cells (torch 2.11 and 2.15). Such inputs are computed in fp32.
    """
    return x.device.type == "cpu" and x.shape[-1] <= 2 * stride


def normed_conv(conv: nn.Module, norm: nn.Module, x: Tensor, *, relu: bool = False) -> Tensor:
    """norm(conv(x)), then ReLU if `relu`.

    Under autocast, constant statistics are folded into the convolution's weight, which saves passes in fp32 over the
    feature map; the parameters stay unchanged. (In fp32 the order of operations stays that of the reference
    implementations, from which the outputs of deep networks would otherwise differ by more than rounding.)
    """
    if not (_is_constant(norm) and torch.is_autocast_enabled(x.device.type)):
        if relu and isinstance(norm, nn.Identity):
            return conv_relu(conv, x)
        out: Tensor = norm(conv(x))
    else:
        layer: Any = conv
        out = F.conv2d(x, *_folded(conv, norm), layer.stride, layer.padding, layer.dilation, layer.groups)
    return F.relu(out, inplace=True) if relu else out


def conv_relu(conv: Any, x: Tensor) -> Tensor:
    """relu(conv(x)), as one kernel where no gradient is needed and the GPU's library has one."""
    plain = torch.is_grad_enabled() or not x.is_cuda or conv.weight.dtype != x.dtype or conv.bias is None
    if not plain and has_fused_conv_relu(x.device, x.dtype):
        fused: Tensor = torch.cudnn_convolution_relu(
            x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups
        )
        return fused
    return F.relu(conv(x), inplace=True)


@cache
def has_fused_conv_relu(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether cuDNN fuses convolution, bias and ReLU for this type, found by trial because no API reports it."""
    if dtype == torch.float32:
        return False  # the order of operations is to stay the reference's
    x = torch.randn(1, 8, 8, 8, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(8, 8, 3, 3, device=device, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bias = torch.randn(8, device=device, dtype=dtype)
    try:
        fused = torch.cudnn_convolution_relu(x, weight, bias, (1, 1), (1, 1), (1, 1), 1)
    except RuntimeError:
        return False
    plain = F.relu(F.conv2d(x, weight, bias, padding=1))
    return bool(torch.allclose(fused, plain, rtol=0.05, atol=0.1))


@torch.no_grad()
def fold_norm(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    """Make a normalization with constant statistics part of the convolution before it, in place.

    The normalization becomes `nn.Identity`. Others (group norm, batch norm in training mode) stay.
    """
    conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
    if _is_constant(norm):
        weight, bias = _folded(conv, norm)
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        parent.set_submodule(norm_name, nn.Identity())


def _folded(conv: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of the convolution that computes norm(conv(x))."""
    layer: Any = conv
    constant: Any = norm
    scale = constant.weight * torch.rsqrt(constant.running_var + constant.eps)
    bias = torch.addcmul(constant.bias, constant.running_mean, scale, value=-1)
    return layer.weight * scale[:, None, None, None], bias


def _is_constant(norm: nn.Module) -> bool:
    return isinstance(norm, FrozenBatchNorm2d) or (isinstance(norm, _BatchNorm) and not norm.training)
