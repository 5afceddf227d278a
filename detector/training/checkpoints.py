"""The checkpoints of a run folder: the last ones and the best, written so that a good one always exists.

`checkpoints/` holds `last.pt`, the ones before it (`last-1.pt`, `last-2.pt`, ...), `best.pt`, all complete, and
`model.pt`, the weights of `best.pt` without what only training needs.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from detector import distributed
from detector.checkpoint import TrainState, load_checkpoint, save_checkpoint
from detector.errors import CheckpointError, Interrupted, RunError
from detector.training.step import Learner

LAST, BEST, MODEL = "last.pt", "best.pt", "model.pt"

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 10.0
"""Seconds between attempts to write; the pause doubles from one to the next."""
HURRIED_TIMEOUT = 10.0
"""Seconds for further attempts from a signal on: those who send one kill the process soon."""


_LASTING = (errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)
"""Errors that no waiting ends."""


def checkpoint_folder(output_dir: Path) -> Path:
    """The folder of a run's checkpoints."""
    return output_dir / "checkpoints"


def resumable(output_dir: Path) -> list[Path]:
    """The checkpoints that a run can be resumed from, the newest first."""
    folder = checkpoint_folder(output_dir)
    before = sorted(folder.glob("last-*.pt"), key=lambda path: (len(path.name), path.name))
    return [path for path in (folder / LAST, *before, folder / BEST) if os.path.lexists(path)]


def load_newest(output_dir: Path) -> tuple[TrainState, Path, list[str]] | None:
    """Load the newest undamaged checkpoint of a run; None if it has none.

    Returns:
        The state, its file, and a warning for each newer checkpoint, which is damaged.

    Raises:
        CheckpointError: all of them are damaged.
    """
    paths, damaged = resumable(output_dir), []
    for path in paths:
        try:
            state = load_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        return (
            state,
            path,
            [f"{reason}; resuming from {path.name} of step {state.step:,} instead" for reason in damaged],
        )
    if not paths:
        return None
    raise CheckpointError(
        "\n".join(
            [
                f"no checkpoint in {checkpoint_folder(output_dir)} can be read:",
                *(f"  {reason}" for reason in damaged),
                "Restore one from a backup, or start again in another --output-dir.",
            ]
        )
    )


def set_aside_damaged(output_dir: Path) -> None:
    """Rename a damaged `last.pt`, so that the next checkpoint does not keep it in place of a good one."""
    path = checkpoint_folder(output_dir) / LAST
    if path.exists():
        path.replace(path.with_suffix(".damaged"))


def holds_best(output_dir: Path) -> bool:
    """Whether a run has its best weights."""
    return any((checkpoint_folder(output_dir) / name).exists() for name in (BEST, MODEL))


def load_best(output_dir: Path, *, warn: Callable[[str], None]) -> TrainState:
    """Load the best weights: `best.pt` or, if it is missing or damaged, `model.pt`.

    Raises:
        CheckpointError: both are.
    """
    folder = checkpoint_folder(output_dir)
    try:
        return load_checkpoint(folder / BEST)
    except CheckpointError as error:
        warn(f"{error}; {MODEL} is used instead")
        return load_checkpoint(folder / MODEL)


def save_last(state: TrainState, output_dir: Path, *, keep: int) -> None:
    """Write `last.pt`; the previous `keep` - 1 checkpoints remain as `last-1.pt`, `last-2.pt`, ...

    Raises:
        RunError: the file system refuses; all older checkpoints are unchanged.
    """
    folder = checkpoint_folder(output_dir)
    for number in range(keep - 1, 1, -1) if (folder / LAST).exists() else ():
        newer = folder / f"last-{number - 1}.pt"
        if newer.exists():
            newer.replace(folder / f"last-{number}.pt")
    save_checkpoint(state, folder / LAST, previous=folder / "last-1.pt" if keep > 1 else None)


def save_best(state: TrainState, output_dir: Path) -> None:
    """Write `best.pt` and `model.pt`.

    Raises:
        RunError: the file system refuses.
    """
    folder = checkpoint_folder(output_dir)
    save_checkpoint(state, folder / BEST)
    save_checkpoint(weights_only(state), folder / MODEL)


