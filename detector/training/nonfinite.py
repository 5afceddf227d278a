"""Steps that are not finite: noticed on the host, described in nonfinite.json, then skipped or the end of the run.

The device itself leaves out their update (`training.step`), so that noticing them may wait until the next log record.
`training.replay` repeats such a step.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from detector import distributed
from detector.atomic import write_json
from detector.checkpoint import TrainState
from detector.errors import DivergedError, RunError
from detector.structures import Batch
from detector.text import printable_lines
from detector.training.diagnosis import Examination, examine, faulty_update
from detector.training.log_window import LogWindow
from detector.training.logger import RunLog
from detector.training.optim import lr_of_step
from detector.training.step import Learner
from detector.training.step_reader import StepReader
from detector.training.step_report import (
    FILE_NAME,
    LOSS,
    MAX_IDS,
    SCALE,
    WEIGHTS,
    cause_text,
    examination_json,
    images_of,
    json_number,
    last_checkpoint,
    remedy,
    step_batches,
    values_text,
)

MIN_LOSS_SCALE = 2.0**-10
"""Loss scale of fp16 below which steps that overflow are a fault: unscaled gradients a thousand times beyond fp16's
range are no rounding problem. From GradScaler's initial 65,536, 27 overflows in a row lead there."""


MAX_REASON = 500
"""Characters of the reason why a step could not be examined."""


