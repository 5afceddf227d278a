"""Detectors that other programs trained: torchvision's, detectron2's and mmdetection's RetinaNets.

A file of theirs is recognised by the names of its tensors. These are renamed to ours, the rows of the last convolutions
are put in our order of anchors and classes, and everything in which the networks differ is written into a `ModelConfig`,
so that the same pictures give the same detections. What a file does not say (the epsilon of a frozen batch norm,
mmdetection's two styles) is taken from what is usual, said in a note, and can be given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from pydantic import ValidationError
from torch import Tensor

from detector.config import HeadConfig, ModelConfig, PostprocessConfig
from detector.errors import WeightsError
from detector.models.retinanet import build_model
from detector.structures import Categories
from detector.weights.coco_classes import COCO
from detector.weights.from_detectron2 import DETECTRON2, _describe_detectron2
from detector.weights.from_mmdetection import MMDET, _describe_mmdet, _meta
from detector.weights.from_torchvision import TORCHVISION, _describe_torchvision
from detector.weights.name_maps import DROP, Rename, Said, Source, _Facts
from detector.weights.safe_load import named, read_content, short, tensors_in


class Imported(NamedTuple):
    """A detector in our terms."""

    source: Source
    model: ModelConfig
    postprocess: PostprocessConfig
    categories: Categories
    weights: dict[str, Tensor]
    sizes: tuple[int, int] | None
    """Short side of pictures and bound of the long one, where the file says it."""
    notes: list[str]
    """What was assumed, dropped or converted."""


def is_foreign(content: Any) -> bool:
    """Whether a file's content looks like another program's RetinaNet."""
    return any(marker in named(content) for marker in MARKERS.values())


def import_detector(path: Path, content: Any = None, said: Said | None = None) -> Imported:
    """Read another program's RetinaNet.

    Args:
        path: .pt, .pth, .pkl, .npz or .safetensors.
        content: of the file, if it was read already.
        said: about it.

    Raises:
        WeightsError: unreadable; not a RetinaNet of a known build; or it does not say something that nobody said.
    """
    said = said or Said()
    facts = _Facts(path, read_content(path) if content is None else content, said)
    tensors = tensors_in(facts.content, path)
    source = said.source or _recognise(tensors, path)
    layout = LAYOUTS[source]
    renamed, unknown = _renamed(tensors, layout.rename)
    _require_parts(renamed, unknown, source, facts)
    _check_numbers(renamed, facts)
    layout.describe(tensors, renamed, facts)
    _describe_build(renamed, facts)
    weights = _in_towers(renamed)
    weights = _in_our_order(weights, layout.anchor_axes)
    _divide_boxes(weights, said.box_weights or facts.box_weights, facts)
    weights, categories = _with_our_classes(weights, source, facts)
    try:
        model = ModelConfig(**facts.model)
    except ValidationError as error:
        (first, *_) = error.errors()
        told = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise WeightsError(f"{path} holds tensors of shapes that no RetinaNet has ({told})") from None
    _require_whole(weights, unknown, model, len(categories), facts)
    return Imported(
        source, model, PostprocessConfig(**facts.postprocess), categories, weights, facts.sizes, facts.notes
    )


# ---- recognising ------------------------------------------------------------------------------------------------

MARKERS: dict[Source, str] = {
    "torchvision": "head.classification_head.cls_logits.weight",
    "detectron2": "head.cls_score.weight",
    "mmdet": "bbox_head.retina_cls.weight",
}
"""A tensor that only this program's RetinaNet has."""


def require_no_backbone(content: Any, path: Path) -> None:
    """Send an image classifier to where it belongs.

    Raises:
        WeightsError: it is one.
    """
    if "layer1.0.conv1.weight" in named(content):
        raise WeightsError(
            f"{path} holds a backbone (an image classifier), not a detector; start a training from it by "
            f"model.backbone_weights={path}"
        )


def _recognise(tensors: Mapping[str, Tensor], path: Path) -> Source:
    for source, marker in MARKERS.items():
        if marker in tensors:
            return source
    require_no_backbone(tensors, path)
    raise WeightsError(
        f"{path} must be a RetinaNet of torchvision, detectron2 or mmdetection, recognised by "
        f"{', '.join(MARKERS.values())}; got {short(sorted(tensors))}"
    )


