"""Checkpoints: what a run is made of, written so that nothing can be half there and read so that nothing can run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.config import Config
from detector.config_yaml import config_from_dict
from detector.errors import CheckpointError, WeightsError
from detector.structures import Categories
from detector.weights.foreign import import_detector, is_foreign, require_no_backbone
from detector.weights.name_maps import Said
from detector.weights.safe_load import read_content

FORMAT = 1


@dataclass
class TrainState:
    """Exactly what a checkpoint holds. Nothing random is among it: the order and the augmentation of every step are
    functions of the seed and the step, and the step itself draws no random numbers."""

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
    """(n, 5) what the steps since the last record of the log add to the next one."""
    finished: bool = False
    """Whether the run came to its end (all steps, or early stopping)."""
    apply_exif: bool = True
    """Whether pictures are to be turned as their EXIF says: not if those it was trained on had orientations that their
    annotations did not follow."""
    train_set: str = ""
    """Fingerprint of the training images and annotations."""
    evaluation_due: bool = False
    """Whether an epoch was finished but not yet evaluated."""
    versions: dict[str, str] = field(default_factory=dict)
    """Of what decides the numbers: torch, torchvision, threads, device."""
    alpha: list[float] | None = None
    """Weights of positives by class, where they were counted from the training set."""
    micro_batch: int | None = None
    """What `train.micro_batch: auto` found, so that a resumed run computes as before."""
    origin: list[str] = field(default_factory=list)
    """Of imported weights: whose they are, and what was assumed about them."""

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is evaluated and used: the averaged weights where there are any."""
        return self.ema if self.ema is not None else self.model


def save_checkpoint(state: TrainState, path: Path) -> None:
    """Write to a temporary file, flush it to disk, rename: the previous file survives until the new one is whole.

    Raises:
        CheckpointError: the disk refuses; the previous file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")  # always this name, so that a killed process's is replaced
    content = {
        "format": FORMAT,
        "config": state.config.model_dump_json(),
        "categories": {"ids": list(state.categories.ids), "names": list(state.categories.names)},
        **{k: v for k, v in vars(state).items() if k not in ("config", "categories")},
    }
    try:
        with temporary.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"checkpoint {path} cannot be written: {error}; the previous one is untouched") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> TrainState:
    """Read a checkpoint into main memory, ours or another program's RetinaNet; nothing in the file is ever run.

    Raises:
        CheckpointError: missing, broken, or no detector.
        WeightsError: another program's that cannot be taken over.
    """
    if not path.is_file():
        near = sorted(path.parent.glob("**/*.pt"))[:3] if path.parent.is_dir() else []
        hint = f"; there is {', '.join(map(str, near))}" if near else ""
        raise CheckpointError(f"checkpoint {path} does not exist{hint}")
    try:
        # mapped, so that reading a large file for its config costs nothing
        content = read_content(path, mmap=True)
    except WeightsError as error:
        raise CheckpointError(str(error).replace("weights file", "checkpoint", 1)) from None
    if is_foreign(content):
        return import_checkpoint(path, content)
    require_no_backbone(content, path)
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} must be a checkpoint written by tools/train.py (format {FORMAT}), or a RetinaNet of torchvision, "
            "detectron2 or mmdetection, got "
            f"{'format ' + str(content.get('format')) if isinstance(content, Mapping) else type(content).__name__}"
        )
    try:
        rest = {k: v for k, v in content.items() if k not in ("format", "config", "categories")}
        categories = Categories(tuple(content["categories"]["ids"]), tuple(content["categories"]["names"]))
        config = config_from_dict(json.loads(content["config"]), str(path))
        return TrainState(config=config, categories=categories, **rest)
    except (KeyError, TypeError, ValueError) as error:  # ConfigError and JSONDecodeError are ValueErrors
        raise CheckpointError(f"checkpoint {path} is of another version of this program: {error}") from None


def import_checkpoint(path: Path, content: Any = None, said: Said | None = None) -> TrainState:
    """Another program's RetinaNet as if it were a checkpoint of ours.

    Args:
        path: of the file.
        content: of the file, if it was read already.
        said: about it.

    Raises:
        WeightsError: it cannot be taken over.
    """
    imported = import_detector(path, content, said)
    settings: dict[str, Any] = {
        "model": imported.model.model_dump(),
        "postprocess": imported.postprocess.model_dump(),
    }
    if imported.sizes is not None:
        settings["data"] = {"min_size": imported.sizes[0], "max_size": imported.sizes[1]}
    return TrainState(
        config=config_from_dict(json.loads(json.dumps(settings)), str(path)),
        categories=imported.categories,
        model=imported.weights,
        step=0,
        origin=[f"weights of {imported.source}'s RetinaNet from {path.name}", *imported.notes],
    )
