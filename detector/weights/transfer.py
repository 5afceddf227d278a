"""Moving weights from files, downloads and other detectors into a network, saying what went where."""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from detector.anchors import AnchorGenerator
from detector.errors import WeightsError
from detector.models.backbone import ResNet
from detector.models.retinanet import RetinaNet
from detector.structures import Categories
from detector.weights.safe_load import DAMAGE, read_tensors, reason, short


class LoadReport(NamedTuple):
    """What became of a file's tensors."""

    source: str
    loaded: list[str]
    missing: list[str]
    """Of the network, without counterpart in the file: they keep their initial values."""
    unused: list[str]
    """Of the file, without counterpart in the network."""
    misshapen: list[str]
    """In both, with different shapes."""

    def __str__(self) -> str:
        lines = [f"backbone weights from {self.source}: {len(self.loaded)} tensors loaded"]
        for title, names in (
            ("not in the file, left at their initial values", self.missing),
            ("of another shape, left at their initial values", self.misshapen),
            ("in the file but not used", self.unused),
        ):
            if names:
                lines.append(f"  {len(names)} {title}: {short(names)}")
        return "\n".join(lines)


def load_backbone_weights(backbone: ResNet, name: str, weights: str) -> LoadReport | None:
    """Fill a backbone with ImageNet weights.

    Args:
        backbone: to be filled in place.
        name: of the architecture, "resnet50" say.
        weights: "imagenet" (torchvision's download, its first version: the one RetinaNet's published results rest
            on), "none", or a file, which may hold only a part of the layers.

    Returns:
        What was and was not loaded; None for "none".

    Raises:
        WeightsError: unreadable; nothing fits; or a layer that is not trained, or normalises by frozen statistics,
            found no weights.
    """
    if weights == "none":
        return None
    if weights == "imagenet":
        source, tensors = f"torchvision ({name}, ImageNet)", _download(name)
    else:
        source, tensors = weights, read_tensors(Path(weights))
    tensors = {key.removeprefix("backbone.body.").removeprefix("backbone."): value for key, value in tensors.items()}
    own = backbone.state_dict()
    # Batch norm's numbers mean nothing to group norm, although the shapes agree.
    group_norms = {key for key, module in backbone.named_modules() if isinstance(module, nn.GroupNorm)}
    usable = {k: v for k, v in tensors.items() if k in own and k.rpartition(".")[0] not in group_norms}
    loaded = [k for k, v in usable.items() if v.shape == own[k].shape]
    report = LoadReport(
        source,
        loaded,
        missing=[k for k in own if k not in usable and not k.endswith("num_batches_tracked")],
        unused=[k for k in tensors if k not in usable and not k.startswith("fc.") and "num_batches_tracked" not in k],
        misshapen=[k for k, v in usable.items() if v.shape != own[k].shape],
    )
    if not loaded:
        raise WeightsError(
            f"{source} must hold weights of {name} under torchvision's names (conv1.weight, layer1.0.conv1.weight, "
            f"...), got {short(list(tensors), 4)}"
        )
    backbone.load_state_dict({k: usable[k] for k in loaded}, strict=False)
    _check_unfilled(backbone, {*report.missing, *report.misshapen}, source)
    return report


def _check_unfilled(backbone: ResNet, unfilled: set[str], source: str) -> None:
    frozen_norms = [
        key
        for key, module in backbone.named_modules()
        if isinstance(module, FrozenBatchNorm2d) and any(f"{key}.{p}" in unfilled for p in ("weight", "running_var"))
    ]
    if frozen_norms:
        raise WeightsError(
            f"model.norm must not be frozen_bn on layers that no weights filled: {source} has no statistics for "
            f"{short(frozen_norms)}; set model.norm=bn (or gn)"
        )
    fixed = {id(p) for part in backbone.frozen_parts() for p in part.parameters()}
    random_fixed = [k for k, p in backbone.named_parameters() if id(p) in fixed and k in unfilled]
    if random_fixed:
        raise WeightsError(
            f"model.trainable_layers must be higher: {source} has nothing for {short(random_fixed)}, which would stay "
            "random for ever; set model.trainable_layers=5"
        )


def _download(name: str) -> dict[str, Tensor]:
    if name not in torchvision.models.list_models():
        raise WeightsError(
            f"torchvision has no ImageNet weights of {name}; set model.backbone_weights to a file, or to none (with "
            "model.norm=bn or gn) to train from scratch"
        )
    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    target = Path(torch.hub.get_dir()) / "checkpoints" / Path(weights.url).name
    try:
        # weights_only: the file may be one that somebody put there by hand
        state: dict[str, Tensor] = weights.get_state_dict(progress=True, check_hash=True, weights_only=True)
    except (pickle.UnpicklingError, *DAMAGE) as error:
        raise WeightsError(
            f"downloading the ImageNet weights of {name} failed ({reason(error)}).\n"
            f"  Fetch {weights.url} elsewhere and put it at {target},\n"
            "  or set model.backbone_weights to a file, or to none (with model.norm=bn or gn) to train from scratch."
        ) from None
    return state


# ---- fine-tuning ------------------------------------------------------------------------------------------------


class TransferRow(NamedTuple):
    """One line of the table that fine-tuning prints."""

    part: str
    copied: int
    total: int
    note: str


SPELLINGS = {
    "motorbike": "motorcycle", "aeroplane": "airplane", "sofa": "couch", "tvmonitor": "tv", "television": "tv",
    "mobilephone": "cellphone", "bike": "bicycle", "people": "person", "pedestrian": "person", "doughnut": "donut",
    "hairdryer": "hairdrier",
}  # fmt: skip
"""What other datasets call COCO's classes, in the form that `canonical_name` compares."""


