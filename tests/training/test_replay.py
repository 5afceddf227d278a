"""Repeating a step that was not finite, from the last checkpoint or the start, and naming what went wrong first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detector.checkpoint import load_checkpoint, save_checkpoint
from detector.datasets.coco import CocoDataset
from detector.errors import DivergedError, RunError
from detector.losses import RetinaNetLoss
from detector.models import RetinaNet
from detector.models.resnet import ARCHITECTURES
from detector.training import compile as compiling
from detector.training import replay as replaying
from detector.training.checkpoints import LAST, checkpoint_folder
from detector.training.compile import compile_step
from detector.training.replay import replay
from detector.training.train import train
from tests.emulated_gpu import emulated_gpu
from tests.tiny import TinyData, last_checkpoint, tiny_config
from tests.training.faults import IMAGE, NARROW, QUICK, Fault, Kind
from tools import train as tool


@pytest.fixture(autouse=True, scope="module")
def _narrow_network(short_network: None) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ARCHITECTURES, "resnet18", NARROW)
        yield


def fail(folder: Path, data: TinyData, **settings: Any) -> Path:
    """Train until a step is not finite; return the file that describes it."""
    with pytest.raises(DivergedError):
        train(tiny_config(folder, data, **{**QUICK, **settings}), folder / "run")
    return folder / "run" / "nonfinite.json"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def read(file: Path) -> Any:
    return json.loads(file.with_name("replay.json").read_text())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(
    ("kind", "stage", "name", "detail"),
    [
        ("weight", "parameter", "fpn.lateral.1.weight", "the first is nan at [0, 3, 0, 0]"),
        ("target", "input", f"image {IMAGE}", "nan"),
        ("class loss", "loss", "loss_cls", "nan at P3, P4, P5, P6, P7, of finite outputs"),
    ],
)
def test_a_planted_nan_is_named_by_the_run_and_by_its_replay(
    kind: Kind,
    stage: str,
    name: str,
    detail: str,
    precision: str,
    data: TinyData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Fault(monkeypatch, kind, step=3)
    file = fail(tmp_path, data, train__precision=precision, train__checkpoint_every_steps=2, train__ema={})
    document, before = json.loads(file.read_text()), contents(file.parent)
    capsys.readouterr()
    assert tool.main(["--replay", str(file)]) == 0
    after, printed = contents(file.parent), " ".join(capsys.readouterr().out.split())
    assert {k: v for k, v in after.items() if k != "replay.json"} == before
    for found in (document["first_fault"], read(file)["first_fault"]):
        assert (found["stage"], found["name"]) == (stage, name)
        assert detail in found["detail"]
    step = document["step"]
    assert (f"from checkpoints/last.pt of step {step // 2 * 2}" if step > 1 else "from the start of the run") in printed
    assert f"repeated step {step} from" in printed
    assert "the fault appeared again" in printed
    assert f"first fault, at step {step}: {stage} {name}: " in printed
    assert read(file)["losses_by_level"] == document["losses_by_level"]
    assert read(file)["gradient_norms"] == document["gradient_norms"]


@pytest.mark.parametrize("settings", [{}, {"train__micro_batch": 1, "optim__name": "adamw", "data__num_workers": 1}])
def test_without_a_checkpoint_all_steps_are_repeated_bit_for_bit(
    settings: dict[str, Any], data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The finite numbers of the step, and all norms, are the same to the last bit."""
    Fault(monkeypatch, "gradient", step=5)
    file = fail(tmp_path, data, **settings)
    assert json.loads(file.read_text())["checkpoint"] is None
    assert replay(file) == 0
    document, found = json.loads(file.read_text()), read(file)
    assert document["step"] == (5 if not settings else 2)
    for key in ("loss_cls", "loss_box", "grad_norm", "gradient_norms", "losses_by_level"):
        assert found[key] == document[key]
    assert found["reproduced"]
    assert isinstance(found["loss_box"], float)


