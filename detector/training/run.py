"""A run: what it consists of, how it is opened, and what is saved of it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detector import distributed
from detector.atomic import make_folder, read_json, remove_leftovers, write_text
from detector.checkpoint import TrainState, load_checkpoint
from detector.config import Config, with_micro_batch
from detector.config_yaml import to_yaml, with_model_of
from detector.datasets.coco import CocoDataset
from detector.datasets.opening import open_datasets
from detector.datasets.sampling import TrainSampler
from detector.errors import Interrupted, RunError, WorkerError
from detector.evaluation.self_check import self_check
from detector.reports.records import require_metrics
from detector.structures import Batch
from detector.training.checkpoints import (
    BEST,
    checkpoint_folder,
    require_room,
    save_best,
    save_last,
    set_aside_damaged,
    write_with_retries,
)
from detector.training.compile import compile_if_worth_it
from detector.training.image_cache import enable_image_cache
from detector.training.log_window import LogWindow
from detector.training.logger import RunLog
from detector.training.micro_batch import resolve_micro_batch
from detector.training.nonfinite import NonfiniteSteps
from detector.training.optim import current_lr, lr_of_step, set_lr
from detector.training.preflight import data_warnings, first_loss_check, require_settings, summarize
from detector.training.profiler import StepProfiler
from detector.training.resume import require_same_data, state_to_resume
from detector.training.setup import build_learner, numeric_versions, warn_if_not_bit_identical
from detector.training.signals import StopRequest, agree_to_stop
from detector.training.step import Learner, StepResult
from detector.training.step_reader import StepReader, build_planner, build_training_data


@dataclass
class Run:
    """What a run consists of between its first and its last step."""

    config: Config
    output_dir: Path
    train_set: CocoDataset
    val_set: CocoDataset | None
    test_set: CocoDataset | None
    learner: Learner
    reader: StepReader
    state: TrainState
    """Written to every checkpoint; `snapshot` fills in its tensors."""
    log: RunLog
    window: LogWindow
    nonfinite: NonfiniteSteps
    profiler: StepProfiler
    stop: StopRequest
    saved_step: int | None
    """Step of the last complete checkpoint."""

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.reader.sampler.planner.steps_per_epoch

    def remaining_epochs(self) -> range:
        """The epochs that are not finished, from 0; an epoch of which only the evaluation is due is among them."""
        first = self.state.step // self.steps_per_epoch - int(self.state.evaluation_due)
        return range(first, self.config.train.epochs)

    def remaining_steps(self, epoch: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of every step of an epoch that is not done."""
        self.window.start_clock()
        try:
            yield from self.reader.steps(epoch, first=self.state.step)
        except WorkerError:  # between two steps, so that none is lost
            if distributed.world_size() == 1:
                self.save()
            raise

    def stop_if_requested(self) -> None:
        """Save and stop if any process received a signal.

        Raises:
            Interrupted: on all processes before the same step.
            DatasetError: too many images of the epoch became unreadable.
        """
        signum = agree_to_stop(self.stop, self.reader)
        if signum is not None:
            self.save()
            distributed.barrier()  # torchrun ends all as soon as one exits, so none may exit while rank 0 writes
            raise Interrupted(signum)

    def schedule_lr(self) -> None:
        """Set the learning rate of the next step."""
        total_steps, batch_size = self.reader.sampler.total_steps, self.config.train.batch_size
        set_lr(self.learner.optimizer, lr_of_step(self.state.step, total_steps, self.config.optim, batch_size))

    def record_step(self, result: StepResult, micro_batches: list[Batch]) -> None:
        """Add a step to the log window before its update; check the first loss, and on a CPU that all is finite.

        Raises:
            DivergedError: see `NonfiniteSteps.notice`. (On a GPU only the next log record notices it, without a sync
                point at every step.)
        """
        if self.state.step == 0 and self.config.train.init_from is None:
            check = first_loss_check(
                self.config.model.head, self.learner.loss, micro_batches, result, len(self.state.categories)
            )
            if check is not None:
                (self.log.info if check.agrees else self.log.warn)(check.text)
        self.window.add(result, waited=self.reader.wait)
        if self.learner.device.type == "cpu":  # no sync to wait for
            self.nonfinite.notice(self.window, last_step=self.state.step)

    def finish_step(self) -> None:
        """Count a step; log and save when they are due."""
        state, sampler = self.state, self.reader.sampler
        state.step += 1
        self.log.advance(state.step)
        report = self.profiler.step()
        if report is not None:
            self.log.info(report)
            self.window.start_clock()  # writing the trace is no part of a step
        if state.step % self.config.train.log_every == 0 or state.step == sampler.total_steps:
            self.nonfinite.notice(self.window, last_step=state.step - 1)
            lr = current_lr(self.learner.optimizer)
            record = self.window.record(step=state.step, steps_per_epoch=self.steps_per_epoch, lr=lr)
            if record is not None:  # else all steps were skipped, and the next record includes them
                self.log.step(record)
                self.window = LogWindow(self.learner.device)
        every = self.config.train.checkpoint_every_steps
        if every is not None and state.step % every == 0 and state.step % self.steps_per_epoch:
            self.save()  # the last step of an epoch is saved with its evaluation due, which a resumed run must not skip

    def evaluates_after(self, epoch: int) -> bool:
        """Whether an evaluation follows an epoch (from 0); the last epoch is always evaluated, if there is data.val."""
        last = epoch + 1 == self.config.train.epochs
        return self.val_set is not None and (last or (epoch + 1) % self.config.eval.every_epochs == 0)

    def finishes_after(self, epoch: int) -> bool:
        """Whether an epoch (from 0) is the last one, by number or by early stopping, which is logged."""
        patience = self.config.train.early_stop_patience
        if epoch + 1 == self.config.train.epochs:
            return True
        if patience is None or self.state.evaluations_since_best < patience:
            return False
        self.log.info(f"stopped early: {patience} evaluations without a better AP")
        return True

    def snapshot(self) -> TrainState:
        """The content of a checkpoint, as of now.

        Raises:
            DivergedError: a weight or a step is not finite.
        """
        learner, state = self.learner, self.state
        self.nonfinite.notice(self.window, last_step=state.step - 1)
        self.nonfinite.require_finite_weights(self.window)
        state.model = learner.model.state_dict()
        state.ema = learner.ema.model.state_dict() if learner.ema is not None else None
        state.optimizer = learner.optimizer.state_dict()
        state.scaler = learner.scaler.state_dict()
        state.unlogged = torch.stack(self.window.steps) if self.window.steps else None
        return state

    def save(self) -> None:
        """Write last.pt (on the first process). Raises RunError where the file system refuses for too long."""
        state, keep = self.snapshot(), self.config.train.keep_checkpoints
        self.write(lambda: save_last(state, self.output_dir, keep=keep))
        self.saved_step = state.step

    def save_best(self) -> None:
        """Write best.pt and model.pt (on the first process). Raises RunError where the file system refuses for too
        long."""
        state = self.snapshot()
        self.write(lambda: save_best(state, self.output_dir))

    def write(self, write: Callable[[], None]) -> None:
        """Call a function that writes results (on the first process), repeatedly where the file system refuses.

        Raises:
            RunError: it refuses for longer than `train.save_timeout`.
        """
        if distributed.rank() == 0:
            write_with_retries(
                write, timeout=self.config.train.save_timeout, saved_step=self.saved_step, warn=self.log.warn,
                hurry=lambda: self.stop.signum is not None,
            )  # fmt: skip


