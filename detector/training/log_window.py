"""The steps between two log records, and their means."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

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
        self.num_checked = len(self.steps)
        self.start_clock()

    def start_clock(self) -> None:
        """Measure throughput from here: neither evaluations nor an earlier session count."""
        self.started = time.monotonic()
        self.data_wait = 0.0
        self.timed_from = len(self.steps)

    def add(self, result: StepResult, *, waited: float) -> None:
        """Add one step, which waited `waited` seconds for its data."""
        self.data_wait += waited
        values = [result.loss_cls, result.loss_box, result.grad_norm, result.num_pos, result.normalizers.images]
        self.steps.append(torch.stack([v.detach().float() for v in values]))

    def take_unchecked(self) -> Tensor | None:
        """The rows (n, 5) of the steps that this method has not returned yet; None if there are none."""
        new = self.steps[self.num_checked :]
        self.num_checked = len(self.steps)
        return torch.stack(new) if new else None

    def record(self, *, step: int, steps_per_epoch: int, lr: float) -> dict[str, Any] | None:
        """Compute the log record of these steps: the means of those that were not skipped. A sync point.

        Args:
            step: number of steps done.
            steps_per_epoch: of the run.
            lr: the current learning rate.

        Returns:
            None if all steps were skipped.
        """
        table = torch.stack(self.steps)
        finite = table[:, :2].isfinite().all(dim=1)  # in fp16, losses count where only gradients overflowed
        norms = table[finite, 2]
        norms = norms[norms.isfinite()]
        if not len(norms):
            return None
        loss_cls, loss_box, _, num_pos, _ = table[finite].mean(dim=0).tolist()
        elapsed = time.monotonic() - self.started
        record = {
            "step": step,
            "epoch": round(step / steps_per_epoch, 3),
            "loss": loss_cls + loss_box,
            "loss_cls": loss_cls,
            "loss_box": loss_box,
            "lr": lr,
            "grad_norm": float(norms.mean()),
            "num_pos": num_pos,
            "images_per_s": float(table[self.timed_from :, 4].sum()) / elapsed,
            "data_wait": self.data_wait / elapsed,
        }
        if table.is_cuda:
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return record
