"""The steps between two log records: their means, and whether one of them was not finite."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector import distributed
from detector.atomic import write_json
from detector.errors import DivergedError
from detector.structures import Batch, Targets
from detector.training.step import StepResult


class LogWindow:
    """The steps since the last log record, kept on the device, so that adding one is no sync point.

    Args:
        device: the device of the run.
        steps: (n, 5) the steps before an interruption that no record contains yet; None: none.
    """

    def __init__(self, device: torch.device, steps: Tensor | None = None) -> None:
        # per step: loss_cls, loss_box, grad_norm, num_pos, num_images
        self.steps: list[Tensor] = [] if steps is None else [*steps.to(device)]
        self.image_ids: list[list[Tensor]] = [[] for _ in self.steps]
        self.targets: list[list[Targets]] = [[] for _ in self.steps]
        self.start_clock()

    def start_clock(self) -> None:
        """Measure throughput from here: neither evaluations nor an earlier session count."""
        self.started = time.monotonic()
        self.data_wait = 0.0
        self.timed_from = len(self.steps)

    def add(self, result: StepResult, micro_batches: Sequence[Batch], *, waited: float) -> None:
        """Add one step, which waited `waited` seconds for its data."""
        self.data_wait += waited
        values = [result.loss_cls, result.loss_box, result.grad_norm, result.num_pos, result.normalizers.images]
        self.steps.append(torch.stack([v.detach().float() for v in values]))
        self.image_ids.append([b.image_ids for b in micro_batches])
        self.targets.append([b.targets for b in micro_batches])

    def require_finite(self, *, last_step: int, lr: float, output_dir: Path, grads_may_overflow: bool) -> None:
        """Check that the losses and gradients of all steps are finite. A sync point.

        Args:
            last_step: number of the last step that was added, from 0.
            lr: the current learning rate, for the report.
            output_dir: where diverged.json is written.
            grads_may_overflow: whether GradScaler skips steps whose gradients are not finite (fp16).

        Raises:
            DivergedError: a step is not finite; the message names it, its images and the usual remedies.
        """
        table = torch.stack(self.steps)
        finite = torch.isfinite(table[:, :2] if grads_may_overflow else table[:, :3]).all(dim=1)
        if bool(finite.all()):
            return
        position = int(torch.nonzero(~finite)[0])
        step = last_step - len(self.steps) + 1 + position
        loss_cls, loss_box, grad_norm = table[position, :3].tolist()
        ids = [i for part in self.image_ids[position] for i in part.tolist()]
        report = {
            "step": step, "loss_cls": loss_cls, "loss_box": loss_box, "grad_norm": grad_norm, "image_ids": ids,
            "lr": lr, "boxes": [b for t in self.targets[position] for b in t.boxes.tolist()],
        }  # fmt: skip
        checkpoints = output_dir / "checkpoints"
        saved = any(checkpoints.glob("*.pt"))
        kept = f"{checkpoints} holds the last good checkpoint" if saved else "no checkpoint was saved yet"
        path = output_dir / "diverged.json"
        write_json(report, path)
        raise DivergedError(
            f"training diverged at step {step}: loss_cls {loss_cls}, loss_box {loss_box}, gradient norm {grad_norm}, "
            f"learning rate {lr:.3g}, images {ids}.\n"
            f"  The step's boxes are in {path}; {kept}.\n"
            "  Usually the learning rate is too high: lower optim.lr, lengthen optim.warmup_steps or set "
            "optim.clip_grad_norm=1."
        )

    def record(self, *, step: int, steps_per_epoch: int, lr: float) -> dict[str, Any]:
        """Compute the log record of these steps, their means. A sync point.

        Args:
            step: number of steps done.
            steps_per_epoch: of the run.
            lr: the current learning rate.
        """
        table = torch.stack(self.steps)
        table[:, :2] = distributed.sum_over_processes(table[:, :2].contiguous())  # each has the losses of its images
        loss_cls, loss_box, _, num_pos, _ = table.mean(dim=0).tolist()
        norms = table[:, 2]
        elapsed = time.monotonic() - self.started
        record = {
            "step": step,
            "epoch": round(step / steps_per_epoch, 3),
            "loss": loss_cls + loss_box,
            "loss_cls": loss_cls,
            "loss_box": loss_box,
            "lr": lr,
            "grad_norm": float(
                norms[norms.isfinite()].mean()
            ),  # without steps that overflowed in fp16 and were skipped
            "num_pos": num_pos,
            "images_per_s": float(table[self.timed_from :, 4].sum()) / elapsed,
            "data_wait": self.data_wait / elapsed,
        }
        if table.is_cuda:
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return record
