"""What a run consists of while it runs, and what is saved of it."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detector import distributed
from detector.assign.max_iou import Matches
from detector.atomic import write_json
from detector.checkpoint import TrainState, load_checkpoint, save_checkpoint
from detector.config import Config
from detector.datasets.class_statistics import class_weights, class_weights_text
from detector.datasets.coco import CocoDataset
from detector.datasets.images import decode_image
from detector.datasets.sampling import StepPlanner
from detector.errors import ConfigError, DatasetError, DivergedError, ImageError, Interrupted, RunError
from detector.evaluation.coco_metrics import CocoResults
from detector.evaluation.evaluate import evaluate_model, highest_score
from detector.evaluation.validation_loss import ValidationLoss
from detector.inference.nms import has_triton
from detector.inference.predictor import model_of
from detector.losses import RetinaNetLoss, build_loss
from detector.losses.class_loss import USES
from detector.losses.retinanet import ConstantLoss
from detector.models import RetinaNet, build_anchors, build_model
from detector.models.heads import background_bias, prior_bias
from detector.precision import resolve_precision
from detector.reports.draw import side_by_side
from detector.reports.loss_analysis import collect_examples, loss_holders
from detector.structures import Batch, Detections
from detector.training.compile import compile_step
from detector.training.ema import Ema
from detector.training.log_window import Interval
from detector.training.logger import RunLog, duration
from detector.training.optim import build_optimizer, scaled_lr, warmup_of
from detector.training.preflight import first_loss_text
from detector.training.profiler import FIRST, Trace
from detector.training.signals import Stop
from detector.weights.compatibility import _require_same_build
from detector.weights.transfer import load_backbone_weights, transfer

STEPS_WORTH_COMPILING = 3000
"""With each shape of input. A minute of compilation is won back by then (docs/benchmarks.md)."""
WATCHING = 0.02
"""Share of the time of a session's steps that looking at who holds the loss may take."""
FIRST_LOOK = 2.5
"""Seconds that the first such look is expected to take, mostly to import matplotlib, beside the passes through the network."""


