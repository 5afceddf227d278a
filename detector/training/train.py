"""The training run, from top to bottom."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detector import distributed
from detector.atomic import make_folder
from detector.checkpoint import load_checkpoint, save_checkpoint
from detector.config import Config, resolve_data_paths, with_micro_batch
from detector.config_yaml import to_yaml, with_model_of
from detector.datasets.augment import Augmentation, extreme_sizes
from detector.datasets.class_statistics import sampling_factors
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, build_loader, to_device, too_many_unreadable, unreadable
from detector.datasets.opening import open_datasets
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.errors import DatasetError, Interrupted
from detector.evaluation.evaluate import gone_away
from detector.evaluation.self_check import prove_pipeline
from detector.precision import autocast
from detector.structures import Batch
from detector.training.image_cache import keep_pictures
from detector.training.log_window import Interval
from detector.training.logger import RunLog
from detector.training.micro_batch import out_of_memory, resolved_micro_batch, too_large_evaluation
from detector.training.optim import lr_factor, set_lr
from detector.training.preflight import data_warnings, require_settings
from detector.training.resume import require_same_data, state_to_resume
from detector.training.run import Run, finished_metrics
from detector.training.signals import Stop, stop_on_signal


def train(config: Config, output_dir: Path, *, resume: str | None = None) -> dict[str, Any]:
    """Train, evaluating and saving on the way; returns what metrics.json holds.

    Args:
        config: the run.
        output_dir: see README, "What a run leaves behind".
        resume: None for a fresh run, "auto" to go on from `checkpoints/last.pt` if there is one, or a checkpoint.

    Raises:
        RunError, ConfigError, DatasetError, WeightsError, CheckpointError: the user's to mend.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint of the last finished step.
    """
    config = resolve_data_paths(config)
    with distributed.process_group(config.train.device) as device:
        return _train(config, output_dir, resume, device)


def _train(config: Config, output_dir: Path, resume: str | None, device: torch.device) -> dict[str, Any]:
    state = state_to_resume(config, output_dir, resume)
    origin = state
    if origin is None and config.train.init_from is not None:
        origin = load_checkpoint(Path(config.train.init_from))
    if origin is not None:
        config = with_model_of(config, origin.config)
    distributed.barrier()  # all have looked before the first writes what would make the others refuse
    if state is not None and state.finished:
        return finished_metrics(output_dir)
    require_settings(config, fresh=origin is None)
    is_main = distributed.rank() == 0
    if is_main:
        make_folder(output_dir / "checkpoints")
    train_set, val_set, test_set = open_datasets(config, output_dir, quiet=not is_main)
    if state is not None:
        require_same_data(state, train_set)

    planner = StepPlanner(
        train_set.sizes,
        config.train.batch_size,
        min_sizes=config.data.train_sizes,
        max_size=config.data.max_size,
        pad=config.model.pad,
        resize=config.model.resize,
        aspect_ratio_grouping=config.data.aspect_ratio_grouping,
        seed=config.train.seed,
        factors=sampling_factors(config.data, train_set),
    )
    total_steps = config.train.epochs * planner.steps_per_epoch
    start_step = state.step if state is not None else 0
    evaluation_due = state is not None and state.evaluation_due
    log = RunLog(
        output_dir, start_step=start_step, total_steps=total_steps, evaluation_due=evaluation_due, enabled=is_main
    )
    try:
        run = Run(config, output_dir, device, state, train_set, log, source=origin)
        others = [dataset for dataset in (val_set, test_set) if dataset is not None]
        for dataset in (train_set, *others):
            log.info(dataset.summary())
        run.announce(planner, total_steps)
        for line in data_warnings(run.model.anchors, train_set, others, config):
            log.warn(line)
        if val_set is not None and start_step == 0:
            log.info(prove_pipeline(run.model, run.loss, val_set, config, device=device))
        pictures = training_data(train_set, config, log)
        micro_batch = resolved_micro_batch(run, planner, pictures)
        run.config = with_micro_batch(run.config, micro_batch)
        sampler = TrainSampler(
            planner, start_step, total_steps, micro_batch=micro_batch,
            rank=distributed.rank(), world_size=distributed.world_size(),
        )  # fmt: skip
        run.compile_if_worth_it(planner, total_steps - start_step)  # after memory was tried
        # one pool of workers for the whole run: they read ahead over the ends of epochs and evaluations
        loader = build_loader(
            pictures,
            sampler,
            num_workers=config.data.num_workers,
            pin_memory=device.type == "cuda",
        )
        if val_set is None and config.train.early_stop_patience is not None:
            log.warn("train.early_stop_patience is ignored: there is no data.val to see whether the model gets better")
        if is_main:  # only now, so that a mistake found above leaves nothing that would be taken for a run
            (output_dir / "config.yaml").write_text(to_yaml(config))
        with stop_on_signal() as stop:
            batches = iter(loader)
            # where the evaluation of a finished epoch is due, that epoch comes again, with no step left to do
            start_epoch = start_step // planner.steps_per_epoch - int(evaluation_due)
            for epoch in range(start_epoch, config.train.epochs):
                started = time.monotonic()
                try:
                    train_one_epoch(run, batches, sampler, epoch, stop)
                except torch.OutOfMemoryError as error:
                    raise out_of_memory(run, sampler) from error
                run.stepping += time.monotonic() - started
                last = epoch + 1 == config.train.epochs
                if val_set is not None and (last or (epoch + 1) % config.eval.every_epochs == 0):
                    run.state.evaluation_due = True
                    run.save()  # evaluating may take long, and a signal may not wait for its end
                    try:
                        run.evaluate(val_set, epoch + 1, stop)
                    except torch.OutOfMemoryError as error:
                        raise too_large_evaluation(run.config) from error
                    run.state.evaluation_due = False
                patience = config.train.early_stop_patience
                run.state.finished = last or (patience is not None and run.state.evaluations_since_best >= patience)
                if val_set is None and is_main:
                    save_checkpoint(run.snapshot(), output_dir / "checkpoints" / "best.pt")
                if run.state.finished:
                    break
                run.save()
        if not last:
            log.info(f"stopped early: {config.train.early_stop_patience} evaluations without a better AP")
        metrics = run.finish(val_set, test_set)
        run.save()  # as finished, after everything else is in place
        return metrics
    finally:
        log.close()


def train_one_epoch(run: Run, batches: Iterator[Batch], sampler: TrainSampler, epoch: int, stop: Stop) -> None:
    """Every remaining step of an epoch: match, normalise, forward, backward, clip, update, average, log.

    Raises:
        DivergedError, Interrupted
        DatasetError: more of the pictures than a few can no longer be read.
    """
    planner, config, device = sampler.planner, run.config, run.device
    plan = planner.epoch(epoch)
    world = distributed.world_size()
    lost: set[int] = set()
    run.interval.start_clock()
    for within in range(run.state.step - epoch * planner.steps_per_epoch, planner.steps_per_epoch):
        waiting = time.monotonic()
        count = sampler.num_micro_batches(len(plan[within]))
        loaded = [next(batches) for _ in range(count)]
        lost |= {unreadable(i) for b in loaded for i in b.index.tolist() if i < -1}
        micro_batches = [to_device(b, device) for b in loaded]
        run.interval.waited += time.monotonic() - waiting
        asked = stop.signum  # read once: a signal may come while the others are told
        told = distributed.sum_over_processes(torch.tensor([int(asked is not None), len(lost)]))
        if too_many_unreadable(int(told[1]), len(run.train_set)):  # a picture may be counted by several processes
            everyones = sorted(set().union(*distributed.gather(lost)))
            if too_many_unreadable(len(everyones), len(run.train_set)):  # not saved: the last steps saw too little
                raise DatasetError(f"{gone_away(run.train_set, everyones)}; then go on with --resume auto")
        if int(told[0]):
            run.save()  # all processes leave before the same step, and none while the first is writing:
            distributed.barrier()  # torchrun ends the others as soon as one is gone
            raise Interrupted(asked or signal.SIGTERM)
        # Matching needs no outputs, so the normaliser of the whole step is known before its first forward pass.
        matches = [
            run.loss.match(run.model.anchors_of(b.images), b.targets, grids=run.model.grids_of(b.images))
            for b in micro_batches
        ]
        counts = torch.stack(
            [
                torch.stack([m.num_pos.sum() for m in matches]).sum(),
                torch.stack([(b.index >= 0).sum() for b in micro_batches]).sum(),
            ]
        )
        num_pos, num_images = distributed.sum_over_processes(counts).unbind()

        set_lr(run.optimizer, run.base_lr * lr_factor(run.state.step, sampler.total_steps, config.optim))
        losses: dict[str, Tensor] = {}
        for i, (batch, matched) in enumerate(zip(micro_batches, matches, strict=True)):
            with run.no_sync(unless=i == count - 1):
                with autocast(run.precision, device):
                    outputs = run.network(batch.images, batch.image_sizes)
                part = run.loss(outputs, batch.targets, matches=matched, num_pos=num_pos, num_images=num_images)
                total = part["loss_cls"] + part["loss_box"]
                # DDP takes the mean over processes; the normaliser already is that of all of them
                run.scaler.scale(total * world).backward()
            losses = {k: v.detach() + losses.get(k, 0.0) for k, v in part.items()}
        if run.state.step == 0:
            run.check_first_loss(micro_batches, matches, losses["loss_cls"], num_pos, num_images)
        run.scaler.unscale_(run.optimizer)
        trained = [p for p in run.model.parameters() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if config.optim.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(trained, config.optim.clip_grad_norm, grad_norm)
        run.interval.add(losses, grad_norm, num_pos, num_images, micro_batches)
        if device.type == "cpu":  # no sync to wait for, so a step that went wrong does not reach the weights
            run.interval.check_finite(run, grads_may_overflow=run.precision == "fp16")
        run.scaler.step(run.optimizer)
        run.scaler.update()
        run.optimizer.zero_grad(set_to_none=True)
        run.state.step += 1
        step = run.state.step
        run.log.advance(step)
        told_by_trace = run.trace.step()
        if told_by_trace is not None:
            run.log.info(told_by_trace)
            run.interval.start_clock()  # writing it is no part of a step
        if run.ema is not None:
            run.ema.update(run.model, step)
        if step % config.train.log_every == 0 or step == sampler.total_steps:
            run.interval.check_finite(run, grads_may_overflow=run.precision == "fp16")
            run.log.step(run.interval.record(run, planner.steps_per_epoch))
            run.interval = Interval(device)
        every = config.train.checkpoint_every_steps
        if every is not None and step % every == 0 and within + 1 < planner.steps_per_epoch:
            run.save()  # the epoch's last step is saved after its evaluation, which a resumed run would leave out


def training_data(train_set: CocoDataset, config: Config, log: RunLog) -> DetectionDataset:
    """The training set as the network sees it: augmented, resized, mirrored.

    Raises:
        ConfigError: there is no room for the cache that the config asks for.
    """
    augmentation = None
    if config.data.augment:
        augmentation = Augmentation(
            config.data.augment,
            min_visibility=config.data.augment_min_visibility,
            sizes=extreme_sizes(train_set.sizes),
        )
    dataset = DetectionDataset(
        train_set,
        max_size=config.data.max_size,
        resize=config.model.resize,
        hflip=config.data.hflip,
        augmentation=augmentation,
        seed=config.train.seed,
        skip_unreadable=config.data.on_error == "skip",
        scaled_decode=config.data.scaled_decode,
    )
    if config.data.cache_gb:
        log.info(keep_pictures(dataset, config.data))
    return dataset
