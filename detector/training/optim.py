"""Optimizers, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from detector.config import OptimConfig


def build_optimizer(model: nn.Module, config: OptimConfig, *, lr: float) -> torch.optim.Optimizer:
    """Build the optimizer over the trained parameters, in groups: backbone or rest, with or without weight decay.

    Each group has an `lr_factor`, which `set_lr` applies.
    """
    norms = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
    no_decay: set[int] = set()
    if not config.norm_bias_decay:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if isinstance(module, norms) or name == "bias":
                    no_decay.add(id(parameter))
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            key = (name.startswith("backbone."), id(parameter) in no_decay)
            groups.setdefault(key, []).append(parameter)
    parameter_groups = [
        {
            "params": parameters,
            "weight_decay": 0.0 if undecayed else config.weight_decay,
            "lr_factor": config.backbone_lr_factor if backbone else 1.0,
        }
        for (backbone, undecayed), parameters in groups.items()
    ]
    if config.name == "adamw":
        # fused: one pass over the memory instead of a dozen (ResNet-18 on one core: 23 ms a step instead of 63)
        return torch.optim.AdamW(parameter_groups, lr=lr, betas=config.betas, fused=True)
    # fused on a GPU, where it can leave out a step without a sync point
    fused = True if any(p.is_cuda for p in model.parameters()) else None
    optimizer = torch.optim.SGD(parameter_groups, lr=lr, momentum=config.momentum, fused=fused)
    _start_momentum(optimizer)
    return optimizer


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state of a checkpoint, whose run may have used another device."""
    fused = [group["fused"] for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, own in zip(optimizer.param_groups, fused, strict=True):
        group["fused"] = own
    _start_momentum(optimizer)


def _start_momentum(optimizer: torch.optim.Optimizer) -> None:
    """Set missing momentum of a fused SGD to 0: it would create it uninitialized in a first step that is left out."""
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"]:
            for parameter in group["params"]:
                optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to `lr` times its `lr_factor`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_factor"]


def current_lr(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the groups whose `lr_factor` is 1."""
    return next((float(g["lr"]) for g in optimizer.param_groups if g["lr_factor"] == 1), 0.0)


def scaled_lr(config: OptimConfig, batch_size: int) -> tuple[float, str]:
    """Scale the learning rate to a batch size; returns it and a line for the log with the arithmetic."""
    if not config.scale_lr or batch_size == config.lr_batch_size:
        return config.lr, f"learning rate {config.lr:g} (batch of {batch_size})"
    ratio = batch_size / config.lr_batch_size
    rule = "linear" if config.name == "sgd" else "square root"
    lr = config.lr * (ratio if config.name == "sgd" else math.sqrt(ratio))
    shown = (
        f"{batch_size} / {config.lr_batch_size}"
        if config.name == "sgd"
        else f"sqrt({batch_size} / {config.lr_batch_size})"
    )
    return lr, (
        f"learning rate {config.lr:g} x {shown} = {lr:.4g}: optim.lr is for {config.lr_batch_size} images per step "
        f"({rule} rule; optim.scale_lr=false to use it unscaled)"
    )


def lr_of_step(step: int, total_steps: int, config: OptimConfig, batch_size: int) -> float:
    """The learning rate of a step (from 0) for batches of this size."""
    return scaled_lr(config, batch_size)[0] * lr_factor(step, total_steps, config)


def warmup_of(config: OptimConfig, total_steps: int) -> int:
    """Number of warm-up steps, clamped to the length of the run."""
    return min(config.warmup_steps, total_steps)


def lr_factor(step: int, total_steps: int, config: OptimConfig) -> float:
    """Factor of the learning rate at a step (from 0): a pure function, so that resuming needs no state."""
    warmup = warmup_of(config, total_steps)
    factor = 1.0
    if step < warmup:
        factor = config.warmup_factor + (1 - config.warmup_factor) * step / warmup
    if config.schedule == "multistep":
        passed = sum(step >= round(m * total_steps) for m in config.milestones)
        return factor * config.gamma**passed
    progress = step / total_steps
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return factor * (config.final_lr_factor + (1 - config.final_lr_factor) * cosine)
