"""Repeat the step that nonfinite.json describes, and find the first thing that went wrong (`tools/train.py --replay`).

Batches are a pure function of (seed, step), so that training on from the last checkpoint repeats every step.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detector import distributed
from detector.atomic import read_json, write_json
from detector.checkpoint import TrainState, load_checkpoint
from detector.config import Config
from detector.config_yaml import load_config, with_model_of
from detector.datasets.loader import build_loader, to_device
from detector.datasets.opening import open_datasets
from detector.datasets.sampling import TrainSampler
from detector.errors import RunError
from detector.precision import DTYPES
from detector.text import printable_lines
from detector.training.compile import compile_step
from detector.training.diagnosis import Examination, Fault, examine, faulty_update
from detector.training.logger import RunLog
from detector.training.micro_batch import split_batch
from detector.training.nonfinite import MIN_LOSS_SCALE
from detector.training.optim import lr_of_step, set_lr
from detector.training.resume import require_same_data
from detector.training.setup import build_learner, numeric_versions
from detector.training.step import Learner, StepResult, optimizer_step, train_step
from detector.training.step_reader import build_planner, build_training_data
from detector.training.step_report import SCALE, WEIGHTS, examination_json, json_number, last_checkpoint

VALUES = ("loss_cls", "loss_box", "grad_norm")
"""What both files contain of the step."""

FIELDS: dict[str, type | tuple[type, ...]] = {
    "reason": str, "step": int, "precision": str, "processes": int, "micro_batch": (int, type(None)),
    "fitting_micro_batch": (int, type(None)), "compiled": bool, "device": str, "versions": dict,
    **dict.fromkeys(VALUES, (int, float, str)),
}  # fmt: skip
"""Fields of nonfinite.json that a replay reads, and their types."""


class Replayed(NamedTuple):
    """What repeating a step found."""

    result: StepResult
    examination: Examination
    fault: Fault | None
    """The first fault: of the step, or of an update before it."""
    fault_step: int
    reproduced: bool


def replay(file: Path, overrides: Sequence[str] = ()) -> int:
    """Repeat the step of a nonfinite.json from the last checkpoint before it, print and write what went wrong.

    Nothing in the run's folder changes but replay.json, beside the file.

    Args:
        file: nonfinite.json in the folder of its run.
        overrides: settings to change, `key=value`, such as train.device or the paths of data that was moved.

    Returns:
        The exit code: 0 if the fault appeared again, 1 if not.

    Raises:
        RunError, ConfigError, DatasetError, CheckpointError: the run cannot be repeated.
    """
    document = _read(file)
    config = load_config(_config_of(file), overrides)
    precision = config.train.model_copy(update={"precision": document["precision"]})
    data = config.data.model_copy(update={"val": None, "test": None})
    config = config.model_copy(update={"train": precision, "data": data})
    device = distributed.pick_device(config.train.device)
    state, origin = _state_before(file.parent, document)
    try:
        replayed = _repeat(document, config, state, file.parent, device)
    except torch.OutOfMemoryError:
        raise RunError(
            f"out of memory while repeating step {document['step']}; use a GPU with as much memory as the run's, or "
            "add train.device=cpu"
        ) from None
    differences = [
        f"{key} was {then}, is {now}"
        for key, now in numeric_versions(device).items()
        if key != "processes" and (then := document["versions"].get(key)) != now
    ]
    if document["processes"] > 1:
        differences.append(f"one process repeats the work of {document['processes']}, and sums round differently")
    path = file.with_name("replay.json")
    content = _report(document, replayed, origin, differences)
    write_json(content, path)
    print(printable_lines(_text(document, content, replayed)))
    print(f"details in {path}")
    return 0 if replayed.reproduced else 1


def _read(file: Path) -> dict[str, Any]:
    """Read a nonfinite.json. Raises RunError where it is none."""
    content = read_json(file)
    fields: dict[str, Any] = content if isinstance(content, dict) else {}
    wrong = [key for key, types in FIELDS.items() if not isinstance(fields.get(key), types)]
    if not wrong:
        least = {"step": 0, "processes": 1, "micro_batch": 1, "fitting_micro_batch": 1}
        wrong = [key for key, low in least.items() if fields[key] is not None and not low <= fields[key] < 2**31]
        wrong += ["precision"] * (fields["precision"] not in DTYPES) + ["processes"] * (fields["processes"] > 2**16)
    if wrong:
        raise RunError(f"--replay needs the nonfinite.json of a run, got {file}, where {wrong[0]} is missing or wrong")
    return fields


def _config_of(file: Path) -> Path:
    path = file.parent / "config.yaml"
    if not path.is_file():
        raise RunError(f"--replay needs the run's folder around the file, got {file}; {path} does not exist")
    return path


def _state_before(output_dir: Path, document: dict[str, Any]) -> tuple[TrainState | None, str]:
    """The newest checkpoint from before the step, None for the start of the run; and where the replay starts."""
    newest = last_checkpoint(output_dir, document["step"])
    if newest is None:
        return None, "the start of the run"
    return load_checkpoint(output_dir / newest["path"]), f"{newest['path']} of step {newest['step']}"


def _repeat(
    document: dict[str, Any], config: Config, state: TrainState | None, output_dir: Path, device: torch.device
) -> Replayed:
    """Train from a state to the step, and examine it."""
    source = state
    if source is None and config.train.init_from is not None:
        source = load_checkpoint(Path(config.train.init_from))
    if source is not None:
        config = with_model_of(config, source.config)
    train_set, _, _ = open_datasets(config, output_dir, quiet=True)
    if state is not None:
        require_same_data(state, train_set)
    planner = build_planner(config, train_set)
    total_steps, step = config.train.epochs * planner.steps_per_epoch, document["step"]
    if step >= total_steps:
        raise RunError(f"--replay needs a step below {total_steps:,}, the length of the run, got {step:,}")
    log = RunLog(output_dir, start_step=0, total_steps=total_steps, enabled=False)
    start = state or TrainState(config, train_set.categories, {}, step=0)
    learner = build_learner(config, train_set, start, resumed=state is not None, source=source, device=device, log=log)
    learner.halted = None  # earlier steps that were skipped are skipped again
    if document["compiled"] and config.train.compile is not False:
        compile_step(learner.model, learner.loss)
    sampler = TrainSampler(
        planner, start.step, step + 1, micro_batch=document["micro_batch"], world_size=document["processes"]
    )
    loader = iter(
        build_loader(
            build_training_data(train_set, config),
            (keys for number in range(start.step, step + 1) for keys in sampler.whole_step(number)),
            num_workers=config.data.num_workers,
            pin_memory=device.type == "cuda",
        )
    )
    fault, fault_step = None, step
    for number in range(start.step, step + 1):
        loaded = [next(loader) for _ in sampler.whole_step(number)]
        parts = [p for b in loaded for p in split_batch(to_device(b, device), document["fitting_micro_batch"])]
        set_lr(learner.optimizer, lr_of_step(number, total_steps, config.optim, config.train.batch_size))
        result = train_step(learner, parts)
        examination = Examination(None, [], {})
        if number == step:
            gradients = [(p, p.grad) for p in learner.model.parameters()]
            examination = examine(learner, parts, describe=train_set.describe)
            for parameter, gradient in gradients:
                parameter.grad = gradient
        optimizer_step(learner, result, step=number + 1)
        if fault is None:
            fault, fault_step = examination.fault or faulty_update(learner), number
    return Replayed(result, examination, fault, fault_step, _reproduced(document, result, learner))


def _reproduced(document: dict[str, Any], result: StepResult, learner: Learner) -> bool:
    """Whether the same went wrong as in the run."""
    if document["reason"] == WEIGHTS:
        return faulty_update(learner) is not None
    if document["reason"] == SCALE:
        return learner.scaler.get_scale() < MIN_LOSS_SCALE and not bool(result.grad_norm.isfinite())
    return all(_finite(document[name]) == bool(getattr(result, name).isfinite()) for name in VALUES)


def _finite(recorded: float | str) -> bool:
    return not isinstance(recorded, str)


def _report(document: dict[str, Any], replayed: Replayed, origin: str, differences: list[str]) -> dict[str, Any]:
    fault = replayed.fault
    return {
        "step": document["step"],
        "reproduced": replayed.reproduced,
        "from": origin,
        **{name: json_number(float(getattr(replayed.result, name))) for name in VALUES},
        **examination_json(replayed.examination),
        "first_fault": None if fault is None else {**fault._asdict(), "step": replayed.fault_step},
        "differences": differences,
    }


def _text(document: dict[str, Any], content: dict[str, Any], replayed: Replayed) -> str:
    """The report in a few lines."""
    now, then = (", ".join(f"{name} {some[name]}" for name in VALUES) for some in (content, document))
    outcome = "the fault appeared again" if replayed.reproduced else "the fault did not appear again"
    lines = [f"repeated step {document['step']} from {content['from']}: {outcome}"]
    lines += [f"  in the run: {then}", f"  now:        {now}"]
    lines += [f"  differs from the run: {difference}" for difference in content["differences"]]
    fault, step = replayed.fault, replayed.fault_step
    lines.append("everything was finite" if fault is None else f"first fault, at step {step}: {fault.text}")
    return "\n".join(lines)