def _renamed(tensors: Mapping[str, Tensor], rules: Rename) -> tuple[dict[str, Tensor], list[str]]:
    """Tensors under our names, but the towers' as `cls_subnet.conv.0.weight` or `cls_subnet.norm.0.weight`; and the
    names that no rule knows."""
    renamed, unknown = {}, []
    compiled = [(re.compile(pattern), new) for pattern, new in rules]
    for name, tensor in tensors.items():
        for pattern, new in compiled:
            match = pattern.fullmatch(name)
            if match:
                target = new(match) if callable(new) else match.expand(new)
                if target != DROP:
                    renamed[target] = tensor
                break
        else:
            unknown.append(name)
    return renamed, unknown


def _in_towers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`cls_subnet.conv.1.weight` to its place in the tower, where convolutions, norms (if any) and ReLUs take turns."""
    with_norm = any(".norm." in name for name in weights)
    placed = {}
    for name, tensor in weights.items():
        match = re.fullmatch(r"(cls|box)_subnet\.(conv|norm)\.(\d+)\.(\w+)", name)
        if match:
            place = int(match[3]) * (3 if with_norm else 2) + (match[2] == "norm")
            name = f"{match[1]}_subnet.tower.{place}.{match[4]}"
        placed[name] = tensor
    return placed


NEEDED = {
    "backbone.layer1.0.conv2.weight": 4, "fpn.lateral.0.weight": 4, "fpn.lateral.2.weight": 4, "fpn.p6.weight": 4,
    "cls_subnet.predictor.weight": 4, "cls_subnet.predictor.bias": 1,
    "box_subnet.predictor.weight": 4, "box_subnet.predictor.bias": 1,
}  # fmt: skip
"""What everything else is deduced from, and its number of axes."""


def _require_parts(renamed: Mapping[str, Tensor], unknown: list[str], source: Source, facts: _Facts) -> None:
    absent = [name for name in NEEDED if name not in renamed]
    if absent:
        others = f"; it has {short(sorted(unknown))}" if unknown else ""
        raise WeightsError(
            f"{facts.path} lacks what every RetinaNet of {source} has: {short(absent)} (in our names){others}"
        )
    odd = [f"{name} {tuple(renamed[name].shape)}" for name, axes in NEEDED.items() if renamed[name].dim() != axes]
    for subnet, outputs in (("cls_subnet", 1), ("box_subnet", 4)):
        rows = [len(renamed[f"{subnet}.predictor.{kind}"]) for kind in ("weight", "bias")] if not odd else []
        if len(set(rows)) > 1 or any(r % outputs for r in rows):
            odd.append(f"{subnet}.predictor with {rows[0]} rows of weights and {rows[1]} biases")
    if odd:
        raise WeightsError(f"{facts.path} holds tensors of shapes that no RetinaNet has: {short(odd)} (in our names)")


# ---- what the tensors show --------------------------------------------------------------------------------------

# Blocks per layer, whether they are bottlenecks, and the width and the inputs per group of the first 3x3 convolution.
BUILDS: dict[tuple[tuple[int, ...], bool, int, int], str] = {
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


def _describe_build(renamed: Mapping[str, Tensor], facts: _Facts) -> None:
    """Sizes of everything, from the shapes."""
    blocks = tuple(_count(renamed, rf"backbone\.layer{layer}\.(\d+)\.conv1\.weight") for layer in (1, 2, 3, 4))
    first = renamed["backbone.layer1.0.conv2.weight"]
    bottleneck = "backbone.layer1.0.conv3.weight" in renamed
    build = (blocks, bottleneck, first.shape[0], first.shape[1])
    if build not in BUILDS:
        raise WeightsError(
            f"{facts.path}: the backbone must be one of {', '.join(BUILDS.values())}, got {blocks} "
            f"{'bottlenecks' if bottleneck else 'basic blocks'} whose first has {first.shape[0]} channels in groups of {first.shape[1]}"
        )
    lateral, p6 = renamed["fpn.lateral.2.weight"], renamed["fpn.p6.weight"]
    channels = lateral.shape[0]
    num_anchors = len(renamed["box_subnet.predictor.bias"]) // 4
    if num_anchors != 9 or len(renamed["cls_subnet.predictor.bias"]) % 9:
        raise WeightsError(
            f"{facts.path}: a cell must have 9 anchors (3 sizes, 3 ratios), got {num_anchors}; the file does not say what "
            "other anchors look like, so they cannot be taken over"
        )
    depth = _count(renamed, r"cls_subnet\.conv\.(\d+)\.weight")
    with_norm = "cls_subnet.norm.0.weight" in renamed
    head_channels = renamed["cls_subnet.predictor.weight"].shape[1]
    facts.model |= {
        "backbone": BUILDS[build],
        "fpn_channels": channels,
        "p6_from": "p5" if p6.shape[1] == channels != lateral.shape[1] else "c5",
        "head": HeadConfig(
            depth=depth,
            channels=None if head_channels == channels else head_channels,
            norm="gn" if with_norm else "none",
            bias_before_norm=with_norm and "cls_subnet.conv.0.bias" in renamed,
        ),
    }


def _count(names: Iterable[str], pattern: str) -> int:
    return sum(re.fullmatch(pattern, name) is not None for name in names)


def _check_numbers(weights: dict[str, Tensor], facts: _Facts) -> None:
    """Everything is float32 afterwards."""
    problems, narrowed = [], set()
    for name, tensor in weights.items():
        if name.endswith("num_batches_tracked"):
            continue
        if not tensor.is_floating_point():
            problems.append(
                f"  {name} must hold floating-point numbers, got {str(tensor.dtype).removeprefix('torch.')}"
            )
        elif not bool(torch.isfinite(tensor).all()):
            problems.append(f"  {name} holds {int((~torch.isfinite(tensor)).sum())} numbers that are not finite")
        elif tensor.dtype != torch.float32:
            narrowed.add(str(tensor.dtype).removeprefix("torch."))
            weights[name] = tensor.float()
    if problems:
        more = f"\n  and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise WeightsError("\n".join([f"{facts.path} cannot be used (names are ours):", *problems[:8]]) + more)
    if narrowed:
        facts.notes.append(f"converted from {', '.join(sorted(narrowed))} to float32")


def _require_whole(
    weights: Mapping[str, Tensor], unknown: list[str], model: ModelConfig, num_classes: int, facts: _Facts
) -> None:
    with torch.device("meta"):
        own = build_model(model, num_classes).state_dict()
    missing = [k for k in own if k not in weights and not k.endswith("num_batches_tracked")]
    surplus = [*unknown, *(k for k in weights if k not in own)]
    misshapen = [
        f"{k} {tuple(weights[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    found = (("missing", missing), ("not part of a RetinaNet", surplus), ("of another shape", misshapen))
    if any(names for _, names in found):
        raise WeightsError(
            "\n".join(
                [
                    f"{facts.path} is not a RetinaNet of a known build ({model.backbone}, {num_classes} classes), got tensors",
                    *(f"  {what}: {short(names)}" for what, names in found if names),
                ]
            )
        )


# ---- anchors and classes ----------------------------------------------------------------------------------------


def _in_our_order(weights: dict[str, Tensor], axes: Literal["ratio, scale", "scale, ratio"]) -> dict[str, Tensor]:
    """Rows of the last convolutions by a = ratio * 3 + scale."""
    if axes == "scale, ratio":
        for name in [k for k in weights if ".predictor." in k]:
            rows = torch.unflatten(weights[name], 0, (3, 3, -1))
            weights[name] = rows.transpose(0, 1).flatten(0, 2).contiguous()
    return weights


def _divide_boxes(weights: dict[str, Tensor], divisors: Sequence[float] | None, facts: _Facts) -> None:
    """Our boxes are coded with weights of 1; others' go into the rows of the last convolution."""
    if divisors is None or all(abs(divisor - 1) < 1e-9 for divisor in divisors):
        return
    factors = 1 / torch.tensor(divisors, dtype=torch.float64)
    for kind in ("weight", "bias"):
        rows = torch.unflatten(weights[f"box_subnet.predictor.{kind}"], 0, (9, 4))
        shape = (1, 4, *[1] * (rows.dim() - 2))
        weights[f"box_subnet.predictor.{kind}"] = (rows * factors.view(shape)).float().flatten(0, 1)
    facts.notes.append(
        f"boxes coded with weights {', '.join(f'{d:g}' for d in divisors)}: put into the last convolution"
    )