def canonical_name(name: str) -> str:
    """A class name without what spelling varies in: case, spaces, underscores, hyphens, and well-known synonyms."""
    plain = "".join(ch for ch in name.casefold() if ch.isalnum()) or name
    return SPELLINGS.get(plain, plain)


def transfer(
    model: RetinaNet,
    weights: Mapping[str, Tensor],
    *,
    classes: Categories,
    source_classes: Categories,
    source_anchors: AnchorGenerator,
) -> list[TransferRow]:
    """Move another detector's weights into a model, in place, as far as they mean the same there.

    The last convolutions are moved row by row: a row serves one anchor and one class (or coordinate), so it is copied
    where the source has an anchor of the same shape on all levels and a class of the same name. Everything else keeps
    its initialisation (new classes: the prior).

    Args:
        model: freshly initialised.
        weights: the source's state dict.
        classes: what the model is to find.
        source_classes: what the source found.
        source_anchors: the source's anchors.

    Returns:
        A table of what was copied.

    Raises:
        WeightsError: nothing fits; or a layer that is not trained, or normalises by frozen statistics, stays empty.
    """
    own = model.state_dict()
    predictors = ("cls_subnet.predictor.", "box_subnet.predictor.")
    rows: list[TransferRow] = []
    groups = {"backbone": "backbone.", "pyramid": "fpn.", "class subnet": "cls_subnet.", "box subnet": "box_subnet."}
    updates: dict[str, Tensor] = {}
    for part, prefix in groups.items():
        names = [k for k in own if k.startswith(prefix) and not k.startswith(predictors)]
        names = [k for k in names if not k.endswith("num_batches_tracked")]
        fitting = [k for k in names if k in weights and weights[k].shape == own[k].shape]
        updates.update({k: weights[k] for k in fitting})
        odd = [k for k in names if k in weights and k not in fitting]
        absent = [k for k in names if k not in weights]
        notes = [f"other shape: {short(odd)}"] if odd else []
        notes += [f"not in the source: {short(absent)}"] if absent else []
        rows.append(TransferRow(part, len(fitting), len(names), "; ".join(notes)))
    if not updates:
        raise WeightsError("nothing of the source fits this model; compare model.backbone and model.fpn_channels")

    last = [prefix + kind for prefix in predictors for kind in ("weight", "bias")]
    same_width = all(key in weights and weights[key].shape[1:] == own[key].shape[1:] for key in last)
    anchor_pairs = _same_anchors(model.anchors, source_anchors) if same_width else []
    by_name = {canonical_name(name): k for k, name in reversed([*enumerate(source_classes.names)])}
    # A name as it is written comes first: a source that has both people and persons keeps them apart.
    by_name |= {name: k for k, name in enumerate(source_classes.names)}
    found = [by_name.get(name, by_name.get(canonical_name(name))) for name in classes.names]
    class_pairs = [(k, source) for k, source in enumerate(found) if source is not None]
    class_rows = list(class_pairs)
    if model.activation == "softmax":
        class_rows.append((len(classes), len(source_classes)))  # the background
    coordinates = [(i, i) for i in range(4)]
    num_anchors = model.anchors.num_per_cell
    for key in last if anchor_pairs else ():
        old = torch.unflatten(weights[key], 0, (source_anchors.num_per_cell, -1))
        new = torch.unflatten(own[key].clone(), 0, (num_anchors, -1))
        for i, j in itertools.product(anchor_pairs, class_rows if key.startswith("cls_subnet.") else coordinates):
            new[i[0], j[0]] = old[i[1], j[1]]
        updates[key] = new.flatten(0, 1)
    anchor_note = ""
    if not same_width:
        anchor_note = "the last convolutions have another width than the source's and start fresh"
    elif len(anchor_pairs) < num_anchors:
        anchor_note = "the other anchors differ from the source's and start fresh"
    rows.append(TransferRow("anchors of a cell", len(anchor_pairs), num_anchors, anchor_note))
    known = {k: source_classes.names[s] for k, s in class_pairs} if anchor_pairs else {}
    same = [name for k, name in known.items() if name == classes.names[k]]
    respelt = [f"{classes.names[k]} <- {name}" for k, name in known.items() if name != classes.names[k]]
    unknown = [name for k, name in enumerate(classes.names) if k not in known]
    notes = [f"of the same name: {short(same, 12)}"] if same else []
    notes += (
        [f"under another spelling: {', '.join(respelt)}"] if respelt else []
    )  # all: a wrong pair is seen nowhere else
    notes += [f"new, start from the prior: {short(unknown, 12)}"] if unknown else []
    note = "; ".join(notes)
    rows.append(TransferRow("classes", len(known), len(classes), note))
    model.load_state_dict(updates, strict=False)
    unfilled = {key.removeprefix("backbone.") for key in own if key.startswith("backbone.") and key not in updates}
    _check_unfilled(model.backbone, unfilled, "the source of the weights")
    return rows


def _same_anchors(new: AnchorGenerator, old: AnchorGenerator) -> list[tuple[int, int]]:
    """Pairs of anchors that have the same shape on every level; none where they are laid out differently."""
    if (new.strides, new.center_offset) != (old.strides, old.center_offset):
        return []
    new_cells, old_cells = torch.stack(new.cells, dim=1), torch.stack(old.cells, dim=1)  # (anchors of a cell, 5, 4)
    pairs = []
    for i, cell in enumerate(new_cells):
        same = torch.isclose(old_cells, cell, rtol=1e-3).flatten(1).all(dim=1).nonzero()
        if len(same):
            pairs.append((i, int(same[0])))
    return pairs
