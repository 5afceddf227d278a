"""What a run does about steps that are not finite: notice, describe, stop or skip; and about too little memory."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from detector.config_yaml import load_config
from detector.errors import DivergedError, RunError
from detector.losses.retinanet import RetinaNetLoss
from detector.models import RetinaNet
from detector.models.resnet import ARCHITECTURES
from detector.training import optim
from detector.training import step as step_module
from detector.training import train as training_loop
from detector.training.nonfinite import longest_run
from detector.training.run import Run
from detector.training.train import train
from tests.emulated_gpu import emulated_gpu
from tests.tiny import (
    TinyData,
    differing,
    last_checkpoint,
    ranks,
    records,
    start_process,
    tensors_of,
    tiny_config,
    wait,
    write_config,
)
from tests.training.faults import IMAGE, NARROW, QUICK, Fault, Kind
from tools import train as tool


@pytest.fixture(autouse=True, scope="module")
def _narrow_network(short_network: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "resnet18", NARROW)
        yield


def strict_json(path: Path) -> Any:
    """Read a file that any JSON parser reads: without NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.parametrize(
    ("kind", "stage", "name"),
    [
        ("weight", "parameter", "fpn.lateral.1.weight"),
        ("buffer", "buffer", "pixel_std"),
        ("module output", "module output", "backbone.layer3.0.conv2"),
        ("class loss", "loss", "loss_cls"),
        ("gradient of the loss", "gradient", "loss_cls"),
        ("gradient", "gradient", "cls_subnet.predictor.weight"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_fault_ends_the_run_with_its_cause_in_a_file_and_good_checkpoints(
    device: str, kind: Kind, stage: str, name: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU, it is noticed at the next log record, and examined with the weights that the step had."""
    settings = {**QUICK, "train__checkpoint_every_steps": 2, "train__device": device}
    emulated = emulated_gpu() if device == "cuda" else contextlib.nullcontext()
    Fault(monkeypatch, kind, step=2)
    with emulated, pytest.raises(DivergedError, match="training diverged at step 2: loss_cls") as caught:
        train(tiny_config(tmp_path, data, **settings), tmp_path / "run")
    message = str(caught.value)
    document = strict_json(tmp_path / "run" / "nonfinite.json")
    assert document["step"] == document["examined_after_step"] == 2
    assert (document["first_fault"]["stage"], document["first_fault"]["name"]) == (stage, name)
    assert f"First fault: {stage} {name}: " in message
    state = last_checkpoint(tmp_path / "run")
    assert state.step == 2
    assert all(torch.isfinite(t).all() for t in tensors_of(state).values())
    assert document["checkpoint"] == {"path": "checkpoints/last.pt", "step": 2}
    assert f"{tmp_path / 'run' / 'checkpoints'} holds the last good checkpoint, last.pt of step 2" in message
    assert document["replay"] == f"python tools/train.py --replay {tmp_path / 'run' / 'nonfinite.json'}"
    assert document["replay"] in message
    assert len(message.encode()) < 4000
    if kind == "module output":
        assert "its inputs are in " in document["first_fault"]["detail"]
    if kind == "gradient of the loss":
        assert "of the logits at P3, P4, P5, P6, P7 is not finite" in document["first_fault"]["detail"]
    if stage == "gradient":
        assert isinstance(document["loss_cls"], float)
        assert document["gradient_norms"]["cls_subnet"] == "nan"
        assert isinstance(document["gradient_norms"]["box_subnet"], float)


def test_the_file_describes_the_step_so_that_others_can_work_on_it(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses by level add up to those of a step whose gradient alone is not finite."""
    Fault(monkeypatch, "gradient", step=3)
    config = tiny_config(tmp_path, data, **{**QUICK, "train__micro_batch": 1, "train__batch_size": 4})
    with pytest.raises(DivergedError):
        train(config, tmp_path / "run")
    document = strict_json(tmp_path / "run" / "nonfinite.json")
    assert document["step"] == 0, "the fourth forward pass"
    levels = document["losses_by_level"]
    assert [level["level"] for level in levels] == ["P3", "P4", "P5", "P6", "P7"]
    for name in ("cls", "box"):
        assert sum(level[name] for level in levels) == pytest.approx(document[f"loss_{name}"], rel=1e-5)
    assert document["lr"] == pytest.approx(0.01 * 0.001)
    assert document["precision"] == "fp32"
    assert document["loss_scale"] is None
    assert document["micro_batch"] == 1
    assert document["checkpoint"] is None
    annotations = json.loads(data.train.read_text())
    files = {i["id"]: i["file_name"] for i in annotations["images"]}
    objects = {i: sum(a["image_id"] == i for a in annotations["annotations"]) for i in files}
    assert len(document["images"]) == 4
    assert document["image_ids"] == [image["image_id"] for image in document["images"]]
    for image in document["images"]:
        assert Path(image["path"]).name == files[image["image_id"]]
        assert Path(image["path"]).is_file()
        assert len(image["boxes"]) == len(image["labels"]) == objects[image["image_id"]]
        assert all(0 <= v <= 48 for box in image["boxes"] for v in box)
    assert set(document["gradient_norms"]) == {
        "total", "backbone.stem", *(f"backbone.layer{n}" for n in (1, 2, 3, 4)), "fpn", "cls_subnet", "box_subnet",
    }  # fmt: skip


def test_a_target_that_is_not_finite_is_a_fault_though_the_loss_would_be_finite(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(monkeypatch, "target", step=0)
    message = rf"First fault: input image {IMAGE}: .*0040\.png: box \d is \[.*nan"
    with pytest.raises(DivergedError, match=message) as caught:
        train(tiny_config(tmp_path, data, **QUICK), tmp_path / "run")
    assert "Correct this image or its annotations." in str(caught.value)
    document = strict_json(tmp_path / "run" / "nonfinite.json")
    boxes = next(image["boxes"] for image in document["images"] if image["image_id"] == IMAGE)
    assert "nan" in boxes[-1]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_skipped_steps_are_counted_reported_stored_and_left_out(
    device: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As if the learning rate of the step had been 0, without momentum and decay. The log record has the others."""
    settings = {
        **QUICK, "train__on_nonfinite": "skip", "train__device": device, "optim__momentum": 0.0,
        "optim__weight_decay": 0.0, "train__log_every": 3,
    }  # fmt: skip
    with monkeypatch.context() as patch, emulated_gpu() if device == "cuda" else contextlib.nullcontext():
        Fault(patch, "class loss", step=1)
        train(tiny_config(tmp_path, data, **settings), tmp_path / "run")
    printed = " ".join(capsys.readouterr().out.split())
    state = last_checkpoint(tmp_path / "run")
    assert state.skipped_steps == [1]
    assert state.step == 6
    assert "warning: step 1 was skipped, 1 in total: loss_cls nan" in printed
    assert "First fault: loss loss_cls" in printed
    document = strict_json(tmp_path / "run" / "nonfinite.json")
    assert document["examined_after_step"] == (1 if device == "cpu" else 3)
    strict_json_lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert all("NaN" not in line for line in strict_json_lines)
    assert [record["step"] for record in records(tmp_path / "run")] == [3, 6]

    real = optim.lr_factor
    monkeypatch.setattr(optim, "lr_factor", lambda step, *rest: 0.0 if step == 1 else real(step, *rest))
    settings["train__device"] = "cpu"
    train(tiny_config(tmp_path, data, **settings), tmp_path / "other")
    other = last_checkpoint(tmp_path / "other")
    if device == "cpu":
        assert differing(state, other) == []
    for key, value in other.model.items():
        torch.testing.assert_close(state.model[key], value, rtol=1e-4, atol=1e-5)
    losses = [record["loss"] for record in records(tmp_path / "run")]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[1] == pytest.approx(records(tmp_path / "other")[1]["loss"], rel=1e-4)


def test_a_run_that_stopped_resumes_without_the_step_as_its_error_suggests(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends as if it had skipped it at once."""
    settings = {**QUICK, "train__checkpoint_every_steps": 1}
    Fault(monkeypatch, "class loss", step=2)
    with pytest.raises(DivergedError, match=r"with --resume auto: train\.on_nonfinite=skip"):
        train(tiny_config(tmp_path, data, **settings), tmp_path / "stopped")
    config = load_config(tmp_path / "tiny.yaml", ["train.on_nonfinite=skip"])
    train(config, tmp_path / "stopped", resume="auto")
    train(config, tmp_path / "skipped")
    stopped, skipped = (last_checkpoint(tmp_path / name) for name in ("stopped", "skipped"))
    assert stopped.skipped_steps == skipped.skipped_steps == [2]
    assert differing(stopped, skipped) == []
    assert records(tmp_path / "stopped") == records(tmp_path / "skipped")


def test_an_interval_in_which_all_steps_were_skipped_has_no_record(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Fault(monkeypatch, "class loss", step=1)
    settings = {**QUICK, "train__on_nonfinite": "skip", "train__log_every": 1}
    train(tiny_config(tmp_path, data, **settings), tmp_path / "run")
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("limits", "failing", "message"),
    [
        ({"consecutive": 2, "total": 9}, [0, 1, 2], r"3 steps in a row were .*max_skipped_steps\.consecutive=2 allows"),
        ({"consecutive": 2, "total": 2}, [0, 2, 4], r"3 steps were .*max_skipped_steps\.total=2 allows"),
        ({"consecutive": 2, "total": 3}, [0, 1, 3], None),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_more_skipped_steps_than_allowed_end_the_run_also_over_an_interruption(
    device: str,
    limits: dict[str, int],
    failing: list[int],
    message: str | None,
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Interrupted after the second step; what was skipped before counts."""
    forward, real, steps = RetinaNetLoss.forward, step_module.train_step, iter(range(100))
    settings = {
        **QUICK, "train__on_nonfinite": "skip", "train__max_skipped_steps": limits, "train__device": device,
        "train__checkpoint_every_steps": 2,
    }  # fmt: skip
    config = tiny_config(tmp_path, data, **settings)

    def broken(*arguments: Any, **named: Any) -> Any:
        return {name: loss * torch.inf for name, loss in forward(*arguments, **named).items()}

    def step_of_run(*arguments: Any) -> Any:
        step = next(steps)
        if step == interrupted:
            raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            if step in failing:
                patch.setattr(RetinaNetLoss, "forward", broken)
            return real(*arguments)

    interrupted = 2
    monkeypatch.setattr(training_loop, "train_step", step_of_run)
    with emulated_gpu() if device == "cuda" else contextlib.nullcontext():
        with contextlib.suppress(KeyboardInterrupt):
            train(config, tmp_path / "run")
        assert last_checkpoint(tmp_path / "run").skipped_steps == [s for s in failing if s < 2]
        interrupted, steps = -1, iter(range(2, 100))
        if message is None:
            train(config, tmp_path / "run", resume="auto")
            assert last_checkpoint(tmp_path / "run").skipped_steps == failing
            return
        with pytest.raises(DivergedError, match=message):
            train(config, tmp_path / "run", resume="auto")


@pytest.mark.parametrize(("steps", "expected"), [([], 0), ([3], 1), ([1, 3], 1), ([1, 2, 4, 5, 6, 9], 3), ([7, 8], 2)])
def test_the_longest_run_of_steps(steps: list[int], expected: int) -> None:
    assert longest_run(steps) == expected


def out_of_memory_beyond(images: int, patch: pytest.MonkeyPatch, *, from_step: int) -> list[int]:
    """Let forward passes of more images fail from a step on; returns their sizes as they come."""
    forward, schedule_lr, sizes, steps = RetinaNet.forward, Run.schedule_lr, [], [-1]

    def limited(model: RetinaNet, batch: torch.Tensor, image_sizes: torch.Tensor) -> Any:
        sizes.append(len(batch))
        if steps[-1] >= from_step and len(batch) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, batch, image_sizes)

    def noted(run: Run) -> None:
        steps.append(run.state.step)
        schedule_lr(run)

    patch.setattr(RetinaNet, "forward", limited)
    patch.setattr(Run, "schedule_lr", noted)
    return sizes


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_step_that_runs_out_of_memory_is_done_again_in_parts_that_are_kept_also_when_resumed(
    device: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights are those of a run with such micro-batches from that step on, interrupted or not."""
    settings = {**QUICK, "train__batch_size": 5, "train__epochs": 2, "train__device": device}
    emulated = emulated_gpu if device == "cuda" else contextlib.nullcontext
    with monkeypatch.context() as patch, emulated():
        sizes = out_of_memory_beyond(2, patch, from_step=1)
        train(tiny_config(tmp_path, data, **settings), tmp_path / "run")
    assert sizes[:7] == [5, 1, 5, 3, 2, 2, 1], "halved to 3, and then to 2, which fits"
    assert sorted(sizes[7:]) == [1, 1, 1, 2, 2, 2, 2], "an epoch has 11 images"
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("out of memory at step 3") == 2
    assert "5 images of 64 x 64 pixels did not fit; from now on at most 3 are processed together" in printed
    assert printed.count("out of memory") == 2, "reported once for each size"
    state = last_checkpoint(tmp_path / "run")
    assert state.fitting_micro_batch == 2

    def as_configured(micro_batch: int | None, name: str, resume: str | None = None) -> None:
        changed = {**settings, "train__device": "cpu", "train__micro_batch": micro_batch}
        train(tiny_config(tmp_path, data, **changed), tmp_path / name, resume=resume)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        interrupt_before(patch, step=2)
        as_configured(None, "planned")
    as_configured(2, "planned", resume="auto")
    planned = last_checkpoint(tmp_path / "planned")
    assert state.step == planned.step == 6
    if device == "cpu":
        assert differing(state, planned) == []
    for key, value in planned.model.items():
        torch.testing.assert_close(state.model[key], value, rtol=1e-3, atol=1e-5)


def interrupt_before(patch: pytest.MonkeyPatch, *, step: int) -> None:
    """Save and end a run as a signal would."""
    real = Run.schedule_lr

    def schedule_lr(run: Run) -> None:
        if run.state.step == step:
            run.save()
            raise KeyboardInterrupt
        real(run)

    patch.setattr(Run, "schedule_lr", schedule_lr)


@pytest.mark.parametrize(("micro_batch", "expected"), [(None, [1, 2, 2, 1]), (3, [1, 2, 1, 2]), ("auto", [1, 2, 2, 1])])
def test_a_resumed_run_keeps_to_the_parts_that_fitted_bit_for_bit(
    micro_batch: int | str | None,
    expected: list[int],
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of three steps with 5, 1 and 5 images, the first runs out of memory."""
    config = tiny_config(tmp_path, data, **{**QUICK, "train__batch_size": 5, "train__micro_batch": micro_batch})
    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        out_of_memory_beyond(2, patch, from_step=0)
        interrupt_before(patch, step=1)
        train(config, tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").fitting_micro_batch == 2
    with monkeypatch.context() as patch:
        sizes = out_of_memory_beyond(2, patch, from_step=0)
        capsys.readouterr()
        train(config, tmp_path / "run", resume="auto")
    assert "at most 2 images in each forward pass, since a step ran out of memory" in capsys.readouterr().out
    assert sizes == expected
    with monkeypatch.context() as patch:
        out_of_memory_beyond(2, patch, from_step=0)
        train(config, tmp_path / "whole")
    resumed, whole = (last_checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert resumed.fitting_micro_batch == whole.fitting_micro_batch == 2
    assert differing(resumed, whole) == []


def test_one_image_that_does_not_fit_ends_the_run_with_figures_and_its_checkpoint(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, data, **{**QUICK, "train__batch_size": 4, "train__checkpoint_every_steps": 1})
    with monkeypatch.context() as patch:
        sizes = out_of_memory_beyond(0, patch, from_step=1)
        with pytest.raises(RunError, match=r"at step 2: 1 image of 32 x 64 pixels did not fit; set train\.checkp"):
            train(config, tmp_path / "run")
    assert sizes == [4, 3, 2, 1], "the second step has three"
    state = last_checkpoint(tmp_path / "run")
    assert state.step == 1
    train(config, tmp_path / "run", resume="auto")
    assert last_checkpoint(tmp_path / "run").step == 3


def train_two_with_a_fault(config: Path, out: Path) -> None:
    """The part of one process in a run whose image `IMAGE` has a target that is not finite."""
    ARCHITECTURES["resnet18"] = NARROW
    Fault(pytest.MonkeyPatch(), "target", step=0)
    sys.exit(tool.main(["--config", str(config), "--output-dir", str(out)]))


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_several_processes_stop_or_skip_alike_whichever_has_the_fault(
    policy: str, data: TinyData, tmp_path: Path
) -> None:
    settings = {**QUICK, "train__batch_size": 4, "train__on_nonfinite": policy, "train__log_every": 1}
    config, out, log = write_config(tmp_path / "c.yaml", data, **settings), tmp_path / "run", tmp_path / "log"
    codes = wait([start_process(train_two_with_a_fault, (config, out), log, env) for env in ranks(2)], log)
    assert codes == ([2, 2] if policy == "stop" else [0, 0]), log.read_text()[-3000:]
    document = strict_json(out / "nonfinite.json")
    assert IMAGE in document["image_ids"]
    assert document["processes"] == 2
    assert document["first_fault"]["name"] == f"image {IMAGE}"
    assert [image["image_id"] for image in document["images"]] == document["image_ids"], "of both processes"
    if policy == "skip":
        assert last_checkpoint(out).skipped_steps == [document["step"]]
        assert log.read_text().count("was skipped") == 1, "only the first process prints"
        assert ", as expected at the prior: " in log.read_text(), "the first loss is that of the images of both"
    else:
        assert "Traceback" not in log.read_text()
