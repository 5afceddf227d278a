"""Sweeps: finished runs are not repeated, failed and pruned trials stay listed, and the winner's config can be trained.

Most tests train nothing: a stub logs as train.py does, with an AP that depends on gamma.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from glob import glob
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import yaml
from optuna.trial import TrialState, create_trial

from detector.config import Config
from detector.config_yaml import load_config
from detector.errors import ConfigError, RunError
from detector.experiments.compare import Comparison
from detector.experiments.run_process import Commands, error_from_log, read_progress
from detector.experiments.search_space import Range, SweepPlan, parse_space, study_definition, validate_plan
from detector.experiments.study import SweepStudy
from detector.experiments.sweep import sweep
from detector.training.train import train
from tests.tiny import TinyData, start_process, start_tool, wait, wait_for, write_config
from tools import sweep as tool

TRAIN_STUB = """
import json, signal, sys, time
from pathlib import Path

if sys.argv[1] == "--detect":
    Path(sys.argv[2], "detections.json").write_text("[]")
    sys.exit()
out, recipe = (Path(sys.argv[sys.argv.index(name) + 1]) for name in ("--output-dir", "--config"))
overrides = dict(text.split("=", 1) for text in sys.argv if "=" in text)
gamma, seed = float(overrides.get("loss.gamma", 2)), int(overrides["train.seed"])
print("resumed" if (out / "metrics.jsonl").exists() else "fresh", flush=True)
if gamma == 13 and not Path(recipe.parent, "repaired").exists():
    sys.exit("error: gamma must not be 13\\nBye.")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
path = out / "metrics.jsonl"
done = path.read_text().count("\\n") if path.exists() else 0
ap = max(0.0, 0.4 - 0.1 * abs(gamma - 2)) + [0.0, 0.004, 0.001][seed]
if gamma == 1:
    ap = 0.4 - ap + 0.3
for epoch in range(done + 1, 5):
    time.sleep(10 * float(overrides["train.ema.decay"]) if epoch > 1 else 0)  # an unrelated setting gives the pace
    with path.open("a") as file:
        print(json.dumps({"epoch": epoch, "split": "val", "AP": ap * epoch / 4}), file=file)
(out / "config.yaml").write_text(recipe.read_text())
(out / "metrics.json").write_text(json.dumps({"AP": ap, "AP50": ap, "per_class": []}))
"""


GRACE_PERIOD = 4
"""Seconds; SQLite's clock counts only whole ones."""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poll often, and draw figures only in slow tests."""
    monkeypatch.setattr("detector.experiments.sweep.POLL_INTERVAL", 0.02)
    if "slow" not in request.keywords:
        monkeypatch.setattr("detector.experiments.sweep_results.write_figure", lambda comparison, path: None)


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    path = tmp_path / "train_stub.py"
    path.write_text(TRAIN_STUB)
    command = (sys.executable, "-S", str(path))
    return Commands(command, (*command, "--detect"))


