"""A step that is not finite changes nothing, on any device, and one that is finite is computed as without the guard."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detector.config import OptimConfig, Precision
from detector.distributed import process_group
from detector.losses.retinanet import Normalizers, RetinaNetLoss
from detector.models import RetinaNet
from detector.models.resnet import ARCHITECTURES
from detector.precision import autocast
from detector.structures import Batch
from detector.training.ema import Ema
from detector.training.micro_batch import split_batch
from detector.training.optim import build_optimizer, load_optimizer_state
from detector.training.step import Learner, StepResult, optimizer_step, train_step
from tests.emulated_gpu import emulated_gpu
from tests.tiny import ranks, start_process, wait
from tests.training.faults import NARROW, Explosive
from tests.training.test_step import aligned_loss, tiny_model
from tests.training.test_step import batch_of as larger_batch_of


@pytest.fixture(autouse=True, scope="module")
def _narrow_network(short_network: None) -> Iterator[None]:
    """A CPU computes fp16 very slowly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "resnet18", NARROW)
        yield


OPTIMIZERS = {
    "sgd": OptimConfig(name="sgd", weight_decay=0.01),
    "adamw": OptimConfig(name="adamw", weight_decay=0.01),
}


def new_learner(
    *,
    optimizer: str = "sgd",
    precision: Precision = "fp32",
    norm: str = "gn",
    device: str = "cpu",
    loss: RetinaNetLoss | None = None,
    clip: float | None = None,
    processes: int = 1,
) -> Learner:
    where = torch.device(device)
    model = tiny_model(norm).to(where)
    return Learner(
        model, model, loss or RetinaNetLoss(), build_optimizer(model, OPTIMIZERS[optimizer], lr=0.01),
        torch.amp.GradScaler(where.type, enabled=precision == "fp16", init_scale=256.0), precision, where,
        clip_grad_norm=clip, ema=Ema(model, 0.9), processes=processes,
    )  # fmt: skip


def batch_of(count: int, *, first: int = 0, **extra: Tensor) -> Batch:
    """As `test_step.batch_of`, a quarter as large."""
    batch = larger_batch_of(count, first=first, **extra)
    targets = batch.targets._replace(boxes=batch.targets.boxes / 2)
    sizes = torch.full((count, 2), 32)
    return batch._replace(images=batch.images[..., :32, :32], targets=targets, image_sizes=sizes)


def moved(batch: Batch, device: torch.device) -> Batch:
    return Batch(
        batch.images.to(device), batch.targets.to(device), batch.image_ids.to(device), batch.image_sizes.to(device),
        batch.original_sizes.to(device), batch.index.to(device),
    )  # fmt: skip


def content(learner: Learner) -> dict[str, Tensor]:
    """All that a step may change: weights, running statistics, averages, the optimizer's state."""
    assert learner.ema is not None
    found = {f"model.{k}": v for k, v in learner.model.state_dict().items()}
    found |= {f"ema.{k}": v for k, v in learner.ema.model.state_dict().items()}
    for name, parameter in learner.model.named_parameters():
        state = learner.optimizer.state.get(parameter, {})
        found |= {f"optimizer.{name}.{k}": v for k, v in state.items() if isinstance(v, Tensor)}
    return {k: v.detach().cpu().clone() for k, v in found.items()}