def test_on_a_gpu_the_step_is_repeated_too(data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noticed only at the log record, when later steps have been left out."""
    Fault(monkeypatch, "module output", step=2)
    with emulated_gpu():
        file = fail(tmp_path, data, train__device="cuda", train__log_every=6, optim__clip_grad_norm=1.0)
        assert replay(file) == 0
    document, found = json.loads(file.read_text()), read(file)
    assert document["step"] == 2
    assert found["first_fault"] == {**document["first_fault"], "step": 2}
    assert found["first_fault"]["name"] == "backbone.layer3.0.conv2"


@pytest.mark.slow
def test_a_compiled_run_is_repeated_compiled_and_examined_eagerly(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graphs of torch.compile, without generated code, which takes minutes."""
    compiled: list[Any] = []

    def compile_quickly(model: RetinaNet, loss: RetinaNetLoss) -> None:
        compiled.append(model)
        compile_step(model, loss, backend="eager")

    for module in (compiling, replaying):
        monkeypatch.setattr(module, "compile_step", compile_quickly)
    monkeypatch.setattr(CocoDataset, "objects", with_a_target_that_is_nan(CocoDataset.objects))
    file = fail(tmp_path, data, train__compile=True)
    document = json.loads(file.read_text())
    assert document["compiled"]
    assert document["first_fault"]["name"] == f"image {IMAGE}"
    assert all(isinstance(level["cls"], float) for level in document["losses_by_level"])
    assert replay(file) == 0
    assert len(compiled) == 2
    assert read(file)["loss_cls"] == document["loss_cls"]


def with_a_target_that_is_nan(objects: Any) -> Any:
    def faulty(dataset: CocoDataset, index: int) -> Any:
        found = objects(dataset, index)
        if dataset.image_ids[index] == IMAGE:
            found.boxes[0, 0] = np.nan
        return found

    return faulty


def test_a_damaged_weight_in_a_checkpoint_is_named(data: TinyData, tmp_path: Path) -> None:
    train(tiny_config(tmp_path, data, **QUICK, train__checkpoint_every_steps=2), tmp_path / "run")
    path = checkpoint_folder(tmp_path / "run") / "last-1.pt"
    state = load_checkpoint(path)
    state.model = {k: v.clone() for k, v in state.model.items()}
    state.model["cls_subnet.predictor.weight"][0, 0, 0, 0] = torch.inf
    for other in checkpoint_folder(tmp_path / "run").glob("*.pt"):
        other.unlink()
    save_checkpoint(state, checkpoint_folder(tmp_path / "run") / LAST)
    config = tiny_config(tmp_path, data, **QUICK, train__checkpoint_every_steps=2)
    with pytest.raises(DivergedError, match=r"First fault: parameter cls_subnet\.predictor\.weight: 1 of"):
        train(config, tmp_path / "run", resume="auto")
    file = tmp_path / "run" / "nonfinite.json"
    assert replay(file) == 0
    assert read(file)["first_fault"]["name"] == "cls_subnet.predictor.weight"


def test_an_update_that_overflows_is_named_with_its_step(data: TinyData, tmp_path: Path) -> None:
    """The weights become infinite in the first step, whose own loss and gradient are finite."""
    file = fail(tmp_path, data, optim__lr=1e38, optim__warmup_steps=0, optim__weight_decay=10.0)
    document = json.loads(file.read_text())
    assert document["step"] == 1
    assert document["first_fault"]["stage"] == "parameter"
    assert replay(file) == 0
    found = read(file)["first_fault"]
    assert found["stage"] == "update"
    assert found["step"] == 0
    assert "after an update with learning rate 5e+37" in found["detail"]


def test_weights_that_are_not_finite_when_they_are_to_be_saved_are_described_and_repeated(
    data: TinyData, tmp_path: Path
) -> None:
    settings = {"train__checkpoint_every_steps": 1, "optim__lr": 1e38, "optim__warmup_steps": 0}
    file = fail(tmp_path, data, **settings, optim__weight_decay=10.0)
    document = json.loads(file.read_text())
    assert (document["reason"], document["step"]) == ("weights", 0)
    assert document["first_fault"]["stage"] == "update"
    assert not list(checkpoint_folder(tmp_path / "run").glob("*.pt"))
    assert replay(file) == 0
    assert read(file)["first_fault"]["name"] == document["first_fault"]["name"]


def test_a_collapsed_loss_scale_is_an_error_with_remedies_and_can_be_repeated(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient that is never finite looks like one that overflows, until the scale is absurd."""
    monkeypatch.setattr("detector.training.nonfinite.MIN_LOSS_SCALE", 20_000.0)
    monkeypatch.setattr("detector.training.replay.MIN_LOSS_SCALE", 20_000.0)
    fault = Fault(monkeypatch, "gradient", step=0)
    fault.always = True
    settings = {**QUICK, "train__precision": "fp16", "train__on_nonfinite": "skip"}
    with pytest.raises(DivergedError, match=r"loss scale collapsed to 1\.6e\+04 at step 2") as caught:
        train(tiny_config(tmp_path, data, **settings), tmp_path / "run")
    assert "train.precision=bf16 or fp32, or with a lower optim.lr" in str(caught.value)
    file = tmp_path / "run" / "nonfinite.json"
    document = json.loads(file.read_text())
    assert (document["reason"], document["step"], document["loss_scale"]) == ("loss scale", 2, 2.0**14)
    assert document["first_fault"]["stage"] == "gradient"
    assert document["skipped_steps"] == []
    assert replay(file) == 0
    assert read(file)["first_fault"]["detail"] == document["first_fault"]["detail"]
    assert "times the loss scale 16384" in document["first_fault"]["detail"]


def test_a_fault_that_does_not_appear_again_gives_exit_code_1(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        Fault(patch, "class loss", step=2)
        file = fail(tmp_path, data)
    capsys.readouterr()
    assert tool.main(["--replay", str(file)]) == 1
    printed = capsys.readouterr().out
    assert "the fault did not appear again" in printed
    assert "everything was finite" in printed
    assert not read(file)["reproduced"]


def test_a_step_is_repeated_from_before_it_although_the_run_went_on(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Skipped, with a good end: the checkpoints of later steps are of no use."""
    Fault(monkeypatch, "class loss", step=2)
    settings = {**QUICK, "train__on_nonfinite": "skip", "train__keep_checkpoints": 1}
    train(tiny_config(tmp_path, data, **settings), tmp_path / "run")
    assert last_checkpoint(tmp_path / "run").step == 6
    assert tool.main(["--replay", str(tmp_path / "run" / "nonfinite.json")]) == 0
    assert "repeated step 2 from the start of the run" in capsys.readouterr().out


def test_what_several_processes_did_is_repeated_by_one(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the same micro-batches, and a note that sums round differently."""
    Fault(monkeypatch, "target", step=0)
    file = fail(tmp_path, data)
    document = json.loads(file.read_text())
    file.write_text(json.dumps({**document, "processes": 2}))
    assert replay(file) == 0
    assert "one process repeats the work of 2" in capsys.readouterr().out
    found = read(file)
    assert found["first_fault"]["name"] == f"image {IMAGE}"
    assert found["loss_cls"] == pytest.approx(document["loss_cls"], rel=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a JSON file"),
        ("[]", "reason is missing or wrong"),
        ("{}", "reason is missing or wrong"),
        ({"step": "3"}, "step is missing or wrong"),
        ({"step": -1}, "step is missing or wrong"),
        ({"step": 10**9}, r"a step below 6, the length of the run, got 1,000,000,000"),
        ({"processes": 0}, "processes is missing or wrong"),
        ({"processes": 10**9}, "processes is missing or wrong"),
        ({"micro_batch": 0}, "micro_batch is missing or wrong"),
        ({"precision": "int8"}, "precision is missing or wrong"),
    ],
)
def test_a_file_that_describes_no_step_of_a_run_is_a_user_error(
    content: str | dict[str, Any], message: str, data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Fault(patch, "class loss", step=0)
        file = fail(tmp_path, data)
    if isinstance(content, dict):
        content = json.dumps({**json.loads(file.read_text()), **content})
    file.write_text(content)
    with pytest.raises(RunError, match=message):
        replay(file)


def test_a_file_without_its_run_is_a_user_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--replay", str(tmp_path / "nonfinite.json")]) == 2
    assert "cannot be read: No such file" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--output-dir", "--resume", "--init-from"])
def test_options_that_a_replay_would_ignore_are_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        tool.main(["--replay", str(tmp_path / "nonfinite.json"), option, "x"])
    assert caught.value.code == 2
    assert "--replay takes its run from the file" in capsys.readouterr().err