def weights_only(state: TrainState) -> TrainState:
    """The state for evaluation, prediction and fine-tuning: the weights to use (EMA, if any), and no optimizer."""
    return replace(state, model=state.weights, ema=None, optimizer=None, scaler=None, unlogged=None)


def write_with_retries(
    write: Callable[[], None],
    *,
    timeout: float,
    saved_step: int | None,
    warn: Callable[[str], None],
    hurry: Callable[[], bool] = lambda: False,
) -> None:
    """Call a function that writes files, again and again where the file system refuses for a reason that may pass.

    Args:
        write: raises RunError where it cannot write.
        timeout: seconds after which no further attempt is made.
        saved_step: step of the last complete checkpoint; None: there is none.
        warn: called with a warning after the first failed attempt.
        hurry: whether there is little time, because a signal asked the process to end.

    Raises:
        RunError: none of the attempts succeeded; the message states which checkpoint is safe.
    """
    deadline = time.monotonic() + timeout
    pause, hurries = FIRST_PAUSE, False
    while True:
        try:
            return write()
        except RunError as error:
            if hurry() and not hurries:
                hurries, deadline = True, min(deadline, time.monotonic() + HURRIED_TIMEOUT)
            remaining = deadline - time.monotonic()
            lasts = isinstance(error.__cause__, OSError) and error.__cause__.errno in _LASTING
            if remaining <= 0 or lasts:
                safe = "no checkpoint was saved before"
                if saved_step is not None:
                    safe = f"the checkpoint of step {saved_step:,} is safe"
                tried = f"; tried for {timeout:g} s (train.save_timeout)" if remaining <= 0 else ""
                raise RunError(f"{error}{tried}; {safe}") from error
            if pause == FIRST_PAUSE:
                warn(f"{error}; trying again for {timeout:g} s")
            next_attempt = time.monotonic() + min(pause, remaining)
            while time.monotonic() < next_attempt and (hurries or not hurry()):
                time.sleep(min(0.1, pause))
            pause = min(2 * pause, LONGEST_PAUSE)


@contextlib.contextmanager
def how_to_resume(output_dir: Path) -> Iterator[None]:
    """Add to any error that ends a run which checkpoint it resumes from."""
    try:
        yield
    except Interrupted:
        raise  # states it already
    except BaseException as error:
        paths = resumable(output_dir) if distributed.rank() == 0 else []
        if paths:
            error.add_note(f"the last checkpoint is {paths[0]}; continue with --resume auto")
        raise


def require_room(output_dir: Path, learner: Learner, *, optimizer: str, keep: int) -> None:
    """Check that the disk has room for the checkpoints of a run.

    Args:
        output_dir: the run's folder, which exists.
        learner: determines the size of a checkpoint.
        optimizer: "sgd", which keeps one moment per trained weight, or "adamw", which keeps two.
        keep: number of last checkpoints.

    Raises:
        RunError: it has not; the message gives the figures.
    """
    tensors: list[Tensor] = [*learner.model.state_dict().values()]
    weights = sum(t.numel() * t.element_size() for t in tensors)
    trained = sum(p.numel() * p.element_size() for p in learner.model.parameters() if p.requires_grad)
    full = weights * (2 if learner.ema is not None else 1) + trained * {"sgd": 1, "adamw": 2}[optimizer]
    needed = full * (keep + 2) + weights  # the last ones, the best, one that is being written, and model.pt
    folder = checkpoint_folder(output_dir)
    existing = sum(path.lstat().st_size for path in folder.glob("*.pt"))
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if needed > free + existing:
        fewer = ", set train.keep_checkpoints=1" if keep > 1 else ""
        raise RunError(
            f"the run's checkpoints need {needed / 1e9:.2f} GB in {folder}, and only {(free + existing) / 1e9:.2f} GB "
            f"are free; free disk space{fewer}, or choose another --output-dir"
        )