class NonfiniteSteps:
    """Notices a run's steps that were not finite, and ends the run or counts them as skipped.

    Args:
        output_dir: the run's folder.
        learner, reader, state, log: of the run; `state.config` has the settings.
    """

    def __init__(
        self, output_dir: Path, *, learner: Learner, reader: StepReader, state: TrainState, log: RunLog
    ) -> None:
        self.output_dir = output_dir
        self.learner = learner
        self.reader = reader
        self.state = state
        self.log = log

    def notice(self, window: LogWindow, *, last_step: int) -> None:
        """Check all steps of a log window that were not checked yet. A sync point if there are any.

        Args:
            window: the steps since the last log record.
            last_step: number of the last of them, from 0.

        Raises:
            DivergedError: a step was not finite and `train.on_nonfinite` is stop; more steps were skipped than
                `train.max_skipped_steps` allows; or fp16's loss scale collapsed.
        """
        rows = window.take_unchecked()
        if rows is None:
            return
        rows = rows.cpu()  # one sync point
        finite_losses, finite_norm = rows[:, :2].isfinite().all(dim=1), rows[:, 2].isfinite()
        half = self.learner.precision == "fp16"  # where GradScaler skips steps whose gradients overflow
        numbers = [last_step + 1 - len(rows) + i for i in range(len(rows))]
        wrong = (~finite_losses if half else ~(finite_losses & finite_norm)).tolist()
        faulty = [(step, row) for step, row, is_wrong in zip(numbers, rows, wrong, strict=True) if is_wrong]
        if faulty:
            self._stop_or_skip([step for step, _ in faulty], faulty[0][1])
        overflowed = [(step, row) for step, row, ok in zip(numbers, rows, finite_norm.tolist(), strict=True) if not ok]
        if half and overflowed and self.learner.scaler.get_scale() < MIN_LOSS_SCALE:
            self._raise_for_scale(*overflowed[-1])

    def require_finite_weights(self, window: LogWindow) -> None:
        """Check the weights, before they are saved. A sync point.

        Raises:
            DivergedError: a weight is not finite.
        """
        weights = [w for w in self.learner.model.state_dict().values() if w.is_floating_point()]
        if bool(torch.stack([w.isfinite().all() for w in weights]).all()):
            return
        step = max(0, self.state.step - 1)
        row = window.steps[-1] if window.steps else torch.full((5,), math.nan)
        document = self._write(step, row, WEIGHTS, lambda _: Examination(faulty_update(self.learner), [], {}))
        self._raise(f"weights are no longer finite after step {step}", document)

    def _stop_or_skip(self, steps: list[int], row: Tensor) -> None:
        """Handle new steps that were not finite; `row` (5,) has the values of the first."""
        document = self._write(steps[0], row, LOSS, self._examine)
        settings = self.state.config.train
        if settings.on_nonfinite == "stop":
            self._raise(f"training diverged at step {steps[0]}", document)
        self.state.skipped_steps += steps
        skipped, limits = self.state.skipped_steps, settings.max_skipped_steps
        counts = {"consecutive": (longest_run(skipped), limits.consecutive), "total": (len(skipped), limits.total)}
        for what, (count, limit) in counts.items():
            if count > limit:
                self._raise(
                    f"training diverged: {count} steps{' in a row' * (what == 'consecutive')} were not finite and were "
                    f"skipped, more than train.max_skipped_steps.{what}={limit} allows; step {steps[0]}",
                    document,
                )
        named = f"step {steps[0]} was" if len(steps) == 1 else f"steps {', '.join(map(str, steps[:MAX_IDS]))} were"
        self.log.warn(
            f"{named} skipped, {len(skipped)} in total: {values_text(document)}\n{cause_text(document)}\n"
            f"  Details are in {self.output_dir / FILE_NAME}."
        )

    def _raise_for_scale(self, step: int, row: Tensor) -> None:
        document = self._write(step, row, SCALE, self._examine)
        self._raise(
            f"fp16's loss scale collapsed to {self.learner.scaler.get_scale():.2g} at step {step}, below "
            f"{MIN_LOSS_SCALE:.2g}: the gradients of step after step overflow",
            document,
        )

    def _raise(self, headline: str, document: dict[str, Any]) -> None:
        """Raise the error that ends the run, on all processes, after the first one has written the file."""
        distributed.barrier()  # torchrun ends all as soon as one exits
        folder, checkpoint = self.output_dir / "checkpoints", document["checkpoint"]
        kept = "no checkpoint was saved yet"
        if checkpoint is not None:
            name = Path(checkpoint["path"]).name
            kept = f"{folder} holds the last good checkpoint, {name} of step {checkpoint['step']}"
        details = f"Details are in {self.output_dir / FILE_NAME}"
        if document.get("not_written"):
            details = f"No details, because {document['not_written']}"
        lines = [f"{headline}: {values_text(document)}", cause_text(document), f"  {details}; {kept}."]
        lines += [f"  {remedy(document)}", f"  To repeat the step and find the cause: {document['replay']}"]
        if document["reason"] == LOSS and self.state.config.train.on_nonfinite == "stop":
            how = "with --resume auto" if checkpoint is not None else "in a new run"
            lines.append(f"  To leave such steps out {how}: train.on_nonfinite=skip")
        raise DivergedError("\n".join(lines))

    def _examine(self, batches: Sequence[Batch]) -> Examination:
        norms = [m for m in self.learner.model.modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
        if norms and self.learner.processes > 1:
            raise RuntimeError("the statistics of norm sync_bn need all processes; see --replay")
        return examine(self.learner, batches, describe=self.reader.coco.describe)

    def _write(
        self, step: int, row: Tensor, reason: str, examine_step: Callable[[Sequence[Batch]], Examination]
    ) -> dict[str, Any]:
        """Describe a step, and write nonfinite.json on the first process. Returns the description."""
        document = self._describe(step, row, reason)
        if distributed.rank() != 0:
            return document | {"not_examined": "only the first process does that"}
        try:
            batches = step_batches(
                self.reader.dataset, self.reader.sampler, step, device=self.learner.device,
                limit=self.state.fitting_micro_batch,
            )  # fmt: skip
            document["images"] = images_of(batches, self.reader.coco.describe)
            document |= examination_json(examine_step(batches))
        except (RuntimeError, OSError, ValueError, LookupError) as error:  # must not hide what is being reported
            document["not_examined"] = printable_lines(str(error), MAX_REASON)
        try:
            write_json(document, self.output_dir / FILE_NAME)
        except RunError as error:
            document["not_written"] = printable_lines(str(error), MAX_REASON)
        return document

    def _describe(self, step: int, row: Tensor, reason: str) -> dict[str, Any]:
        config, sampler, learner = self.state.config, self.reader.sampler, self.learner
        loss_cls, loss_box, grad_norm = row[:3].tolist()
        ids = self.reader.coco.image_ids
        exact = learner.device.type == "cpu" or learner.halted is not None
        return {
            "reason": reason,
            "step": step,
            "loss_cls": json_number(loss_cls),
            "loss_box": json_number(loss_box),
            "grad_norm": json_number(grad_norm),
            "lr": lr_of_step(step, sampler.total_steps, config.optim, config.train.batch_size),
            "precision": learner.precision,
            "loss_scale": learner.scaler.get_scale() if learner.scaler.is_enabled() else None,
            "device": learner.device.type,
            "processes": learner.processes,
            "micro_batch": sampler.micro_batch,
            "fitting_micro_batch": self.state.fitting_micro_batch,
            "compiled": "forward_tensors" in vars(learner.model),
            "versions": self.state.versions,
            "skipped_steps": list(self.state.skipped_steps),
            "examined_after_step": step if exact else self.state.step,
            "image_ids": [int(ids[key.index]) for part in sampler.whole_step(step) for key in part if key.index >= 0],
            "images": [],
            **examination_json(Examination(None, [], {})),
            "checkpoint": last_checkpoint(self.output_dir, step),
            "replay": f"python tools/train.py --replay {shlex.quote(str(self.output_dir / FILE_NAME))}",
        }


def longest_run(steps: Sequence[int]) -> int:
    """The length of the longest run of consecutive numbers in an ascending list."""
    longest = current = 0
    for i, step in enumerate(steps):
        current = current + 1 if i and step == steps[i - 1] + 1 else 1
        longest = max(longest, current)
    return longest