def differing(one: dict[str, Tensor], other: dict[str, Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [k for k in one if not torch.equal(one[k], other[k])]


def unguarded_step(learner: Learner, micro_batches: list[Batch], *, step: int) -> None:
    """One step as it was computed before anything guarded it."""
    loss, model = learner.loss, learner.model
    assignments = [
        loss.assign(model.anchors_of(b.images), b.targets, grids=model.grids_of(b.images)) for b in micro_batches
    ]
    rows = [
        torch.stack([*loss.normalizers(a, torch.tensor(len(b.images)))])
        for a, b in zip(assignments, micro_batches, strict=True)
    ]
    normalizers = Normalizers(*torch.stack(rows).sum(dim=0))
    for batch, assignment in zip(micro_batches, assignments, strict=True):
        with autocast(learner.precision, learner.device):
            outputs = model(batch.images, batch.image_sizes)
        parts = loss(outputs, batch.targets, assignment=assignment, normalizers=normalizers)
        learner.scaler.scale(parts["loss_cls"] + parts["loss_box"]).backward()
    learner.scaler.unscale_(learner.optimizer)
    trained = [p for p in model.parameters() if p.grad is not None]
    if learner.clip_grad_norm is not None:
        nn.utils.clip_grad_norm_(trained, learner.clip_grad_norm)
    learner.scaler.step(learner.optimizer)
    learner.scaler.update()
    learner.optimizer.zero_grad(set_to_none=True)
    assert learner.ema is not None
    learner.ema.update(model, step)


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({}, 1),
        ({"optimizer": "adamw", "clip": 0.5}, 2),
        ({"norm": "bn", "clip": 0.5}, 2),
        ({"precision": "bf16"}, 1),
        ({"precision": "fp16", "optimizer": "adamw"}, 2),
    ],
)
def test_finite_steps_are_bit_identical_to_steps_without_the_guard(settings: dict[str, Any], parts: int) -> None:
    guarded, plain = new_learner(**settings), new_learner(**settings)
    guarded.halted = torch.zeros((), dtype=torch.bool)
    before = content(plain)
    for step in (1, 2, 3):
        micro_batches = [batch_of(2, first=10 * step + 2 * part) for part in range(parts)]
        optimizer_step(guarded, train_step(guarded, micro_batches), step=step)
        unguarded_step(plain, micro_batches, step=step)
    assert differing(content(guarded), content(plain)) == []
    assert guarded.scaler.state_dict() == plain.scaler.state_dict()
    assert all(k in differing(before, {k: v for k, v in content(plain).items() if k in before}) for k in (
        "model.fpn.lateral.0.weight", "ema.fpn.lateral.0.weight",
    ))  # fmt: skip


class FaultyLoss(RetinaNetLoss):
    """A loss with a fault."""

    fault = ""

    def forward(self, *arguments: Any, **named: Any) -> dict[str, Tensor]:
        parts = super().forward(*arguments, **named)
        if self.fault == "class loss":
            parts["loss_cls"] = parts["loss_cls"] * torch.nan
        if self.fault == "box loss":
            parts["loss_box"] = parts["loss_box"] + torch.inf
        if self.fault == "gradient":
            parts["loss_cls"] = Explosive.apply(parts["loss_cls"])
        return parts


FAULTS = ["class loss", "box loss", "gradient", "target", "ignore region", "weight"]


