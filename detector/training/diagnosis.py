"""Find what made a step's loss, gradient or update non-finite: recompute the step and check everything in it, in order.

The order is that of cause and effect: the batch, the weights, the outputs of modules, the losses of the pyramid's
levels, the gradients, the update.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from detector.assign.assignment import Assignment
from detector.losses.retinanet import Normalizers, RetinaNetLoss
from detector.models.retinanet import RetinaNet
from detector.precision import autocast
from detector.structures import Batch, HeadOutputs, Targets
from detector.training.running_statistics import unchanged_buffers
from detector.training.step import Learner, assign_ahead, sum_over_step

Stage = Literal["input", "parameter", "buffer", "module output", "loss", "gradient", "update"]


class Fault(NamedTuple):
    """The first thing of a step that is not finite."""

    stage: Stage
    name: str
    """The image, or the full name of the parameter, buffer, module or loss."""
    detail: str

    @property
    def text(self) -> str:
        """The fault in one line."""
        return f"{self.stage} {self.name}: {self.detail}"


class LevelLoss(NamedTuple):
    """The losses of the anchors of one level of the pyramid; they add up to those of the step."""

    level: str
    cls: float | None
    """None for class losses that choose anchors, or weigh them by statistics, of all levels together."""
    box: float


class Examination(NamedTuple):
    """What recomputing a step found."""

    fault: Fault | None
    """None: everything is finite."""
    levels: list[LevelLoss]
    gradient_norms: dict[str, float]
    """Before clipping: "total", the stages of the backbone, "fpn", "cls_subnet" and "box_subnet"."""


def examine(learner: Learner, micro_batches: Sequence[Batch], *, describe: Callable[[int], str]) -> Examination:
    """Recompute the losses and gradients of a step, without changing weights or buffers; gradients are cleared.

    Nothing is compiled here, and nothing is exchanged with other processes.

    Args:
        learner: with the weights of the step.
        micro_batches: of the step, of all processes together.
        describe: names the file of the image at a position in the dataset.
    """
    model, loss = learner.model, learner.loss
    levels, found = level_names(model), [*_faulty_input(micro_batches, model, describe), *_faulty_weight(model)]
    losses = torch.zeros(len(levels), 2, dtype=torch.float64)
    alone = replace(learner, network=model, processes=1, halted=None)
    learner.optimizer.zero_grad(set_to_none=True)
    with unchanged_buffers(model):
        assignments = [assign_ahead(alone, batch) for batch in micro_batches]
        _, normalizers = sum_over_step(alone, assignments, micro_batches)
        for batch, assignment in zip(micro_batches, assignments, strict=True):
            with _watched_outputs(model, levels, found), autocast(learner.precision, learner.device):
                tensors = RetinaNet.forward_tensors(model, batch.images, batch.image_sizes)
            outputs = HeadOutputs(*tensors, model.anchors_of(batch.images), model.activation)
            by_level = _level_losses(loss, outputs, batch.targets, assignment, normalizers)
            losses += by_level
            _backward(learner, outputs, batch.targets, assignment, normalizers, levels, by_level, found)
    norms = gradient_norms(model, scale=learner.scaler.get_scale())
    if not found and not torch.tensor(norms["total"]).isfinite():
        found.append(Fault("gradient", "all parameters", "every gradient is finite, but not the norm of all together"))
    learner.optimizer.zero_grad(set_to_none=True)
    table = [
        LevelLoss(level, None if loss.class_loss.is_mean else cls, box)
        for level, (cls, box) in zip(levels, losses.tolist(), strict=True)
    ]
    return Examination(found[0] if found else None, table, norms)


def level_names(model: RetinaNet) -> list[str]:
    """P3, P4, ... of the pyramid's strides."""
    return [f"P{stride.bit_length() - 1}" for stride in model.fpn.strides]


