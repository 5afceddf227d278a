"""What nonfinite.json and replay.json contain of a step, and how messages describe it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from detector.checkpoint import load_checkpoint
from detector.datasets.loader import DetectionDataset, collate, to_device
from detector.datasets.sampling import TrainSampler
from detector.errors import CheckpointError
from detector.structures import Batch
from detector.training.checkpoints import resumable
from detector.training.diagnosis import Examination, Fault
from detector.training.micro_batch import split_batch

FILE_NAME = "nonfinite.json"
"""In the run's folder."""

LOSS, SCALE, WEIGHTS = "loss or gradient", "loss scale", "weights"
"""`reason` in nonfinite.json: what was not finite, or collapsed."""

MAX_IDS = 20
"""Image ids that a message lists."""


def last_checkpoint(output_dir: Path, step: int) -> dict[str, Any] | None:
    """The newest checkpoint of a run from before a step: its path in the run's folder, and its step."""
    found: list[tuple[int, Path]] = []
    for path in resumable(output_dir):
        try:
            state = load_checkpoint(path)
        except CheckpointError:
            continue
        if state.step <= step and state.optimizer is not None:
            found.append((state.step, path))
    if not found:
        return None
    newest, path = max(found, key=lambda pair: pair[0])
    return {"path": path.relative_to(output_dir).as_posix(), "step": newest}


def step_batches(
    dataset: DetectionDataset, sampler: TrainSampler, step: int, *, device: torch.device, limit: int | None
) -> list[Batch]:
    """Read the micro-batches of all processes of a step again.

    Args:
        dataset, sampler: of the run.
        step: of the run, from 0.
        device: where batches go.
        limit: images per micro-batch, if it is less than the sampler's.
    """
    loaded = [collate([dataset[key] for key in keys]) for keys in sampler.whole_step(step)]
    return [part for batch in loaded for part in split_batch(to_device(batch, device), limit)]


def images_of(batches: Sequence[Batch], describe: Callable[[int], str]) -> list[dict[str, Any]]:
    """The images of a step: id, file, and the objects in pixels of the network's input."""
    images = []
    for batch in batches:
        for row, index in enumerate(batch.index.tolist()):
            if index < 0:
                continue
            real = batch.targets.labels[row] >= 0
            boxes = batch.targets.boxes[row][real].tolist()
            images.append({
                "image_id": int(batch.image_ids[row]),
                "path": describe(index),
                "size": batch.image_sizes[row].tolist(),
                "boxes": [[json_number(v) for v in box] for box in boxes],
                "labels": batch.targets.labels[row][real].tolist(),
            })  # fmt: skip
    return images


def examination_json(examination: Examination) -> dict[str, Any]:
    """The part of nonfinite.json and replay.json that describes what recomputing a step found."""
    fault = examination.fault
    return {
        "first_fault": None if fault is None else fault._asdict(),
        "losses_by_level": [
            {"level": e.level, "cls": None if e.cls is None else json_number(e.cls), "box": json_number(e.box)}
            for e in examination.levels
        ],
        "gradient_norms": {part: json_number(norm) for part, norm in examination.gradient_norms.items()},
    }


def json_number(value: float) -> float | str:
    """JSON has no NaN and no infinity: they become text."""
    return value if math.isfinite(value) else str(value)


def values_text(document: dict[str, Any]) -> str:
    """The losses, gradient norm, learning rate and images of a step."""
    ids, more = document["image_ids"][:MAX_IDS], len(document["image_ids"]) - MAX_IDS
    return (
        f"loss_cls {document['loss_cls']}, loss_box {document['loss_box']}, gradient norm {document['grad_norm']}, "
        f"learning rate {document['lr']:.3g}, images {ids}{f' and {more} more' if more > 0 else ''}."
    )


def cause_text(document: dict[str, Any]) -> str:
    """The first fault, if it is known."""
    if document.get("not_examined"):
        return f"  The step was not examined: {document['not_examined']}."
    fault = document["first_fault"]
    if fault is None:
        return "  Computed again, everything in the step is finite."
    return f"  First fault: {Fault(**fault).text}."


def remedy(document: dict[str, Any]) -> str:
    """What to do about a step that is not finite."""
    fault = document["first_fault"]
    if fault is not None and fault["stage"] == "input":
        return "Correct this image or its annotations."
    if document["reason"] == SCALE:
        start = "a new run"
        if document["checkpoint"] is not None:
            start = f"a new run from these weights (--init-from .../{document['checkpoint']['path']})"
        return f"Start {start} with train.precision=bf16 or fp32, or with a lower optim.lr."
    return (
        "Usually the learning rate is too high: lower optim.lr, lengthen optim.warmup_steps or set "
        "optim.clip_grad_norm=1."
    )