def load_states(
    config: Config, output_dir: Path, resume: str | None
) -> tuple[Config, TrainState | None, TrainState | None]:
    """Load the checkpoint to resume and the one that gives the network, if any.

    Returns:
        The config with the model settings of the checkpoint filled in; the state to resume; the state that the network
        comes from (the same, or that of `train.init_from`).

    Raises:
        RunError, CheckpointError, WeightsError, ConfigError
    """
    state, warnings = state_to_resume(config, output_dir, resume)
    source = state
    if source is None and config.train.init_from is not None:
        source = load_checkpoint(Path(config.train.init_from))
    if source is not None:
        config = with_model_of(config, source.config)
    distributed.barrier()  # all have checked the folder before the first writes what would make the others refuse
    if warnings and distributed.rank() == 0:
        print("\n".join(f"warning: {warning}" for warning in warnings), file=sys.stderr)
        set_aside_damaged(output_dir)
    return config, state, source


@contextlib.contextmanager
def open_run(
    config: Config,
    output_dir: Path,
    *,
    resumed: TrainState | None,
    source: TrainState | None,
    device: torch.device,
    stop: StopRequest,
) -> Iterator[Run]:
    """Open the data, build everything, report it, and check that a step will work; config.yaml is written last.

    Args:
        config: of the run, from `load_states`.
        output_dir: its folder.
        resumed, source: from `load_states`.
        device: to train on.
        stop: whether a signal asked the run to stop.

    Raises:
        RunError, ConfigError, DatasetError, WeightsError: user errors, before anything that looks like a run is
            written.
    """
    is_main = distributed.rank() == 0
    require_settings(config, fresh=source is None)
    if is_main:
        make_folder(checkpoint_folder(output_dir))
        for folder in (output_dir, checkpoint_folder(output_dir)):
            remove_leftovers(folder)
    train_set, val_set, test_set = open_datasets(config, output_dir, quiet=not is_main)
    if resumed is not None:
        require_same_data(resumed, train_set)
    planner = build_planner(config, train_set)
    total_steps = config.train.epochs * planner.steps_per_epoch
    origin = source.origin if source is not None else []
    state = resumed or TrainState(config, train_set.categories, {}, step=0, origin=origin)
    log = RunLog(
        output_dir, start_step=state.step, total_steps=total_steps, evaluation_due=state.evaluation_due, enabled=is_main
    )
    try:
        learner = build_learner(
            config, train_set, state, resumed=resumed is not None, source=source, device=device, log=log
        )
        if resumed is not None:
            if not (checkpoint_folder(output_dir) / BEST).exists():  # resumed from a file into a new folder
                state.best_ap, state.evaluations_since_best = -1.0, 0
            warn_if_not_bit_identical(state, config, device, log)
        state.config, state.versions = config, numeric_versions(device)
        state.apply_exif, state.train_set = not train_set.overrides_exif, train_set.fingerprint()
        others = [dataset for dataset in (val_set, test_set) if dataset is not None]
        for dataset in (train_set, *others):
            log.info(dataset.summary())
        summarize(config, learner, planner, log, step=state.step, total_steps=total_steps)
        for line in data_warnings(learner.model.anchors, train_set, others, config):
            log.warn(line)
        if val_set is not None and state.step == 0:
            log.info(self_check(learner.model, learner.loss, val_set, config, device=device))
        training_data = build_training_data(train_set, config)
        if config.data.cache_gb:
            log.info(enable_image_cache(training_data, config.data))
        micro_batch = resolve_micro_batch(config, learner, state, planner, training_data, log)
        sampler = TrainSampler(
            planner, state.step, total_steps, micro_batch=micro_batch, rank=distributed.rank(),
            world_size=distributed.world_size(),
        )  # fmt: skip
        compile_if_worth_it(config.train.compile, learner, planner, log, steps=total_steps - state.step)
        if is_main:
            require_room(output_dir, learner, optimizer=config.optim.name, keep=config.train.keep_checkpoints)
        if val_set is None and config.train.early_stop_patience is not None:
            log.warn("train.early_stop_patience has no effect without data.val")
        reader = StepReader(
            training_data, sampler, num_workers=config.data.num_workers, worker_timeout=config.data.worker_timeout,
            device=device,
        )  # fmt: skip
        if is_main:  # only now, so that an error above leaves nothing that looks like a run
            write_text(to_yaml(config), output_dir / "config.yaml")
        trace_steps = config.train.trace_steps if is_main else 0
        yield Run(
            with_micro_batch(config, micro_batch),
            output_dir,
            train_set,
            val_set,
            test_set,
            learner,
            reader,
            state,
            log,
            LogWindow(device, state.unlogged),
            NonfiniteSteps(output_dir, learner=learner, reader=reader, state=state, log=log),
            StepProfiler(trace_steps, output_dir / "trace.json.gz", device),
            stop,
            saved_step=resumed.step if resumed is not None else None,
        )
    finally:
        log.close()


def finished_metrics(output_dir: Path) -> dict[str, Any]:
    """Read the metrics.json of a finished run.

    Raises:
        RunError: there is none, or it is damaged.
    """
    path = output_dir / "metrics.json"
    if not path.exists():
        raise RunError(
            f"the run to resume is finished, and {path} does not exist: its results are in its own folder; evaluate it "
            "with tools/eval.py, or start from its weights with --init-from"
        )
    try:
        metrics: dict[str, Any] = read_json(path)
        if not isinstance(metrics, dict) or "AP" in metrics:  # without data.val, it holds only that of a test
            require_metrics(metrics, path)
    except RunError as error:
        best = checkpoint_folder(output_dir) / BEST
        raise RunError(f"{error}; the weights are safe: evaluate {best} with tools/eval.py") from None
    return metrics
