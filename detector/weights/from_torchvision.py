"""Import of torchvision's RetinaNet.

References: torchvision/models/detection/{retinanet,transform,anchor_utils}.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from detector.config import AnchorConfig
from detector.files import open_regular
from detector.weights.coco_classes import COCO_OUTPUTS
from detector.weights.import_facts import ImportedFacts, SourceFormat
from detector.weights.name_maps import WEIGHT_BIAS, RenameRules, hidden_layer

PUBLISHED_WITHOUT_EPS = "eeacb38b"
"""Start of the SHA-256 of torchvision's RetinaNet_ResNet50_FPN_Weights.COCO_V1, whose frozen batch norms have eps 0."""

TORCHVISION_ANCHORS = AnchorConfig(
    sizes=tuple(
        (float(x), float(int(x * 2 ** (1 / 3))), float(int(x * 2 ** (2 / 3)))) for x in (32, 64, 128, 256, 512)
    ),
    octave_scales=(1.0,),
)
TORCHVISION_COMPAT: dict[str, Any] = {
    "anchor_spacing": "grid", "anchor_center_offset": 0.0, "anchor_rounding": "integer", "resize": "float_bilinear",
}  # fmt: skip
"""Settings of `CompatConfig` that all of torchvision's RetinaNets share."""
PIXEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
PIXEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)

_HIDDEN = r"head\.(classification|regression)_head\.conv\.(\d+)"
_RENAME: RenameRules = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (rf"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?{WEIGHT_BIAS}", r"fpn.lateral.\1.\2"),
    (rf"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?{WEIGHT_BIAS}", r"fpn.output.\1.\2"),
    (rf"backbone\.fpn\.extra_blocks\.(p[67])\.{WEIGHT_BIAS}", r"fpn.\1.\2"),
    (rf"head\.classification_head\.cls_logits\.{WEIGHT_BIAS}", r"cls_subnet.predictor.\1"),
    (rf"head\.regression_head\.bbox_reg\.{WEIGHT_BIAS}", r"box_subnet.predictor.\1"),
    (rf"{_HIDDEN}\.0\.{WEIGHT_BIAS}", lambda m: hidden_layer(m[1], "conv", m[2], m[3])),
    (rf"{_HIDDEN}\.1\.{WEIGHT_BIAS}", lambda m: hidden_layer(m[1], "norm", m[2], m[3])),
    # before torchvision 0.12: convolutions and ReLUs alternate
    (rf"{_HIDDEN}\.{WEIGHT_BIAS}", lambda m: hidden_layer(m[1], "conv", int(m[2]) // 2, m[3])),
)


def _collect_facts(_: Mapping[str, Tensor], renamed: dict[str, Tensor], facts: ImportedFacts) -> None:
    trained_norms = any(name.endswith("num_batches_tracked") for name in renamed)
    facts.model |= {
        "norm": "bn" if trained_norms else "frozen_bn",
        "anchors": TORCHVISION_ANCHORS,
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "pad": "batch_max_32",
    }
    facts.compat |= {**TORCHVISION_COMPAT, "norm_eps": _norm_eps(trained_norms, renamed, facts)}
    facts.postprocess |= {"detections_per_img": 300}


def _norm_eps(trained_norms: bool, renamed: Mapping[str, Tensor], facts: ImportedFacts) -> float:
    if facts.options.norm_eps is not None:
        return facts.options.norm_eps
    if trained_norms:
        return 1e-5
    with open_regular(facts.path) as file:
        if hashlib.file_digest(file, "sha256").hexdigest().startswith(PUBLISHED_WITHOUT_EPS):
            return 0.0
    has_coco_outputs = len(renamed["cls_subnet.predictor.bias"]) % COCO_OUTPUTS == 0
    eps = 0.0 if has_coco_outputs else 1e-5
    facts.notes.append(
        f"norm_eps {eps:g} is assumed, because files do not store the epsilon of frozen batch norms. It is 0 in "
        "torchvision's published COCO weights and in models fine-tuned from them, 1e-5 in models that started from an "
        "ImageNet backbone (override: tools/convert_weights.py --norm-eps)"
    )
    return eps


TORCHVISION = SourceFormat(
    marker="head.classification_head.cls_logits.weight",
    rename=_RENAME,
    collect_facts=_collect_facts,
    anchor_axes="ratio, scale",
)
