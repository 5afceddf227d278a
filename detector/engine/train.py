"""The training run, from top to bottom."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detector.anchors import best_anchor_iou
from detector.boxes import area
from detector.coco_eval import CocoResults, ground_truth_warnings
from detector.config import Config, ConfigError, resolve_data_paths
from detector.datasets.augment import Augmentation
from detector.datasets.coco import CocoDataset, read_coco
from detector.datasets.images import ImageError, decode_image
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.datasets.transforms import padded_size, resized_size
from detector.engine import distributed
from detector.engine.checkpoint import CheckpointError, TrainState, load_checkpoint, save_checkpoint
from detector.engine.evaluate import autocast, evaluate_model, prove_pipeline
from detector.engine.logger import RunLog, duration
from detector.engine.optim import Ema, build_optimizer, lr_factor, resolve_precision, scaled_lr, set_lr, warmup_of
from detector.engine.predict import model_of
from detector.losses import RetinaNetLoss, build_loss
from detector.models import RetinaNet, build_anchors, build_model
from detector.models.weights import load_backbone_weights, transfer
from detector.reports.draw import side_by_side
from detector.structures import Batch, Detections, Targets

MAY_CHANGE_ON_RESUME = (
    "data.num_workers", "data.verify", "train.log_every", "train.checkpoint_every_steps", "train.images_every_epochs",
    "train.init_from", "eval.engine", "eval.batch_size",
)  # fmt: skip
"""Settings that do not change what is computed."""


class RunError(ValueError):
    """A run that cannot start or go on; `str` says why and what to do."""


class DivergedError(RunError):
    """A loss or gradient is no longer a number."""


class Interrupted(Exception):  # noqa: N818 (no error: the user asked for it)
    """A signal ended the run, after a checkpoint was written."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


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
    with process_group(config) as device:
        return _train(config, output_dir, resume, device)


@contextlib.contextmanager
def process_group(config: Config) -> Iterator[torch.device]:
    """The device to run on, with the other processes joined where torchrun started several."""
    with distributed.process_group(pick_device(config.train.device)) as device:
        yield device