def faulty_step(learner: Learner, fault: str, *, step: int) -> StepResult:
    """A step of two micro-batches, the second of which has the fault."""
    assert isinstance(learner.loss, FaultyLoss)
    good, bad = (moved(batch_of(2, first=first), learner.device) for first in (20, 22))
    weight = learner.model.get_parameter("fpn.lateral.0.weight")
    kept = weight.detach().clone()
    learner.loss.fault = fault
    if fault == "target":
        bad.targets.boxes[1, 0, 2] = torch.nan
    if fault == "ignore region":
        bad = bad._replace(targets=bad.targets._replace(ignore_boxes=bad.targets.boxes * torch.inf))
    if fault == "weight":
        with torch.no_grad():
            weight.view(-1)[0] = torch.nan
    result = train_step(learner, [good, bad])
    with torch.no_grad():
        weight.copy_(kept)
    learner.loss.fault = ""
    optimizer_step(learner, result, step=step)
    return result


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("precision", "optimizer", "fault"),
    [
        *itertools.product(["fp32"], ["sgd", "adamw"], FAULTS),
        *itertools.product(["bf16"], ["adamw"], ["class loss", "weight"]),
        *itertools.product(["fp16"], ["sgd", "adamw"], ["class loss", "gradient"]),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_is_as_if_it_had_not_been(
    device: str, precision: Precision, optimizer: str, fault: str
) -> None:
    """At the first step, and after another; with norm bn, whose statistics the forward pass changes."""
    emulated = emulated_gpu() if device == "cuda" else contextlib.nullcontext()
    with emulated as gpu:
        learners = [
            new_learner(optimizer=optimizer, precision=precision, norm="bn", device=device, loss=FaultyLoss())
            for _ in range(2)
        ]
        faulty, spared = learners
        for step in (1, 2):
            before = content(faulty)
            if gpu is not None:
                gpu.waits.clear()
            result = faulty_step(faulty, fault, step=step)
            if gpu is not None:
                waits = [wait for wait in gpu.waits if "train_step" in wait or "optimizer_step" in wait]
                assert {wait[-2:] for wait in waits} <= {("AnchorGenerator.forward", "to")}  # a new shape
            assert not bool(result.applies)
            if optimizer == "sgd" and step == 1 and device == "cpu":
                assert not [k for k in content(faulty) if "momentum" in k]
            now = content(faulty)
            if optimizer == "sgd" or step == 2:
                assert differing(now, before) == []
            else:  # AdamW creates its state in the first step, whatever that is
                assert differing({k: now[k] for k in before}, before) == []
                assert not any(v.any() for k, v in now.items() if k not in before)
            scale = {"scale": 256.0} if faulty.scaler.is_enabled() else {}
            for learner in learners:
                learner.scaler.load_state_dict({**learner.scaler.state_dict(), **scale})
                batch = moved(batch_of(2, first=30), learner.device)
                optimizer_step(learner, train_step(learner, [batch]), step=step)
        assert differing(content(faulty), content(spared)) == []
        assert not all(torch.equal(a, b) for a, b in zip(before.values(), content(spared).values(), strict=False))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_after_a_fault_that_ends_the_run_no_step_changes_anything(device: str) -> None:
    """So that its weights are still there when the host notices it; without `halted`, good steps are applied."""
    with emulated_gpu() if device == "cuda" else contextlib.nullcontext():
        halting, skipping = (new_learner(norm="bn", device=device, loss=FaultyLoss()) for _ in range(2))
        halting.halted = torch.zeros((), dtype=torch.bool, device=halting.device)
        before = content(halting)
        for learner in (halting, skipping):
            faulty_step(learner, "class loss", step=1)
            result = train_step(learner, [moved(batch_of(2), learner.device)])
            assert bool(result.applies) == (learner is skipping)
            optimizer_step(learner, result, step=2)
        assert differing(content(halting), before) == []
        assert differing({k: content(skipping)[k] for k in before}, before)


@pytest.mark.parametrize(("fault", "halts"), [("gradient", False), ("class loss", True)])
def test_in_fp16_gradients_that_overflow_lower_the_scale_and_halt_nothing(fault: str, halts: bool) -> None:
    learner = new_learner(precision="fp16", loss=FaultyLoss())
    learner.halted = torch.zeros((), dtype=torch.bool)
    before = content(learner)
    faulty_step(learner, fault, step=1)
    assert differing(content(learner), before) == []
    assert learner.scaler.get_scale() == 128
    assert bool(learner.halted) == halts


def faulty_step_of_one_process(out: Path) -> None:
    """Two steps of two processes; only in the second process, and only in the first step, a loss is not finite."""
    ARCHITECTURES["resnet18"] = NARROW
    with process_group("cpu"):
        rank = torch.distributed.get_rank()
        learner = new_learner(loss=FaultyLoss(), processes=2)
        learner.network = nn.parallel.DistributedDataParallel(learner.model)
        before = content(learner)
        assert isinstance(learner.loss, FaultyLoss)
        changed, losses = [], []
        for step in (1, 2):
            batch = batch_of(1, first=rank)
            if rank == 1 and step == 1:
                batch.targets.boxes[0, 0] = torch.nan  # the gradients of such a step are finite
            result = train_step(learner, [batch])
            optimizer_step(learner, result, step=step)
            losses.append(float(result.loss_box))
            changed.append(bool(differing({k: content(learner)[k] for k in before}, before)))
        torch.save({"content": content(learner), "changed": changed, "losses": losses}, out / f"{rank}.pt")


def test_a_fault_of_one_process_makes_all_leave_out_the_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    codes = wait([start_process(faulty_step_of_one_process, (tmp_path,), log, env) for env in ranks(2)], log)
    assert codes == [0, 0], log.read_text()[-3000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["changed"] == other["changed"] == [False, True]
    assert str(one["losses"]) == str(other["losses"])
    assert str(one["losses"][0]) == "nan"
    assert differing(one["content"], other["content"]) == []


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_checkpoint_of_a_cpu_trains_on_with_a_gpus_optimizer_and_back(name: str) -> None:
    """Whether an optimizer is fused, and can leave out a step, is a matter of the device and not of the checkpoint."""
    cpu = new_learner(optimizer=name)
    optimizer_step(cpu, train_step(cpu, [batch_of(2)]), step=1)
    saved = copy.deepcopy(cpu.optimizer.state_dict())
    with emulated_gpu():
        gpu = new_learner(optimizer=name, device="cuda", loss=FaultyLoss())
        load_optimizer_state(gpu.optimizer, saved)
        assert all(group["fused"] for group in gpu.optimizer.param_groups)
        before = content(gpu)
        faulty_step(gpu, "class loss", step=2)
        assert differing(content(gpu), before) == []
        back = copy.deepcopy(gpu.optimizer.state_dict())
    again = new_learner(optimizer=name)
    load_optimizer_state(again.optimizer, back)
    assert {bool(group["fused"]) for group in again.optimizer.param_groups} == {name == "adamw"}


@pytest.mark.parametrize(("length", "size", "expected"), [(1, 1, [1]), (5, None, [5]), (5, 8, [5]), (5, 2, [2, 2, 1])])
def test_a_micro_batch_is_split_into_the_fewest_nearly_equal_parts(
    length: int, size: int | None, expected: list[int]
) -> None:
    batch = batch_of(length, weights=torch.arange(2.0 * length).view(length, 2))
    parts = split_batch(batch, size)
    assert [len(part.images) for part in parts] == expected
    for part in parts:
        assert len({len(t) for t in (*part.targets[:4], *part[2:6], part.images) if t is not None}) == 1
    for name in ("images", "image_ids", "image_sizes", "original_sizes", "index"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(batch, name))
    weights = [part.targets.weights for part in parts]
    assert torch.equal(torch.cat([w for w in weights if w is not None]), torch.arange(2.0 * length).view(length, 2))


@pytest.mark.parametrize("where", ["forward", "backward", "clipping"])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_runs_out_of_memory_changes_nothing_and_can_be_done_again(
    precision: Precision, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the second of two micro-batches, when the first has left gradients and statistics."""
    learner, spared = (new_learner(precision=precision, norm="bn", clip=0.5) for _ in range(2))
    before = content(learner)
    micro_batches = [batch_of(2), batch_of(2, first=2)]
    with monkeypatch.context() as patch:
        calls = 0

        def full(*arguments: Any, real: Any, at: int, **named: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == at:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return real(*arguments, **named)

        owner, name, at = {
            "forward": (RetinaNet, "forward", 2),
            "backward": (Tensor, "backward", 2),
            "clipping": (nn.utils, "clip_grads_with_norm_", 1),
        }[where]
        real: Any = getattr(owner, name)
        patch.setattr(owner, name, lambda *a, **k: full(*a, real=real, at=at, **k))
        with pytest.raises(torch.OutOfMemoryError):
            train_step(learner, micro_batches)
    assert differing(content(learner), before) == []
    assert all(p.grad is None for p in learner.model.parameters())
    for each in (learner, spared):
        optimizer_step(each, train_step(each, micro_batches), step=1)
    assert differing(content(learner), content(spared)) == []
    assert learner.scaler.state_dict() == spared.scaler.state_dict()


def test_with_soft_targets_the_guard_holds_too() -> None:
    """An assigner that needs outputs, in one micro-batch and in several."""
    for parts in (1, 2):
        learner = new_learner(loss=aligned_loss(), norm="bn")
        before = content(learner)
        batches = [batch_of(2, first=2 * part) for part in range(parts)]
        batches[-1].targets.boxes[0, 0, 0] = torch.inf
        result = train_step(learner, batches)
        optimizer_step(learner, result, step=1)
        assert not bool(result.applies)
        assert differing(content(learner), before) == []
