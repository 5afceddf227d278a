"""Stop and resume: whatever ends a run, it continues as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detector.atomic import read_json
from detector.checkpoint import save_checkpoint
from detector.config import Config
from detector.config_yaml import load_config
from detector.errors import CheckpointError, Interrupted, RunError
from detector.training import run as run_module
from detector.training import train as train_module
from detector.training import validation as validation_module
from detector.training.logger import RunLog
from detector.training.train import train
from tests.conftest import EVERYTHING_ON, Run
from tests.tiny import (
    REPO,
    TinyData,
    differing,
    images_of,
    last_checkpoint,
    records,
    start_tool,
    tiny_config,
    wait,
    wait_for,
    write_config,
    write_tiny_data,
)  # fmt: skip
from tools.train import main


def steps_logged(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text().count('"lr"') if path.exists() else 0


def assert_same_end(run: Path, whole: Path, what: str = "") -> None:
    """Every tensor of the last checkpoint bit for bit, every record but its timing, and the results."""
    assert last_checkpoint(run).step == last_checkpoint(whole).step
    assert differing(last_checkpoint(run), last_checkpoint(whole)) == [], what
    assert records(run) == records(whole), what
    assert (run / "metrics.json").read_text() == (whole / "metrics.json").read_text()
    assert not list((run / "checkpoints").glob(".*")), "half-written files are left"


class Crash(BaseException):
    """As sudden as a signal that cannot be caught, but in this process."""


def crash_after(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a run end without a word once it has logged a step."""
    log_step = RunLog.step

    def log_and_crash(self: RunLog, record: dict[str, Any]) -> None:
        log_step(self, record)
        if record["step"] == step:
            raise Crash

    monkeypatch.setattr(RunLog, "step", log_and_crash)


