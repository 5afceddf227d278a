"""Benchmarks of the training step."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.assign.max_iou import MaxIoUAssigner
from detector.config import Precision
from detector.datasets.loader import to_device
from detector.losses import RetinaNetLoss
from detector.memory import Work
from detector.models import RetinaNet
from detector.precision import DTYPES, autocast
from detector.structures import Batch
from detector.training.compile import compile_step
from detector.training.step import Learner, optimizer_step, train_step
from tools.benchmarks.measure import Timings, flops_of, interleaved, machine_peak, seconds_of
from tools.benchmarks.peers import Inputs, make_inputs, make_ours, make_pair, peer_name
from tools.benchmarks.pipeline import our_loader, write_images
from tools.benchmarks.rows import MismatchError, Options, Row, figures

MAX_LOSS_DIFFERENCE = 1e-5
"""Relative, in fp32."""
MAX_GRADIENT_DIFFERENCE = 1e-3
"""Norm of the difference relative to the norm, in fp32."""


class OurStep:
    """A step of our training with torchvision's matching and losses."""

    def __init__(self, model: RetinaNet, options: Options, precision: Precision, *, compiled: bool) -> None:
        loss = RetinaNetLoss(box="l1", normalizer="per_image", assigner=MaxIoUAssigner(low_quality_matches=True))
        scaler = torch.amp.GradScaler(options.device.type, enabled=False)  # the peer has none
        self.learner = Learner(model, model, loss, _optimizer(model), scaler, precision, options.device)
        if compiled:
            compile_step(model, loss)

    def losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Compute class loss, box loss and gradients."""
        result = train_step(self.learner, [batch])
        return result.loss_cls, result.loss_box

    def __call__(self, batch: Batch) -> None:
        """Run the whole step."""
        optimizer_step(self.learner, train_step(self.learner, [batch]), step=1)


class PeerStep:
    """A step as in torchvision's reference script."""

    def __init__(self, model: Any, options: Options, precision: Precision) -> None:
        self.model, self.device, self.precision = model, options.device, precision
        self.optimizer = _optimizer(model)

    def losses(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Compute class loss, box loss and gradients."""
        with autocast(self.precision, self.device):
            losses = self.model(inputs.peer_images, inputs.peer_targets)
        cls, box = losses["classification"], losses["bbox_regression"]
        (cls + box).backward()
        return cls.detach(), box.detach()

    def __call__(self, inputs: Inputs) -> None:
        """Run the whole step."""
        self.losses(inputs)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _optimizer(model: Any) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(trained, lr=1e-6, momentum=0.9, weight_decay=1e-4, fused=True)


def train(options: Options) -> list[Row]:
    """Time a training step with torchvision's anchors, matching and losses, and the same frozen layers."""
    device = options.device
    inputs = make_inputs(options.batch, options.size, options.boxes, options.classes, device)
    suffix = f"{', compiled' if options.compiles else ''}{', checkpointing' * options.checkpoint_activations}"
    rows = []
    facts: Row = {}
    for precision in options.precisions:
        ours, peer = make_pair(options.backbone, options.classes, options.size, inputs)
        ours.train().backbone.checkpointing = options.checkpoint_activations
        peer.train()
        if options.peer and not facts:
            facts = _check_same_losses(options, inputs, ours, peer)
        our_step = OurStep(ours, options, precision, compiled=options.compiles)
        peer_step = PeerStep(peer, options, precision)
        works: dict[str, Work] = {"ours": partial(our_step, inputs.batch)}
        if options.peer:
            works["peer"] = partial(peer_step, inputs)
        operations = flops_of(partial(peer_step, inputs))
        started = time.monotonic()
        works["ours"]()
        first = time.monotonic() - started
        timings = interleaved(works, repeats=options.repeats, warmup=options.warmup, device=device)
        peak = machine_peak(device, DTYPES[precision])
        rows.append(
            {
                "case": "train", "row": f"{precision}{suffix}", **options.workload, **facts,
                "first_step_seconds": first, "slowest": options.profile(works["ours"], f"train_{precision}"),
                **figures(timings, images=options.batch, operations=operations, peak=peak),
            }
        )  # fmt: skip
        del ours, peer, our_step, peer_step, works
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def _check_same_losses(options: Options, inputs: Inputs, ours: RetinaNet, peer: Any) -> Row:
    """Compare both losses and all gradients in fp32, before anything is compiled."""
    with torch.compiler.set_stance("force_eager"):
        our_losses = OurStep(ours, options, "fp32", compiled=False).losses(inputs.batch)
        peer_losses = PeerStep(peer, options, "fp32").losses(inputs)
    difference = max(float((a - b).abs() / b.abs()) for a, b in zip(our_losses, peer_losses, strict=True))
    if difference > MAX_LOSS_DIFFERENCE:
        values = [[float(part) for part in parts] for parts in (our_losses, peer_losses)]
        raise MismatchError(f"losses must agree to {MAX_LOSS_DIFFERENCE}, got {values[0]} and {values[1]}")
    gradients = {peer_name(name): p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in peer.named_parameters() if p.grad is not None}
    if gradients.keys() != expected.keys():
        raise MismatchError(f"the same layers must be trained, got {sorted(gradients.keys() ^ expected.keys())}")
    apart = torch.stack([(gradients[name] - gradient).norm() for name, gradient in expected.items()]).norm()
    gradient_difference = float(apart / torch.stack([g.norm() for g in expected.values()]).norm())
    if gradient_difference > MAX_GRADIENT_DIFFERENCE:
        raise MismatchError(f"gradients must agree to {MAX_GRADIENT_DIFFERENCE}, got {gradient_difference:.1e}")
    for model in (ours, peer):
        model.zero_grad(set_to_none=True)
    return {"loss_difference": difference, "gradient_difference": gradient_difference}


def feed(options: Options) -> list[Row]:
    """Time training steps with batches from JPEG files ("ours"), and with one batch that is on the device ("peer")."""
    device, precision = options.device, options.precisions[-1]
    model = make_ours(options.backbone, options.classes, device).train()
    step = OurStep(model, options, precision, compiled=options.compiles)
    timings = {name: Timings() for name in ("ours", "peer", "again")}
    with tempfile.TemporaryDirectory() as folder:
        count = min(options.images, max(256, 8 * options.batch))
        annotations = write_images(Path(folder), count, options.image_size)
        loader, steps = our_loader(
            annotations, options.size, options.workers, options.batch, epochs=3 * options.repeats + 1
        )
        batches = (to_device(batch, device) for batch in loader)
        batch = next(batches)
        for _ in range(2 * options.workers):  # the batches that the workers prepared before the first step
            step(batch)
            batch = next(batches)

        def from_files() -> None:
            for _ in range(steps):
                step(next(batches))

        def from_memory() -> None:
            for _ in range(steps):
                step(batch)

        order = (("ours", from_files), ("peer", from_memory), ("again", from_files), ("peer", from_memory))
        for _ in range(options.repeats):
            for name, work in order:
                timings[name].seconds.append(seconds_of(work, device) / steps)
    title = "{}, {} workers, from {} x {}".format(precision, options.workers, *options.image_size)
    return [{"case": "feed", "row": title, **options.workload, **figures(timings, images=options.batch)}]
