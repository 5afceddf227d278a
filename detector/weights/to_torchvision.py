"""Export to torchvision's RetinaNet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from detector.config import AnchorConfig, ModelConfig
from detector.errors import WeightsError
from detector.structures import Categories
from detector.weights.coco_classes import COCO
from detector.weights.from_torchvision import PIXEL_MEAN, PIXEL_STD, TORCHVISION_ANCHORS

NEVER = -100.0
"""Bias of classes that a network does not have: no score in floating point."""


# ---- the way back -----------------------------------------------------------------------------------------------


def to_torchvision(weights: Mapping[str, Tensor], model: ModelConfig, categories: Categories) -> dict[str, Tensor]:
    """A state dict that torchvision's RetinaNet loads strictly (`retinanet_resnet50_fpn` or `_v2`, or its class around
    another ResNet), with COCO's 91 outputs where the classes are COCO's, else one for the background before ours.

    Raises:
        WeightsError: torchvision cannot build this network; says what stands in the way.
    """
    anchors = model.anchors
    rules = {
        "model.anchors.center_offset": (anchors.center_offset, 0.0),
        "model.anchors.rounding": (anchors.rounding, "integer"),
        "model.anchors.strides": (anchors.strides, "grid"),
        "model.relu_before_p7": (model.relu_before_p7, True),
        "model.stride_in": (model.stride_in, "3x3"),
        "model.channel_order": (model.channel_order, "rgb"),
        "model.head.bias_before_norm": (model.head.bias_before_norm, False),
        "model.head.activation": (model.head.activation, "sigmoid"),
        "model.head.channels": (model.head.channels or model.fpn_channels, model.fpn_channels),
        "model.head.depth": (model.head.depth, 4),
        "model.fpn_channels": (model.fpn_channels, 256),
        "model.norm": (model.norm if model.norm == "gn" else "batch norm", "batch norm"),
        "model.p6_from": (model.p6_from, "c5" if model.head.norm == "gn" else "p5"),
        "model.anchors": (_sides(anchors), _sides(TORCHVISION_ANCHORS)),
        "model.anchors.ratios": (anchors.ratios, TORCHVISION_ANCHORS.ratios),
        "model.pixel_mean": (_rounded(model.pixel_mean), _rounded(PIXEL_MEAN)),
        "model.pixel_std": (_rounded(model.pixel_std), _rounded(PIXEL_STD)),
    }
    odd = [f"  {key} is {has}, there it is always {wants}" for key, (has, wants) in rules.items() if has != wants]
    if odd:
        raise WeightsError("\n".join(["this network cannot be written for torchvision:", *odd]))
    out: dict[str, Tensor] = {}
    step = 3 if model.head.norm == "gn" else 2
    for name, tensor in weights.items():
        part, _, rest = name.partition(".")
        if part == "backbone":
            out[f"backbone.body.{rest}"] = tensor
        elif part == "fpn":
            kind, _, end = rest.partition(".")
            if kind in ("p6", "p7"):
                out[f"backbone.fpn.extra_blocks.{rest}"] = tensor
            else:
                level, _, what = end.partition(".")
                blocks = {"lateral": "inner_blocks", "output": "layer_blocks"}[kind]
                out[f"backbone.fpn.{blocks}.{level}.0.{what}"] = tensor
        else:
            head, last = {
                "cls_subnet": ("classification_head", "cls_logits"),
                "box_subnet": ("regression_head", "bbox_reg"),
            }[part]
            kind, *places, what = rest.split(".")
            if kind == "predictor":
                out[f"head.{head}.{last}.{what}"] = tensor
            else:
                layer, within = divmod(int(places[0]), step)
                out[f"head.{head}.conv.{layer}.{within}.{what}"] = tensor
    rows, num_outputs = _torchvision_rows(categories)
    num_anchors = len(weights["box_subnet.predictor.bias"]) // 4
    for kind, fill in (("weight", 0.0), ("bias", NEVER)):
        name = f"head.classification_head.cls_logits.{kind}"
        own = torch.unflatten(out[name], 0, (num_anchors, len(categories)))
        wide = own.new_full((num_anchors, num_outputs, *own.shape[2:]), fill)
        wide[:, rows] = own
        out[name] = wide.flatten(0, 1)
    return out


def _sides(anchors: AnchorConfig) -> list[list[float]]:
    """Of each level."""
    sizes = [size if isinstance(size, tuple) else (size,) for size in anchors.sizes]
    return [[round(side * scale, 3) for side in level for scale in anchors.octave_scales] for level in sizes]


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [round(number, 2) for number in numbers]


def advice_for_torchvision(model: ModelConfig, categories: Categories) -> list[str]:
    """How torchvision has to build the network for such a state dict, and what it will do differently."""
    second = model.head.norm == "gn" and model.p6_from == "c5"
    name = "retinanet_resnet50_fpn_v2" if second else "retinanet_resnet50_fpn"
    _, num_outputs = _torchvision_rows(categories)
    lines = [f"build it by {name}(weights=None, weights_backbone=None, num_classes={num_outputs})"]
    if model.backbone != "resnet50":
        lines = [f"build it as torchvision does in {name}, around {model.backbone}, num_classes={num_outputs}"]
    if model.norm_eps != 1e-5:
        lines.append(f"and set eps of its norms to {model.norm_eps} (torchvision's overwrite_eps does)")
    if model.resize != "float_bilinear":
        lines.append(f"its pictures will look otherwise: it resizes in floating point, not by {model.resize}")
    if categories != COCO:
        lines.append(
            f"labels: 0 the background, then {', '.join(categories.names[:4])}{', ...' * (len(categories) > 4)}"
        )
    return lines


def _torchvision_rows(categories: Categories) -> tuple[list[int], int]:
    if categories == COCO:
        return list(COCO.ids), 91
    return list(range(1, len(categories) + 1)), len(categories) + 1