def signal_after(step: int, signum: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process get a signal once its run has logged a step."""
    log_step = RunLog.step

    def log_and_ask(self: RunLog, record: dict[str, Any]) -> None:
        log_step(self, record)
        if record["step"] == step:
            os.kill(os.getpid(), signum)

    monkeypatch.setattr(RunLog, "step", log_and_ask)


def test_a_run_killed_at_a_random_step_ends_bit_equal_to_one_left_alone(whole: Run, tmp_path: Path) -> None:
    """A real process and a real SIGKILL; averaging, accumulation, several scales, a checkpoint every other step."""
    out, log = tmp_path / "run", tmp_path / "log"
    kill_after = random.randrange(1, 6)
    process = start_tool("train", ["--config", str(whole.config), "--output-dir", str(out)], log)
    wait_for(lambda: steps_logged(out) >= kill_after, process, log)
    process.kill()
    assert wait([process], log) == [-signal.SIGKILL]
    done = steps_logged(out)
    assert main(["--config", str(whole.config), "--output-dir", str(out), "--resume", "auto"]) == 0
    assert_same_end(out, whole.out, f"killed after step {done}")


@pytest.mark.parametrize("step", [2, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 3, 5))])
def test_a_run_that_crashed_resumes_bit_equal_from_its_last_checkpoint(
    step: int, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After 1: nothing was saved yet; 2: from before the checkpoint of that step; 5: from inside the last epoch."""
    with monkeypatch.context() as patch:
        crash_after(step, patch)
        with pytest.raises(Crash):
            train(load_config(whole.config), tmp_path)
    train(load_config(whole.config), tmp_path, resume="auto")
    assert_same_end(tmp_path, whole.out)


@pytest.mark.parametrize(
    ("evaluation", "after"),
    [(1, True), (2, False), *(pytest.param(*case, marks=pytest.mark.slow) for case in [(1, False), (2, True)])],
)
def test_a_run_that_crashed_while_it_evaluated_evaluates_again(
    evaluation: int, after: bool, whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or just after, when its record was written already but no checkpoint.

    With a checkpoint at every step, of which the epoch's last must not leave out the evaluation that follows."""
    config = changed(whole, tmp_path, train__checkpoint_every_steps=1)
    count = 0

    validate = validation_module.validate

    def crash(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == evaluation and not after:
            raise Crash
        validate(*arguments)
        if count == evaluation:
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "validate", crash)
        with pytest.raises(Crash):
            train(config, tmp_path / "run")
    train(config, tmp_path / "run", resume="auto")
    assert_same_end(tmp_path / "run", whole.out)


def test_a_signal_during_an_evaluation_ends_it_at_once_and_loses_nothing(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", str(whole.config), "--output-dir", str(tmp_path)]

    def signal_and_report(*arguments: Any, progress: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        progress(1, 5)
        raise AssertionError("continues to evaluate")

    with monkeypatch.context() as patch:
        patch.setattr(validation_module, "evaluate_model", signal_and_report)
        assert main(argv) == 128 + signal.SIGTERM
    state = last_checkpoint(tmp_path)
    assert (state.step, state.evaluation_due) == (3, True)
    assert main([*argv, "--resume", "auto"]) == 0
    assert_same_end(tmp_path, whole.out)


def test_sigterm_may_come_twice(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun and schedulers pass on what the process has had already; that must not kill it while it saves."""
    save = run_module.Run.save

    def asked_again(run: run_module.Run, *name: str) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        save(run, *name)

    monkeypatch.setattr(run_module.Run, "save", asked_again)
    signal_after(1, signal.SIGTERM, monkeypatch)
    argv = ["--config", str(whole.config), "--output-dir", str(tmp_path), "train.checkpoint_every_steps=null"]
    assert main(argv) == 128 + signal.SIGTERM
    assert last_checkpoint(tmp_path).step == 1


def changed(run: Run, folder: Path, **settings: Any) -> Config:
    """The run's config with other settings."""
    overrides = [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]
    return load_config(run.config, overrides)


@pytest.mark.parametrize(
    ("signum", "step"), [(signal.SIGTERM, 1), pytest.param(signal.SIGINT, 5, marks=pytest.mark.slow)]
)
def test_a_signal_leaves_a_checkpoint_of_the_last_step_and_sets_the_exit_code(
    signum: signal.Signals,
    step: int,
    whole: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["--config", str(whole.config), "--output-dir", str(tmp_path)]
    before = signal.getsignal(signum)
    with monkeypatch.context() as patch:
        signal_after(step, signum, patch)
        assert main(argv) == 128 + signum
    assert f"stopped by {signum.name}" in capsys.readouterr().err
    assert last_checkpoint(tmp_path).step == step
    assert signal.getsignal(signum) is before
    assert main([*argv, "--resume", "auto"]) == 0
    assert_same_end(tmp_path, whole.out)


def test_a_real_process_with_workers_obeys_sigterm(data: TinyData, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    config = write_config(tmp_path / "c.yaml", data, data__num_workers=1, train__epochs=50, data__val=None)
    process = start_tool("train", ["--config", str(config), "--output-dir", str(out)], log)
    wait_for(lambda: steps_logged(out) >= 2, process, log)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    assert wait([process], log) == [128 + signal.SIGTERM], log.read_text()
    assert last_checkpoint(out).step >= 2
    assert "Traceback" not in log.read_text()


def test_resuming_a_finished_run_does_nothing_and_is_fine(
    whole: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("nothing is to be done")

    monkeypatch.setattr(run_module, "open_datasets", fail)
    before = {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")}
    assert main(["--config", str(whole.config), "--output-dir", str(whole.out), "--resume", "auto"]) == 0
    assert {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")} == before
    assert "AP50" in capsys.readouterr().out


def test_resume_auto_starts_a_new_run_where_there_is_no_checkpoint(whole: Run, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("left behind by a run that was killed before its first checkpoint")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "lr": 0.5}\n')
    train(load_config(whole.config), tmp_path, resume="auto")
    assert_same_end(tmp_path, whole.out)


def test_an_existing_run_is_not_overwritten(whole: Run) -> None:
    before = {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")}
    with pytest.raises(RunError, match="already holds a run; continue it with --resume auto, or choose another"):
        train(load_config(whole.config), whole.out)
    assert {p: p.stat().st_mtime_ns for p in whole.out.rglob("*")} == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=0.02", "optim.lr: 0.01 in the checkpoint, 0.02 in the config"),
        ("train.seed=7", "train.seed: 0 in the checkpoint, 7 in the config"),
        ("train.epochs=3", "train.epochs: 2 in the checkpoint, 3 in the config"),
        ("train.ema=null", "train.ema.decay: 0.9 in the checkpoint, None in the config"),
        ("data.augment=[]", "data.augment"),
        ("train.batch_size=2", "train.batch_size: 4 in the checkpoint, 2 in the config"),
        ("data.test={images: a, annotations: b}", "data.test.images: None in the checkpoint"),
    ],
)
def test_resuming_with_other_settings_is_refused_and_names_both_values(
    override: str, message: str, whole: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["--config", str(whole.config), "--output-dir", str(whole.out), "--resume", "auto", override]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --resume continues the run in")
    assert message in error
    assert "--init-from" in error


def test_resuming_with_settings_that_change_no_result_is_fine(whole: Run) -> None:
    config = load_config(whole.config, ["data.num_workers=3", "train.log_every=7", "eval.engine=pycocotools"])
    assert train(config, whole.out, resume="auto")["AP"] >= 0


def test_a_missing_or_damaged_checkpoint_is_named(whole: Run, tmp_path: Path) -> None:
    config = load_config(whole.config)
    with pytest.raises(CheckpointError, match=r"nowhere\.pt does not exist"):
        train(config, tmp_path / "new", resume=str(tmp_path / "nowhere.pt"))
    broken = tmp_path / "broken.pt"
    broken.write_bytes((whole.out / "checkpoints" / "last.pt").read_bytes()[:100_000])
    with pytest.raises(CheckpointError, match=r"broken\.pt cannot be read"):
        train(config, tmp_path / "new", resume=str(broken))
    assert not (tmp_path / "new").exists()


def test_records_past_the_checkpoint_are_dropped_and_a_cut_off_line_too(tmp_path: Path) -> None:
    lines = ['{"step": 1, "a": 1}', '{"step": 2, "a": 2}', '{"step": 2, "split": "val"}', '{"step": 3, "a": 3}', '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    RunLog(tmp_path, start_step=2, total_steps=9).close()
    assert (tmp_path / "metrics.jsonl").read_text().splitlines() == lines[:3]


def test_a_run_continues_in_another_folder_from_a_named_checkpoint(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """best.pt and metrics.json of the new folder are its own, also if nothing gets better there."""
    with monkeypatch.context() as patch:
        crash_after(5, patch)
        with pytest.raises(Crash):
            train(load_config(whole.config), tmp_path / "first")
    start = tmp_path / "first" / "checkpoints" / "last.pt"
    shutil.move(start, tmp_path / "elsewhere.pt")
    metrics = train(load_config(whole.config), tmp_path / "second", resume=str(tmp_path / "elsewhere.pt"))
    assert differing(last_checkpoint(tmp_path / "second"), last_checkpoint(whole.out)) == []
    assert (tmp_path / "second" / "checkpoints" / "best.pt").exists()
    assert set(metrics) >= {"AP", "per_class"}


def test_the_best_of_a_new_folder_is_the_best_of_what_was_evaluated_there(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        crash_after(5, patch)
        with pytest.raises(Crash):
            train(load_config(whole.config), tmp_path / "first")
    state = last_checkpoint(tmp_path / "first")
    state.best_ap = 0.99
    save_checkpoint(state, tmp_path / "elsewhere.pt")
    metrics = train(load_config(whole.config), tmp_path / "second", resume=str(tmp_path / "elsewhere.pt"))
    assert last_checkpoint(tmp_path / "second").best_ap == metrics["AP"] < 0.99


def test_a_run_continues_from_the_best_checkpoint_even_if_that_is_of_the_last_step(whole: Run, tmp_path: Path) -> None:
    """Nothing is left to do but the evaluation, of which it does not know yet."""
    state = last_checkpoint(whole.out)
    state.finished, state.evaluation_due = False, True
    save_checkpoint(state, tmp_path / "best.pt")
    metrics = train(load_config(whole.config), tmp_path / "run", resume=str(tmp_path / "best.pt"))
    assert metrics == read_json(whole.out / "metrics.json")
    assert differing(last_checkpoint(tmp_path / "run"), last_checkpoint(whole.out)) == []


def test_a_finished_run_is_not_resumed_into_another_folder(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = str(whole.out / "checkpoints" / "last.pt")
    assert main(["--config", str(whole.config), "--output-dir", str(tmp_path / "new"), "--resume", last]) == 2
    assert "the run to resume is finished" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["annotations"].pop(), "the images or annotations of .* have changed"),
        (lambda c: c["annotations"][0]["bbox"].__setitem__(0, 1.5), "the images or annotations of .* have changed"),
        (lambda c: c["images"].pop(), "the images or annotations of .* have changed"),
        (lambda c: c["categories"][0].update(name="circle"), "the run was started with"),
        (lambda c: c["categories"].append({"id": 91, "name": "new"}), "the run was started with"),
    ],
    ids=["annotation removed", "box moved", "image removed", "class renamed", "class added"],
)
def test_a_run_does_not_resume_with_other_training_data(
    change: Callable[[Any], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_tiny_data(tmp_path)
    config = tiny_config(tmp_path, data, train__epochs=1, data__val=None)
    signal_after(1, signal.SIGTERM, monkeypatch)
    with pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    content = json.loads(data.train.read_text())
    change(content)
    known = {image["id"] for image in content["images"]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in known]
    data.train.write_text(json.dumps(content))
    with pytest.raises(RunError, match=message):
        train(config, tmp_path / "run", resume="auto")


def test_means_of_an_interval_are_those_of_the_uninterrupted_run(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of five steps and of one; the checkpoint at the end of an epoch lies between steps of the first."""
    settings = {"train__log_every": 5, "data__val": None}
    config = tiny_config(tmp_path, data, **settings)
    train(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "step", crash_at_once)
        with pytest.raises(Crash):
            train(config, tmp_path / "cut")
    train(config, tmp_path / "cut", resume="auto")
    assert_same_end(tmp_path / "cut", tmp_path / "whole")
    assert [record["step"] for record in records(tmp_path / "cut")] == [5, 6]


def crash_at_once(*_: Any) -> None:
    raise Crash


@pytest.mark.slow
@pytest.mark.usefixtures("whole_network")
@pytest.mark.parametrize("workers", [0, 2])
def test_the_command_line_survives_many_kills(workers: int, data: TinyData, tmp_path: Path) -> None:
    """`python tools/train.py`, killed again and again at random moments, also while it starts and while it saves."""
    settings = {**EVERYTHING_ON, "train__checkpoint_every_steps": 1, "train__epochs": 4, "data__num_workers": workers}
    config = write_config(tmp_path / "c.yaml", data, **settings)
    out, log = tmp_path / "run", tmp_path / "log"
    train(load_config(config), tmp_path / "whole")
    command = [sys.executable, str(REPO / "tools/train.py"), "--config", str(config), "--output-dir", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for _ in range(5):
        with log.open("ab") as file:
            process = subprocess.Popen([*command, "--resume", "auto"], stdout=file, stderr=file, env=env)
        before = steps_logged(out)
        wanted = random.randrange(1, 4)
        while process.poll() is None and steps_logged(out) < before + wanted:
            os.sched_yield()
        process.kill()
        process.wait()
    with log.open("ab") as file:
        assert subprocess.run([*command, "--resume", "auto"], stdout=file, stderr=file, env=env).returncode == 0
    assert_same_end(out, tmp_path / "whole", log.read_text()[-2000:])


def test_a_signal_during_the_test_evaluation_ends_the_run_at_once(
    data: TinyData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost, because last.pt still has the evaluation before it due."""
    config = tiny_config(tmp_path, data, train__epochs=1, data__test={
        "images": str(images_of(data.val)), "annotations": str(data.val),
    })  # fmt: skip

    def interrupted(*_: Any, **__: Any) -> Any:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)
        raise AssertionError("the signal was swallowed")

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "score_best", interrupted)
        with pytest.raises(Interrupted, match="stopped by SIGINT; continue with --resume auto"):
            train(config, tmp_path / "run")
    assert set(train(config, tmp_path / "run", resume="auto")) >= {"AP", "test"}