def pick_device(device: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device a setting means on this machine."""
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device must be cpu or auto on this machine, got cuda: torch sees no CUDA device")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def _train(config: Config, output_dir: Path, resume: str | None, device: torch.device) -> dict[str, Any]:
    state = _state_to_resume(config, output_dir, resume)
    distributed.barrier()  # all have looked before the first writes what would make the others refuse
    if state is not None and state.finished:
        return _finished_metrics(output_dir)
    is_main = distributed.rank() == 0
    train_set, val_set, test_set = open_datasets(config, output_dir, quiet=not is_main)

    micro_batch = config.train.micro_batch
    planner = StepPlanner(
        train_set.sizes,
        config.train.batch_size,
        min_sizes=config.data.train_sizes,
        max_size=config.data.max_size,
        pad=config.model.pad,
        aspect_ratio_grouping=config.data.aspect_ratio_grouping,
        seed=config.train.seed,
    )
    total_steps = config.train.epochs * planner.steps_per_epoch
    start_step = state.step if state is not None else 0
    if is_main:
        (output_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    log = RunLog(output_dir, start_step=start_step, total_steps=total_steps, enabled=is_main)
    try:
        run = _Run(config, output_dir, device, state, train_set, log)
        run.announce(planner, total_steps, [s for s in (train_set, val_set, test_set) if s is not None])
        if val_set is not None and start_step == 0:
            log.info(prove_pipeline(run.model, run.loss.match, val_set, config, device=device))
        augmentation = None
        if config.data.augment:
            augmentation = Augmentation(config.data.augment, min_visibility=config.data.augment_min_visibility)
        dataset = DetectionDataset(
            train_set,
            max_size=config.data.max_size,
            hflip=config.data.hflip,
            augmentation=augmentation,
            seed=config.train.seed,
            skip_unreadable=config.data.on_error == "skip",
        )
        sampler = TrainSampler(
            planner, start_step, total_steps, micro_batch=micro_batch,
            rank=distributed.rank(), world_size=distributed.world_size(),
        )  # fmt: skip
        loader = build_loader(
            dataset, sampler, num_workers=config.data.num_workers, pin_memory=device.type == "cuda"
        )  # one pool of workers for the whole run: they read ahead over the ends of epochs and evaluations
        if is_main:  # only now, so that a mistake found above leaves nothing that would be taken for a run
            (output_dir / "config.yaml").write_text(config.to_yaml())
        with _stop_on_signal() as stop:
            batches = iter(loader)
            for epoch in range(start_step // planner.steps_per_epoch, config.train.epochs):
                train_one_epoch(run, batches, sampler, epoch, stop)
                last = epoch + 1 == config.train.epochs
                if val_set is not None and (last or (epoch + 1) % config.eval.every_epochs == 0):
                    run.evaluate(val_set, epoch + 1)
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


def train_one_epoch(run: _Run, batches: Iterator[Batch], sampler: TrainSampler, epoch: int, stop: _Stop) -> None:
    """Every remaining step of an epoch: match, normalise, forward, backward, clip, update, average, log.

    Raises:
        DivergedError, Interrupted
    """
    planner, config, device = sampler.planner, run.config, run.device
    plan = planner.epoch(epoch)
    world = distributed.world_size()
    run.interval.start_clock()
    for within in range(run.state.step - epoch * planner.steps_per_epoch, planner.steps_per_epoch):
        waiting = time.monotonic()
        count = sampler.num_micro_batches(len(plan[within]))
        micro_batches = [next(batches).to(device) for _ in range(count)]
        run.interval.waited += time.monotonic() - waiting
        asked = stop.signum  # read once: a signal may come while the others are told
        # Matching needs no outputs, so the normaliser of the whole step is known before its first forward pass.
        matches = [run.loss.match(run.model.anchors_of(b.images), b.targets) for b in micro_batches]
        counts = torch.stack(
            [
                torch.stack([m.num_pos.sum() for m in matches]).sum(),
                torch.stack([(b.index >= 0).sum() for b in micro_batches]).sum(),
                torch.tensor(int(asked is not None), device=device),
            ]
        )
        num_pos, num_images, asked_of = distributed.sum_over_processes(counts).unbind()
        if asked is not None or (world > 1 and int(asked_of)):  # all processes leave before the same step
            run.save()
            raise Interrupted(asked or signal.SIGTERM)

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
        if run.ema is not None:
            run.ema.update(run.model, step)
        if step % config.train.log_every == 0 or step == sampler.total_steps:
            run.interval.check_finite(run, grads_may_overflow=run.precision == "fp16")
            run.log.step(run.interval.record(run, planner.steps_per_epoch))
            run.interval = _Interval(device)
        every = config.train.checkpoint_every_steps
        if every is not None and step % every == 0 and within + 1 < planner.steps_per_epoch:
            run.save()  # the epoch's last step is saved after its evaluation, which a resumed run would leave out


class _Run:
    """What a run consists of while it runs: network, loss, optimizer, averages, log, and what is saved of them."""

    def __init__(
        self,
        config: Config,
        output_dir: Path,
        device: torch.device,
        resumed: TrainState | None,
        train_set: CocoDataset,
        log: RunLog,
    ) -> None:
        self.config, self.output_dir, self.device, self.log = config, output_dir, device, log
        self.precision = resolve_precision(config.train.precision, device)
        if config.model.norm == "sync_bn" and device.type == "cpu":
            raise ConfigError("model.norm must not be sync_bn on a CPU (torch has no such kernel); use bn or gn")
        torch.manual_seed(config.train.seed)
        self.model = build_model(config.model, len(train_set.categories))
        if resumed is None:
            self._initialise(train_set)
        self.model.to(device)
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.model.train()
        self.loss: RetinaNetLoss = build_loss(config)
        self.base_lr, self.lr_text = scaled_lr(config.optim, config.train.batch_size)
        self.optimizer = build_optimizer(self.model, config.optim, lr=self.base_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.ema = Ema(self.model, config.train.ema.decay) if config.train.ema is not None else None
        self.state = resumed or TrainState(config, train_set.categories, {}, step=0)
        if resumed is not None:
            self._restore(resumed)
        # Of several processes only the first one's rows are saved, and each has the losses of its own images.
        self.interval = _Interval(device, self.state.unlogged if distributed.world_size() == 1 else None)
        self.state.config, self.state.versions = config, _versions(device)
        compiled = config.train.compile is True or (config.train.compile == "auto" and device.type == "cuda")
        if compiled:
            self.model.compile(dynamic=False)
        self.network: nn.Module = self.model
        if distributed.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.network = DistributedDataParallel(
                self.model, device_ids=ids, broadcast_buffers=config.model.norm == "bn"
            )

    def _initialise(self, train_set: CocoDataset) -> None:
        config = self.config
        if config.train.init_from is None:
            report = load_backbone_weights(self.model.backbone, config.model.backbone, config.model.backbone_weights)
            self.log.info(str(report) if report is not None else "backbone: from scratch")
            return
        source = load_checkpoint(Path(config.train.init_from))
        rows = transfer(
            self.model,
            source.weights,
            classes=train_set.categories,
            source_classes=source.categories,
            source_anchors=build_anchors(source.config.model),
        )
        table = Table("part", "taken over", "of", "note", title=f"weights from {config.train.init_from}")
        for row in rows:
            table.add_row(row.part, str(row.copied), str(row.total), row.note)
        self.log.info(table)

    def _restore(self, saved: TrainState) -> None:
        self.model.load_state_dict(saved.model)
        if self.ema is not None and saved.ema is not None:
            self.ema.model.load_state_dict(saved.ema)
        if saved.optimizer is not None:
            self.optimizer.load_state_dict(saved.optimizer)
        if saved.scaler:
            self.scaler.load_state_dict(saved.scaler)
        for key, then in saved.versions.items():
            now = _versions(self.device).get(key)
            if now != then:
                self.log.warn(f"{key} was {then}, is {now}: the run goes on, but not bit for bit as it would have")

    def announce(self, planner: StepPlanner, total_steps: int, datasets: list[CocoDataset]) -> None:
        """What is about to happen, and what looks wrong about it."""
        config, log = self.config, self.log
        for dataset in datasets:
            log.info(dataset.summary())
        parameters = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        processes = distributed.world_size()
        log.info(
            f"{config.model.backbone}, {parameters / 1e6:.1f} M parameters, {trained / 1e6:.1f} M trained; "
            f"{processes} process{'es' * (processes > 1)} on {self.device}, {self.precision}"
        )
        log.info(self.lr_text)
        if config.optim.warmup_steps > total_steps:
            log.warn(f"optim.warmup_steps {config.optim.warmup_steps} is longer than the run: {total_steps} steps")
        log.info(
            f"{config.train.epochs} epochs of {planner.steps_per_epoch} steps, {config.train.batch_size} images a step, "
            f"{warmup_of(config.optim, total_steps)} steps of warm-up"
        )
        for line in coverage_warnings(self.model, datasets[0], config):
            log.warn(line)
        for dataset in datasets[1:]:
            for line in ground_truth_warnings(dataset.ground_truth(), config.eval.max_dets):
                log.warn(f"{dataset.annotations.name}: {line}")
        if self.state.step:
            log.info(f"resumed after step {self.state.step} of {total_steps}")

    @contextlib.contextmanager
    def no_sync(self, *, unless: bool) -> Iterator[None]:
        """Leave out DDP's exchange of gradients, but for the last micro-batch."""
        if isinstance(self.network, DistributedDataParallel) and not unless:
            with self.network.no_sync():
                yield
        else:
            yield

    @property
    def evaluated_model(self) -> RetinaNet:
        """The averaged weights, where there are any."""
        if self.ema is None:
            return self.model
        averaged: Any = self.ema.model
        model: RetinaNet = averaged
        return model

    def evaluate(self, val_set: CocoDataset, epoch: int) -> None:
        """Score the val set, remember whether it is the best yet, draw some pictures."""
        started = time.monotonic()
        metrics, results = evaluate_model(
            self.evaluated_model, val_set, self.config, device=self.device, progress=self.log.progress("evaluating")
        )
        best = self.output_dir / "checkpoints" / "best.pt"
        # While AP is undefined (-1: no objects), the latest weights are taken for the best.
        improved = metrics.values["AP"] > self.state.best_ap or self.state.best_ap < 0
        self.state.evaluations_since_best = 0 if improved else self.state.evaluations_since_best + 1
        self.state.best_ap = max(metrics.values["AP"], self.state.best_ap)
        record = metrics.to_json()
        per_class = record.pop("per_class")
        self.log.evaluation({"step": self.state.step, "epoch": epoch, "split": "val", **record}, per_class)
        values = metrics.values
        self.log.info(
            f"epoch {epoch}: val AP {values['AP']:.4f} AP50 {values['AP50']:.4f} AP75 {values['AP75']:.4f}"
            f"{' (best)' if improved else ''}, {len(results.scores)} detections, "
            f"{duration(time.monotonic() - started)}"
        )
        if not len(results.scores):
            self.log.warn(
                f"no score above postprocess.score_thresh {self.config.postprocess.score_thresh}: usual in the first "
                "epochs; if it lasts, look at the losses, optim.lr and the anchors"
            )
        if distributed.rank() != 0:
            return
        if improved or not best.exists():  # not there: resumed from a file into a new folder
            write_json(metrics.to_json(), self.output_dir / "metrics.json")
            save_checkpoint(self.snapshot(), best)
        every = self.config.train.images_every_epochs
        if every and epoch % every == 0:
            pictures = val_pictures(val_set, results, skip_unreadable=self.config.data.on_error == "skip")
            self.log.pictures("val: truth, predictions", pictures, self.state.step)

    def snapshot(self) -> TrainState:
        """What a checkpoint holds, as of now."""
        weights = [*self.model.state_dict().values()]
        if not all(bool(torch.isfinite(w).all()) for w in weights if w.is_floating_point()):
            raise DivergedError(
                f"weights are no longer finite after step {self.state.step}; checkpoints in "
                f"{self.output_dir / 'checkpoints'} are untouched; lower optim.lr or set optim.clip_grad_norm"
            )
        self.state.model = self.model.state_dict()
        self.state.ema = self.ema.model.state_dict() if self.ema is not None else None
        self.state.optimizer = self.optimizer.state_dict()
        self.state.scaler = self.scaler.state_dict()
        self.state.unlogged = torch.stack(self.interval.steps) if self.interval.steps else None
        return self.state

    def save(self) -> None:
        """Write checkpoints/last.pt."""
        if distributed.rank() == 0:
            save_checkpoint(self.snapshot(), self.output_dir / "checkpoints" / "last.pt")

    def finish(self, val_set: CocoDataset | None, test_set: CocoDataset | None) -> dict[str, Any]:
        """Score the test set with the best weights and write metrics.json."""
        distributed.barrier()  # best.pt is written by the first process
        best = self.output_dir / "checkpoints" / "best.pt"
        test_metrics = None
        if test_set is not None and best.exists():
            model = model_of(load_checkpoint(best), self.device)
            test_metrics, _ = evaluate_model(
                model, test_set, self.config, device=self.device, progress=self.log.progress("testing")
            )
        written = _finished_metrics(self.output_dir) if val_set is not None else {}
        if distributed.rank() == 0:
            if test_metrics is not None:
                written["test"] = test_metrics.to_json()
            write_json(written, self.output_dir / "metrics.json")
        return written


class _Interval:
    """The steps since the last log, those before an interruption included; on the device, so that adding is no sync."""

    def __init__(self, device: torch.device, steps: Tensor | None = None) -> None:
        # per step: loss_cls, loss_box, grad_norm, num_pos, num_images
        self.steps: list[Tensor] = [] if steps is None else [*steps.to(device)]
        self.image_ids: list[list[Tensor]] = [[] for _ in self.steps]
        self.targets: list[list[Targets]] = [[] for _ in self.steps]
        self.start_clock()

    def start_clock(self) -> None:
        """Measure the speed from here: neither evaluations nor an earlier session count."""
        self.started = time.monotonic()
        self.waited = 0.0
        self.timed_from = len(self.steps)

    def add(
        self, losses: dict[str, Tensor], grad_norm: Tensor, num_pos: Tensor, num_images: Tensor, batches: list[Batch]
    ) -> None:
        """Note one step."""
        values = [losses["loss_cls"], losses["loss_box"], grad_norm, num_pos, num_images]
        self.steps.append(torch.stack([v.detach().float() for v in values]))
        self.image_ids.append([b.image_ids for b in batches])
        self.targets.append([b.targets for b in batches])

    def check_finite(self, run: _Run, *, grads_may_overflow: bool) -> None:
        """A sync point. Tell which step went wrong, on which images."""
        table = torch.stack(self.steps)
        finite = torch.isfinite(table[:, :2] if grads_may_overflow else table[:, :3]).all(dim=1)
        if bool(finite.all()):
            return
        position = int(torch.nonzero(~finite)[0])
        step = run.state.step - len(self.steps) + position + (1 if run.device.type == "cpu" else 0)
        loss_cls, loss_box, grad_norm = table[position, :3].tolist()
        ids = [i for part in self.image_ids[position] for i in part.tolist()]
        report = {
            "step": step, "loss_cls": loss_cls, "loss_box": loss_box, "grad_norm": grad_norm, "image_ids": ids,
            "lr": run.optimizer.param_groups[0]["lr"],
            "boxes": [b for t in self.targets[position] for b in t.boxes.tolist()],
        }  # fmt: skip
        path = run.output_dir / "diverged.json"
        write_json(report, path)
        raise DivergedError(
            f"training diverged at step {step}: loss_cls {loss_cls}, loss_box {loss_box}, gradient norm {grad_norm}, "
            f"learning rate {report['lr']:.3g}, images {ids}.\n"
            f"  The step's boxes are in {path}; {run.output_dir / 'checkpoints'} holds the last good checkpoint.\n"
            "  Usually the learning rate is too high: lower optim.lr, lengthen optim.warmup_steps or set "
            "optim.clip_grad_norm=1."
        )

    def record(self, run: _Run, steps_per_epoch: int) -> dict[str, Any]:
        """Means since the last log. A sync point."""
        table = torch.stack(self.steps)
        table[:, :2] = distributed.sum_over_processes(table[:, :2].contiguous())  # each has the losses of its images
        loss_cls, loss_box, grad_norm, num_pos, _ = table.mean(dim=0).tolist()
        elapsed = time.monotonic() - self.started
        record = {
            "step": run.state.step,
            "epoch": round(run.state.step / steps_per_epoch, 3),
            "loss": loss_cls + loss_box,
            "loss_cls": loss_cls,
            "loss_box": loss_box,
            "lr": run.optimizer.param_groups[0]["lr"] / (run.optimizer.param_groups[0]["lr_factor"] or 1),
            "grad_norm": grad_norm,
            "num_pos": num_pos,
            "images_per_s": float(table[self.timed_from :, 4].sum()) / elapsed,
            "data_wait": self.waited / elapsed,
        }
        if run.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return record


class _Stop:
    """Whether a signal asked the run to stop."""

    signum: int | None = None


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[_Stop]:
    """The first SIGINT or SIGTERM asks; the second is obeyed at once."""
    stop = _Stop()

    def ask(signum: int, _: Any) -> None:
        if stop.signum is not None:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        stop.signum = signum

    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def open_datasets(
    config: Config, output_dir: Path, *, quiet: bool
) -> tuple[CocoDataset, CocoDataset | None, CocoDataset | None]:
    """Read and check the train, val and test sets; the latter two with the classes of the first."""
    if config.data.train is None:
        raise ConfigError(
            "data.train must name images and annotations; set data.train.images and data.train.annotations"
        )
    opened: list[CocoDataset | None] = []
    for name in ("train", "val", "test"):
        split = getattr(config.data, name)
        if split is None:
            opened.append(None)
            continue
        opened.append(
            read_coco(
                Path(split.annotations),
                Path(split.images),
                verify=config.data.verify,
                on_error=config.data.on_error,
                exif=config.data.exif,
                categories=opened[0].categories if opened and opened[0] is not None else None,
                progress=not quiet,
                problems_file=None if quiet else output_dir / f"problems_{name}.tsv",
            )
        )
    train_set = opened[0]
    assert train_set is not None
    return train_set, opened[1], opened[2]


def coverage_warnings(model: RetinaNet, coco: CocoDataset, config: Config) -> list[str]:
    """Objects that no anchor overlaps enough to learn from (as the boxes are before augmentation)."""
    size = config.data.eval_size
    boxes, images, _ = coco.boxes()
    heights_widths = coco.sizes.astype(np.int64)
    best = torch.zeros(len(boxes))
    resized = np.array([resized_size((h, w), min_size=size, max_size=config.data.max_size) for h, w in heights_widths])
    factors = (resized / heights_widths)[images][:, [1, 0, 1, 0]]
    scaled = torch.from_numpy((boxes * factors).astype(np.float32))
    canvases = [padded_size((int(h), int(w)), config.model.pad) for h, w in resized]
    for canvas in set(canvases):
        rows = torch.from_numpy(np.array([c == canvas for c in canvases])[images])
        best[rows] = best_anchor_iou(model.anchors, scaled[rows], canvas)
    lost = best < config.matching.fg_iou_thresh
    if not bool(lost.any()) or config.matching.low_quality_matches:
        return []
    sides = area(scaled[lost]).sqrt()
    return [
        f"{int(lost.sum())} of {len(boxes)} objects ({float(lost.float().mean()):.1%}) overlap no anchor by "
        f"{config.matching.fg_iou_thresh} at data.min_size {size} and will not be learnt; their sides are "
        f"{sides.min():.0f} to {sides.max():.0f} pixels there (median {sides.median():.0f}); larger data.min_size, other "
        "model.anchors.sizes or ratios, or matching.low_quality_matches=true would reach them"
    ]


def val_pictures(
    coco: CocoDataset, results: CocoResults, *, skip_unreadable: bool = False, count: int = 6
) -> list[Image.Image]:
    """Ground truth beside predictions, for a few images spread over the set, always the same ones."""
    labels_of = {category_id: k for k, category_id in enumerate(coco.categories.ids)}
    pictures = []
    for index in np.unique(np.linspace(0, len(coco) - 1, count).astype(int)):
        try:
            image = decode_image(coco.path(int(index)), apply_exif=coco.apply_exif)
        except ImageError:
            if skip_unreadable:
                continue
            raise
        rows: NDArray[np.intp] = np.nonzero(results.image_ids == coco.image_ids[index])[0]
        xywh = torch.from_numpy(results.boxes[rows]).float()
        found = Detections(
            torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
            torch.from_numpy(results.scores[rows]).float(),
            torch.tensor([labels_of[int(c)] for c in results.category_ids[rows]], dtype=torch.int64),
        )
        truth = coco.objects(int(index))
        pictures.append(
            side_by_side(
                image, found, truth.boxes, truth.labels, coco.categories.names, ignore_boxes=truth.ignore_boxes
            )
        )
    return pictures


def _state_to_resume(config: Config, output_dir: Path, resume: str | None) -> TrainState | None:
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


def flatten(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    """Nested settings by their full key."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat.update(flatten(value, f"{at}{key}.") if isinstance(value, dict) else {at + key: value})
    return flat


def _finished_metrics(output_dir: Path) -> dict[str, Any]:
    metrics: dict[str, Any] = json.loads((output_dir / "metrics.json").read_text())
    return metrics


def _versions(device: torch.device) -> dict[str, str]:
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "torch": str(torch.__version__),  # a subclass of str, which an inert reader refuses
        "torchvision": torchvision.__version__,
        "device": hardware,
        "threads": str(torch.get_num_threads()),
        "processes": str(distributed.world_size()),
    }


def write_json(content: Any, path: Path) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
