"""Checkpoints: the state of a run, written as complete files and read without running code from them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.atomic import atomic_file
from detector.cli import require_checkpoint
from detector.config import Config
from detector.config_formats import require_known
from detector.config_yaml import config_from_dict
from detector.errors import CheckpointError, WeightsError
from detector.json_text import parse_json
from detector.structures import Categories
from detector.text import printable, printable_lines
from detector.weights.foreign import import_detector, is_foreign, require_no_backbone
from detector.weights.import_facts import ImportOptions
from detector.weights.safe_load import read_content

FORMAT = 2
"""Format 1 has a config of format 1 (`detector.config_formats`)."""


@dataclass
class TrainState:
    """Exactly what a checkpoint holds.

    There is no state of random number generators: the order and the augmentation of the images are functions of the
    seed and the step, and the step itself draws no random numbers.
    """

    config: Config
    categories: Categories
    model: dict[str, Tensor]
    step: int
    """Optimizer steps done."""
    ema: dict[str, Tensor] | None = None
    optimizer: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None
    best_ap: float = -1.0
    evaluations_since_best: int = 0
    unlogged: Tensor | None = None
    """(n, 5) float32: the values of the steps since the last log record, which the next record includes."""
    finished: bool = False
    """Whether the run is complete (all steps, or early stopping)."""
    apply_exif: bool = True
    """Whether to apply EXIF orientations: False if the annotations of the training set did not follow them."""
    train_set: str = ""
    """Fingerprint of the training images and annotations."""
    evaluation_due: bool = False
    """Whether the last epoch is complete but not yet evaluated."""
    versions: dict[str, str] = field(default_factory=dict)
    """Versions and hardware on which results depend: torch, torchvision, threads, device."""
    alpha: list[float] | None = None
    """Weight of the positives of each class, where it was computed from the training set."""
    micro_batch: int | None = None
    """The size that `train.micro_batch: auto` determined; a resumed run uses it again."""
    fitting_micro_batch: int | None = None
    """Images per forward pass since a step ran out of memory and was repeated in smaller parts; also when resumed."""
    skipped_steps: list[int] = field(default_factory=list)
    """Steps (from 0) that were not finite and were left out (`train.on_nonfinite: skip`)."""
    origin: list[str] = field(default_factory=list)
    """Of imported weights: the framework and file they come from, and the assumptions of the import."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to evaluate and use: the EMA weights if there are any."""
        return self.ema if self.ema is not None else self.model


def save_checkpoint(state: TrainState, path: Path, *, previous: Path | None = None) -> None:
    """Write a complete checkpoint; the previous file is replaced only then.

    Args:
        state: to write.
        path: the file.
        previous: where the replaced file is kept; None: nowhere.

    Raises:
        RunError: the file cannot be written; the previous one is unchanged.
    """
    content = {
        "format": FORMAT,
        "config": state.config.model_dump_json(),
        "categories": {"ids": list(state.categories.ids), "names": list(state.categories.names)},
        **{k: v for k, v in vars(state).items() if k not in ("config", "categories")},
    }
    with atomic_file(path, single_writer=True, previous=previous) as file:
        torch.save(content, file)


def load_checkpoint(path: Path) -> TrainState:
    """Read a checkpoint, or another framework's RetinaNet, into main memory; no code in the file is run.

    Raises:
        CheckpointError: the file is missing or damaged, contains no detector, or has a newer format.
        WeightsError: another framework's detector cannot be imported.
    """
    require_checkpoint(path)
    try:
        content = read_content(path, mmap=True)  # mapped: reading only the config of a large file costs nothing
    except WeightsError as error:
        raise CheckpointError(str(error).replace("weights file", "checkpoint", 1)) from None
    if is_foreign(content):
        return import_checkpoint(path, content)
    require_no_backbone(content, path)
    if not isinstance(content, Mapping) or "format" not in content:
        raise CheckpointError(
            f"{path} must be a checkpoint written by tools/train.py, or a RetinaNet of torchvision, detectron2 or "
            f"mmdetection, got {type(content).__name__}"
        )
    require_known(content["format"], f"checkpoint {path}", newest=FORMAT, error=CheckpointError)
    try:
        rest = {k: v for k, v in content.items() if k not in ("format", "config", "categories")}
        wrong = [key for key, is_valid in _VALID.items() if key in rest and not is_valid(rest[key])]
        if wrong:
            raise ValueError(f"unexpected {', '.join(wrong)}")
        rest["origin"] = [printable(line, 500) for line in rest.get("origin", [])]
        categories = Categories(tuple(content["categories"]["ids"]), tuple(content["categories"]["names"]))
        config = config_from_dict(parse_json(content["config"].encode()), str(path))
        return TrainState(config=config, categories=categories, **rest)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # ConfigError and JsonError are ValueErrors
        reason = printable_lines(str(error), 3000)
        raise CheckpointError(f"checkpoint {path} was written by another version of this program: {reason}") from None