@pytest.fixture
def recipe(data: TinyData, tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml", data, train__epochs=4)


def grid(recipe: Path, *values: str, seeds: int = 1, epoch_seconds: float = 0.01, **more: Any) -> SweepPlan:
    space = parse_space([f"loss.gamma={','.join(values)}"], ranges=False) if values else {}
    return validate_plan(
        SweepPlan({"tiny": recipe}, (f"train.ema.decay={epoch_seconds / 10}",), space, seeds=seeds, **more)
    )


def sweep_with_short_grace(plan: SweepPlan, out: Path, **more: Any) -> Comparison:
    """A sweep that retries trials after a few seconds without a heartbeat."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detector.experiments.sweep.POLL_INTERVAL", 0.02)
        patch.setattr("detector.experiments.study.HEARTBEAT_INTERVAL", 0.5)
        patch.setattr("detector.experiments.study.GRACE_PERIOD", GRACE_PERIOD)
        return sweep(plan, out, **more)


def start_sweep(plan: SweepPlan, out: Path, log: Path, commands: Commands, **more: Any) -> ForkServerProcess:
    target: Any = functools.partial(sweep_with_short_grace, commands=commands, **more)
    return start_process(target, (plan, out), log)


@pytest.fixture
def postgresql() -> Iterator[tuple[str, Callable[[str], None]]]:
    """The URL of a database, and how to `start` and `stop` its server."""
    pytest.importorskip("psycopg2", reason="psycopg2 is not installed: pip install psycopg2-binary")
    debian = glob("/usr/lib/postgresql/*/bin")  # which are not on the PATH
    pg_ctl = shutil.which("pg_ctl", path=os.pathsep.join([os.environ.get("PATH", ""), *debian]))
    if pg_ctl is None:
        pytest.skip("PostgreSQL's server is not installed")
    user = "nobody" if os.geteuid() == 0 else None  # the server refuses to run as root
    with tempfile.TemporaryDirectory() as folder:  # short, as the name of a socket must be
        if user is not None:
            shutil.chown(folder, user)

        def control(action: str) -> None:
            options = {
                "initdb": ["-o", "-A trust -U sweep"], "stop": ["-m", "immediate"],
                "start": ["-o", f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"],
            }[action]  # fmt: skip
            command = [pg_ctl, action, "-w", "-D", f"{folder}/data", "-l", f"{folder}/log", *options]
            subprocess.run(command, check=True, cwd=folder, user=user, stdout=subprocess.DEVNULL)

        control("initdb")
        control("start")
        yield f"postgresql+psycopg2://sweep@/postgres?host={folder}", control
        control("stop")


def log_of(out: Path, trial: str, unit: str = "seed0") -> str:
    return (out / "trials" / trial / unit / "log.txt").read_text()


# --- the search space


def test_a_space_may_have_lists_as_values_and_all_its_errors_are_reported_together() -> None:
    assert parse_space([], ranges=False) == {}
    space = parse_space(
        ["data.min_size=[48, 64],56", "optim.lr=1e-4..1e-2:log", "loss.gamma=0..5", "optim.name=sgd,adamw"], ranges=True
    )
    assert space == {
        "data.min_size": ("[48, 64]", "56"), "optim.lr": Range(1e-4, 1e-2, True, False),
        "loss.gamma": Range(0, 5, False, True), "optim.name": ("sgd", "adamw"),
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        parse_space(["loss.gamma", "a=1,1", "b=2..1", "c=0..1:log", "d=x..y"], ranges=True)
    assert len(str(caught.value).splitlines()) == 6
    with pytest.raises(ConfigError, match="use --search"):
        parse_space(["loss.gamma=0..5"], ranges=False)


def test_a_range_of_integers_is_continuous_if_the_setting_allows_fractions(recipe: Path) -> None:
    space = parse_space(["loss.gamma=0..5", "train.batch_size=2..4"], ranges=True)
    validated = validate_plan(SweepPlan({"tiny": recipe}, (), space, "random", trials=3)).space
    assert validated["loss.gamma"] == Range(0.0, 5.0, False, False)
    assert validated["train.batch_size"] == Range(2, 4, False, True)


def test_trials_have_readable_names_and_a_run_for_every_seed_and_fold(recipe: Path) -> None:
    space = parse_space(["loss.gamma=0,2", "optim.gamma=0.1,0.5", "data.min_size=[48, 64],56"], ranges=False)
    plan = SweepPlan({"a": recipe, "b": recipe}, (), space, seeds=2, folds=2)
    assert len(plan.points()) == 16
    assert plan.trial_name(plan.points()[0]) == "a,loss.gamma=0,optim.gamma=0.1,min_size=_48,_64_"
    assert [key.name for key in plan.run_keys()] == ["seed0_fold0", "seed0_fold1", "seed1_fold0", "seed1_fold1"]
    assert SweepPlan({"a": recipe}).trial_name({}) == "a"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "loss.gama=0,1"], "loss.gama: unknown key; did you mean loss.gamma?"),
        (["--grid", "loss.gamma=0,much"], "loss.gamma: input should be a valid number, got 'much'"),
        (["--grid", "train.seed=0,1"], "train.seed must not be set or searched: --seeds gives"),
        (["--grid", "loss.gamma=0,1", "--output-dir", "OUT", "loss.gamma=2"], "either searched or set for all"),
        (["--search", "tpe", "--trials", "3"], "--search must come with --trials and --space"),
        (
            ["--search", "random", "--trials", "3", "--space", "optim.lr=-1..1"],
            "optim.lr: input should be greater than 0",
        ),
        (["data.val=null"], "data.val must name images and annotations"),
        (["--folds", "1"], "--folds at least 2"),
        (["--folds", "99"], "got 99 for the 11 images"),
        (["--storage", "nowhere://x"], "--storage cannot be opened"),
    ],
)
def test_user_errors_are_reported_before_any_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = str(tmp_path / "out")
    assert tool.main(["--config", str(recipe), *[a.replace("OUT", out) for a in arguments], "--output-dir", out]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "out" / "trials").exists()


def test_recipes_with_different_validation_sets_are_rejected(data: TinyData, recipe: Path, tmp_path: Path) -> None:
    other = write_config(tmp_path / "other.yaml", TinyData(data.train, data.train))
    with pytest.raises(ConfigError, match=r"must have the same data.val, got different annotations in a, b"):
        validate_plan(SweepPlan({"a": recipe, "b": other}))


@pytest.mark.parametrize("package", ["optuna", "scipy"])
def test_a_missing_package_is_an_error_with_the_command_to_install_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert tool.main(["--config", str(recipe), "--output-dir", str(tmp_path / "out")]) == 2
    error = f"need {package}: pip install 'retinanet-detector[sweep]', or uv sync --extra sweep in a clone"
    assert error in capsys.readouterr().err


# --- pruning


@pytest.fixture
def pruned_below(recipe: Path, tmp_path: Path) -> Callable[[int, float], bool]:
    """Whether a trial is pruned that reports an AP at a step; four trials with AP 0.2 to 0.5 are complete."""
    plan = grid(recipe, "0", "1", "2", "3", "4", "5")
    study = SweepStudy(plan, study_definition(plan), tmp_path)

    def start(ap: float, *steps: int) -> Any:
        asked = study.ask()
        assert asked is not None
        trial, _ = asked
        for step in steps:
            trial.report(ap, step)
        return trial

    for ap in (0.2, 0.3, 0.4):
        study.finish(start(ap, 100, 500, 1000, 1500).number, "COMPLETE", ap)
    assert not start(0.0, 500).should_prune(), "too few complete trials"
    study.finish(start(0.5, 100, 500, 1000, 1500).number, "COMPLETE", 0.5)
    return lambda step, ap: bool(start(ap, step).should_prune())


@pytest.mark.parametrize(
    ("step", "ap", "pruned"),
    [
        (500, 0.27, True),
        (500, 0.28, False),  # the lowest quarter ends at 0.275
        (1500, 0.2, True),
        (100, 0.0, False),  # too early in the first run
        (750, 0.0, False),  # no other trial has reported at this point
    ],
)
def test_a_trial_is_pruned_in_the_lowest_quarter_of_four_complete_ones_late_in_a_run(
    pruned_below: Callable[[int, float], bool], step: int, ap: float, pruned: bool
) -> None:
    assert pruned_below(step, ap) is pruned


def test_progress_and_errors_are_read_from_incomplete_files(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_progress(path) == (0.0, {})
    lines = [
        '{"epoch": 1.5, "loss": 1}',
        '{"epoch": 2, "split": "val", "AP": 0.2}',
        '{"epoch": 3, "split": "val", "AP": 0.1}',
    ]
    path.write_text("\n".join([*lines, '{"epo']))
    assert read_progress(path) == (3, {2: 0.2, 3: 0.2})
    path.write_text("")
    assert error_from_log(path, 1) == "exit code 1"
    assert error_from_log(path, -9) == "killed by SIGKILL (out of memory?)"
    path.write_text("Traceback\n  File\nValueError: bad\n\n")
    assert error_from_log(path, 1) == "ValueError: bad"
    path.write_text("error: what is wrong\n  and where\n")
    assert error_from_log(path, 2) == "what is wrong"


@pytest.mark.slow
def test_an_unpromising_trial_is_pruned_and_the_table_states_why(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    plan = grid(recipe, "2", "1", "1.5", "2.5", "5.5", seeds=2, epoch_seconds=0.3)
    comparison = sweep(plan, tmp_path / "out", commands=commands)
    assert "| gamma=5.5 | 0 | - | - | - | pruned | - |" in comparison.markdown()
    assert "gamma=5.5 pruned: AP 0.025 at 50% of a run, in the lowest 25% of completed trials" in comparison.markdown()
    assert "gamma=5.5" not in comparison.verdict
    assert not (tmp_path / "out" / "trials" / "gamma=5.5" / "seed1").exists()
    plan = grid(recipe, "2", "1", "1.5", "2.5", "5.5")
    assert "| gamma=5.5 | 1 | 0.050" in sweep(plan, tmp_path / "all", prune=False, commands=commands).markdown()


# --- the study


def test_a_failed_trial_is_listed_does_not_affect_others_and_can_be_retried(
    recipe: Path, commands: Commands, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    comparison = sweep(grid(recipe, "0", "2", "13", seeds=3), out, workers=2, commands=commands)
    assert comparison.verdict == "Best: gamma=2, AP 0.402. Significantly worse: gamma=0."
    text = (out / "results.md").read_text()
    failure = re.search(r"gamma=13 failed: (seed[01]): gamma must not be 13 \(log: (.*)\)", text)
    assert failure is not None
    assert failure[2] == str(out / "trials" / "gamma=13" / failure[1] / "log.txt")
    printed = capsys.readouterr().out
    assert "gamma=2/seed2: AP 0.401" in printed
    assert printed.count("[100%") == 1, "no run counts twice"
    assert "[100%, eta 0:00:00]" in printed
    assert json.loads((out / "results.json").read_text())["reference"] == "gamma=2"
    (recipe.parent / "repaired").touch()
    plan = grid(recipe, "0", "2", "13", seeds=3)
    assert "gamma=13 failed" in sweep(plan, out, commands=commands).markdown(), "the same command does not retry it"
    again = sweep(plan, out, retry_failed=True, commands=commands)
    assert [(arm.name, len(arm.metrics)) for arm in again.arms] == [("gamma=2", 3), ("gamma=0", 3), ("gamma=13", 3)]
    assert log_of(out, "gamma=2") == "fresh\n"


def test_the_winner_is_the_recipe_with_the_winning_settings_and_a_header(
    data: TinyData, commands: Commands, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", write_config(tmp_path / "tiny.yaml", data, train__epochs=4, train__seed=7)
    sweep(grid(recipe, "0", "2"), out, commands=commands)
    winner = out / "winner.yaml"
    assert load_config(winner) == load_config(recipe, ["loss.gamma=2", "train.ema.decay=1e-3"])
    assert f"# python tools/train.py --config {winner}" in winner.read_text()
    assert "One run each is too few" in winner.read_text()


def test_recipes_are_compared_with_each_other(recipe: Path, commands: Commands, tmp_path: Path) -> None:
    plan = validate_plan(SweepPlan({"one": recipe, "two": recipe}, ("train.ema.decay=1e-3",), seeds=3))
    comparison = sweep(plan, tmp_path / "out", commands=commands)
    assert [arm.name for arm in comparison.arms] == ["one", "two"]
    assert "Not significantly different: two." in comparison.verdict
    assert sorted(p.name for p in (tmp_path / "out" / "trials" / "one").iterdir()) == ["seed0", "seed1", "seed2"]


def test_the_verdict_prefers_the_unchanged_recipe_if_differences_are_not_significant(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    comparison = sweep(grid(recipe, "2", "1", seeds=3), tmp_path / "out", commands=commands)  # 0.4 and about 0.4
    assert "Not significantly different: " in comparison.verdict
    assert comparison.reference is not None
    if comparison.reference.name != "gamma=2":
        assert "Of these, gamma=2 is the unchanged recipe: an equally good choice." in comparison.verdict


@pytest.mark.parametrize("search", ["random", pytest.param("tpe", marks=pytest.mark.slow)])
def test_a_search_starts_with_the_unchanged_recipe_and_can_be_extended(
    recipe: Path, commands: Commands, tmp_path: Path, search: Any
) -> None:
    space = parse_space(["loss.gamma=0..5", "optim.name=sgd,adamw"], ranges=True)
    for trials in (2, 4):
        plan = validate_plan(SweepPlan({"tiny": recipe}, ("train.ema.decay=1e-3",), space, search, trials=trials))
        comparison = sweep(plan, tmp_path / "out", workers=2, commands=commands)
        names = {arm.name for arm in comparison.arms}
        assert "gamma=2,name=sgd" in names
        assert len(names) == trials
        assert not [n for n in names if re.search(r"_\d+$", n)], "a continued search does not repeat points"


def test_a_folder_with_another_study_is_rejected(recipe: Path, commands: Commands, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(grid(recipe, "0"), out, commands=commands)
    with pytest.raises(
        RunError,
        match=r"must hold the same study, got another one:\n  space.loss.gamma: \[\"0\"\] there, \[\"0\", \"2\"\] now",
    ):
        sweep(grid(recipe, "0", "2"), out, commands=commands)


@pytest.mark.slow
def test_a_killed_sweep_continues_and_a_second_one_in_its_folder_is_rejected(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    plan = grid(recipe, "0", "2", seeds=2, epoch_seconds=0.2)
    process = start_sweep(plan, out, log, commands)
    second = out / "trials" / "gamma=2" / "seed0" / "metrics.jsonl"
    wait_for(second.exists, process, log)
    with pytest.raises(RunError, match="another sweep is running"):
        sweep(plan, out, commands=commands)
    process.kill()
    wait([process], log)
    comparison = sweep(plan, out, commands=commands)
    assert [len(arm.metrics) for arm in comparison.arms] == [2, 2]
    assert log_of(out, "gamma=0") == "fresh\n", "a finished run is not started again"
    assert log_of(out, "gamma=2") == "fresh\nresumed\n", "an interrupted run is resumed"
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*/log.txt")}
    assert sweep(plan, out, commands=commands).verdict == comparison.verdict
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*/log.txt")}, "no run is repeated"


@pytest.mark.slow
def test_a_signal_stops_the_runs_and_the_command_continues_them(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    process = start_sweep(grid(recipe, "0", epoch_seconds=0.9), tmp_path / "out", log, commands)
    wait_for((tmp_path / "out" / "trials" / "gamma=0" / "seed0" / "metrics.jsonl").exists, process, log)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    wait([process], log)
    assert "Interrupted: stopped by SIGTERM" in log.read_text()
    sweep(grid(recipe, "0", epoch_seconds=0.9), tmp_path / "out", commands=commands)
    assert log_of(tmp_path / "out", "gamma=0") == "fresh\nresumed\n"


@pytest.mark.slow
@pytest.mark.parametrize("search", ["grid", "random", "tpe"])
def test_machines_share_a_study_and_survive_a_restart_of_its_server(
    recipe: Path, commands: Commands, tmp_path: Path, postgresql: tuple[str, Callable[[str], None]], search: Any
) -> None:
    url, control = postgresql
    plan = grid(recipe, "0", "2", "1.5", "2.5", seeds=2, epoch_seconds=0.4)
    if search != "grid":
        space = parse_space(["loss.gamma=0..5"], ranges=True)
        plan = validate_plan(SweepPlan({"tiny": recipe}, ("train.ema.decay=0.04",), space, search, trials=4, seeds=2))
    folders, log = [tmp_path / "here", tmp_path / "there"], tmp_path / "log"
    machines = [start_sweep(plan, folder, log, commands, storage=url) for folder in folders]
    for folder, machine in zip(folders, machines, strict=True):
        wait_for(lambda folder=folder: bool([*folder.glob("trials/*/seed0/metrics.jsonl")]), machine, log)  # type: ignore[misc]
    control("stop")
    time.sleep(1.5)  # a run ends meanwhile
    control("start")
    assert wait(machines, log) == [0, 0], log.read_text()
    assert log.read_text().count("trying again") == 2
    tables = [json.loads((folder / "results.json").read_text())["arms"] for folder in folders]
    whole = max(tables, key=lambda arms: sum(len(arm["runs"]) for arm in arms))  # of the machine that finished last
    assert [len(arm["runs"]) for arm in whole] == [2, 2, 2, 2]
    trials = [sorted(path.name for path in (folder / "trials").iterdir()) for folder in folders]
    assert sorted(trials[0] + trials[1]) == sorted(arm["name"] for arm in whole)
    assert all(trials)
    logs = [path.read_text() for path in tmp_path.glob("*/trials/*/*/log.txt")]
    assert logs == ["fresh\n"] * 8, "no run was interrupted or repeated"


def test_a_point_that_two_machines_enqueue_is_tried_once(recipe: Path, commands: Commands, tmp_path: Path) -> None:
    plan = grid(recipe, "0", "2")
    study = SweepStudy(plan, study_definition(plan), tmp_path)
    for point in plan.points():
        study.optuna_study.enqueue_trial(point)
    assert sorted(arm.name for arm in sweep(plan, tmp_path, commands=commands).arms) == ["gamma=0", "gamma=2"]


@pytest.mark.slow
def test_a_trial_of_a_killed_machine_is_run_by_another_and_stays_with_it(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    plan = grid(recipe, "0", "2", seeds=2, epoch_seconds=0.4)
    storage, log, there = f"sqlite:///{tmp_path / 'shared.db'}", tmp_path / "log", tmp_path / "there"
    dead = start_sweep(plan, there, log, commands, storage=storage)
    wait_for((there / "trials" / "gamma=2" / "seed1" / "metrics.jsonl").exists, dead, log)
    dead.kill()
    wait([dead], log)
    comparison = sweep_with_short_grace(plan, tmp_path / "here", commands=commands, storage=storage)
    assert [len(arm.metrics) for arm in comparison.arms] == [2, 2]
    runs = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("here/trials/*/*"))
    assert runs == ["here/trials/gamma=2/seed1"], "finished runs are not repeated"
    before = {path: path.read_text() for path in there.glob("trials/*/*/log.txt")}
    assert sweep(plan, there, commands=commands, storage=storage).verdict == comparison.verdict
    assert before == {path: path.read_text() for path in there.glob("trials/*/*/log.txt")}


@pytest.mark.slow
def test_a_machine_leaves_a_trial_that_another_retries_until_that_one_is_dead(
    recipe: Path, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = grid(recipe, "0", epoch_seconds=0.9)
    url, log, out = f"sqlite:///{tmp_path / 'shared.db'}", tmp_path / "log", tmp_path / "out"
    other = SweepStudy(plan, study_definition(plan), tmp_path, url)
    process = start_sweep(plan, out, log, commands, storage=url)
    wait_for((out / "trials" / "gamma=0" / "seed0" / "metrics.jsonl").exists, process, log)
    (trial,) = other.running_elsewhere()
    attributes = {**trial.system_attrs, "failed_trial": trial.number, "retry_history": [trial.number]}
    retried = create_trial(
        state=TrialState.RUNNING, params=trial.params, distributions=trial.distributions, system_attrs=attributes,
        user_attrs={**trial.user_attrs, "owner": other.machine},
    )  # fmt: skip
    other.optuna_study.add_trial(retried)
    other.record_heartbeat(trial.number + 1)
    other.finish(trial.number, "FAIL")
    assert wait([process], log) == [0], log.read_text()
    printed = log.read_text()
    assert 0 < printed.index("another machine retries it") < printed.index("gamma=0: retried") < printed.index("AP 0.2")
    assert log_of(out, "gamma=0") == "fresh\nresumed\n"


@pytest.mark.slow
def test_trials_of_a_live_machine_are_left_to_it(recipe: Path, commands: Commands, tmp_path: Path) -> None:
    plan = grid(recipe, "0", "2", epoch_seconds=GRACE_PERIOD + 2)
    storage, log, there = f"sqlite:///{tmp_path / 'shared.db'}", tmp_path / "log", tmp_path / "there"
    process = start_sweep(plan, there, log, commands, storage=storage, workers=2)
    wait_for((there / "trials" / "gamma=2" / "seed0" / "metrics.jsonl").exists, process, log)
    comparison = sweep_with_short_grace(plan, tmp_path / "here", commands=commands, storage=storage)
    assert [arm.excluded for arm in comparison.arms] == ["running on another machine"] * 2, "it did not wait for them"
    assert wait([process], log) == [0]
    assert "another machine retries it" not in log.read_text()


@pytest.mark.slow
def test_a_trial_whose_machine_died_before_its_first_heartbeat_is_run_by_another(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    plan, storage = grid(recipe, "0", "2"), f"sqlite:///{tmp_path / 'shared.db'}"
    study = SweepStudy(plan, study_definition(plan), tmp_path, storage)
    with pytest.warns(UserWarning, match="Heartbeat"):
        study.optuna_study.ask()
    comparison = sweep_with_short_grace(plan, tmp_path / "here", commands=commands, storage=storage)
    assert {arm.name: len(arm.metrics) for arm in comparison.arms} == {"gamma=0": 1, "gamma=2": 1}


def test_every_worker_has_its_own_gpu(
    recipe: Path, commands: Commands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    spy = tmp_path / "spy.py"
    spy.write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n" + TRAIN_STUB)
    command = (sys.executable, "-S", str(spy))
    spies = Commands(command, commands.detect)
    sweep(grid(recipe, "0", "2", epoch_seconds=0.1), tmp_path / "out", workers=2, commands=spies)
    assert {log_of(tmp_path / "out", name).splitlines()[0] for name in ("gamma=0", "gamma=2")} == {"4", "GPU-7"}


def test_a_grid_is_complete_after_an_interruption_while_it_was_enqueued_or_asked_for(
    recipe: Path, commands: Commands, tmp_path: Path
) -> None:
    plan = grid(recipe, "0", "1", "2")
    for _ in range(2):
        study = SweepStudy(plan, study_definition(plan), tmp_path).optuna_study
        assert len(study.get_trials()) == 3
    study.ask()  # then the process was killed
    finished = study.ask()
    finished.set_user_attr("seed0", {"AP": 0.3, "AP50": 0.3, "per_class": [], "seconds": None})  # and killed again
    comparison = sweep(plan, tmp_path, commands=commands)
    assert {arm.name: arm.excluded for arm in comparison.arms} == {"gamma=0": "", "gamma=1": "", "gamma=2": ""}
    assert not (tmp_path / "trials" / "gamma=1").exists(), "no run was left to do"


# --- real trainings


@pytest.mark.slow
def test_a_real_sweep_over_folds_killed_and_resumed_ends_with_a_config_that_trains(
    data: TinyData, tmp_path: Path
) -> None:
    recipe = write_config(tmp_path / "tiny.yaml", data, train__epochs=3, train__checkpoint_every_steps=1)
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["--config", str(recipe), "--grid", "loss.gamma=0,2", "--folds", "2", "--output-dir", str(out)]
    process = start_tool("sweep", arguments, log)
    second = out / "trials" / "gamma=2" / "seed0_fold0"
    wait_for((second / "checkpoints" / "last.pt").exists, process, log, seconds=300)
    process.kill()
    wait([process], log)
    assert wait([start_tool("sweep", arguments, log)], log, seconds=600) == [0]
    assert "<svg" in (out / "results.svg").read_text()
    results = json.loads((out / "results.json").read_text())
    assert sorted(arm["name"] for arm in results["arms"]) == ["gamma=0", "gamma=2"]
    assert all(arm["interval_over_images"] and len(arm["runs"]) == 2 for arm in results["arms"])
    assert "resumed after step" in (second / "log.txt").read_text()
    first_log = (out / "trials" / "gamma=0" / "seed0_fold0" / "log.txt").read_text()
    assert "resumed" not in first_log
    assert first_log.count("epochs of 2 steps") == 1, "half of the images, four at a time"
    config: Config = load_config(out / "winner.yaml", ["train.epochs=1"])
    assert config.data.train is not None
    assert config.data.train.annotations == str(data.train), "not a fold's"
    assert "AP" in train(config, tmp_path / "winner")


@pytest.mark.slow
def test_a_real_failure_is_listed_with_its_error_message(data: TinyData, tmp_path: Path) -> None:
    recipe = write_config(tmp_path / "tiny.yaml", data, train__epochs=1)
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["--config", str(recipe), "--grid", "loss.alpha=[1.0],0.25", "--output-dir", str(out)]
    assert wait([start_tool("sweep", arguments, log)], log, seconds=300) == [0]
    assert "loss.alpha must give one weight for each of the 3 classes" in (out / "results.md").read_text()
    assert yaml.safe_load((out / "winner.yaml").read_text())["loss"]["alpha"] == 0.25


@pytest.mark.slow
def test_a_sweep_without_a_finished_trial_has_no_winner_and_reports_an_error(data: TinyData, tmp_path: Path) -> None:
    recipe = write_config(tmp_path / "tiny.yaml", data, train__epochs=1)
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["--config", str(recipe), "--grid", "loss.alpha=[1.0]", "--output-dir", str(out)]
    assert wait([start_tool("sweep", arguments, log)], log, seconds=300) == [1]
    assert not (out / "winner.yaml").exists()
    assert "error: no trial has finished, so there is no winner" in log.read_text()
    assert "winner.yaml" not in log.read_text()
