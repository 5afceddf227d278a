"""The steps between two lines of the log: their means, and whether one of them went wrong."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from detector import distributed
from detector.atomic import write_json
from detector.errors import DivergedError
from detector.structures import Batch, Targets
from detector.training.optim import current_lr

if TYPE_CHECKING:
    from detector.training.run import Run


class Interval:
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

    def check_finite(self, run: Run, *, grads_may_overflow: bool) -> None:
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
            "lr": current_lr(run.optimizer),
            "boxes": [b for t in self.targets[position] for b in t.boxes.tolist()],
        }  # fmt: skip
        checkpoints = run.output_dir / "checkpoints"
        kept = (
            f"{checkpoints} holds the last good checkpoint"
            if any(checkpoints.glob("*.pt"))
            else "no checkpoint was saved yet"
        )
        path = run.output_dir / "diverged.json"
        write_json(report, path)
        raise DivergedError(
            f"training diverged at step {step}: loss_cls {loss_cls}, loss_box {loss_box}, gradient norm {grad_norm}, "
            f"learning rate {report['lr']:.3g}, images {ids}.\n"
            f"  The step's boxes are in {path}; {kept}.\n"
            "  Usually the learning rate is too high: lower optim.lr, lengthen optim.warmup_steps or set "
            "optim.clip_grad_norm=1."
        )

    def record(self, run: Run, steps_per_epoch: int) -> dict[str, Any]:
        """Means since the last log. A sync point."""
        table = torch.stack(self.steps)
        table[:, :2] = distributed.sum_over_processes(table[:, :2].contiguous())  # each has the losses of its images
        loss_cls, loss_box, _, num_pos, _ = table.mean(dim=0).tolist()
        norms = table[:, 2]
        grad_norm = float(norms[norms.isfinite()].mean())  # without steps that overflowed in fp16 and were skipped
        elapsed = time.monotonic() - self.started
        record = {
            "step": run.state.step,
            "epoch": round(run.state.step / steps_per_epoch, 3),
            "loss": loss_cls + loss_box,
            "loss_cls": loss_cls,
            "loss_box": loss_box,
            "lr": current_lr(run.optimizer),
            "grad_norm": grad_norm,
            "num_pos": num_pos,
            "images_per_s": float(table[self.timed_from :, 4].sum()) / elapsed,
            "data_wait": self.waited / elapsed,
        }
        if run.device.type == "cuda":
            record["memory_gb"] = torch.cuda.max_memory_allocated() / 1e9
        return record