def _with_our_classes(
    weights: dict[str, Tensor], source: Source, facts: _Facts
) -> tuple[dict[str, Tensor], Categories]:
    """Only rows of real classes, and what these are."""
    num_outputs = len(weights["cls_subnet.predictor.bias"]) // 9
    if facts.said.categories is not None:
        rows, categories = _told_classes(facts.said.categories, num_outputs, source, facts)
    elif source == "torchvision" and num_outputs == 91:
        rows, categories = list(COCO.ids), COCO
    else:
        rows, categories = list(range(num_outputs)), _known_classes(num_outputs, source, facts)
    if rows != list(range(num_outputs)):
        dropped = num_outputs - len(rows)
        facts.notes.append(
            f"{dropped} of {num_outputs} outputs removed, which stand for no class (background, gaps in the ids)"
        )
        for kind in ("weight", "bias"):
            name = f"cls_subnet.predictor.{kind}"
            weights[name] = torch.unflatten(weights[name], 0, (9, num_outputs))[:, rows].flatten(0, 1).contiguous()
    return weights, categories


def _known_classes(num_outputs: int, source: Source, facts: _Facts) -> Categories:
    names = _stored_names(facts)
    if names is not None and len(names) == num_outputs:
        if len(set(names)) != len(names):
            raise WeightsError(f"{facts.path} gives several classes the same name; say them with --categories")
        if tuple(names) == COCO.names:
            return COCO
        return Categories(tuple(range(1, num_outputs + 1)), tuple(names))
    if source != "torchvision" and num_outputs == 80:
        return COCO
    raise WeightsError(
        f"{facts.path} has {num_outputs} outputs and does not say which classes they are; convert it by tools/convert_weights.py "
        "with --categories FILE.json (a COCO file) or --categories NAME,NAME,..."
    )


