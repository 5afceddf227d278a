"""Import RetinaNets trained with torchvision, detectron2 or mmdetection.

A file is recognised by the names of its tensors. They are renamed to this project's, the rows of the last convolutions
are put in this project's order of anchors and classes, and every difference between the frameworks becomes a setting:
the same images give the same detections. Facts that a file does not contain (the epsilon of a frozen batch norm,
mmdetection's style) come from `ImportOptions`, or are assumed and reported in a note.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from detector.config import CompatConfig, ModelConfig, PostprocessConfig
from detector.errors import WeightsError
from detector.structures import Categories
from detector.text import printable
from detector.weights.architecture import (
    check_complete,
    check_required_tensors,
    collect_architecture,
    convert_to_float32,
)
from detector.weights.from_detectron2 import DETECTRON2
from detector.weights.from_mmdetection import MMDETECTION
from detector.weights.from_torchvision import TORCHVISION
from detector.weights.import_facts import ImportedFacts, ImportOptions, Source, SourceFormat
from detector.weights.load_report import abbreviate
from detector.weights.name_maps import place_hidden_layers, rename_tensors
from detector.weights.output_classes import select_classes
from detector.weights.safe_load import read_content, state_dict_in, tensors_in

FORMATS: dict[Source, SourceFormat] = {"torchvision": TORCHVISION, "detectron2": DETECTRON2, "mmdet": MMDETECTION}


class ImportedDetector(NamedTuple):
    """Another framework's detector, converted."""

    source: Source
    model: ModelConfig
    postprocess: PostprocessConfig
    categories: Categories
    weights: dict[str, Tensor]
    min_max_size: tuple[int, int] | None
    """Short side of test images and bound of the long side, where the file contains them."""
    notes: list[str]
    """What was assumed, dropped or converted."""


def is_foreign(content: Any) -> bool:
    """Return whether a file's content looks like another framework's RetinaNet."""
    return any(source_format.marker in state_dict_in(content) for source_format in FORMATS.values())


def import_detector(path: Path, content: Any = None, options: ImportOptions | None = None) -> ImportedDetector:
    """Read and convert another framework's RetinaNet.

    Args:
        path: .pt, .pth, .pkl, .npz or .safetensors file.
        content: the file's content, if it was read already.
        options: facts that the file does not contain.

    Raises:
        WeightsError: the file is unreadable, is not a supported RetinaNet, or lacks a fact that cannot be assumed.
    """
    options = options or ImportOptions()
    facts = ImportedFacts(path, read_content(path) if content is None else content, options)
    tensors = tensors_in(facts.content, path)
    source = options.source or _recognise(tensors, path)
    source_format = FORMATS[source]
    renamed, unmatched = rename_tensors(tensors, source_format.rename)
    check_required_tensors(renamed, unmatched, source, facts)
    convert_to_float32(renamed, facts)
    source_format.collect_facts(tensors, renamed, facts)
    collect_architecture(renamed, facts)
    weights = place_hidden_layers(renamed)
    if source_format.anchor_axes == "scale, ratio":
        _swap_anchor_axes(weights)
    _fold_box_weights(weights, options.box_weights or facts.box_weights, facts)
    categories = select_classes(weights, source, facts)
    try:
        model = ModelConfig(**facts.model, compat=CompatConfig(**facts.compat))
        postprocess = PostprocessConfig(**facts.postprocess)
    except ValidationError as error:
        (first, *_) = error.errors()
        setting = ".".join(map(str, first["loc"]))
        raise WeightsError(
            f"{path} must describe a valid RetinaNet, got {setting}: {printable(first['msg'], 500)}"
        ) from None
    check_complete(weights, unmatched, model, len(categories), facts)
    return ImportedDetector(source, model, postprocess, categories, weights, facts.min_max_size, facts.notes)


def require_no_backbone(content: Any, path: Path) -> None:
    """Check that a file is not an image classifier, which `model.backbone_weights` would accept.

    Raises:
        WeightsError: it is one.
    """
    if "layer1.0.conv1.weight" in state_dict_in(content):
        raise WeightsError(
            f"{path} must hold a detector, got a backbone (an image classifier); to train from it, set "
            f"model.backbone_weights={path}"
        )


def _recognise(tensors: Mapping[str, Tensor], path: Path) -> Source:
    for source, source_format in FORMATS.items():
        if source_format.marker in tensors:
            return source
    require_no_backbone(tensors, path)
    raise WeightsError(
        f"{path} must be a RetinaNet of torchvision, detectron2 or mmdetection, recognised by the tensor "
        f"{', '.join(source_format.marker for source_format in FORMATS.values())}; got {abbreviate(sorted(tensors))}"
    )


def _swap_anchor_axes(weights: dict[str, Tensor]) -> None:
    """Reorder the rows of the last convolutions, in place, from scale * 3 + ratio to ratio * 3 + scale."""
    for name in [k for k in weights if ".predictor." in k]:
        rows = torch.unflatten(weights[name], 0, (3, 3, -1))
        weights[name] = rows.transpose(0, 1).flatten(0, 2).contiguous()


def _fold_box_weights(weights: dict[str, Tensor], divisors: Sequence[float] | None, facts: ImportedFacts) -> None:
    """Divide the last convolution of the box subnet, in place: this project's box encoding has weights of 1."""
    if divisors is None or all(abs(divisor - 1) < 1e-9 for divisor in divisors):
        return
    factors = 1 / torch.tensor(divisors, dtype=torch.float64)
    for parameter in ("weight", "bias"):
        name = f"box_subnet.predictor.{parameter}"
        rows = torch.unflatten(weights[name], 0, (9, 4))
        weights[name] = (rows * factors.view(1, 4, *[1] * (rows.dim() - 2))).float().flatten(0, 1)
    facts.notes.append(
        f"box encoding with weights {', '.join(f'{d:g}' for d in divisors)}: folded into the last convolution"
    )
