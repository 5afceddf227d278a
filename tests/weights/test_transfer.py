"""Transfer from another detector: which weights are loaded, which start fresh, and what is rejected."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from detector.config import ModelConfig
from detector.errors import WeightsError
from detector.models import RetinaNet, build_model
from detector.models.heads import prior_bias
from detector.structures import Categories
from detector.weights.coco_classes import canonical_name
from detector.weights.load_report import LoadedPart, LoadReport
from detector.weights.transfer import transfer
from tests.weights.test_safe_load import some_tensors


def model(classes: list[str], **settings: Any) -> tuple[RetinaNet, Categories]:
    values = {"backbone": "resnet18", "backbone_weights": "none", "norm": "bn", "fpn_channels": 8, **settings}
    config = ModelConfig.model_validate({"head": {"depth": 1}, **values}, strict=False)
    return build_model(config, len(classes)), Categories(tuple(range(1, len(classes) + 1)), tuple(classes))


def transferred(source: tuple[RetinaNet, Categories], target: tuple[RetinaNet, Categories]) -> dict[str, LoadedPart]:
    report = transfer(
        target[0],
        source[0].state_dict(),
        source="source.pt",
        classes=target[1],
        source_classes=source[1],
        source_anchors=source[0].anchors,
    )
    return {row.part: row for row in report.parts}


def filled(classes: list[str], **settings: Any) -> tuple[RetinaNet, Categories]:
    """A model as after training: no parameter has its initial value."""
    torch.manual_seed(5)
    made = model(classes, **settings)
    for parameter in made[0].parameters():
        torch.nn.init.normal_(parameter)
    return made


def rows_of(model: RetinaNet, subnet: str, kind: str) -> Tensor:
    """(anchors per cell, classes or coordinates, ...)."""
    rows: Tensor = torch.unflatten(
        model.state_dict()[f"{subnet}.predictor.{kind}"], 0, (model.anchors.num_per_cell, -1)
    )
    return rows


@pytest.mark.parametrize("names", [["cat", "dog", "car"], ["people", "person", "pedestrian"], ["bike", "bicycle"]])
def test_all_weights_are_loaded_for_the_same_classes(names: list[str]) -> None:
    source, target = filled(names), model(names)
    table = transferred(source, target)
    own = target[0].state_dict()
    for key, value in source[0].state_dict().items():
        if not key.endswith("num_batches_tracked"):
            assert torch.equal(own[key], value), key
    assert all(row.loaded == row.total > 0 for row in table.values())


def test_rows_of_classes_with_other_order_and_spelling_are_transferred_by_anchor() -> None:
    source = filled(["Traffic Light", "motorbike", "cat"])
    target = model(["cat", "dog", "traffic_light", "motorcycle"])
    table = transferred(source, target)
    for kind in ("weight", "bias"):
        old, new = rows_of(source[0], "cls_subnet", kind), rows_of(target[0], "cls_subnet", kind)
        for label, source_label in {0: 2, 2: 0, 3: 1}.items():
            assert torch.equal(new[:, label], old[:, source_label])
        assert torch.equal(rows_of(target[0], "box_subnet", kind), rows_of(source[0], "box_subnet", kind))
    assert (rows_of(target[0], "cls_subnet", "bias")[:, 1] == prior_bias(0.01)).all()
    assert rows_of(target[0], "cls_subnet", "weight")[:, 1].std() == pytest.approx(0.01, rel=0.2)
    row = table["classes"]
    assert (row.loaded, row.total) == (3, 4)
    for expected in ("traffic_light <- Traffic Light", "motorcycle <- motorbike", "new, start from the prior: dog"):
        assert expected in row.note


def test_rows_of_the_same_anchors_are_loaded_and_the_others_start_fresh() -> None:
    source = filled(["cat"])
    target = model(["cat"], anchors={"ratios": [0.5, 1.0, 3.0, 2.0]})
    fresh = {kind: rows_of(target[0], "box_subnet", kind).clone() for kind in ("weight", "bias")}
    table = transferred(source, target)
    for kind in ("weight", "bias"):
        for subnet in ("cls_subnet", "box_subnet"):
            old, new = rows_of(source[0], subnet, kind), rows_of(target[0], subnet, kind)
            assert torch.equal(new[:6], old[:6])
            assert torch.equal(new[9:], old[6:])  # ratio 2 has another index now
        assert torch.equal(rows_of(target[0], "box_subnet", kind)[6:9], fresh[kind][6:9])
    assert (table["anchors per cell"].loaded, table["anchors per cell"].total) == (9, 12)
    assert "start fresh" in table["anchors per cell"].note


@pytest.mark.parametrize(
    "settings",
    [
        {"compat": {"anchor_center_offset": 0.0}},
        {"compat": {"anchor_spacing": "grid"}},
        {"anchors": {"sizes": [20, 40, 80, 160, 320]}},
    ],
)
def test_no_rows_are_loaded_for_anchors_with_another_layout(settings: dict[str, Any]) -> None:
    source, target = filled(["cat"]), model(["cat"], **settings)
    table = transferred(source, target)
    assert (rows_of(target[0], "cls_subnet", "bias") == prior_bias(0.01)).all()
    assert table["anchors per cell"].loaded == table["classes"].loaded == 0
    assert table["backbone"].loaded == table["backbone"].total


def test_with_another_width_the_backbone_is_loaded_and_the_rest_reported() -> None:
    source, target = filled(["cat", "dog"]), model(["cat", "dog"], fpn_channels=16)
    table = transferred(source, target)
    assert table["backbone"].loaded == table["backbone"].total
    assert table["pyramid"].loaded == 0 < table["pyramid"].total
    assert "other shape" in table["pyramid"].note
    assert (rows_of(target[0], "cls_subnet", "bias") == prior_bias(0.01)).all()  # no bias without its weight
    assert table["anchors per cell"].loaded == table["classes"].loaded == 0
    assert "another width" in table["anchors per cell"].note


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({"backbone_weights": "imagenet", "norm": "frozen_bn"}, "set model.norm=bn"),
        ({"backbone_weights": "imagenet", "trainable_layers": 3}, "set model.trainable_layers=5"),
    ],
    ids=["frozen statistics", "frozen layers"],
)
def test_layers_that_would_stay_random_are_rejected(settings: dict[str, Any], remedy: str) -> None:
    source = filled(["cat"])
    weights = {k: v for k, v in source[0].state_dict().items() if not k.startswith("backbone.layer1")}
    target, classes = model(["cat"], **settings)
    with pytest.raises(WeightsError, match=remedy):
        transfer(target, weights, source="w", classes=classes, source_classes=classes, source_anchors=target.anchors)


def test_weights_that_fit_no_tensor_are_rejected() -> None:
    target, classes = model(["cat"])
    with pytest.raises(WeightsError, match="weights from w must fit the model, got no tensor that does"):
        transfer(
            target, some_tensors(), source="w", classes=classes, source_classes=classes, source_anchors=target.anchors
        )


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Traffic Light", "traffic_light"),
        ("motorbike", "Motorcycle"),
        ("TV-Monitor", "tv"),
        ("cell phone", "cellphone"),
    ],
)
def test_spellings_of_one_class_have_the_same_canonical_name(one: str, other: str) -> None:
    assert canonical_name(one) == canonical_name(other)


def test_names_without_letters_stay_distinct() -> None:
    assert canonical_name("+") != canonical_name("-")


def test_the_report_prints_as_a_table_with_all_notes() -> None:
    report = LoadReport("a/[b].pt", [LoadedPart("classes", 1, 2, "of the same name: [red]")])
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines[0] == ["weights", "loaded", "from", "a/[b].pt"]
    assert [word for word in lines[2] if word.isalpha()] == ["part", "loaded", "of", "note"]
    assert "classes 1 2 of the same name: [red]" in " ".join(w for line in lines for w in line if w not in "│┃")
