"""One optimizer step: assign, normalize, forward, backward, clip; then update, unless the step is not finite."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from detector import distributed
from detector.assign.assignment import Assignment
from detector.config import Precision
from detector.losses.retinanet import Normalizers, RetinaNetLoss
from detector.models.retinanet import RetinaNet
from detector.precision import autocast
from detector.structures import Batch
from detector.training.ema import Ema
from detector.training.running_statistics import BuffersBefore, running_statistics, unchanged_buffers


@dataclass
class Learner:
    """Everything that an optimizer step reads and changes."""

    model: RetinaNet
    network: nn.Module
    """`model`, or its DistributedDataParallel wrapper."""
    loss: RetinaNetLoss
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Enabled for fp16 only."""
    precision: Precision
    device: torch.device
    clip_grad_norm: float | None = None
    processes: int = 1
    """Processes that share a step; 1 leaves out all communication."""
    ema: Ema | None = None
    halted: Tensor | None = None
    """Where a step that is not finite ends the run: () bool on the device, whether there was one. No later step changes
    anything, so that the weights of that step are still there when the next check on the host notices it."""

    @property
    def evaluated_model(self) -> RetinaNet:
        """The EMA weights, where there are any."""
        if self.ema is None:
            return self.model
        model: RetinaNet = self.ema.model  # type: ignore[assignment]  # a copy of `self.model`
        return model

    @cached_property
    def running_statistics(self) -> list[Tensor]:
        """The buffers that a forward pass changes."""
        return running_statistics(self.model)


class StepResult(NamedTuple):
    """What a step computed; scalars on the device, so that keeping it is no sync point."""

    loss_cls: Tensor
    loss_box: Tensor
    """The losses of all micro-batches and processes; the box loss is NaN where a target is not finite."""
    grad_norm: Tensor
    num_pos: Tensor
    """Positive anchors of all micro-batches and processes."""
    normalizers: Normalizers
    assignments: list[Assignment]
    """One per micro-batch of this process."""
    applies: Tensor
    """() bool, the same on all processes: whether `optimizer_step` will apply the step."""


def train_step(learner: Learner, micro_batches: Sequence[Batch]) -> StepResult:
    """Compute the gradients of one optimizer step and clip them; `optimizer_step` then applies them.

    The losses are divided by sums over all micro-batches and processes. Most assigners need no outputs of the network:
    all micro-batches are assigned first, and the sums are known before the first forward pass. An assigner that needs
    outputs costs nothing more where a step is one micro-batch. With several, each is first passed through the network
    without a gradient (about a third of a step's time), because the sums must be known before the first backward pass
    and only one micro-batch's activations fit into memory.

    Running statistics stay as they were if the step does not apply, or if memory runs out.

    Args:
        learner: the network and what trains it.
        micro_batches: of this process, on its device.
    """
    loss, model = learner.loss, learner.model
    with _discarded_if_memory_runs_out(learner) as statistics:
        ahead = not loss.assigner.needs_outputs or len(micro_batches) > 1
        assignments = [assign_ahead(learner, batch) for batch in micro_batches] if ahead else []
        if ahead:
            num_pos, normalizers = sum_over_step(learner, assignments, micro_batches)
        loss_cls = loss_box = torch.zeros((), device=learner.device)
        for i, batch in enumerate(micro_batches):
            with _no_gradient_exchange(learner, unless=i == len(micro_batches) - 1):
                with autocast(learner.precision, learner.device):
                    outputs = learner.network(batch.images, batch.image_sizes)
                if not ahead:
                    grids = model.grids_of(batch.images)
                    assignments = [loss.assign(outputs.anchors, batch.targets, grids=grids, outputs=outputs)]
                    num_pos, normalizers = sum_over_step(learner, assignments, micro_batches)
                parts = loss(outputs, batch.targets, assignment=assignments[i], normalizers=normalizers)
                total = parts["loss_cls"] + parts["loss_box"]
                # DDP averages over processes, but the normalizers are those of all of them already.
                learner.scaler.scale(total * learner.processes).backward()
            loss_cls, loss_box = loss_cls + parts["loss_cls"].detach(), loss_box + parts["loss_box"].detach()
        learner.scaler.unscale_(learner.optimizer)
        trained = [p for p in model.parameters() if p.grad is not None]
        grad_norm = nn.utils.get_total_norm([p.grad for p in trained if p.grad is not None])
        if learner.clip_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(trained, learner.clip_grad_norm, grad_norm)
        losses = torch.stack([loss_cls, loss_box + _zero_if_finite(micro_batches)])
        if learner.processes > 1:  # on a GPU not a sync point
            losses = distributed.sum_over_processes(losses)
        applies = _applies(learner, losses, grad_norm)
        statistics.restore(unless=applies)
    return StepResult(losses[0], losses[1], grad_norm, num_pos, normalizers, assignments, applies)


