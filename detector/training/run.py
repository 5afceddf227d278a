"""A run: what it consists of, how it is opened, and what is saved of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from detector import distributed
from detector.atomic import make_folder, read_json, write_text
from detector.checkpoint import TrainState, load_checkpoint, save_checkpoint
from detector.config import Config, with_micro_batch
from detector.config_yaml import to_yaml, with_model_of
from detector.datasets.coco import CocoDataset
from detector.datasets.opening import open_datasets
from detector.datasets.sampling import TrainSampler
from detector.errors import DivergedError, Interrupted, RunError
from detector.evaluation.self_check import self_check
from detector.structures import Batch
from detector.training.compile import compile_if_worth_it
from detector.training.image_cache import enable_image_cache
from detector.training.log_window import LogWindow
from detector.training.logger import RunLog
from detector.training.micro_batch import resolve_micro_batch
from detector.training.optim import current_lr, lr_factor, scaled_lr, set_lr
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
    profiler: StepProfiler

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
        yield from self.reader.steps(epoch, first=self.state.step)

    def stop_if_requested(self, request: StopRequest) -> None:
        """Save and stop if any process received a signal.

        Raises:
            Interrupted: on all processes before the same step.
            DatasetError: too many images of the epoch became unreadable.
        """
        signum = agree_to_stop(request, self.reader)
        if signum is not None:
            self.save()
            distributed.barrier()  # torchrun ends all as soon as one exits, so none may exit while rank 0 writes
            raise Interrupted(signum)

    def schedule_lr(self) -> None:
        """Set the learning rate of the next step."""
        base, _ = scaled_lr(self.config.optim, self.config.train.batch_size)
        factor = lr_factor(self.state.step, self.reader.sampler.total_steps, self.config.optim)
        set_lr(self.learner.optimizer, base * factor)

    def record_step(self, result: StepResult, micro_batches: list[Batch]) -> None:
        """Add a step to the log window before its update; check the first loss, and on a CPU that all is finite.

        Raises:
            DivergedError: a loss or gradient is not finite. (A GPU finds this at the next log record, without a sync
                point at every step.)
        """
        if self.state.step == 0 and self.config.train.init_from is None:
            check = first_loss_check(
                self.config.model.head, self.learner.loss, micro_batches, result, len(self.state.categories)
            )
            if check is not None:
                (self.log.info if check.agrees else self.log.warn)(check.text)
        self.window.add(result, micro_batches, waited=self.reader.wait)
        if self.learner.device.type == "cpu":  # no sync to wait for, so a diverged step does not reach the weights
            self._require_finite(self.state.step)

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
            self._require_finite(state.step - 1)
            lr = current_lr(self.learner.optimizer)
            self.log.step(self.window.record(step=state.step, steps_per_epoch=self.steps_per_epoch, lr=lr))
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

    def _require_finite(self, last_step: int) -> None:
        self.window.require_finite(
            last_step=last_step, lr=current_lr(self.learner.optimizer), output_dir=self.output_dir,
            grads_may_overflow=self.learner.precision == "fp16",
        )  # fmt: skip

    def snapshot(self) -> TrainState:
        """The content of a checkpoint, as of now.

        Raises:
            DivergedError: a weight is not finite.
        """
        learner, state = self.learner, self.state
        weights = [w for w in learner.model.state_dict().values() if w.is_floating_point()]
        if not bool(torch.stack([torch.isfinite(w).all() for w in weights]).all()):
            raise DivergedError(
                f"weights are no longer finite after step {state.step}; checkpoints in "
                f"{self.output_dir / 'checkpoints'} are untouched; lower optim.lr or set optim.clip_grad_norm"
            )
        state.model = learner.model.state_dict()
        state.ema = learner.ema.model.state_dict() if learner.ema is not None else None
        state.optimizer = learner.optimizer.state_dict()
        state.scaler = learner.scaler.state_dict()
        state.unlogged = torch.stack(self.window.steps) if self.window.steps else None
        return state

    def save(self, name: str = "last.pt") -> None:
        """Write a checkpoint (on the first process)."""
        if distributed.rank() == 0:
            save_checkpoint(self.snapshot(), self.output_dir / "checkpoints" / name)


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
    state = state_to_resume(config, output_dir, resume)
    source = state
    if source is None and config.train.init_from is not None:
        source = load_checkpoint(Path(config.train.init_from))
    if source is not None:
        config = with_model_of(config, source.config)
    distributed.barrier()  # all have checked the folder before the first writes what would make the others refuse
    return config, state, source


@contextlib.contextmanager
def open_run(
    config: Config, output_dir: Path, *, resumed: TrainState | None, source: TrainState | None, device: torch.device
) -> Iterator[Run]:
    """Open the data, build everything, report it, and check that a step will work; config.yaml is written last.

    Args:
        config: of the run, from `load_states`.
        output_dir: its folder.
        resumed, source: from `load_states`.
        device: to train on.

    Raises:
        RunError, ConfigError, DatasetError, WeightsError: user errors, before anything that looks like a run is
            written.
    """
    is_main = distributed.rank() == 0
    require_settings(config, fresh=source is None)
    if is_main:
        make_folder(output_dir / "checkpoints")
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
            if not (output_dir / "checkpoints" / "best.pt").exists():  # resumed from a file into a new folder
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
        if val_set is None and config.train.early_stop_patience is not None:
            log.warn("train.early_stop_patience has no effect without data.val")
        if is_main:  # only now, so that an error above leaves nothing that looks like a run
            write_text(to_yaml(config), output_dir / "config.yaml")
        # Of several processes only the first one's steps are saved, and each has the losses of its own images.
        unlogged = state.unlogged if distributed.world_size() == 1 else None
        trace_steps = config.train.trace_steps if is_main else 0
        yield Run(
            with_micro_batch(config, micro_batch),
            output_dir,
            train_set,
            val_set,
            test_set,
            learner,
            StepReader(training_data, sampler, num_workers=config.data.num_workers, device=device),
            state,
            log,
            LogWindow(device, unlogged),
            StepProfiler(trace_steps, output_dir / "trace.json.gz", device),
        )
    finally:
        log.close()


def finished_metrics(output_dir: Path) -> dict[str, Any]:
    """Read the metrics.json of a finished run.

    Raises:
        RunError: there is none.
    """
    path = output_dir / "metrics.json"
    if not path.exists():
        raise RunError(
            f"the run to resume is finished, and {path} does not exist: its results are in its own folder; evaluate it "
            "with tools/eval.py, or start from its weights with --init-from"
        )
    metrics: dict[str, Any] = read_json(path)
    return metrics
