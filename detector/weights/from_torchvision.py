"""Import of torchvision's RetinaNet."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import Tensor

from detector.config import AnchorConfig
from detector.weights.name_maps import _WB, Rename, _Facts, _tower

PUBLISHED_WITHOUT_EPS = "eeacb38b"
"""Start of the SHA-256 of torchvision's RetinaNet_ResNet50_FPN_Weights.COCO_V1, whose frozen batch norms have eps 0."""

TORCHVISION: Rename = (
    (r"backbone\.body\.(.+)", r"backbone.\1"),
    (rf"backbone\.fpn\.inner_blocks\.(\d)\.(?:0\.)?{_WB}", r"fpn.lateral.\1.\2"),
    (rf"backbone\.fpn\.layer_blocks\.(\d)\.(?:0\.)?{_WB}", r"fpn.output.\1.\2"),
    (rf"backbone\.fpn\.extra_blocks\.(p[67])\.{_WB}", r"fpn.\1.\2"),
    (rf"head\.classification_head\.cls_logits\.{_WB}", r"cls_subnet.predictor.\1"),
    (rf"head\.regression_head\.bbox_reg\.{_WB}", r"box_subnet.predictor.\1"),
    (rf"head\.(classification|regression)_head\.conv\.(\d+)\.0\.{_WB}", lambda m: _tower(m[1], "conv", m[2], m[3])),
    (rf"head\.(classification|regression)_head\.conv\.(\d+)\.1\.{_WB}", lambda m: _tower(m[1], "norm", m[2], m[3])),
    # before torchvision 0.12: convolutions and ReLUs in turn
    (
        rf"head\.(classification|regression)_head\.conv\.(\d+)\.{_WB}",
        lambda m: _tower(m[1], "conv", int(m[2]) // 2, m[3]),
    ),
)


# ---- what the kinds of file decide ------------------------------------------------------------------------------


TORCHVISION_ANCHORS = AnchorConfig(
    sizes=tuple(
        (float(x), float(int(x * 2 ** (1 / 3))), float(int(x * 2 ** (2 / 3)))) for x in (32, 64, 128, 256, 512)
    ),
    octave_scales=(1.0,),
    strides="grid",
    center_offset=0.0,
    rounding="integer",
)
PIXEL_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
PIXEL_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)


def _describe_torchvision(_: Mapping[str, Tensor], renamed: dict[str, Tensor], facts: _Facts) -> None:
    """References: torchvision/models/detection/{retinanet,transform,anchor_utils}.py."""
    plain = any(name.endswith("num_batches_tracked") for name in renamed)
    facts.model |= {
        "norm": "bn" if plain else "frozen_bn",
        "norm_eps": _torchvision_eps(plain, renamed, facts),
        "relu_before_p7": True,
        "anchors": TORCHVISION_ANCHORS,
        "pixel_mean": PIXEL_MEAN,
        "pixel_std": PIXEL_STD,
        "resize": "float_bilinear",
        "pad": "batch_max_32",
    }
    facts.postprocess |= {"detections_per_img": 300}


def _torchvision_eps(plain: bool, renamed: Mapping[str, Tensor], facts: _Facts) -> float:
    if facts.said.norm_eps is not None:
        return facts.said.norm_eps
    if plain:
        return 1e-5
    with facts.path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest().startswith(PUBLISHED_WITHOUT_EPS):
            return 0.0
    coco = len(renamed["cls_subnet.predictor.bias"]) % 91 == 0
    eps = 0.0 if coco else 1e-5
    facts.notes.append(
        f"norm_eps {eps:g} is assumed: frozen batch norms do not say their epsilon. torchvision's published COCO weights, and "
        "what was trained from them, have 0; models that began with an ImageNet backbone have 1e-5 "
        "(tools/convert_weights.py --norm-eps)"
    )
    return eps