def optimizer_step(learner: Learner, result: StepResult, *, step: int) -> None:
    """Apply the gradients of `train_step` and update the EMA weights.

    A step that is not finite changes neither weights nor the optimizer's state nor the EMA weights, only the loss scale
    of fp16. On a GPU the device decides, without a sync point.

    Args:
        learner: the network and what trains it.
        result: of `train_step`.
        step: number of steps including this one.
    """
    optimizer: Any = learner.optimizer
    if learner.device.type == "cpu":
        if bool(result.applies):
            optimizer.step()
            if learner.ema is not None:
                learner.ema.update(learner.model, step)
    else:
        assert all(group["fused"] for group in optimizer.param_groups), "other optimizers ignore found_inf"
        optimizer.found_inf = (~result.applies).float()  # as GradScaler passes it
        optimizer.step()
        del optimizer.found_inf
        if learner.ema is not None:
            learner.ema.update(learner.model, step, applies=result.applies)
    learner.scaler.update()
    optimizer.zero_grad(set_to_none=True)


def _applies(learner: Learner, losses: Tensor, grad_norm: Tensor) -> Tensor:
    """Whether a step is finite and no earlier one has halted the run: () bool."""
    finite_losses = losses.isfinite().all()
    finite = finite_losses & grad_norm.isfinite()
    if learner.halted is None:
        return finite
    # In fp16, overflowing gradients are no fault: GradScaler lowers the loss scale.
    learner.halted.logical_or_(~(finite_losses if learner.precision == "fp16" else finite))
    return finite & ~learner.halted


def _zero_if_finite(micro_batches: Sequence[Batch]) -> Tensor:
    """0, or NaN if a target is not finite: () fp32. Assigners would silently ignore such a box."""
    targets = [batch.targets for batch in micro_batches]
    values = [value for t in targets for value in (t.boxes, t.ignore_boxes, t.weights) if value is not None]
    return torch.stack([value.sum() for value in values]).sum() * 0


@contextlib.contextmanager
def _discarded_if_memory_runs_out(learner: Learner) -> Iterator[BuffersBefore]:
    """Undo everything that a step changed if the block raises an out-of-memory error, so that it can be done again."""
    statistics = BuffersBefore(learner.running_statistics)
    try:
        yield statistics
    except torch.OutOfMemoryError:
        statistics.restore(unless=torch.zeros((), dtype=torch.bool, device=learner.device))
        learner.optimizer.zero_grad(set_to_none=True)
        if learner.scaler.is_enabled():  # a new one, because unscale_ may have been called and cannot be called twice
            scaler = torch.amp.GradScaler(learner.device.type)
            scaler.load_state_dict(learner.scaler.state_dict())
            learner.scaler = scaler
        raise


def assign_ahead(learner: Learner, batch: Batch) -> Assignment:
    """Assign a micro-batch before its forward pass, or by one of its own without a gradient."""
    model, outputs = learner.model, None
    if learner.loss.assigner.needs_outputs:
        # running statistics must see each batch once
        with unchanged_buffers(model), torch.no_grad(), autocast(learner.precision, learner.device):
            outputs = model(batch.images, batch.image_sizes)
    return learner.loss.assign(
        model.anchors_of(batch.images), batch.targets, grids=model.grids_of(batch.images), outputs=outputs
    )


def sum_over_step(
    learner: Learner, assignments: Sequence[Assignment], micro_batches: Sequence[Batch]
) -> tuple[Tensor, Normalizers]:
    """Positive anchors and normalizers of all micro-batches and processes."""
    rows = []
    for assignment, batch in zip(assignments, micro_batches, strict=True):
        own = learner.loss.normalizers(assignment, (batch.index >= 0).sum())
        rows.append(torch.stack([assignment.num_pos.sum().float(), *own]))
    sums = torch.stack(rows).sum(dim=0)
    if learner.processes > 1:
        sums = distributed.sum_over_processes(sums)
    num_pos, *normalizers = sums.unbind()
    return num_pos, Normalizers(*normalizers)


@contextlib.contextmanager
def _no_gradient_exchange(learner: Learner, *, unless: bool) -> Iterator[None]:
    """Skip DDP's exchange of gradients for all micro-batches but the last."""
    if isinstance(learner.network, DistributedDataParallel) and not unless:
        with learner.network.no_sync():
            yield
    else:
        yield