def gradient_norms(model: RetinaNet, *, scale: float) -> dict[str, float]:
    """The norm of all gradients, "total", and of the parts of the network, after division by `scale`."""
    parts: dict[str, list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            part, _, rest = name.partition(".")
            if part == "backbone":
                stage = rest.partition(".")[0]
                part = f"backbone.{'stem' if stage in ('conv1', 'bn1') else stage}"
            parts.setdefault(part, []).append(parameter.grad.float())
    norms = {part: nn.utils.get_total_norm(gradients) / scale for part, gradients in parts.items()}
    total = nn.utils.get_total_norm(list(norms.values())) if norms else torch.zeros(())
    return {"total": float(total), **{part: float(norm) for part, norm in norms.items()}}


def nonfinite_weight(model: nn.Module) -> tuple[str, Tensor] | None:
    """The name and values of the first parameter or buffer that is not finite."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return next(((name, t) for name, t in tensors if t.is_floating_point() and not bool(t.isfinite().all())), None)


def faulty_update(learner: Learner) -> Fault | None:
    """What an update made non-finite, if anything."""
    weight = nonfinite_weight(learner.model)
    if weight is None:
        return None
    name, values = weight
    parameter = dict(learner.model.named_parameters()).get(name)
    state = {} if parameter is None else learner.optimizer.state.get(parameter, {})
    moments = [k for k, v in state.items() if isinstance(v, Tensor) and not bool(v.isfinite().all())]
    lr = next(group["lr"] for group in learner.optimizer.param_groups)
    cause = f"; so is its {', '.join(moments)}" if moments else ""
    return Fault("update", name, f"{_count(values)} after an update with learning rate {lr:.3g}{cause}")


def _faulty_input(micro_batches: Sequence[Batch], model: RetinaNet, describe: Callable[[int], str]) -> Iterator[Fault]:
    """The images, boxes and labels that no step can use."""
    num_classes = model.cls_subnet.outputs - (model.activation == "softmax")
    for batch in micro_batches:
        labels = batch.targets.labels
        for row, (image_id, index) in enumerate(zip(batch.image_ids.tolist(), batch.index.tolist(), strict=True)):
            name = f"image {image_id}"
            where = describe(index) if index >= 0 else "no file"
            pixels = batch.images[row]
            if pixels.is_floating_point() and not bool(pixels.isfinite().all()):
                channel, y, x = torch.nonzero(~pixels.isfinite())[0].tolist()
                yield Fault("input", name, f"{where}: pixel ({x}, {y}) of channel {channel} is {pixels[channel, y, x]}")
            for kind, boxes in (("box", batch.targets.boxes[row]), ("ignore region", batch.targets.ignore_boxes[row])):
                for number in torch.nonzero(~boxes.isfinite().all(dim=1)).flatten().tolist():
                    yield Fault("input", name, f"{where}: {kind} {number} is {_numbers(boxes[number])}")
            for number in torch.nonzero(labels[row] >= 0).flatten().tolist():
                if int(labels[row, number]) >= num_classes:
                    label = int(labels[row, number])
                    yield Fault("input", name, f"{where}: label {number} is {label}, of {num_classes} classes")
            weights = batch.targets.weights
            if weights is not None and not bool(weights[row].isfinite().all()):
                yield Fault("input", name, f"{where}: weights of objects are {_numbers(weights[row])}")


def _faulty_weight(model: RetinaNet) -> list[Fault]:
    weight = nonfinite_weight(model)
    if weight is None:
        return []
    name, values = weight
    stage: Stage = "parameter" if name in dict(model.named_parameters()) else "buffer"
    return [Fault(stage, name, _count(values))]


@contextlib.contextmanager
def _watched_outputs(model: RetinaNet, levels: Sequence[str], found: list[Fault]) -> Iterator[None]:
    """Add the first module whose output is not finite to `found` if that is empty."""
    calls: dict[str, int] = {}

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def check(_: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            outputs = _floats(output)
            if found or all(bool(t.isfinite().all()) for t in outputs):
                return
            level = ""
            if name.startswith(("cls_subnet.", "box_subnet.")):  # their layers are called once for each level
                level = f" at {levels[(calls[name] - 1) % len(levels)]}"
            bad = next(t for t in outputs if not bool(t.isfinite().all()))
            detail = f"{_count(bad)}{level}; its inputs are {_range(_floats(inputs))}"
            found.append(Fault("module output", name, detail))

        return check

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _level_losses(
    loss: RetinaNetLoss, outputs: HeadOutputs, targets: Targets, assignment: Assignment, normalizers: Normalizers
) -> Tensor:
    """(L, 2) fp64: the class and box loss of each level's anchors."""
    sizes = [deltas.shape[1] for deltas in outputs.box_deltas]
    per_anchor = [
        [None] * len(sizes) if t is None else torch.split(t, sizes, dim=1)
        for t in (assignment.matched, assignment.target_scores, assignment.box_weights)
    ]
    rows = []
    with torch.no_grad():
        for level, (anchors, matched, scores, weights) in enumerate(
            zip(torch.split(outputs.anchors, sizes), *per_anchor, strict=True)
        ):
            own = HeadOutputs((outputs.cls_logits[level],), (outputs.box_deltas[level],), anchors, outputs.activation)
            part = Assignment(matched, assignment.num_pos, scores, weights)
            parts = RetinaNetLoss.forward(loss, own, targets, assignment=part, normalizers=normalizers)
            rows.append(torch.stack([parts["loss_cls"], parts["loss_box"]]))
    return torch.stack(rows).double().cpu()


def _backward(
    learner: Learner,
    outputs: HeadOutputs,
    targets: Targets,
    assignment: Assignment,
    normalizers: Normalizers,
    levels: Sequence[str],
    by_level: Tensor,
    found: list[Fault],
) -> None:
    """Compute the losses and add up their gradients; add what is not finite to `found`, if that is empty."""
    cls, box = ([t.detach().requires_grad_() for t in part] for part in (outputs.cls_logits, outputs.box_deltas))
    leaves = outputs._replace(cls_logits=tuple(cls), box_deltas=tuple(box))
    parts = RetinaNetLoss.forward(learner.loss, leaves, targets, assignment=assignment, normalizers=normalizers)
    for column, name in enumerate(("loss_cls", "loss_box")):
        faulty = [level for level, value in zip(levels, by_level[:, column], strict=True) if not value.isfinite()]
        if not found and (faulty or not bool(parts[name].isfinite())):
            where = f"at {', '.join(faulty)}" if faulty else "over all levels together"
            found.append(Fault("loss", name, f"{float(parts[name].detach())} {where}, of finite outputs"))
    total = learner.scaler.scale(parts["loss_cls"] + parts["loss_box"])
    gradients = torch.autograd.grad(total, [*cls, *box], allow_unused=True)
    known = [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(gradients, [*cls, *box], strict=True)]
    scaled = f", times the loss scale {learner.scaler.get_scale():g}" if learner.scaler.is_enabled() else ""
    for name, some in (("loss_cls", known[: len(cls)]), ("loss_box", known[len(cls) :])):
        faulty = [level for level, g in zip(levels, some, strict=True) if not bool(g.isfinite().all())]
        if not found and faulty:
            what = f"of the {'logits' if name == 'loss_cls' else 'deltas'} at {', '.join(faulty)}"
            found.append(Fault("gradient", name, f"the gradient {what}{scaled} is not finite, though the loss is"))
    handles = []
    for name, parameter in learner.model.named_parameters():

        def check(p: Tensor, name: str = name) -> None:
            if not found and p.grad is not None and not bool(p.grad.isfinite().all()):
                found.append(Fault("gradient", name, f"{_count(p.grad)}{scaled}"))

        if parameter.requires_grad:
            handles.append(parameter.register_post_accumulate_grad_hook(check))  # type: ignore[no-untyped-call]
    try:
        torch.autograd.backward([*outputs.cls_logits, *outputs.box_deltas], known)
    finally:
        for handle in handles:
            handle.remove()


def _floats(values: Any) -> list[Tensor]:
    return [t.detach() for t in tree_leaves(values) if isinstance(t, Tensor) and t.is_floating_point()]


def _count(values: Tensor) -> str:
    """How many entries of a tensor are not finite, and where the first one is."""
    bad = torch.nonzero(~values.isfinite())
    first = bad[0].tolist()
    return f"{len(bad):,} of {values.numel():,} values are not finite, the first is {values[tuple(first)]} at {first}"


def _range(tensors: Sequence[Tensor]) -> str:
    finite = [t[t.isfinite()] for t in tensors]
    finite = [t for t in finite if t.numel()]
    if not finite:
        return "not finite"
    low, high = min(float(t.min()) for t in finite), max(float(t.max()) for t in finite)
    others = "" if all(bool(t.isfinite().all()) for t in tensors) else ", and not all finite"
    return f"in {low:.3g}..{high:.3g}{others}"


def _numbers(values: Tensor) -> str:
    return "[" + ", ".join(f"{v:g}" for v in values.tolist()) + "]"
