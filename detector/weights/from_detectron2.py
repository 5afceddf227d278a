"""Import of detectron2's RetinaNet."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from detector.config import AnchorConfig
from detector.errors import WeightsError
from detector.weights.name_maps import _BN, _WB, DROP, Rename, _Facts, _tower

DETECTRON2: Rename = (
    (r"backbone\.bottom_up\.stem\.conv1\.weight", "backbone.conv1.weight"),
    (rf"backbone\.bottom_up\.stem\.conv1\.norm\.{_BN}", r"backbone.bn1.\1"),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([123])\.weight",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.conv{m[3]}.weight",
    ),
    (
        rf"backbone\.bottom_up\.res([2-5])\.(\d+)\.conv([123])\.norm\.{_BN}",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.bn{m[3]}.{m[4]}",
    ),
    (
        r"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.weight",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.0.weight",
    ),
    (
        rf"backbone\.bottom_up\.res([2-5])\.(\d+)\.shortcut\.norm\.{_BN}",
        lambda m: f"backbone.layer{int(m[1]) - 1}.{m[2]}.downsample.1.{m[3]}",
    ),
    (rf"backbone\.fpn_lateral([345])\.{_WB}", lambda m: f"fpn.lateral.{int(m[1]) - 3}.{m[2]}"),
    (rf"backbone\.fpn_output([345])\.{_WB}", lambda m: f"fpn.output.{int(m[1]) - 3}.{m[2]}"),
    (rf"backbone\.top_block\.(p[67])\.{_WB}", r"fpn.\1.\2"),
    (rf"head\.cls_score\.{_WB}", r"cls_subnet.predictor.\1"),
    (rf"head\.bbox_pred\.{_WB}", r"box_subnet.predictor.\1"),
    # which of these are norms shows in their shape, see _describe_detectron2
    (rf"head\.(cls|bbox)_subnet\.(\d+)\.{_WB}", lambda m: _tower(m[1], "layer", m[2], m[3])),
    (r"anchor_generator\.cell_anchors\.\d", DROP),
    (r"pixel_mean|pixel_std", DROP),
)


def _describe_detectron2(tensors: Mapping[str, Tensor], renamed: dict[str, Tensor], facts: _Facts) -> None:
    """References: detectron2's modeling/meta_arch/retinanet.py, modeling/anchor_generator.py, config/defaults.py."""
    for subnet in ("cls_subnet", "box_subnet"):
        layers = [k for k in renamed if k.startswith(f"{subnet}.layer.") and k.endswith(".weight")]
        places = sorted(int(k.split(".")[2]) for k in layers)
        counts = {"conv": 0, "norm": 0}
        for place in places:
            what = "conv" if renamed[f"{subnet}.layer.{place}.weight"].dim() == 4 else "norm"
            for end in ("weight", "bias"):
                tensor = renamed.pop(f"{subnet}.layer.{place}.{end}", None)
                if tensor is not None:
                    renamed[f"{subnet}.{what}.{counts[what]}.{end}"] = tensor
            counts[what] += 1
    norms = [k.removesuffix(".weight") for k in renamed if re.search(r"backbone.*(bn\d|downsample\.1)\.weight", k)]
    if norms and not any(f"{k}.running_mean" in renamed for k in norms):
        facts.notes.append("batch norms without statistics: mean 0 and variance 1 are assumed, as detectron2 does")
        for k in norms:
            renamed[f"{k}.running_mean"] = torch.zeros_like(renamed[f"{k}.weight"])
            renamed[f"{k}.running_var"] = torch.ones_like(renamed[f"{k}.weight"])
    for name in [k for k in renamed if k.endswith("num_batches_tracked")]:
        del renamed[name]  # frozen here
    mean = tensors.get("pixel_mean", torch.tensor([103.53, 116.28, 123.675])).flatten().tolist()
    std = tensors.get("pixel_std", torch.ones(3)).flatten().tolist()
    anchors = AnchorConfig(center_offset=0.0)
    _check_cell_anchors(tensors, facts)
    facts.model |= {
        "norm": "frozen_bn",
        "norm_eps": facts.said.norm_eps if facts.said.norm_eps is not None else 1e-5,
        "stride_in": "1x1",
        "relu_before_p7": True,
        "anchors": anchors,
        "channel_order": "bgr",
        "pixel_mean": tuple(mean),
        "pixel_std": tuple(std),
        "resize": "pil_bilinear",
        "pad": "batch_max_32",
    }
    facts.postprocess |= {"clip": "after_nms", "drop_empty": True}


def _check_cell_anchors(tensors: Mapping[str, Tensor], facts: _Facts) -> None:
    """Older files carry their anchors: they must be the usual ones."""
    for level, side in enumerate((32, 64, 128, 256, 512)):
        stored = tensors.get(f"anchor_generator.cell_anchors.{level}")
        if stored is None:
            continue
        sides = torch.tensor([side * 2 ** (i / 3) for i in range(3)]).repeat_interleave(3)
        ratios = torch.tensor([0.5, 1.0, 2.0]).repeat(3)
        half = torch.stack([sides / ratios.sqrt(), sides * ratios.sqrt()], dim=1) / 2
        expected = torch.cat([-half, half], dim=1)
        if stored.shape != expected.shape or not torch.allclose(stored.float(), expected, atol=0.01):
            raise WeightsError(
                f"{facts.path}: the anchors of P{level + 3} must be detectron2's usual ones (sizes {side} x 2^(0, 1/3, 2/3), "
                f"ratios 0.5, 1, 2), got {stored.tolist()}"
            )
