"""Which runs may be resumed, and with which settings changed."""

from __future__ import annotations

from pathlib import Path

from detector.checkpoint import TrainState, load_checkpoint
from detector.config import Config, config_differences
from detector.config_yaml import with_model_of
from detector.datasets.coco import CocoDataset
from detector.errors import CheckpointError, RunError

MAY_CHANGE_ON_RESUME = (
    "data.num_workers", "data.cache", "data.verify", "train.log_every", "train.checkpoint_every_steps",
    "train.images_every_epochs", "train.loss_every_epochs", "train.loss_images", "train.trace_steps", "train.init_from",
    "train.micro_batch", "train.checkpoint_activations", "eval.engine", "eval.batch_size", "eval.loss",
)  # fmt: skip
"""Settings that do not change what is computed; micro_batch changes its rounding, with a warning."""


def state_to_resume(config: Config, output_dir: Path, resume: str | None) -> TrainState | None:
    """Load the state to resume from; None for a fresh run.

    Args:
        config: of the run to continue.
        output_dir: the run's folder.
        resume: None, "auto" (`checkpoints/last.pt` if it exists) or a checkpoint.

    Raises:
        RunError: the folder holds a run and `resume` is None; or settings differ (the message gives both values).
        CheckpointError: it cannot be read, or has no optimizer state.
    """
    last = output_dir / "checkpoints" / "last.pt"
    if resume is None:
        if (output_dir / "config.yaml").exists() or last.exists():
            raise RunError(
                f"{output_dir} already holds a run; continue it with --resume auto, or choose another --output-dir"
            )
        return None
    path = last if resume == "auto" else Path(resume)
    if resume == "auto" and not path.exists():
        return None
    state = load_checkpoint(path)
    if state.optimizer is None:
        raise CheckpointError(f"{path} holds weights only and cannot be resumed; use --init-from {path}")
    differences = [
        f"  {key}: {then!r} in the checkpoint, {now!r} in the config"
        for key, now, then in config_differences(with_model_of(config, state.config), state.config)
        if not key.startswith(MAY_CHANGE_ON_RESUME)
    ]
    if differences:
        raise RunError(
            "\n".join(
                [
                    f"--resume continues the run in {path}, whose settings must not change, got:",
                    *differences,
                    f"For a new run that starts from these weights, use --init-from {path} and another --output-dir.",
                ]
            )
        )
    return state


def require_same_data(state: TrainState, train_set: CocoDataset) -> None:
    """Check that the training data did not change: steps, epochs and class names would have another meaning.

    Raises:
        RunError: classes, images or annotations differ.
    """
    then, now = state.categories.names, train_set.categories.names
    if then != now:
        raise RunError(
            f"--resume needs the same training classes, got {', '.join(now)} in {train_set.annotations}; the "
            f"run was started with {', '.join(then)}; for new classes use --init-from and another --output-dir"
        )
    if state.train_set and state.train_set != train_set.fingerprint():
        raise RunError(
            f"--resume needs the same training set, but the images or annotations of {train_set.annotations} have "
            "changed since the run was started; restore them, or use --init-from and another --output-dir"
        )
