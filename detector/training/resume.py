"""Which runs may be resumed, and with which settings changed."""

from __future__ import annotations

from pathlib import Path

from detector.checkpoint import TrainState, load_checkpoint
from detector.config import Config, flatten
from detector.config_yaml import with_model_of
from detector.datasets.coco import CocoDataset
from detector.errors import CheckpointError, RunError

MAY_CHANGE_ON_RESUME = (
    "data.num_workers", "data.cache", "data.verify", "train.log_every", "train.checkpoint_every_steps", "train.images_every_epochs",
    "train.loss_images", "train.trace_steps", "train.init_from", "train.micro_batch", "train.checkpoint_activations", "eval.engine", "eval.batch_size",
    "eval.loss",
)  # fmt: skip
"""Settings that do not change what is computed, or (micro_batch) but for rounding, with a warning."""


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