def _is_weights(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**53


def _is_list_of(*types: type) -> Callable[[object], bool]:
    return lambda value: isinstance(value, list) and all(type(item) in types for item in value)


_VALID: dict[str, Callable[[Any], bool]] = {
    "model": _is_weights,
    "ema": lambda value: value is None or _is_weights(value),
    "optimizer": lambda value: value is None or (
        isinstance(value, dict) and isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list)
    ),
    "scaler": lambda value: value is None or isinstance(value, dict),
    "step": _is_count,
    "evaluations_since_best": _is_count,
    "best_ap": lambda value: type(value) in (int, float) and -1 <= value <= 1,
    "unlogged": lambda value: value is None or (isinstance(value, Tensor) and value.dim() == 2),
    "train_set": lambda value: isinstance(value, str),
    "versions": lambda value: isinstance(value, dict) and _is_list_of(str)([*value, *value.values()]),
    "alpha": lambda value: value is None or _is_list_of(int, float)(value),
    "micro_batch": lambda value: value is None or _is_count(value),
    "fitting_micro_batch": lambda value: value is None or _is_count(value),
    "skipped_steps": _is_list_of(int),
    "origin": _is_list_of(str),
    **dict.fromkeys(("finished", "apply_exif", "evaluation_due"), lambda value: isinstance(value, bool)),
}  # fmt: skip
"""What the fields of a checkpoint may be, since a file may hold anything."""


def require_fitting_weights(state: TrainState) -> None:
    """Check that a network of a checkpoint's config is as large as its weights, before one is built.

    Raises:
        CheckpointError: the config describes another network, which could be of any size.
    """
    model, weights, num_classes = state.config.model, state.weights, len(state.categories)
    sides = max(len(size) if isinstance(size, tuple) else 1 for size in model.anchors.sizes)
    anchors = sides * len(model.anchors.octave_scales) * len(model.anchors.ratios)
    outputs = num_classes + (model.head.activation == "softmax")
    wanted = {
        "fpn.lateral.0.weight": model.fpn_channels,
        "cls_subnet.predictor.bias": anchors * outputs,
        "box_subnet.predictor.bias": anchors * 4,
    }
    wrong = [name for name, rows in wanted.items() if name not in weights or weights[name].shape[:1] != (rows,)]
    wide = model.head.channels or model.fpn_channels
    kernels = weights.get("cls_subnet.predictor.weight")
    wrong += ["cls_subnet.predictor.weight"] * (kernels is None or kernels.shape[1:2] != (wide,))
    if wrong or model.head.depth > len(weights):
        names = ", ".join(wrong) or "the towers of the subnets"
        raise CheckpointError(f"the checkpoint's weights do not fit the network that it describes: {names}")


def import_checkpoint(path: Path, content: Any = None, options: ImportOptions | None = None) -> TrainState:
    """Convert another framework's RetinaNet to a checkpoint's content.

    Args:
        path: the file.
        content: the file's content, if it was read already.
        options: facts that the file does not contain.

    Raises:
        WeightsError: the file cannot be imported.
    """
    imported = import_detector(path, content, options)
    settings: dict[str, Any] = {
        "model": imported.model.model_dump(),
        "postprocess": imported.postprocess.model_dump(),
    }
    if imported.min_max_size is not None:
        settings["data"] = {"min_size": imported.min_max_size[0], "max_size": imported.min_max_size[1]}
    return TrainState(
        config=config_from_dict(json.loads(json.dumps(settings)), str(path)),
        categories=imported.categories,
        model=imported.weights,
        step=0,
        origin=[f"weights of {imported.source}'s RetinaNet from {path.name}", *imported.notes],
    )