def _stored_names(facts: _Facts) -> list[str] | None:
    """mmdetection's files name their classes: meta.CLASSES (2.x), meta.dataset_meta.classes (3.x)."""
    dataset = _meta(facts).get("dataset_meta")
    for place in (_meta(facts), dataset if isinstance(dataset, dict) else {}):
        for key in ("CLASSES", "classes"):
            names = place.get(key)
            if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
                return list(names)
    return None


def _told_classes(said: str, num_outputs: int, source: Source, facts: _Facts) -> tuple[list[int], Categories]:
    """Which output stands for which of the classes that the user named."""
    if said.endswith(".json"):
        categories = _categories_of(Path(said))
        # torchvision's reference scripts take COCO's category ids for labels
        if source == "torchvision" and num_outputs == max(categories.ids) + 1 and min(categories.ids) >= 0:
            return list(categories.ids), categories
    elif Path(said).exists():
        raise WeightsError(
            f"--categories must be a .json file or names separated by commas, got {said}, which is neither"
        )
    else:
        names = tuple(name.strip() for name in said.split(","))
        if not all(names) or len(set(names)) != len(names):
            raise WeightsError(f"--categories must be a COCO file or different names separated by commas, got {said!r}")
        categories = Categories(tuple(range(1, len(names) + 1)), names)
    if len(categories) == num_outputs:
        return list(range(num_outputs)), categories
    if source == "torchvision" and len(categories) == num_outputs - 1:  # the first output is the background
        return list(range(1, num_outputs)), categories
    background = ", or one less, the first output being the background" if source == "torchvision" else ""
    raise WeightsError(
        f"--categories must name {num_outputs} classes for {facts.path}{background}, got {len(categories)}"
    )


def _categories_of(path: Path) -> Categories:
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))["categories"]
        pairs = sorted((int(c["id"]), str(c["name"])) for c in listed)
        return Categories(tuple(i for i, _ in pairs), tuple(name for _, name in pairs))
    except OSError as error:
        raise WeightsError(f"--categories {path} cannot be read: {error.strerror}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"--categories {path} must be a COCO file with categories of different ids: {error}"
        ) from None


class _Layout(NamedTuple):
    rename: Rename
    describe: Callable[[Mapping[str, Tensor], dict[str, Tensor], _Facts], None]
    anchor_axes: Literal["ratio, scale", "scale, ratio"]


LAYOUTS: dict[Source, _Layout] = {
    "torchvision": _Layout(TORCHVISION, _describe_torchvision, "ratio, scale"),
    "detectron2": _Layout(DETECTRON2, _describe_detectron2, "scale, ratio"),
    "mmdet": _Layout(MMDET, _describe_mmdet, "ratio, scale"),
}
SOURCES: tuple[Source, ...] = get_args(Source)
