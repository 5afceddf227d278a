"""Sweeps: nothing finished is done twice, nothing that failed or was given up is hidden, and the winner can be trained.

Most of these train nothing: a program stands in that scores what its gamma deserves, and logs as train.py does.
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

from detector.config import Config
from detector.config_yaml import load_config
from detector.errors import ConfigError, RunError
from detector.experiments.compare import Comparison
from detector.experiments.search_space import Plan, Range, definition_of, read_space, settle
from detector.experiments.sweep import Programs, hopeless, last_words, learning_curve, open_study, sweep
from detector.training.train import train
from tests.tiny import TinyData, start_process, start_tool, wait, wait_for, write_config
from tools import sweep as tool

STAND_IN = """
import json, signal, sys, time
from pathlib import Path

if sys.argv[1] == "--detect":
    Path(sys.argv[2], "detections.json").write_text("[]")
    sys.exit()
out, recipe = (Path(sys.argv[sys.argv.index(name) + 1]) for name in ("--output-dir", "--config"))
said = dict(text.split("=", 1) for text in sys.argv if "=" in text)
gamma, seed = float(said.get("loss.gamma", 2)), int(said["train.seed"])
print("resumed" if (out / "metrics.jsonl").exists() else "fresh", flush=True)
if gamma == 13 and not Path(recipe.parent, "mended").exists():
    sys.exit("error: an unlucky number\\nBye.")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
path = out / "metrics.jsonl"
done = path.read_text().count("\\n") if path.exists() else 0
ap = max(0.0, 0.4 - 0.1 * abs(gamma - 2)) + [0.0, 0.004, 0.001][seed]
if gamma == 1:
    ap = 0.4 - ap + 0.3
for epoch in range(done + 1, 5):
    time.sleep(float(said["train.ema.decay"]) if epoch > 1 else 0)  # some setting, for the pace
    with path.open("a") as file:
        print(json.dumps({"epoch": epoch, "split": "val", "AP": ap * epoch / 4}), file=file)
(out / "config.yaml").write_text(recipe.read_text())
(out / "metrics.json").write_text(json.dumps({"AP": ap, "AP50": ap, "per_class": []}))
"""


@pytest.fixture(autouse=True)
def quick(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Look often, and draw only where the figure is looked at."""
    monkeypatch.setattr("detector.experiments.sweep.POLL", 0.02)
    if "slow" not in request.keywords:
        monkeypatch.setattr("detector.experiments.sweep.figure", lambda comparison, path: None)


@pytest.fixture
def programs(tmp_path: Path) -> Programs:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    command = (sys.executable, "-S", str(path))
    return Programs(command, (*command, "--detect"))


