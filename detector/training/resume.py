"""Which runs may be resumed, and with which settings changed."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

from detector.checkpoint import TrainState, load_checkpoint
from detector.config import Config, config_differences
from detector.config_yaml import with_model_of
from detector.datasets.coco import CocoDataset
from detector.errors import CheckpointError, RunError
from detector.training.checkpoints import load_newest, resumable

MAY_CHANGE_ON_RESUME = (
    "data.num_workers", "data.worker_timeout", "data.cache", "data.verify", "train.rank_timeout", "train.log_every",
    "train.checkpoint_every_steps", "train.keep_checkpoints", "train.save_timeout", "train.on_nonfinite",
    "train.max_skipped_steps", "train.images_every_epochs", "train.loss_every_epochs", "train.loss_images",
    "train.trace_steps", "train.init_from", "train.micro_batch", "train.checkpoint_activations", "eval.engine",
    "eval.batch_size", "eval.loss",
)  # fmt: skip
"""Settings that do not change what is computed; micro_batch changes its rounding, with a warning."""


def holds_run(folder: Path) -> bool:
    """Whether a folder holds a run, which a new one must not overwrite."""
    return (folder / "config.yaml").exists() or bool(resumable(folder))


def place_run(folder: Path, *, is_default: bool, resume: str | None) -> tuple[Path, str | None]:
    """Choose the folder of a run and what it resumes, before anything is read or written.

    A fresh run for which the user named no folder goes to `folder-2`, `folder-3`, ... where `folder` holds a run
    already. A process that torchrun restarted after a failure resumes from the run's last checkpoint.

    Args:
        folder: the run's folder.
        is_default: whether the user named no folder.
        resume: what the user asked to resume: None, "auto" or a checkpoint.

    Returns:
        The folder, and what to resume.

    Raises:
        RunError: torchrun may restart the run, and a restarted process could not know the folder.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if restarted:
        return folder, "auto" if resume is None or resumable(folder) else resume
    if not is_default or resume is not None or not holds_run(folder):
        return folder, resume
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0:
        raise RunError(f"--output-dir must be given with torchrun --max-restarts, because {folder} holds a run already")
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in itertools.count(2))
    return next(path for path in numbered if not holds_run(path)), None


def state_to_resume(config: Config, output_dir: Path, resume: str | None) -> tuple[TrainState | None, list[str]]:
    """Load the state to resume from; None for a fresh run. Also return a warning for each newer, damaged checkpoint.

    Args:
        config: of the run to continue.
        output_dir: the run's folder.
        resume: None, "auto" (the newest undamaged checkpoint of the folder, if it has any) or a checkpoint.

    Raises:
        RunError: the folder holds a run and `resume` is None; or settings differ (the message gives both values).
        CheckpointError: it cannot be read, or has no optimizer state.
    """
    if resume is None:
        if holds_run(output_dir):
            raise RunError(
                f"{output_dir} already holds a run; continue it with --resume auto, or choose another --output-dir"
            )
        return None, []
    path = Path(resume)
    warnings: list[str] = []
    if resume == "auto":
        newest = load_newest(output_dir)
        if newest is None:
            return None, []
        state, path, warnings = newest
    else:
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
    return state, warnings


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
