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

from detector.config import Config, config_from_dict, flatten, with_model_of
from detector.datasets.coco import CocoDataset
from detector.engine.errors import RunError
from detector.models.foreign import Said, import_detector, is_foreign, require_no_backbone
from detector.models.reading import WeightsError, read_content
from detector.structures import Categories

FORMAT = 1


MAY_CHANGE_ON_RESUME = (
    "data.num_workers", "data.cache", "data.verify", "train.log_every", "train.checkpoint_every_steps", "train.images_every_epochs",
    "train.loss_images", "train.trace_steps", "train.init_from", "train.micro_batch", "train.checkpoint_activations", "eval.engine", "eval.batch_size",
    "eval.loss",
)  # fmt: skip
"""Settings that do not change what is computed, or (micro_batch) but for rounding, with a warning."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; `str` says which file, why and what to do."""


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


def state_to_resume(config: Config, output_dir: Path, resume: str | None) -> TrainState | None:
    """The state to go on from; None for a fresh start.

    Args:
        config: of the run that is about to go on.
        output_dir: of the run.
        resume: None, "auto" (`checkpoints/last.pt` if it exists) or a checkpoint.

    Raises:
        RunError: the folder holds a run that nobody asked to resume; or the settings differ, naming both values.
        CheckpointError: unreadable, or without an optimizer's state.
    """
    last = output_dir / "checkpoints" / "last.pt"
    if resume is None:
        if (output_dir / "config.yaml").exists() or last.exists():
            raise RunError(
                f"{output_dir} already holds a run; go on with it by --resume auto, or choose another --output-dir"
            )
        return None
    path = last if resume == "auto" else Path(resume)
    if resume == "auto" and not path.exists():
        return None
    state = load_checkpoint(path)
    if state.optimizer is None:
        raise CheckpointError(f"{path} holds weights only and cannot be resumed; use --init-from {path}")
    config = with_model_of(config, state.config)
    then, now = flatten(state.config.model_dump()), flatten(config.model_dump())
    keys = {**now, **then}  # of both: a section that is null on one side has its keys on the other only
    different = [k for k in keys if then.get(k) != now.get(k) and not k.startswith(MAY_CHANGE_ON_RESUME)]
    if different:
        raise RunError(
            "\n".join(
                [
                    f"--resume goes on with the run in {path}, whose settings must stay as they are, got:",
                    *(f"  {k}: {then.get(k)!r} in the checkpoint, {now.get(k)!r} in the config" for k in different),
                    f"For a new run that starts from these weights, use --init-from {path} and another --output-dir.",
                ]
            )
        )
    return state


def require_same_data(state: TrainState, train_set: CocoDataset) -> None:
    """Refuse to go on with other training data: steps, epochs and class names would no longer mean the same.

    Raises:
        RunError
    """
    then, now = state.categories.names, train_set.categories.names
    if then != now:
        raise RunError(
            f"--resume must find the training classes as they were, got {', '.join(now)} in {train_set.annotations}; the "
            f"run began with {', '.join(then)}; use --init-from and another --output-dir for the new ones"
        )
    if state.train_set and state.train_set != train_set.fingerprint():
        raise RunError(
            f"--resume must find the training set as it was, but the images or annotations of {train_set.annotations} have "
            "changed since the run began; put them back, or use --init-from and another --output-dir"
        )


def make_folder(path: Path) -> None:
    """Make a folder for results, with those above it, if it is not there.

    Raises:
        RunError: the file system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--output-dir must be a folder to write in, got {path}: {error.strerror}; choose another"
        ) from None


def write_json(content: Any, path: Path) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
