"""Import of detectron2's RetinaNet.

References: detectron2's modeling/meta_arch/retinanet.py, modeling/anchor_generator.py, config/defaults.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from detector.errors import WeightsError
from detector.text import shown
from detector.weights.import_facts import BGR_MEAN, ImportedFacts, SourceFormat
from detector.weights.name_maps import BATCH_NORM, DROP, DROP_STEP_COUNTS, WEIGHT_BIAS, RenameRules, hidden_layer

_BLOCK = r"backbone\.bottom_up\.res([2-5])\.(\d+)"
_RENAME: RenameRules = (
    DROP_STEP_COUNTS,
    (r"backbone\.bottom_up\.stem\.conv1\.weight", "backbone.conv1.weight"),
    (rf"backbone\.bottom_up\.stem\.conv1\.norm\.{BATCH_NORM}", r"backbone.bn1.\1"),
    (rf"{_BLOCK}\.conv([123])\.weight", lambda m: f"{_block(m)}.conv{m[3]}.weight"),
    (rf"{_BLOCK}\.conv([123])\.norm\.{BATCH_NORM}", lambda m: f"{_block(m)}.bn{m[3]}.{m[4]}"),
    (rf"{_BLOCK}\.shortcut\.weight", lambda m: f"{_block(m)}.downsample.0.weight"),
    (rf"{_BLOCK}\.shortcut\.norm\.{BATCH_NORM}", lambda m: f"{_block(m)}.downsample.1.{m[3]}"),
    (rf"backbone\.fpn_lateral([345])\.{WEIGHT_BIAS}", lambda m: f"fpn.lateral.{int(m[1]) - 3}.{m[2]}"),
    (rf"backbone\.fpn_output([345])\.{WEIGHT_BIAS}", lambda m: f"fpn.output.{int(m[1]) - 3}.{m[2]}"),
    (rf"backbone\.top_block\.(p[67])\.{WEIGHT_BIAS}", r"fpn.\1.\2"),
    (rf"head\.cls_score\.{WEIGHT_BIAS}", r"cls_subnet.predictor.\1"),
    (rf"head\.bbox_pred\.{WEIGHT_BIAS}", r"box_subnet.predictor.\1"),
    # convolutions and norms share one numbering, see _separate_norms
    (rf"head\.(cls|bbox)_subnet\.(\d+)\.{WEIGHT_BIAS}", lambda m: hidden_layer(m[1], "layer", m[2], m[3])),
    (r"anchor_generator\.cell_anchors\.\d", DROP),
    (r"pixel_mean|pixel_std", DROP),
)


def _block(match: re.Match[str]) -> str:
    return f"backbone.layer{int(match[1]) - 1}.{match[2]}"


def _collect_facts(tensors: Mapping[str, Tensor], renamed: dict[str, Tensor], facts: ImportedFacts) -> None:
    _separate_norms(renamed)
    _fill_statistics(renamed, facts)
    _check_cell_anchors(tensors, facts)
    facts.model |= {
        "norm": "frozen_bn",
        "pixel_mean": tuple(tensors.get("pixel_mean", torch.tensor(BGR_MEAN)).flatten()[:4].tolist()),
        "pixel_std": tuple(tensors.get("pixel_std", torch.ones(3)).flatten()[:4].tolist()),
        "pad": "batch_max_32",
    }
    facts.compat |= {
        "norm_eps": 1e-5 if facts.options.norm_eps is None else facts.options.norm_eps,
        "stride_in": "1x1",
        "anchor_center_offset": 0.0,
        "channel_order": "bgr",
        "resize": "pil_bilinear",
        "clip": "after_nms",
        "drop_empty": True,
    }


def _separate_norms(renamed: dict[str, Tensor]) -> None:
    """Rename the subnets' `layer`s, in place, to `conv` and `norm`, which differ in the shape of their weight."""
    for subnet in ("cls_subnet", "box_subnet"):
        layers = [k for k in renamed if k.startswith(f"{subnet}.layer.") and k.endswith(".weight")]
        counts = {"conv": 0, "norm": 0}
        for index in sorted(int(k.split(".")[2]) for k in layers):
            kind = "conv" if renamed[f"{subnet}.layer.{index}.weight"].dim() == 4 else "norm"
            for parameter in ("weight", "bias"):
                tensor = renamed.pop(f"{subnet}.layer.{index}.{parameter}", None)
                if tensor is not None:
                    renamed[f"{subnet}.{kind}.{counts[kind]}.{parameter}"] = tensor
            counts[kind] += 1


def _fill_statistics(renamed: dict[str, Tensor], facts: ImportedFacts) -> None:
    """Add the statistics that detectron2 assumes, in place, if no batch norm of the file has any."""
    norms = [k.removesuffix(".weight") for k in renamed if re.search(r"backbone.*(bn\d|downsample\.1)\.weight", k)]
    if norms and not any(f"{k}.running_mean" in renamed for k in norms):
        facts.notes.append("batch norms without statistics: mean 0 and variance 1 are assumed, as detectron2 does")
        for k in norms:
            renamed[f"{k}.running_mean"] = torch.zeros_like(renamed[f"{k}.weight"])
            renamed[f"{k}.running_var"] = torch.ones_like(renamed[f"{k}.weight"])


def _check_cell_anchors(tensors: Mapping[str, Tensor], facts: ImportedFacts) -> None:
    """Check the anchors that older files contain: only the default ones are supported."""
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
                f"{facts.path}: the anchors of P{level + 3} must be detectron2's default ones (sizes {side} x "
                f"2^(0, 1/3, 2/3), ratios 0.5, 1, 2), got {shown(stored.flatten()[:36].tolist(), 200)}"
            )


DETECTRON2 = SourceFormat(
    marker="head.cls_score.weight",
    rename=_RENAME,
    collect_facts=_collect_facts,
    anchor_axes="scale, ratio",
)
