"""Export to torchvision's RetinaNet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from detector.config import AnchorConfig, ModelConfig
from detector.errors import WeightsError
from detector.structures import Categories
from detector.weights.coco_classes import COCO, COCO_OUTPUTS
from detector.weights.from_torchvision import PIXEL_MEAN, PIXEL_STD, TORCHVISION_ANCHORS
from detector.weights.name_maps import RenameRules, rename_tensors

UNUSED_BIAS = -100.0
"""Bias of outputs without a class; their score is below 1e-40."""


def to_torchvision(weights: Mapping[str, Tensor], model: ModelConfig, categories: Categories) -> dict[str, Tensor]:
    """Return a state dict that torchvision's RetinaNet loads strictly (`retinanet_resnet50_fpn` or `_v2`, or its class
    around another ResNet).

    It has COCO's 91 outputs if the classes are COCO's; otherwise an output for the background before the classes.

    Raises:
        WeightsError: torchvision cannot build this network; lists the settings that differ.
    """
    _check_supported(model)
    layers_per_conv = 3 if model.head.norm == "gn" else 2

    def hidden_layer(match: re.Match[str]) -> str:
        layer, sublayer = divmod(int(match[2]), layers_per_conv)
        head = {"cls": "classification_head", "box": "regression_head"}[match[1]]
        return f"head.{head}.conv.{layer}.{sublayer}.{match[3]}"

    rules: RenameRules = (
        (r"backbone\.(.+)", r"backbone.body.\1"),
        (r"fpn\.lateral\.(\d)\.(.+)", r"backbone.fpn.inner_blocks.\1.0.\2"),
        (r"fpn\.output\.(\d)\.(.+)", r"backbone.fpn.layer_blocks.\1.0.\2"),
        (r"fpn\.(p[67]\..+)", r"backbone.fpn.extra_blocks.\1"),
        (r"cls_subnet\.predictor\.(.+)", r"head.classification_head.cls_logits.\1"),
        (r"box_subnet\.predictor\.(.+)", r"head.regression_head.bbox_reg.\1"),
        (r"(cls|box)_subnet\.tower\.(\d+)\.(.+)", hidden_layer),
    )
    out, unmatched = rename_tensors(weights, rules)
    assert not unmatched
    outputs, num_outputs = _output_layout(categories)
    num_anchors = len(weights["box_subnet.predictor.bias"]) // 4
    for parameter, fill in (("weight", 0.0), ("bias", UNUSED_BIAS)):
        name = f"head.classification_head.cls_logits.{parameter}"
        rows = torch.unflatten(out[name], 0, (num_anchors, len(categories)))
        all_rows = rows.new_full((num_anchors, num_outputs, *rows.shape[2:]), fill)
        all_rows[:, outputs] = rows
        out[name] = all_rows.flatten(0, 1)
    return out


def advice_for_torchvision(model: ModelConfig, categories: Categories) -> list[str]:
    """Return how to build the network in torchvision for such a state dict, and what will differ there."""
    is_v2 = model.head.norm == "gn" and model.compat.p6_from == "c5"
    name = "retinanet_resnet50_fpn_v2" if is_v2 else "retinanet_resnet50_fpn"
    _, num_outputs = _output_layout(categories)
    lines = [f"build it with {name}(weights=None, weights_backbone=None, num_classes={num_outputs})"]
    if model.backbone != "resnet50":
        lines = [f"build it as torchvision does in {name}, around {model.backbone}, num_classes={num_outputs}"]
    if model.compat.norm_eps != 1e-5:
        lines.append(f"and set eps of its norms to {model.compat.norm_eps} (with torchvision's overwrite_eps)")
    if model.compat.resize != "float_bilinear":
        lines.append(
            f"detections will differ slightly: torchvision resizes in floating point, not by {model.compat.resize}"
        )
    if categories != COCO:
        lines.append(
            f"labels: 0 the background, then {', '.join(categories.names[:4])}{', ...' * (len(categories) > 4)}"
        )
    return lines


def _check_supported(model: ModelConfig) -> None:
    anchors = model.anchors
    supported = {
        "model.compat.anchor_center_offset": (model.compat.anchor_center_offset, 0.0),
        "model.compat.anchor_rounding": (model.compat.anchor_rounding, "integer"),
        "model.compat.anchor_spacing": (model.compat.anchor_spacing, "grid"),
        "model.compat.relu_before_p7": (model.compat.relu_before_p7, True),
        "model.compat.stride_in": (model.compat.stride_in, "3x3"),
        "model.compat.channel_order": (model.compat.channel_order, "rgb"),
        "model.compat.bias_before_norm": (model.compat.bias_before_norm, False),
        "model.head.activation": (model.head.activation, "sigmoid"),
        "model.head.channels": (model.head.channels or model.fpn_channels, model.fpn_channels),
        "model.head.depth": (model.head.depth, 4),
        "model.fpn_channels": (model.fpn_channels, 256),
        "model.norm": (model.norm if model.norm == "gn" else "batch norm", "batch norm"),
        "model.compat.p6_from": (model.compat.p6_from, "c5" if model.head.norm == "gn" else "p5"),
        "model.anchors": (_anchor_sides(anchors), _anchor_sides(TORCHVISION_ANCHORS)),
        "model.anchors.ratios": (anchors.ratios, TORCHVISION_ANCHORS.ratios),
        "model.pixel_mean": (_rounded(model.pixel_mean), _rounded(PIXEL_MEAN)),
        "model.pixel_std": (_rounded(model.pixel_std), _rounded(PIXEL_STD)),
    }
    problems = [
        f"  {key} must be {wanted}, got {value}" for key, (value, wanted) in supported.items() if value != wanted
    ]
    if problems:
        raise WeightsError("\n".join(["torchvision cannot build this network:", *problems]))


def _anchor_sides(anchors: AnchorConfig) -> list[list[float]]:
    """Sides of the square anchors of each level, in pixels."""
    sizes = [size if isinstance(size, tuple) else (size,) for size in anchors.sizes]
    return [[round(side * scale, 3) for side in level for scale in anchors.octave_scales] for level in sizes]


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [round(number, 2) for number in numbers]


def _output_layout(categories: Categories) -> tuple[list[int], int]:
    """The output of each class, and the number of outputs."""
    if categories == COCO:
        return list(COCO.ids), COCO_OUTPUTS
    return list(range(1, len(categories) + 1)), len(categories) + 1
