"""Deduce the architecture of an imported detector from the shapes of its tensors, and check that it is complete."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from detector.config import HeadConfig, ModelConfig
from detector.errors import WeightsError
from detector.models.retinanet import build_model
from detector.weights.import_facts import ImportedFacts, Source
from detector.weights.load_report import abbreviate

# Blocks per layer, whether they are bottlenecks, and output and group channels of the first 3x3 convolution.
BACKBONES: dict[tuple[tuple[int, ...], bool, int, int], str] = {
    ((2, 2, 2, 2), False, 64, 64): "resnet18",
    ((3, 4, 6, 3), False, 64, 64): "resnet34",
    ((3, 4, 6, 3), True, 64, 64): "resnet50",
    ((3, 4, 23, 3), True, 64, 64): "resnet101",
    ((3, 8, 36, 3), True, 64, 64): "resnet152",
    ((3, 4, 6, 3), True, 128, 4): "resnext50_32x4d",
    ((3, 4, 23, 3), True, 128, 4): "resnext101_32x4d",
    ((3, 4, 23, 3), True, 256, 8): "resnext101_32x8d",
    ((3, 4, 23, 3), True, 256, 4): "resnext101_64x4d",
}

REQUIRED_TENSORS = {
    "backbone.layer1.0.conv2.weight": 4, "fpn.lateral.0.weight": 4, "fpn.lateral.2.weight": 4, "fpn.p6.weight": 4,
    "cls_subnet.predictor.weight": 4, "cls_subnet.predictor.bias": 1,
    "box_subnet.predictor.weight": 4, "box_subnet.predictor.bias": 1,
}  # fmt: skip
"""Tensors from which everything else is deduced -> number of dimensions."""


def check_required_tensors(
    tensors: Mapping[str, Tensor], unmatched: list[str], source: Source, facts: ImportedFacts
) -> None:
    """Check that the tensors that describe the architecture exist and have plausible shapes.

    Raises:
        WeightsError: listing those that do not.
    """
    missing = [name for name in REQUIRED_TENSORS if name not in tensors]
    if missing:
        others = f"; unknown tensors: {abbreviate(sorted(unmatched))}" if unmatched else ""
        raise WeightsError(
            f"{facts.path} must hold a complete RetinaNet of {source}, but lacks {abbreviate(missing)} "
            f"(names after conversion){others}"
        )
    invalid = [
        f"{name} {tuple(tensors[name].shape)}" for name, ndim in REQUIRED_TENSORS.items() if tensors[name].dim() != ndim
    ]
    for subnet, outputs in (("cls_subnet", 1), ("box_subnet", 4)) if not invalid else ():
        weights, biases = (len(tensors[f"{subnet}.predictor.{parameter}"]) for parameter in ("weight", "bias"))
        if weights != biases or weights % outputs:
            invalid.append(f"{subnet}.predictor with {weights} rows of weights and {biases} biases")
    if invalid:
        raise WeightsError(
            f"{facts.path} must hold tensors of a RetinaNet's shapes, got {abbreviate(invalid)} "
            "(names after conversion)"
        )


def convert_to_float32(tensors: dict[str, Tensor], facts: ImportedFacts) -> None:
    """Convert all tensors to float32, in place.

    Raises:
        WeightsError: listing tensors of other than floating-point type, or with non-finite values.
    """
    problems, converted = [], set()
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        if not tensor.is_floating_point():
            problems.append(f"  {name} must hold floating-point numbers, got {dtype}")
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(
                f"  {name} must hold finite numbers, got {int((~torch.isfinite(tensor)).sum())} that are not"
            )
        elif tensor.dtype != torch.float32:
            converted.add(dtype)
            tensors[name] = tensor.float()
    if problems:
        more = [f"  and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise WeightsError(
            "\n".join([f"{facts.path} cannot be imported (tensor names after conversion):", *problems[:8], *more])
        )
    if converted:
        facts.notes.append(f"converted from {', '.join(sorted(converted))} to float32")


def collect_architecture(tensors: Mapping[str, Tensor], facts: ImportedFacts) -> None:
    """Add the settings of `ModelConfig` and `CompatConfig` that follow from the shapes to the facts.

    Raises:
        WeightsError: an unknown backbone, or other than nine anchors per cell.
    """
    blocks = tuple(_count(tensors, rf"backbone\.layer{layer}\.(\d+)\.conv1\.weight") for layer in (1, 2, 3, 4))
    first = tensors["backbone.layer1.0.conv2.weight"]
    bottleneck = "backbone.layer1.0.conv3.weight" in tensors
    backbone = BACKBONES.get((blocks, bottleneck, first.shape[0], first.shape[1]))
    if backbone is None:
        raise WeightsError(
            f"{facts.path}: the backbone must be one of {', '.join(BACKBONES.values())}, got {blocks} "
            f"{'bottlenecks' if bottleneck else 'basic blocks'}, the first with {first.shape[0]} channels in groups of "
            f"{first.shape[1]}"
        )
    num_anchors = len(tensors["box_subnet.predictor.bias"]) // 4
    if num_anchors != 9 or len(tensors["cls_subnet.predictor.bias"]) % 9:
        raise WeightsError(
            f"{facts.path}: a cell must have 9 anchors (3 sizes, 3 ratios), got {num_anchors}; a file does not contain "
            "the shapes of other anchors, so they cannot be imported"
        )
    lateral, p6 = tensors["fpn.lateral.2.weight"], tensors["fpn.p6.weight"]
    channels = lateral.shape[0]
    head_channels = tensors["cls_subnet.predictor.weight"].shape[1]
    has_norm = "cls_subnet.norm.0.weight" in tensors
    facts.model |= {
        "backbone": backbone,
        "fpn_channels": channels,
        "head": HeadConfig(
            depth=_count(tensors, r"cls_subnet\.conv\.(\d+)\.weight"),
            channels=None if head_channels == channels else head_channels,
            norm="gn" if has_norm else "none",
        ),
    }
    facts.compat |= {
        "p6_from": "p5" if p6.shape[1] == channels != lateral.shape[1] else "c5",
        "bias_before_norm": has_norm and "cls_subnet.conv.0.bias" in tensors,
    }


def check_complete(
    weights: Mapping[str, Tensor], unmatched: list[str], model: ModelConfig, num_classes: int, facts: ImportedFacts
) -> None:
    """Check that the weights are exactly those of a model, except for unmatched counters of batch norm's steps.

    Raises:
        WeightsError: listing missing, surplus and misshapen tensors.
    """
    with torch.device("meta"):
        own = build_model(model, num_classes).state_dict()
    problems = {
        "missing": [k for k in own if k not in weights and not k.endswith("num_batches_tracked")],
        "not part of a RetinaNet": [*unmatched, *(k for k in weights if k not in own)],
        "of another shape": [
            f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
            for k in own
            if k in weights and weights[k].shape != own[k].shape
        ],
    }
    lines = [f"  {problem}: {abbreviate(names)}" for problem, names in problems.items() if names]
    if lines:
        title = f"{facts.path} must hold the tensors of {model.backbone} with {num_classes} classes, got tensors"
        raise WeightsError("\n".join([title, *lines]))


def _count(names: Iterable[str], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)
