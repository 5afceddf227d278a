"""Build what a run trains: network, loss, optimizer, EMA; fresh, fine-tuned from a checkpoint, or resumed."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from detector import distributed
from detector.checkpoint import TrainState, require_fitting_weights
from detector.config import Config
from detector.datasets.class_statistics import class_weights, class_weights_text
from detector.datasets.coco import CocoDataset
from detector.errors import ConfigError
from detector.inference.nms import has_triton
from detector.losses import build_loss
from detector.losses.class_loss import CLASS_LOSSES
from detector.models import RetinaNet, build_anchors, build_model
from detector.precision import resolve_precision
from detector.training.ema import Ema
from detector.training.logger import RunLog
from detector.training.optim import build_optimizer, load_optimizer_state, scaled_lr
from detector.training.step import Learner
from detector.weights.backbone_weights import load_backbone_weights
from detector.weights.compatibility import require_same_build
from detector.weights.transfer import transfer


def require_device_settings(config: Config, device: torch.device) -> None:
    """Check the settings that depend on the device.

    Raises:
        ConfigError: a setting that this device cannot serve.
    """
    norm = config.model.norm
    if norm == "sync_bn" and device.type == "cpu":
        raise ConfigError("model.norm must not be sync_bn on a CPU (torch has no such kernel); use bn or gn")
    if config.train.compile is True and device.type == "cuda" and not has_triton(device):
        raise ConfigError(
            "train.compile must be auto or false on this machine, got true: Triton, which compiles for the GPU, is not "
            "installed or does not support this GPU (compute capability 7.0 at least)"
        )
    if config.train.checkpoint_activations and norm in ("bn", "sync_bn"):
        raise ConfigError(
            f"train.checkpoint_activations must be false with model.norm {norm}, whose statistics would see every "
            "batch twice; use train.micro_batch, or norm frozen_bn or gn"
        )


def build_learner(
    config: Config,
    train_set: CocoDataset,
    state: TrainState,
    *,
    resumed: bool,
    source: TrainState | None,
    device: torch.device,
    log: RunLog,
) -> Learner:
    """Build the learner of a run and fill in `state.alpha`.

    Args:
        config: of the run.
        train_set: gives the classes, and class weights that are counted.
        state: of the run; its tensors are loaded if `resumed`.
        resumed: whether `state` comes from a checkpoint of this run.
        source: a checkpoint to fine-tune from; None: a fresh network.
        device: to train on.
        log: reports which weights were loaded.
    """
    require_device_settings(config, device)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, len(train_set.categories))
    if not resumed:
        _load_initial_weights(model, config, train_set, source, log)
    model.backbone.checkpointing = config.train.checkpoint_activations
    model.to(device)
    if config.train.channels_last:
        model.to(memory_format=torch.channels_last)
    model.train()
    if config.loss.cls != "focal":
        log.info(f"loss.cls={config.loss.cls} uses the settings {', '.join(CLASS_LOSSES[config.loss.cls].settings)}")
    state.alpha = class_weights(config.loss, train_set)
    if state.alpha is not None:
        log.info(class_weights_text(state.alpha, train_set))
    precision = resolve_precision(config.train.precision, device)
    learner = Learner(
        model,
        model,
        build_loss(config, alpha=state.alpha).to(device),
        build_optimizer(model, config.optim, lr=scaled_lr(config.optim, config.train.batch_size)[0]),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        precision,
        device,
        clip_grad_norm=config.optim.clip_grad_norm,
        processes=distributed.world_size(),
        ema=Ema(model, config.train.ema.decay) if config.train.ema is not None else None,
        halted=torch.zeros((), dtype=torch.bool, device=device) if config.train.on_nonfinite == "stop" else None,
    )
    if resumed:
        _load_state(learner, state)
    learner.network = _distributed(model, config, device)
    return learner


def _load_initial_weights(
    model: RetinaNet, config: Config, train_set: CocoDataset, source: TrainState | None, log: RunLog
) -> None:
    if source is None:
        report = load_backbone_weights(
            model.get_submodule("backbone"), config.model.backbone, config.model.backbone_weights
        )
        log.info(report if report is not None else "backbone: from scratch")
        return
    require_fitting_weights(source)
    for line in source.origin:
        log.info(line)
    for line in require_same_build(config, source.config, str(config.train.init_from)):
        log.warn(line)
    report = transfer(
        model,
        source.weights,
        source=str(config.train.init_from),
        classes=train_set.categories,
        source_classes=source.categories,
        source_anchors=build_anchors(source.config.model),
    )
    log.info(report)


def _load_state(learner: Learner, state: TrainState) -> None:
    learner.model.load_state_dict(state.model)
    if learner.ema is not None and state.ema is not None:
        learner.ema.model.load_state_dict(state.ema)
    if state.optimizer is not None:
        load_optimizer_state(learner.optimizer, state.optimizer)
    if state.scaler:
        learner.scaler.load_state_dict(state.scaler)


def _distributed(model: RetinaNet, config: Config, device: torch.device) -> nn.Module:
    if distributed.world_size() == 1:
        return model
    network = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)
    network.broadcast_buffers = config.model.norm == "bn"  # the argument of this name is deprecated
    return network


def warn_if_not_bit_identical(state: TrainState, config: Config, device: torch.device, log: RunLog) -> None:
    """Warn about everything that differs from the session that saved `state` and changes the last bits of the
    weights."""
    before, now = state.config.train.micro_batch, config.train.micro_batch
    if before != now:
        statistics = " and norm bn computes statistics over other images" if config.model.norm == "bn" else ""
        log.warn(
            f"train.micro_batch was {before}, is {now}: sums round differently{statistics}; resuming, but results will "
            "not be bit-identical"
        )
    versions = numeric_versions(device)
    for key, value in state.versions.items():
        if versions.get(key) != value:
            log.warn(f"{key} was {value}, is {versions.get(key)}: resuming, but results will not be bit-identical")


def numeric_versions(device: torch.device) -> dict[str, str]:
    """Everything besides the config that determines the last bits of the weights."""
    import torchvision  # slow to import, and not needed for anything else

    return {
        "torch": str(torch.__version__),  # a subclass of str, which the safe loader refuses
        "torchvision": torchvision.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": str(torch.get_num_threads()),
        "processes": str(distributed.world_size()),
    }
