"""Transfer the weights of a trained detector to a model with other classes or anchors."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from detector.anchors import AnchorGenerator
from detector.errors import WeightsError
from detector.models.retinanet import RetinaNet
from detector.structures import Categories
from detector.weights.backbone_weights import require_filled
from detector.weights.coco_classes import match_classes
from detector.weights.load_report import LoadedPart, LoadReport, abbreviate, match_tensors

_PARTS = {"backbone": "backbone.", "pyramid": "fpn.", "class subnet": "cls_subnet.", "box subnet": "box_subnet."}
_PREDICTORS = ("cls_subnet.predictor.", "box_subnet.predictor.")


def transfer(
    model: RetinaNet,
    weights: Mapping[str, Tensor],
    *,
    source: str,
    classes: Categories,
    source_classes: Categories,
    source_anchors: AnchorGenerator,
) -> LoadReport:
    """Load another detector's weights into a model, in place, wherever they have the same meaning there.

    Each row of the last convolutions belongs to one anchor and one class (or coordinate). It is loaded where the source
    has an anchor of the same shape on all levels and a class of the same name. All other rows keep their initial values
    (new classes: the prior).

    Args:
        model: freshly initialised.
        weights: the source's state dict.
        source: origin of the weights, for the report and messages.
        classes: the model's classes.
        source_classes: the source's classes.
        source_anchors: the source's anchors.

    Returns:
        The report of what was loaded.

    Raises:
        WeightsError: no tensor fits; or the weights lack a layer that is not trained or that normalises by frozen
            statistics.
    """
    own = model.state_dict()
    updates: dict[str, Tensor] = {}
    rows: list[LoadedPart] = []
    for part, prefix in _PARTS.items():
        names = [k for k in own if k.startswith(prefix) and not k.startswith(_PREDICTORS)]
        fitting, row = match_tensors(part, {k: own[k] for k in names}, weights)
        updates |= fitting
        rows.append(row)
    if not updates:
        raise WeightsError(
            f"weights from {source} must fit the model, got no tensor that does; compare model.backbone and "
            "model.fpn_channels"
        )

    last = [prefix + kind for prefix in _PREDICTORS for kind in ("weight", "bias")]
    same_width = all(key in weights and weights[key].shape[1:] == own[key].shape[1:] for key in last)
    anchor_pairs = _match_anchors(model.anchors, source_anchors) if same_width else []
    class_pairs = match_classes(classes.names, source_classes.names) if anchor_pairs else []
    output_pairs = [*class_pairs, (len(classes), len(source_classes))] if model.activation == "softmax" else class_pairs
    num_anchors = model.anchors.num_per_cell
    for key in last if anchor_pairs else ():
        old = torch.unflatten(weights[key], 0, (source_anchors.num_per_cell, -1))
        new = torch.unflatten(own[key].clone(), 0, (num_anchors, -1))
        columns = output_pairs if key.startswith("cls_subnet.") else [(i, i) for i in range(4)]
        for (anchor, source_anchor), (column, source_column) in itertools.product(anchor_pairs, columns):
            new[anchor, column] = old[source_anchor, source_column]
        updates[key] = new.flatten(0, 1)
    note = ""
    if not same_width:
        note = "the source's last convolutions have another width; all anchors start fresh"
    elif len(anchor_pairs) < num_anchors:
        note = "the other anchors differ from the source's and start fresh"
    rows.append(LoadedPart("anchors per cell", len(anchor_pairs), num_anchors, note))
    rows.append(_class_row(classes.names, source_classes.names, class_pairs))
    model.load_state_dict(updates, strict=False)
    unfilled = {key.removeprefix("backbone.") for key in own if key.startswith("backbone.") and key not in updates}
    require_filled(model.get_submodule("backbone"), unfilled, source)
    return LoadReport(source, rows)


def _match_anchors(new: AnchorGenerator, old: AnchorGenerator) -> list[tuple[int, int]]:
    """Pairs of anchors that have the same shape on every level; none where strides or centres differ."""
    if (new.strides, new.spacing, new.center_offset) != (old.strides, old.spacing, old.center_offset):
        return []
    new_cells, old_cells = torch.stack(new.cells, dim=1), torch.stack(old.cells, dim=1)  # (anchors per cell, 5, 4)
    pairs = []
    for i, cell in enumerate(new_cells):
        same = torch.isclose(old_cells, cell, rtol=1e-3).flatten(1).all(dim=1).nonzero()
        if len(same):
            pairs.append((i, int(same[0])))
    return pairs


def _class_row(names: Sequence[str], source_names: Sequence[str], pairs: list[tuple[int, int]]) -> LoadedPart:
    known = {names[label]: source_names[source] for label, source in pairs}
    same = [name for name, source_name in known.items() if name == source_name]
    respelt = [f"{name} <- {source_name}" for name, source_name in known.items() if name != source_name]
    notes = (
        ("of the same name", abbreviate(same, 12)),
        ("under another spelling", ", ".join(respelt)),  # all of them: nothing else would reveal a wrong match
        ("new, start from the prior", abbreviate([name for name in names if name not in known], 12)),
    )
    note = "; ".join(f"{title}: {listed}" for title, listed in notes if listed)
    return LoadedPart("classes", len(pairs), len(names), note)