class Run:
    """What a run consists of while it runs: network, loss, optimizer, averages, log, and what is saved of them."""

    def __init__(
        self,
        config: Config,
        output_dir: Path,
        device: torch.device,
        resumed: TrainState | None,
        train_set: CocoDataset,
        log: RunLog,
        *,
        source: TrainState | None = None,
    ) -> None:
        self.config, self.output_dir, self.device, self.log = config, output_dir, device, log
        self.train_set = train_set
        self.stepping = self.watching = self.last_look = 0.0  # seconds, of this session
        self.precision = resolve_precision(config.train.precision, device)
        if config.model.norm == "sync_bn" and device.type == "cpu":
            raise ConfigError("model.norm must not be sync_bn on a CPU (torch has no such kernel); use bn or gn")
        if config.train.compile is True and device.type == "cuda" and not has_triton(device):
            raise ConfigError(
                "train.compile must be auto or false on this machine, got true: Triton, which makes a GPU's code, is not installed or does "
                "not know this GPU (compute capability 7.0 is the least)"
            )
        if config.train.checkpoint_activations and config.model.norm in ("bn", "sync_bn"):
            raise ConfigError(
                f"train.checkpoint_activations must be false with model.norm {config.model.norm}, whose statistics would see "
                "every batch twice; use train.micro_batch, or norm frozen_bn or gn"
            )
        torch.manual_seed(config.train.seed)
        self.model = build_model(config.model, len(train_set.categories))
        if resumed is None:
            self._initialise(train_set, source)
        self.model.backbone.checkpointing = config.train.checkpoint_activations
        self.model.to(device)
        if config.train.channels_last:
            self.model.to(memory_format=torch.channels_last)
        self.model.train()
        if config.loss.cls != "focal":
            self.log.info(
                f"loss.cls {config.loss.cls} uses {', '.join(USES[config.loss.cls])} of the settings of the class loss"
            )
        alpha = class_weights(config.loss, train_set)
        if alpha is not None:
            self.log.info(class_weights_text(alpha, train_set))
        self.loss: RetinaNetLoss = build_loss(config, alpha=alpha).to(device)
        self.base_lr, self.lr_text = scaled_lr(config.optim, config.train.batch_size)
        self.optimizer = build_optimizer(self.model, config.optim, lr=self.base_lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == "fp16")
        self.ema = Ema(self.model, config.train.ema.decay) if config.train.ema is not None else None
        origin = source.origin if source is not None else []
        self.state = resumed or TrainState(config, train_set.categories, {}, step=0, origin=origin)
        self.state.alpha = alpha
        if resumed is not None:
            self._restore(resumed)
        # Of several processes only the first one's rows are saved, and each has the losses of its own images.
        steps = config.train.trace_steps if distributed.rank() == 0 else 0
        self.trace = Trace(steps, output_dir / "trace.json.gz", device)
        self.interval = Interval(device, self.state.unlogged if distributed.world_size() == 1 else None)
        self.state.config, self.state.versions = config, versions_of_everything(device)
        self.state.apply_exif = not train_set.overrides_exif
        self.state.train_set = train_set.fingerprint()
        self.network: nn.Module = self.model
        if distributed.world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            network = DistributedDataParallel(self.model, device_ids=ids)
            network.broadcast_buffers = config.model.norm == "bn"  # the argument of this name is deprecated
            self.network = network

    def _initialise(self, train_set: CocoDataset, source: TrainState | None) -> None:
        config = self.config
        if source is None:
            report = load_backbone_weights(self.model.backbone, config.model.backbone, config.model.backbone_weights)
            self.log.info(str(report) if report is not None else "backbone: from scratch")
            return
        for line in source.origin:
            self.log.info(line)
        for line in _require_same_build(config, source.config, str(config.train.init_from)):
            self.log.warn(line)
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
        if not (self.output_dir / "checkpoints" / "best.pt").exists():  # resumed from a file into a new folder
            saved.best_ap, saved.evaluations_since_best = -1.0, 0
        parts = saved.config.train.micro_batch, self.config.train.micro_batch
        if parts[0] != parts[1]:
            statistics = " and norm bn sees other pictures together" if self.config.model.norm == "bn" else ""
            self.log.warn(
                f"train.micro_batch was {parts[0]}, is {parts[1]}: sums round otherwise{statistics}, so the run goes on, but not bit "
                "for bit as it would have"
            )
        for key, then in saved.versions.items():
            now = versions_of_everything(self.device).get(key)
            if now != then:
                self.log.warn(f"{key} was {then}, is {now}: the run goes on, but not bit for bit as it would have")

    def compile_if_worth_it(self, planner: StepPlanner, steps: int) -> None:
        """Have the step compiled, as `train.compile` says, for a run with so many steps to go."""
        wanted = self.config.train.compile
        canvases = {keys[0].canvas for keys in planner.first_steps(200)}
        if wanted == "auto":
            worth_it = self.device.type == "cuda" and steps >= STEPS_WORTH_COMPILING * len(canvases)
            wanted = worth_it and has_triton(self.device)
        if wanted:
            self.log.info(
                f"the training step is compiled when it meets a new shape of input, about a minute each; in the first steps of an "
                f"epoch there are {len(canvases)}"
            )
            compile_step(self.model, self.loss)

    def announce(self, planner: StepPlanner, total_steps: int) -> None:
        """What is about to be trained, and how."""
        config, log = self.config, self.log
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
        left = total_steps - self.state.step
        if config.train.trace_steps and left < FIRST + config.train.trace_steps:
            log.warn(
                f"train.trace_steps {config.train.trace_steps} will not come to anything: {left} steps are left, and the first {FIRST} of "
                "a session are not looked at"
            )
        if planner.factors is not None:
            log.info(
                f"{config.data.sampling} sampling: {planner.pictures_per_epoch} pictures an epoch of {len(planner.sizes)}, each "
                f"{planner.factors.min():.2g} to {planner.factors.max():.2g} times"
            )
        log.info(
            f"{config.train.epochs} epoch{'s' * (config.train.epochs > 1)} of {planner.steps_per_epoch} steps, "
            f"{config.train.batch_size} images a step, "
            f"{warmup_of(config.optim, total_steps)} steps of warm-up"
        )
        if self.state.step:
            log.info(f"resumed after step {self.state.step} of {total_steps}")

    def check_first_loss(
        self, batches: Sequence[Batch], matches: Sequence[Matches], found: Tensor, num_pos: Tensor, num_images: Tensor
    ) -> None:
        """Compare a fresh network's first class loss with its closed form; say so, or warn."""
        if self.config.train.init_from is not None:
            return
        head, num_classes = self.config.model.head, len(self.state.categories)
        if head.activation == "softmax":
            said = [0.0] * num_classes + [background_bias(head.prior_prob, num_classes)]
        else:
            said = [prior_bias(head.prior_prob)] * num_classes
        at_prior = torch.tensor(said, device=self.device)
        parts = [
            self.loss.class_loss_at(at_prior, batch.targets, matched, num_pos=num_pos, num_images=num_images)
            for batch, matched in zip(batches, matches, strict=True)
        ]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return
        background, positives = (sum(part[place] for part in known) for place in (1, 3))
        mean = sum(part.positives * part.positive_loss for part in known) / max(1, positives)
        whole = ConstantLoss(
            sum(part.total for part in known), int(background), known[0].background_loss, int(positives), mean
        )
        text, agrees = first_loss_text(whole, float(found), int(num_pos))
        (self.log.info if agrees else self.log.warn)(text)

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

    def evaluate(self, val_set: CocoDataset, epoch: int, stop: Stop) -> None:
        """Score the val set, remember whether it is the best yet, draw some pictures.

        Raises:
            Interrupted: a signal came. (One of several processes goes on to the end: the others wait for it.)
        """
        show = self.log.progress("evaluating")

        def progress(done: int, total: int) -> None:
            if show is not None:
                show(done, total)
            if stop.signum is not None and distributed.world_size() == 1:
                raise Interrupted(stop.signum)

        started = time.monotonic()
        distributed.same_buffers(self.model)
        if self.ema is not None:
            distributed.same_buffers(self.ema.model)
        losses = ValidationLoss(self.loss, self.device)
        watch = losses.add if self.config.eval.loss else None
        metrics, results = evaluate_model(
            self.evaluated_model, val_set, self.config, device=self.device, progress=progress, watch=watch
        )
        means = losses.means() if watch is not None else {}
        took = time.monotonic() - started
        best = self.output_dir / "checkpoints" / "best.pt"
        # While AP is undefined (-1: no objects), the latest weights are taken for the best.
        improved = metrics.values["AP"] > self.state.best_ap or self.state.best_ap < 0
        # Patience is for a model that stands still, not for one that has found nothing yet.
        waiting = improved or self.state.best_ap <= 0
        self.state.evaluations_since_best = 0 if waiting else self.state.evaluations_since_best + 1
        self.state.best_ap = max(metrics.values["AP"], self.state.best_ap)
        record = metrics.to_json()
        per_class = record.pop("per_class")
        self.log.evaluation({"step": self.state.step, "epoch": epoch, "split": "val", **means, **record}, per_class)
        values = metrics.values
        told = f"loss {means['loss']:.4f}, " if means else ""
        self.log.info(
            f"epoch {epoch}: val AP {values['AP']:.4f} AP50 {values['AP50']:.4f} AP75 {values['AP75']:.4f}"
            f"{' (best)' if improved else ''}, {told}{len(results.scores)} detections, "
            f"{duration(time.monotonic() - started)}"
        )
        if not len(results.scores):
            highest = highest_score(self.evaluated_model, val_set, self.config, device=self.device)
            self.log.warn(
                f"no score above postprocess.score_thresh {self.config.postprocess.score_thresh} (the highest of some pictures is "
                f"{highest:.4f}): usual in the first epochs; if it lasts, look at the losses, optim.lr and the anchors"
            )
        if distributed.rank() != 0:
            return
        if improved:
            write_json(metrics.to_json(), self.output_dir / "metrics.json")
            save_checkpoint(self.snapshot(), best)
        every = self.config.train.images_every_epochs
        if every and epoch % every == 0:
            pictures = val_pictures(val_set, results, skip_unreadable=self.config.data.on_error == "skip")
            self.log.pictures("val: truth, predictions", pictures, self.state.step)
        if self.config.train.loss_images:
            self._log_loss_holders(val_set, took / len(val_set))

    def _log_loss_holders(self, val_set: CocoDataset, seconds_per_image: float) -> None:
        started = time.monotonic()
        count = min(self.config.train.loss_images, len(val_set))
        expected = self.last_look or FIRST_LOOK + count * seconds_per_image
        if self.watching + expected > WATCHING * self.stepping:
            return
        indices = np.unique(np.linspace(0, len(val_set) - 1, count).astype(int)).tolist()
        try:
            examples = collect_examples(
                self.evaluated_model, self.loss, val_set, self.config, device=self.device, indices=indices,
                max_negatives=100_000,
            )  # fmt: skip
            self.log.loss_holders(loss_holders(examples, self.loss.class_loss), self.state.step, started=started)
        except DatasetError:  # just these few are broken, which was told
            pass
        self.last_look = time.monotonic() - started
        self.watching += self.last_look

    def snapshot(self) -> TrainState:
        """What a checkpoint holds, as of now."""
        weights = [w for w in self.model.state_dict().values() if w.is_floating_point()]
        if not bool(torch.stack([torch.isfinite(w).all() for w in weights]).all()):
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
        written = finished_metrics(self.output_dir) if val_set is not None else {}
        if distributed.rank() == 0:
            if test_metrics is not None:
                written["test"] = test_metrics.to_json()
            write_json(written, self.output_dir / "metrics.json")
        return written


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


def finished_metrics(output_dir: Path) -> dict[str, Any]:
    """What a run wrote to metrics.json.

    Raises:
        RunError: nothing.
    """
    path = output_dir / "metrics.json"
    if not path.exists():
        raise RunError(
            f"the run to resume is finished, and {path} does not exist: its results are in its own folder; score it with "
            "tools/eval.py, or start from its weights with --init-from"
        )
    metrics: dict[str, Any] = json.loads(path.read_text())
    return metrics


def versions_of_everything(device: torch.device) -> dict[str, str]:
    """What decides the last bits of the weights besides the config."""
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    return {
        "torch": str(torch.__version__),  # a subclass of str, which an inert reader refuses
        "torchvision": torchvision.__version__,
        "device": hardware,
        "threads": str(torch.get_num_threads()),
        "processes": str(distributed.world_size()),
    }
