"""Our RetinaNet and torchvision's with the same weights, inputs and frozen layers."""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
from torchvision.models.detection.retinanet import RetinaNet as TorchvisionRetinaNet
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from detector.config import ModelConfig
from detector.datasets.loader import padded_rows
from detector.models import RetinaNet, build_model
from detector.models.convolution import FrozenBatchNorm2d as OurFrozenBatchNorm2d
from detector.structures import Batch, Targets
from detector.weights.from_torchvision import TORCHVISION_ANCHORS, TORCHVISION_COMPAT

MODEL = {
    "norm": "frozen_bn", "trainable_layers": 3, "anchors": TORCHVISION_ANCHORS.model_dump(),
    "compat": {**TORCHVISION_COMPAT, "norm_eps": 1e-5, "p6_from": "p5"},
}  # fmt: skip
"""Settings of `ModelConfig` for the network that torchvision builds."""


class Inputs(NamedTuple):
    """One batch in the form of either implementation, on the device unless stated otherwise."""

    batch: Batch
    image_sizes: Tensor
    """(B, 2), in main memory."""
    peer_images: list[Tensor]
    """Per image (3, H, W) float32 in 0..1."""
    peer_targets: list[dict[str, Tensor]]
    """Per image {"boxes": (M, 4), "labels": (M,)}."""


def make_ours(backbone: str, num_classes: int, device: torch.device) -> RetinaNet:
    """Build our network with weights that give activations of order one, as those of a trained network do."""
    torch.manual_seed(0)
    config = ModelConfig.model_validate({**MODEL, "backbone": backbone}, strict=False)
    model = build_model(config, num_classes)
    for module in model.modules():
        if isinstance(module, OurFrozenBatchNorm2d):  # or the residuals would add up without bounds
            module.weight.uniform_(0.3, 0.6)
    for tower in (model.cls_subnet.tower, model.box_subnet.tower):
        for module in tower:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    model.to(device).to(memory_format=torch.channels_last)
    return model


@torch.no_grad()
def calibrate_scores(model: RetinaNet, images: Tensor, sizes: Tensor, *, candidates: int = 1000) -> None:
    """Scale and shift the class outputs, in place, so that about `candidates` scores per image exceed 0.05, as in a
    trained network."""
    model.eval()
    weight, bias = model.cls_subnet.predictor.weight, model.cls_subnet.predictor.bias
    assert bias is not None
    logits = model(images, sizes).all_cls_logits().float()
    weight.div_(logits.std())
    logits = model(images, sizes).all_cls_logits().float()
    best = logits.flatten(1).topk(candidates, dim=1).values[:, -1].mean()
    bias += math.log(0.05 / 0.95) - best


def make_torchvision(ours: RetinaNet, backbone: str, num_classes: int, size: tuple[int, int]) -> Any:
    """Build torchvision's detector with our weights."""
    body = torchvision.models.get_model(backbone, weights=None, norm_layer=FrozenBatchNorm2d)
    pyramid = _resnet_fpn_extractor(body, 3, returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))
    peer = TorchvisionRetinaNet(
        pyramid, num_classes, min_size=min(size), max_size=max(size), detections_per_img=100, _skip_resize=True,
        image_mean=(ours.pixel_mean / 255).flatten().tolist(), image_std=(ours.pixel_std / 255).flatten().tolist(),
    )  # fmt: skip
    weights = {peer_name(key): value for key, value in ours.state_dict().items()}
    peer.load_state_dict(weights, strict=False)
    missing = peer.state_dict().keys() - weights.keys()
    assert not missing, sorted(missing)
    device = next(ours.parameters()).device
    return peer.to(device, memory_format=torch.channels_last)


def make_pair(backbone: str, num_classes: int, size: tuple[int, int], inputs: Inputs) -> tuple[RetinaNet, Any]:
    """Build both networks with the same weights, on the device of the inputs."""
    ours = make_ours(backbone, num_classes, inputs.batch.images.device)
    calibrate_scores(ours, inputs.batch.images[:1], inputs.batch.image_sizes[:1])
    return ours, make_torchvision(ours, backbone, num_classes, size)


def peer_name(key: str) -> str:
    """Convert our name of a tensor to torchvision's."""
    key = re.sub(r"^backbone\.", "backbone.body.", key)
    key = re.sub(r"^fpn\.lateral\.(\d)\.", r"backbone.fpn.inner_blocks.\1.0.", key)
    key = re.sub(r"^fpn\.output\.(\d)\.", r"backbone.fpn.layer_blocks.\1.0.", key)
    key = re.sub(r"^fpn\.(p[67])\.", r"backbone.fpn.extra_blocks.\1.", key)
    key = key.replace("cls_subnet.predictor", "head.classification_head.cls_logits")
    key = key.replace("box_subnet.predictor", "head.regression_head.bbox_reg")
    for subnet, head in (("cls_subnet", "classification_head"), ("box_subnet", "regression_head")):
        hidden = re.fullmatch(rf"{subnet}\.tower\.(\d)\.(.+)", key)
        if hidden is not None:
            key = f"head.{head}.conv.{int(hidden[1]) // 2}.0.{hidden[2]}"
    return key


def make_inputs(batch: int, size: tuple[int, int], boxes: int, num_classes: int, device: torch.device) -> Inputs:
    """Make images of noise with boxes of all sizes; the last image has a quarter of the first one's."""
    random = torch.Generator().manual_seed(0)
    height, width = size
    images = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=random)
    images = images.to(device).contiguous(memory_format=torch.channels_last)
    length = padded_rows(boxes)
    all_boxes, labels = torch.zeros(batch, length, 4), torch.full((batch, length), -1)
    for i in range(batch):
        count = boxes - (boxes * 3 // 4) * i // max(1, batch - 1)
        sides = torch.exp(torch.rand(count, 2, generator=random) * 3.0 + 2.5).clamp(max=min(size) - 2.0)
        corner = torch.rand(count, 2, generator=random) * (torch.tensor([width, height]) - sides)
        all_boxes[i, :count] = torch.cat([corner, corner + sides], dim=1)
        labels[i, :count] = torch.randint(0, num_classes, (count,), generator=random)
    targets = Targets(all_boxes.to(device), labels.to(device), torch.zeros(batch, 0, 4, device=device))
    peer_targets = [
        {"boxes": b[k >= 0].to(device), "labels": k[k >= 0].to(device)} for b, k in zip(all_boxes, labels, strict=True)
    ]
    sizes = torch.tensor([size] * batch)
    index = torch.arange(batch, device=device)
    ours = Batch(images, targets, index, sizes.to(device), sizes.to(device), index)
    return Inputs(ours, sizes, list((images.float() / 255).contiguous().unbind(0)), peer_targets)
