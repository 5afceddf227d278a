"""RetinaNet (Lin et al. 2017): backbone, pyramid, two subnets, dense anchors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detector.anchors import STRIDES, AnchorGenerator, pyramid_grids
from detector.config import Activation, ChannelOrder, ModelConfig
from detector.models.backbone import Backbone
from detector.models.fpn import FeaturePyramid
from detector.models.heads import Subnet
from detector.models.resnet import ResNet
from detector.structures import HeadOutputs


class RetinaNet(nn.Module):
    """Images to class logits and box deltas of every anchor; the same in training and evaluation.

    Args:
        backbone: computes the feature maps, e.g. C3 to C5.
        fpn: computes the pyramid's levels, e.g. P3 to P7.
        cls_subnet: computes class logits.
        box_subnet: computes box deltas.
        anchors: the anchors of the pyramid's levels.
        pixel_mean, pixel_std: mean and standard deviation of values 0..255, in the order of `channel_order`.
        channel_order: of the backbone's input.
        activation: of the class scores; see `HeadOutputs`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: Backbone,
        fpn: FeaturePyramid,
        *,
        cls_subnet: Subnet,
        box_subnet: Subnet,
        anchors: AnchorGenerator,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
        channel_order: ChannelOrder = "rgb",
        activation: Activation = "sigmoid",
    ) -> None:
        super().__init__()
        if not len(anchors.cells) == len(anchors.strides) == len(fpn.strides):
            raise ValueError(
                f"anchors must have sizes for strides {fpn.strides}, got {len(anchors.cells)} for {anchors.strides}"
            )
        self.backbone = backbone
        self.fpn = fpn
        self.cls_subnet = cls_subnet
        self.box_subnet = box_subnet
        self.anchors = anchors
        self.channel_order = channel_order
        self.activation: Activation = activation
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor) -> HeadOutputs:
        """Run the network on a batch.

        Args:
            images: (B, 3, H, W) uint8, or float32 in 0..255, RGB.
            image_sizes: (B, 2) height and width of each image without padding.
        """
        cls_logits, box_deltas = self.forward_tensors(images, image_sizes)
        return HeadOutputs(cls_logits, box_deltas, self.anchors_of(images), self.activation)

    def forward_normalized(self, images: Tensor) -> HeadOutputs:
        """Run the network on a normalized, zero-padded (B, 3, H, W) float batch."""
        return HeadOutputs(*self.heads(images), self.anchors_of(images), self.activation)

    def forward_tensors(self, images: Tensor, image_sizes: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """`forward` without the anchors: tensors in, tensors out, which can be compiled."""
        return self.heads(self.normalize(images, image_sizes))

    def heads(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits and deltas of a normalized batch, per level."""
        features = self.fpn(self.backbone(images.to(self.backbone.dtype)))
        return self.cls_subnet(features), self.box_subnet(features)

    def normalize(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Subtract the mean, divide by the standard deviation, then zero the padding, which is thus "average grey"."""
        ordered = images.flip(1) if self.channel_order == "bgr" else images
        normalized = (ordered.float() - self.pixel_mean) / self.pixel_std
        height, width = images.shape[-2:]
        inside_y = torch.arange(height, device=images.device) < image_sizes[:, :1]
        inside_x = torch.arange(width, device=images.device) < image_sizes[:, 1:]
        inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        out = torch.where(inside, normalized, 0.0)
        if images.is_contiguous(memory_format=torch.channels_last):
            return out.contiguous(memory_format=torch.channels_last)
        return out

    def grids_of(self, images: Tensor) -> list[tuple[int, int]]:
        """Height and width in cells of each level for a (B, 3, H, W) batch."""
        return pyramid_grids((images.shape[-2], images.shape[-1]), self.fpn.strides)

    def anchors_of(self, images: Tensor) -> Tensor:
        """(A, 4) anchors of a (B, 3, H, W) batch, without running the network."""
        size = (images.shape[-2], images.shape[-1])
        anchors: Tensor = self.anchors(size, self.grids_of(images), images.device)
        return anchors


def build_anchors(config: ModelConfig, strides: Sequence[int] = STRIDES) -> AnchorGenerator:
    """Build the anchors of a config for levels of these strides."""
    anchors, compat = config.anchors, config.compat
    return AnchorGenerator(
        anchors.sizes, anchors.octave_scales, ratios=anchors.ratios, spacing=compat.anchor_spacing,
        center_offset=compat.anchor_center_offset, rounding=compat.anchor_rounding, strides=strides,
    )  # fmt: skip


def build_model(config: ModelConfig, num_classes: int) -> RetinaNet:
    """Build the network of a config, freshly initialized (loading weights: `detector.weights`)."""
    backbone = ResNet(
        config.backbone,
        norm=config.norm,
        norm_eps=config.compat.norm_eps,
        num_trainable_layers=config.num_trainable_layers,
        stride_in=config.compat.stride_in,
    )
    fpn = FeaturePyramid(
        backbone.channels, config.fpn_channels, in_strides=backbone.strides, p6_from=config.compat.p6_from,
        relu_before_p7=config.compat.relu_before_p7,
    )  # fmt: skip
    anchors = build_anchors(config, fpn.strides)
    softmax = config.head.activation == "softmax"

    def subnet(outputs: int, prior_prob: float | None) -> Subnet:
        return Subnet(
            config.fpn_channels,
            outputs,
            num_anchors=anchors.num_per_cell,
            depth=config.head.depth,
            channels=config.head.channels or config.fpn_channels,
            norm=config.head.norm,
            bias_before_norm=config.compat.bias_before_norm,
            prior_prob=prior_prob,
            background=softmax and prior_prob is not None,
        )

    return RetinaNet(
        backbone,
        fpn,
        cls_subnet=subnet(num_classes + softmax, config.head.prior_prob),
        box_subnet=subnet(4, None),
        anchors=anchors,
        pixel_mean=config.pixel_mean,
        pixel_std=config.pixel_std,
        channel_order=config.compat.channel_order,
        activation=config.head.activation,
    )
