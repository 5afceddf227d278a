"""RetinaNet (Lin et al. 2017): backbone, pyramid, two subnets, dense anchors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from detector.anchors import AnchorGenerator, pyramid_grids
from detector.config import ModelConfig
from detector.models.backbone import ResNet
from detector.models.fpn import FeaturePyramid
from detector.models.heads import Subnet
from detector.structures import HeadOutputs


class RetinaNet(nn.Module):
    """Images to what the heads say about every anchor; the same in training and evaluation.

    Args:
        backbone: gives C3, C4, C5.
        fpn: gives P3..P7.
        cls_subnet, box_subnet: give logits and deltas.
        anchors: of the levels.
        pixel_mean, pixel_std: of values 0..255, in the order of `channel_order`.
        channel_order: of what the backbone sees.
        activation: of the class scores; see `HeadOutputs`.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        backbone: ResNet,
        fpn: FeaturePyramid,
        *,
        cls_subnet: Subnet,
        box_subnet: Subnet,
        anchors: AnchorGenerator,
        pixel_mean: tuple[float, float, float],
        pixel_std: tuple[float, float, float],
        channel_order: Literal["rgb", "bgr"] = "rgb",
        activation: Literal["sigmoid", "softmax"] = "sigmoid",
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.fpn = fpn
        self.cls_subnet = cls_subnet
        self.box_subnet = box_subnet
        self.anchors = anchors
        self.channel_order = channel_order
        self.activation: Literal["sigmoid", "softmax"] = activation
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor, image_sizes: Tensor) -> HeadOutputs:
        """Look at a batch.

        Args:
            images: (B, 3, H, W) uint8, or float32 in 0..255, RGB.
            image_sizes: (B, 2) height and width of each without padding.
        """
        cls_logits, box_deltas = self.look(images, image_sizes)
        return HeadOutputs(cls_logits, box_deltas, self.anchors_of(images), self.activation)

    def forward_normalized(self, images: Tensor) -> HeadOutputs:
        """The same from a normalised, zero-padded (B, 3, H, W) float batch."""
        return HeadOutputs(*self.heads(images), self.anchors_of(images), self.activation)

    def look(self, images: Tensor, image_sizes: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits and deltas, `forward` without the anchors: tensors in, tensors out, which is what can be compiled."""
        return self.heads(self.normalize(images, image_sizes))

    def heads(self, images: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Logits and deltas of a normalised batch, per level."""
        features = self.fpn(self.backbone(images.to(self.backbone.conv1.weight.dtype)))
        return self.cls_subnet(features), self.box_subnet(features)

    def normalize(self, images: Tensor, image_sizes: Tensor) -> Tensor:
        """Subtract the mean, divide by the deviation, then zero what is padding (so that zero means "average grey")."""
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
        """Height and width in cells of the levels of a (B, 3, H, W) batch."""
        return pyramid_grids((images.shape[-2], images.shape[-1]))

    def anchors_of(self, images: Tensor) -> Tensor:
        """(A, 4) anchors of a (B, 3, H, W) batch; needs no pass through the network."""
        size = (images.shape[-2], images.shape[-1])
        anchors: Tensor = self.anchors(size, self.grids_of(images), images.device)
        return anchors


def build_anchors(config: ModelConfig) -> AnchorGenerator:
    """The anchors that a config describes."""
    a = config.anchors
    return AnchorGenerator(
        a.sizes, a.octave_scales, ratios=a.ratios, strides=a.strides, center_offset=a.center_offset, rounding=a.rounding
    )


def build_model(config: ModelConfig, num_classes: int) -> RetinaNet:
    """The network that a config describes, freshly initialised (weights: see `detector.models.weights`)."""
    anchors = build_anchors(config)
    backbone = ResNet(
        config.backbone,
        norm=config.norm,
        norm_eps=config.norm_eps,
        num_trainable_layers=config.num_trainable_layers,
        stride_in=config.stride_in,
    )
    fpn = FeaturePyramid(
        backbone.channels, config.fpn_channels, p6_from=config.p6_from, relu_before_p7=config.relu_before_p7
    )

    softmax = config.head.activation == "softmax"

    def subnet(outputs: int, prior_prob: float | None) -> Subnet:
        return Subnet(
            config.fpn_channels,
            outputs,
            num_anchors=anchors.num_per_cell,
            depth=config.head.depth,
            channels=config.head.channels or config.fpn_channels,
            norm=config.head.norm,
            bias_before_norm=config.head.bias_before_norm,
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
        channel_order=config.channel_order,
        activation=config.head.activation,
    )