@pytest.fixture
def recipe(data: TinyData, tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny.yaml", data, train__epochs=4)


def grid(recipe: Path, *values: str, seeds: int = 1, pace: str = "1e-3", **more: Any) -> Plan:
    space = read_space([f"loss.gamma={','.join(values)}"], ranges=False) if values else {}
    return settle(Plan({"tiny": recipe}, (f"train.ema.decay={pace}",), space, seeds=seeds, **more))


def sweep_in_haste(plan: Plan, out: Path, **more: Any) -> Comparison:
    """With less than a second of silence before a machine counts as dead."""
    with pytest.MonkeyPatch.context() as patch:
        for name, seconds in {"POLL": 0.02, "BEAT": 0.1}.items():
            patch.setattr(f"detector.experiments.sweep.{name}", seconds)
        return sweep(plan, out, **more)


def start_sweep(plan: Plan, out: Path, log: Path, programs: Programs, **more: Any) -> ForkServerProcess:
    target: Any = functools.partial(sweep_in_haste, programs=programs, **more)
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


# ---- what is searched ----------------------------------------------------------------------------------------------


def test_a_space_is_read_with_lists_as_values_and_all_mistakes_together() -> None:
    assert read_space([], ranges=False) == {}
    space = read_space(
        ["data.min_size=[48, 64],56", "optim.lr=1e-4..1e-2:log", "loss.gamma=0..5", "optim.name=sgd,adamw"], ranges=True
    )
    assert space == {
        "data.min_size": ("[48, 64]", "56"), "optim.lr": Range(1e-4, 1e-2, True, False),
        "loss.gamma": Range(0, 5, False, True), "optim.name": ("sgd", "adamw"),
    }  # fmt: skip
    with pytest.raises(ConfigError) as told:
        read_space(["loss.gamma", "a=1,1", "b=2..1", "c=0..1:log", "d=x..y"], ranges=True)
    assert len(str(told.value).splitlines()) == 6
    with pytest.raises(ConfigError, match="use --search"):
        read_space(["loss.gamma=0..5"], ranges=False)


def test_whole_numbers_are_whole_only_where_the_setting_is(recipe: Path) -> None:
    space = read_space(["loss.gamma=0..5", "train.batch_size=2..4"], ranges=True)
    settled = settle(Plan({"tiny": recipe}, (), space, "random", trials=3)).space
    assert settled["loss.gamma"] == Range(0.0, 5.0, False, False)
    assert settled["train.batch_size"] == Range(2, 4, False, True)


def test_trials_have_readable_names_and_folds_and_seeds_have_units(recipe: Path) -> None:
    space = read_space(["loss.gamma=0,2", "optim.gamma=0.1,0.5", "data.min_size=[48, 64],56"], ranges=False)
    plan = Plan({"a": recipe, "b": recipe}, (), space, seeds=2, folds=2)
    assert len(plan.points()) == 16
    assert plan.name_of(plan.points()[0]) == "a,loss.gamma=0,optim.gamma=0.1,min_size=_48,_64_"
    assert [unit.name for unit in plan.units()] == ["seed0_fold0", "seed0_fold1", "seed1_fold0", "seed1_fold1"]
    assert Plan({"a": recipe}).name_of({}) == "a"


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
def test_mistakes_are_told_before_anything_runs(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = str(tmp_path / "out")
    assert tool.main(["--config", str(recipe), *[a.replace("OUT", out) for a in arguments], "--output-dir", out]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "Traceback" not in told
    assert not (tmp_path / "out" / "trials").exists()


def test_recipes_that_are_measured_by_different_images_are_refused(
    data: TinyData, recipe: Path, tmp_path: Path
) -> None:
    other = write_config(tmp_path / "other.yaml", TinyData(data.train, data.train))
    with pytest.raises(ConfigError, match=r"must have the same data.val, got different annotations in a, b"):
        settle(Plan({"a": recipe, "b": other}))


def test_without_optuna_the_error_says_how_to_get_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(RunError, match=r"pip install optuna \(or -e \.\[sweep\]\)"):
        sweep(grid(recipe), tmp_path / "out")


# ---- giving up -----------------------------------------------------------------------------------------------------


def test_hopeless_is_far_below_most_of_several_others_late_in_a_run() -> None:
    others = [{500: ap, 1500: ap} for ap in (0.2, 0.3, 0.4, 0.5)]
    assert hopeless(500, 0.2, others) == "AP 0.200 after 50% of a run, median of 4 others 0.350"
    assert hopeless(1500, 0.2, others), "the same place of the second run"
    assert not hopeless(500, 0.27, others), "not so far below"
    assert not hopeless(500, 0.0, others[:3]), "too few to compare with"
    assert not hopeless(200, 0.0, [{200: 0.3}] * 4), "too early"
    assert not hopeless(1200, 0.0, [{1200: 0.3}] * 4), "too early in the second run"
    assert not hopeless(750, 0.0, others), "never measured at that point"


def test_curves_and_last_words_are_read_from_files_in_any_state(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert learning_curve(path) == (0.0, {})
    lines = [
        '{"epoch": 1.5, "loss": 1}',
        '{"epoch": 2, "split": "val", "AP": 0.2}',
        '{"epoch": 3, "split": "val", "AP": 0.1}',
    ]
    path.write_text("\n".join([*lines, '{"epo']))
    assert learning_curve(path) == (3, {2: 0.2, 3: 0.2})
    path.write_text("")
    assert last_words(path, 1) == "exit code 1"
    assert last_words(path, -9) == "killed by SIGKILL (out of memory?)"
    path.write_text("Traceback\n  File\nValueError: bad\n\n")
    assert last_words(path, 1) == "ValueError: bad"
    path.write_text("error: what is wrong\n  and where\n")
    assert last_words(path, 2) == "what is wrong"


@pytest.mark.slow
def test_a_hopeless_trial_is_given_up_and_that_is_said(recipe: Path, programs: Programs, tmp_path: Path) -> None:
    plan = grid(recipe, "2", "1", "1.5", "2.5", "5.5", seeds=2, pace="0.06")
    comparison = sweep(plan, tmp_path / "out", programs=programs)
    assert "| gamma=5.5 | 0 | - | - | - | pruned | - |" in comparison.markdown()
    assert "gamma=5.5 pruned: AP 0.0" in comparison.markdown()
    assert "gamma=5.5" not in comparison.verdict
    assert not (tmp_path / "out" / "trials" / "gamma=5.5" / "seed1").exists()
    plan = grid(recipe, "2", "1", "1.5", "2.5", "5.5")
    assert "| gamma=5.5 | 1 | 0.050" in sweep(plan, tmp_path / "all", prune=False, programs=programs).markdown()


# ---- a study -------------------------------------------------------------------------------------------------------


def test_a_failed_trial_is_shown_harms_no_other_and_can_be_tried_again(
    recipe: Path, programs: Programs, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    comparison = sweep(grid(recipe, "0", "2", "13", seeds=3), out, workers=2, programs=programs)
    assert comparison.verdict == "Best: gamma=2, AP 0.402. Worse beyond noise: gamma=0."
    text = (out / "results.md").read_text()
    assert "gamma=13 failed: seed0: an unlucky number (log: " in text
    assert str(out / "trials" / "gamma=13" / "seed0" / "log.txt") in text
    said = capsys.readouterr().out
    assert "gamma=2/seed2: AP 0.401" in said
    assert said.count("[100%") == 1, "no run counts twice"
    assert "[100%, eta 0:00:00]" in said
    assert json.loads((out / "results.json").read_text())["reference"] == "gamma=2"
    (recipe.parent / "mended").touch()
    plan = grid(recipe, "0", "2", "13", seeds=3)
    assert "gamma=13 failed" in sweep(plan, out, programs=programs).markdown(), "the same command leaves it as it is"
    again = sweep(plan, out, retry_failed=True, programs=programs)
    assert [(arm.name, len(arm.metrics)) for arm in again.arms] == [("gamma=2", 3), ("gamma=0", 3), ("gamma=13", 3)]
    assert log_of(out, "gamma=2") == "fresh\n"


def test_the_winner_is_the_recipe_with_the_winning_settings_and_says_what_it_is(
    data: TinyData, programs: Programs, tmp_path: Path
) -> None:
    out, recipe = tmp_path / "out", write_config(tmp_path / "tiny.yaml", data, train__epochs=4, train__seed=7)
    sweep(grid(recipe, "0", "2"), out, programs=programs)
    winner = out / "winner.yaml"
    assert load_config(winner) == load_config(recipe, ["loss.gamma=2", "train.ema.decay=1e-3"])
    assert f"# python tools/train.py --config {winner}" in winner.read_text()
    assert "One run each is too few" in winner.read_text()


def test_recipes_are_compared_with_each_other(recipe: Path, programs: Programs, tmp_path: Path) -> None:
    plan = settle(Plan({"one": recipe, "two": recipe}, ("train.ema.decay=1e-3",), seeds=3))
    comparison = sweep(plan, tmp_path / "out", programs=programs)
    assert [arm.name for arm in comparison.arms] == ["one", "two"]
    assert "No difference from it is distinguishable from noise (two)." in comparison.verdict
    assert sorted(p.name for p in (tmp_path / "out" / "trials" / "one").iterdir()) == ["seed0", "seed1", "seed2"]


def test_where_nothing_is_distinguishable_the_recipe_as_it_is_is_named(
    recipe: Path, programs: Programs, tmp_path: Path
) -> None:
    comparison = sweep(grid(recipe, "2", "1", seeds=3), tmp_path / "out", programs=programs)  # 0.4 and about 0.4
    assert "No difference from it is distinguishable from noise" in comparison.verdict
    assert comparison.reference is not None
    if comparison.reference.name != "gamma=2":
        assert "Of these gamma=2 is the recipe as it is: as good a choice as any." in comparison.verdict


@pytest.mark.parametrize("search", ["random", pytest.param("tpe", marks=pytest.mark.slow)])
def test_a_search_begins_with_the_recipe_as_it_is_and_can_be_prolonged(
    recipe: Path, programs: Programs, tmp_path: Path, search: Any
) -> None:
    space = read_space(["loss.gamma=0..5", "optim.name=sgd,adamw"], ranges=True)
    for trials in (2, 4):
        plan = settle(Plan({"tiny": recipe}, ("train.ema.decay=1e-3",), space, search, trials=trials))
        comparison = sweep(plan, tmp_path / "out", workers=2, programs=programs)
        names = {arm.name for arm in comparison.arms}
        assert "gamma=2,name=sgd" in names
        assert len(names) == trials
        assert not [n for n in names if re.search(r"_\d+$", n)], "what goes on does not suggest the same points again"


def test_another_study_in_the_folder_is_refused(recipe: Path, programs: Programs, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sweep(grid(recipe, "0"), out, programs=programs)
    with pytest.raises(
        RunError, match=r"holds another study, got:\n  space.loss.gamma: \['0'\] there, \['0', '2'\] now"
    ):
        sweep(grid(recipe, "0", "2"), out, programs=programs)


@pytest.mark.slow
def test_a_killed_sweep_goes_on_where_it_was_and_a_second_one_is_refused(
    recipe: Path, programs: Programs, tmp_path: Path
) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    plan = grid(recipe, "0", "2", seeds=2, pace="0.2")
    process = start_sweep(plan, out, log, programs)
    second = out / "trials" / "gamma=2" / "seed0" / "metrics.jsonl"
    wait_for(second.exists, process, log)
    with pytest.raises(RunError, match="another sweep is at work"):
        sweep(plan, out, programs=programs)
    process.kill()
    wait([process], log)
    comparison = sweep(plan, out, programs=programs)
    assert [len(arm.metrics) for arm in comparison.arms] == [2, 2]
    assert log_of(out, "gamma=0") == "fresh\n", "what was finished is not started again"
    assert log_of(out, "gamma=2") == "fresh\nresumed\n", "what was cut goes on"
    before = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*/log.txt")}
    assert sweep(plan, out, programs=programs).verdict == comparison.verdict
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("trials/*/*/log.txt")}, "nothing is done twice"


@pytest.mark.slow
def test_a_signal_ends_the_runs_too_and_the_command_goes_on(recipe: Path, programs: Programs, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = start_sweep(grid(recipe, "0", pace="0.9"), tmp_path / "out", log, programs)
    wait_for((tmp_path / "out" / "trials" / "gamma=0" / "seed0" / "metrics.jsonl").exists, process, log)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGTERM)
    wait([process], log)
    assert "Interrupted: stopped by SIGTERM" in log.read_text()
    sweep(grid(recipe, "0", pace="0.9"), tmp_path / "out", programs=programs)
    assert log_of(tmp_path / "out", "gamma=0") == "fresh\nresumed\n"


@pytest.mark.slow
@pytest.mark.parametrize("search", ["grid", "random", "tpe"])
def test_machines_share_a_study_and_bear_that_its_server_is_away_for_a_while(
    recipe: Path, programs: Programs, tmp_path: Path, postgresql: tuple[str, Callable[[str], None]], search: Any
) -> None:
    url, control = postgresql
    plan = grid(recipe, "0", "2", "1.5", "2.5", seeds=2, pace="0.4")
    if search != "grid":
        space = read_space(["loss.gamma=0..5"], ranges=True)
        plan = settle(Plan({"tiny": recipe}, ("train.ema.decay=0.4",), space, search, trials=4, seeds=2))
    places, log = [tmp_path / "here", tmp_path / "there"], tmp_path / "log"
    machines = [start_sweep(plan, place, log, programs, storage=url) for place in places]
    for place, machine in zip(places, machines, strict=True):
        wait_for(lambda place=place: bool([*place.glob("trials/*/seed0/metrics.jsonl")]), machine, log)  # type: ignore[misc]
    control("stop")
    time.sleep(1.5)  # the end of a run falls into it
    control("start")
    assert wait(machines, log) == [0, 0], log.read_text()
    assert log.read_text().count("trying again") == 2
    tables = [json.loads((place / "results.json").read_text())["arms"] for place in places]
    whole = max(tables, key=lambda arms: sum(len(arm["runs"]) for arm in arms))  # of the last to end
    assert [len(arm["runs"]) for arm in whole] == [2, 2, 2, 2]
    worked = [sorted(path.name for path in (place / "trials").iterdir()) for place in places]
    assert sorted(worked[0] + worked[1]) == sorted(arm["name"] for arm in whole)
    assert all(worked)
    logs = [path.read_text() for path in tmp_path.glob("*/trials/*/*/log.txt")]
    assert logs == ["fresh\n"] * 8, "no run was cut off or done twice"


def test_a_point_that_two_machines_put_into_the_queue_is_tried_once(
    recipe: Path, programs: Programs, tmp_path: Path
) -> None:
    plan = grid(recipe, "0", "2")
    study = open_study(plan, definition_of(plan), tmp_path, None)
    for point in plan.points():
        study.enqueue_trial(point)
    assert sorted(arm.name for arm in sweep(plan, tmp_path, programs=programs).arms) == ["gamma=0", "gamma=2"]


@pytest.mark.slow
def test_trials_of_a_dead_machine_are_taken_over_and_left_to_the_taker_if_it_comes_back(
    recipe: Path, programs: Programs, tmp_path: Path
) -> None:
    plan = grid(recipe, "0", "2", seeds=2, pace="0.4")
    storage, log, there = f"sqlite:///{tmp_path / 'shared.db'}", tmp_path / "log", tmp_path / "there"
    dead = start_sweep(plan, there, log, programs, storage=storage, workers=2)
    second = [there / "trials" / name / "seed1" / "metrics.jsonl" for name in ("gamma=0", "gamma=2")]
    wait_for(lambda: all(path.exists() for path in second), dead, log)
    dead.kill()
    wait([dead], log)
    comparison = sweep_in_haste(plan, tmp_path / "here", programs=programs, storage=storage)
    assert [len(arm.metrics) for arm in comparison.arms] == [2, 2]
    done_here = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("here/trials/*/*"))
    assert done_here == ["here/trials/gamma=0/seed1", "here/trials/gamma=2/seed1"], "what was finished is kept"
    before = {path: path.read_text() for path in there.glob("trials/*/*/log.txt")}
    assert sweep(plan, there, programs=programs, storage=storage).verdict == comparison.verdict
    assert before == {path: path.read_text() for path in there.glob("trials/*/*/log.txt")}


@pytest.mark.slow
def test_a_machine_leaves_a_trial_alone_that_was_taken_from_it_until_the_taker_is_dead(
    recipe: Path, programs: Programs, tmp_path: Path
) -> None:
    plan = grid(recipe, "0", pace="0.9")
    url, log, out = f"sqlite:///{tmp_path / 'shared.db'}", tmp_path / "log", tmp_path / "out"
    study = open_study(plan, definition_of(plan), tmp_path, url)
    process = start_sweep(plan, out, log, programs, storage=url)
    wait_for((out / "trials" / "gamma=0" / "seed0" / "metrics.jsonl").exists, process, log)
    study._storage.set_trial_user_attr(study.trials[0]._trial_id, "owner", "somebody")
    assert wait([process], log) == [0], log.read_text()
    said = log.read_text()
    assert 0 < said.index("no longer this machine's") < said.index("taken over") < said.index("AP 0.2")
    assert log_of(out, "gamma=0") == "fresh\nresumed\n"


@pytest.mark.slow
def test_trials_of_a_machine_that_lives_are_left_to_it(recipe: Path, programs: Programs, tmp_path: Path) -> None:
    plan = grid(recipe, "0", "2", pace="0.9")
    storage, log, there = f"sqlite:///{tmp_path / 'shared.db'}", tmp_path / "log", tmp_path / "there"
    open_study(plan, definition_of(plan), tmp_path, storage)  # what is slow, before it begins
    process = start_sweep(plan, there, log, programs, storage=storage, workers=2)
    wait_for((there / "trials" / "gamma=2" / "seed0" / "metrics.jsonl").exists, process, log)
    comparison = sweep_in_haste(plan, tmp_path / "here", programs=programs, storage=storage)
    assert [arm.why_out for arm in comparison.arms] == ["running elsewhere"] * 2, "it did not wait for their end"
    assert wait([process], log) == [0]
    assert "no longer" not in log.read_text()


def test_every_worker_has_its_own_gpu(
    recipe: Path, programs: Programs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-7")
    spy = tmp_path / "spy.py"
    spy.write_text("import os; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)\n" + STAND_IN)
    command = (sys.executable, "-S", str(spy))
    spies = Programs(command, programs.detect)
    sweep(grid(recipe, "0", "2", pace="0.1"), tmp_path / "out", workers=2, programs=spies)
    assert {log_of(tmp_path / "out", name).splitlines()[0] for name in ("gamma=0", "gamma=2")} == {"4", "GPU-7"}


def test_a_grid_cut_off_while_it_was_queued_or_asked_for_is_whole_afterwards(
    recipe: Path, programs: Programs, tmp_path: Path
) -> None:
    plan = grid(recipe, "0", "1", "2")
    for _ in range(2):
        study = open_study(plan, definition_of(plan), tmp_path, None)
        assert len(study.get_trials()) == 3
    study.ask()  # and then the process was killed
    whole = study.ask()
    whole.set_user_attr("seed0", {"AP": 0.3, "AP50": 0.3, "per_class": [], "seconds": None})  # and not told
    comparison = sweep(plan, tmp_path, programs=programs)
    assert {arm.name: arm.why_out for arm in comparison.arms} == {"gamma=0": "", "gamma=1": "", "gamma=2": ""}
    assert not (tmp_path / "trials" / "gamma=1").exists(), "nothing was left to do"


# ---- in earnest ----------------------------------------------------------------------------------------------------


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
def test_a_real_failure_is_told_by_its_own_error(data: TinyData, tmp_path: Path) -> None:
    recipe = write_config(tmp_path / "tiny.yaml", data, train__epochs=1)
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["--config", str(recipe), "--grid", "loss.alpha=[1.0],0.25", "--output-dir", str(out)]
    assert wait([start_tool("sweep", arguments, log)], log, seconds=300) == [0]
    assert "loss.alpha must give one weight for each of the 3 classes" in (out / "results.md").read_text()
    assert yaml.safe_load((out / "winner.yaml").read_text())["loss"]["alpha"] == 0.25


@pytest.mark.slow
def test_a_sweep_of_which_nothing_came_to_its_end_has_no_winner_and_says_so(data: TinyData, tmp_path: Path) -> None:
    recipe = write_config(tmp_path / "tiny.yaml", data, train__epochs=1)
    out, log = tmp_path / "out", tmp_path / "log"
    arguments = ["--config", str(recipe), "--grid", "loss.alpha=[1.0]", "--output-dir", str(out)]
    assert wait([start_tool("sweep", arguments, log)], log, seconds=300) == [1]
    assert not (out / "winner.yaml").exists()
    assert "error: no run came to its end, so there is no winner" in log.read_text()
    assert "winner.yaml" not in log.read_text()
