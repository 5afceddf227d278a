"""Determine which classes the outputs of an imported detector stand for."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from detector.errors import WeightsError
from detector.files import os_error_reason, read_bytes
from detector.json_text import parse_json
from detector.structures import Categories
from detector.text import printable, shown
from detector.weights.coco_classes import COCO, COCO_OUTPUTS
from detector.weights.import_facts import ImportedFacts, Source


def select_classes(weights: dict[str, Tensor], source: Source, facts: ImportedFacts) -> Categories:
    """Remove outputs that stand for no class (background, unused ids) from the class predictor, in place.

    Returns:
        The classes of the remaining outputs, in order.

    Raises:
        WeightsError: the classes are unknown, or their number differs from the outputs'.
    """
    num_outputs = len(weights["cls_subnet.predictor.bias"]) // 9
    if facts.options.categories is not None:
        outputs, categories = _given_classes(facts.options.categories, num_outputs, source, facts)
    elif source == "torchvision" and num_outputs == COCO_OUTPUTS:
        outputs, categories = list(COCO.ids), COCO
    else:
        outputs, categories = list(range(num_outputs)), _known_classes(num_outputs, source, facts)
    if outputs != list(range(num_outputs)):
        facts.notes.append(
            f"{num_outputs - len(outputs)} of {num_outputs} outputs removed, which stand for no class (background, "
            "unused ids)"
        )
        for parameter in ("weight", "bias"):
            name = f"cls_subnet.predictor.{parameter}"
            rows = torch.unflatten(weights[name], 0, (9, num_outputs))
            weights[name] = rows[:, outputs].flatten(0, 1).contiguous()
    return categories


def _known_classes(num_outputs: int, source: Source, facts: ImportedFacts) -> Categories:
    names = facts.class_names
    if names is not None and all(names) and len(names) == num_outputs:
        if len(set(names)) != len(names):
            raise WeightsError(
                f"{facts.path} must name each class once, got repeated names; give them with --categories"
            )
        return COCO if tuple(names) == COCO.names else Categories(tuple(range(1, num_outputs + 1)), tuple(names))
    if source != "torchvision" and num_outputs == len(COCO):
        return COCO
    raise WeightsError(
        f"{facts.path} has {num_outputs} outputs and does not contain the names of their classes; convert it with "
        "tools/convert_weights.py and --categories FILE.json (a COCO file) or --categories NAME,NAME,..."
    )


def _given_classes(option: str, num_outputs: int, source: Source, facts: ImportedFacts) -> tuple[list[int], Categories]:
    """Outputs and names of the classes given by --categories."""
    if option.endswith(".json"):
        categories = _read_categories(Path(option))
        # torchvision's reference scripts use COCO's category ids as labels
        if source == "torchvision" and num_outputs == max(categories.ids) + 1 and min(categories.ids) >= 0:
            return list(categories.ids), categories
    elif os.path.exists(option):
        raise WeightsError(f"--categories must be a .json file or names separated by commas, got the file {option}")
    else:
        names = tuple(name.strip() for name in option.split(","))
        if not all(names) or len(set(names)) != len(names):
            raise WeightsError(
                f"--categories must be a COCO file or different names separated by commas, got {shown(option)}"
            )
        categories = Categories(tuple(range(1, len(names) + 1)), names)
    if len(categories) == num_outputs:
        return list(range(num_outputs)), categories
    if source == "torchvision" and len(categories) == num_outputs - 1:  # the first output is the background
        return list(range(1, num_outputs)), categories
    background = ", or one less if the first output is the background" if source == "torchvision" else ""
    raise WeightsError(
        f"--categories must name {num_outputs} classes for {facts.path}{background}, got {len(categories)}"
    )


def _read_categories(path: Path) -> Categories:
    try:
        entries = parse_json(read_bytes(path))["categories"]
        pairs = sorted((entry["id"], entry["name"]) for entry in entries)
        return Categories(tuple(i for i, _ in pairs), tuple(name for _, name in pairs))
    except OSError as error:
        raise WeightsError(f"--categories {path} cannot be read: {os_error_reason(error)}") from None
    except (ValueError, LookupError, TypeError) as error:
        raise WeightsError(
            f"--categories {path} must be a COCO file with categories of different ids: {printable(str(error), 500)}"
        ) from None
