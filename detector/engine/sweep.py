"""Many trainings to choose by: every trial is a recipe with some settings changed, run for several seeds and folds.

The study lives in Optuna's storage and in one folder. This process only asks for trials, starts `tools/train.py` for
their runs, each in a process and a folder of its own, reads what they log, and tells. So a run that crashes harms no
other, and the same command goes on after anything: what is finished is in the storage, and what was cut is resumed by
train's own `--resume auto`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from detector.config import load_config, resolve_data_paths
from detector.datasets.folds import Fold, write_folds
from detector.engine.checkpoint import make_folder, write_json
from detector.engine.compare import Arm, Comparison, add_run, compare, figure
from detector.engine.errors import Interrupted, RunError, stop_on_signal
from detector.engine.logger import duration
from detector.engine.plan import Plan, Range, Unit, definition_of
from detector.reports.figures import FigureError

if TYPE_CHECKING:
    import optuna

# ---- when to give up -----------------------------------------------------------------------------------------------

PRUNE_BELOW = 0.75
"""A trial is hopeless at less than this share of the median of the others at the same point ..."""
PRUNE_AGAINST = 4
"""... of which there must be so many ..."""
PRUNE_FROM = 0.3
"""... and not before this share of a run."""
STEPS = 1000
"""Optuna's steps in each run, whatever its number of epochs."""


def hopeless(step: int, ap: float, others: Sequence[Mapping[int, float]]) -> str:
    """Why a trial is not worth going on with; "" if it is. Recipes of equal worth differ by less than a quarter.

    Args:
        step: place in the trial: STEPS times runs done, plus the share of the current one.
        ap: best val AP so far of the run at that place.
        others: by step, the same of other trials: the same seed and fold, at the same share of the run.
    """
    there = [other[step] for other in others if step in other]
    share = ((step - 1) % STEPS + 1) / STEPS
    if share < PRUNE_FROM or len(there) < PRUNE_AGAINST:
        return ""
    median = statistics.median(there)
    if ap >= PRUNE_BELOW * median:
        return ""
    return f"AP {ap:.3f} after {share:.0%} of a run, median of {len(there)} others {median:.3f}"


# ---- the study -----------------------------------------------------------------------------------------------------

POLL = 0.5
"""Seconds between two looks at the running processes."""
TOOLS = Path(__file__).resolve().parents[2] / "tools"


class Programs(NamedTuple):
    """How runs are trained, and how what they find is written to detections.json."""

    train: tuple[str, ...] = (sys.executable, str(TOOLS / "train.py"))
    detect: tuple[str, ...] = (sys.executable, str(TOOLS / "compare.py"), "--detect", "--replicates", "0")


@dataclass
class Trial:
    """A trial of the study that this process works on."""

    handle: optuna.trial.Trial
    folder: Path
    epochs: int
    todo: list[Unit]
    done: dict[str, float] = field(default_factory=dict)
    """AP by unit."""
    reported: dict[int, float] = field(default_factory=dict)
    """AP by step."""
    running: int = 0
    why: str = ""
    """Why it came to nothing: starts with `failed` or `pruned`."""


@dataclass
class Job:
    """A process that works on a run."""

    trial: Trial
    unit: Unit
    slot: int
    process: subprocess.Popen[bytes]
    started: float | None
    """None of a run that goes on: how long it takes is not known then."""
    detecting: bool = False
    share: float = 0.0

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.trial.folder / self.unit.name

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.trial.folder.name}/{self.unit.name}"


def sweep(
    plan: Plan,
    output_dir: Path,
    *,
    workers: int = 1,
    storage: str | None = None,
    prune: bool = True,
    retry_failed: bool = False,
    programs: Programs | None = None,
) -> Comparison:
    """Run a study to its end, or go on with it; write results.md, results.json, results.svg and winner.yaml.

    Args:
        plan: as `settle` returns it.
        output_dir: of everything.
        workers: runs side by side, each with its share of the CPU's threads, and its own GPU where there are several.
        storage: a database URL that several machines share, each with its own folder; None: a file in the folder.
        prune: whether to give up what is `hopeless`; of recipes alone, which are to be a whole table, nothing is.
        retry_failed: whether to go on with trials that failed, whatever it was (a full disk?) being mended.
        programs: to run; None: our own tools.

    Raises:
        RunError: no Optuna; the folder belongs to another study or is being worked on.
        Interrupted: after SIGINT or SIGTERM; all runs have left a checkpoint.
    """
    make_folder(output_dir)
    with _only_one(output_dir / ".lock", f"another sweep is at work in {output_dir}; wait for it or choose another"):
        definition = definition_of(plan)
        require_same_study(definition, output_dir)
        study = open_study(plan, definition, output_dir, storage, retry_failed=retry_failed)
        state = _Sweep(plan, output_dir.absolute(), study, workers, prune, programs or Programs())
        write_json(definition, output_dir / "study.json")
        state.run()
        return state.finish()


def open_study(
    plan: Plan, definition: dict[str, Any], output_dir: Path, storage: str | None, *, retry_failed: bool = False
) -> optuna.Study:
    """Optuna's study of a plan, made if it is not there, with every point of a grid in its queue.

    The file is SQLite: a transaction is there or not, whereas a journal file that lost its process while writing a line
    cannot be read any more.

    Raises:
        RunError: no Optuna, or its storage cannot be opened.
    """
    try:
        import optuna
    except ImportError:
        raise RunError("a sweep needs optuna, which is not installed: pip install optuna (or -e .[sweep])") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]
    try:
        backend = optuna.storages.RDBStorage(
            storage or f"sqlite:///{output_dir.absolute() / 'study.db'}",
            engine_kwargs={} if storage else {"connect_args": {"timeout": 60}},
        )
        study = optuna.create_study(
            storage=backend, study_name=f"sweep-{digest}", direction="maximize", load_if_exists=True
        )
    except Exception as error:  # noqa: BLE001 (SQLAlchemy's and every driver's own)
        raise RunError(f"--storage cannot be opened: {str(error).splitlines()[0]}") from None
    # A sampler that began again with the same seed would suggest the same points again.
    me = f"machine {owner_of(output_dir)}"
    if me not in study.user_attrs:
        study.set_user_attr(me, len([key for key in study.user_attrs if key.startswith("machine ")]))
    seed = 1000 * int(study.user_attrs[me]) + len(study.trials)
    if plan.search == "tpe":
        study.sampler = optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    else:
        study.sampler = optuna.samplers.RandomSampler(seed=seed)
    first = plan.usual()  # something to compare with
    points = plan.points() if plan.search == "grid" else [first] if first is not None else []
    for point in points:
        study.enqueue_trial(point, user_attrs={"queued": True}, skip_if_exists=True)
    folders = [trial.user_attrs.get("folder") for trial in study.trials]
    for trial in study.trials if retry_failed else []:
        folder = trial.user_attrs.get("folder")
        again = folder is None or folder in folders[trial.number + 1 :]
        if trial.state.name == "FAIL" and not again:
            study.enqueue_trial(trial.params, user_attrs={"queued": True, "folder": folder})
    return study


def owner_of(output_dir: Path) -> str:
    """The name under which a folder takes part in a study, wherever it is moved."""
    path = output_dir / ".owner"
    if not path.exists():
        write_json(uuid.uuid4().hex, path)
    name: str = json.loads(path.read_text())
    return name


class _Sweep:
    """The loop: keep all workers busy, watch, tell."""

    def __init__(
        self, plan: Plan, output_dir: Path, study: optuna.Study, workers: int, prune: bool, programs: Programs
    ) -> None:
        self.plan, self.output_dir, self.study, self.programs = plan, output_dir, study, programs
        self.prune = prune and bool(plan.space)
        self.me = owner_of(output_dir)
        self.workers, self.units = workers, plan.units()
        self.folds: list[Fold] = []
        self.console = Console(highlight=False, soft_wrap=True)
        if plan.folds:
            train = plan.config_of(plan.points()[0]).data.train
            assert train is not None, "settle has looked"
            self.folds, warnings = write_folds(Path(train.annotations), plan.folds, output_dir=output_dir / "folds")
            for line in warnings:
                self.console.print(f"warning: {line}", style="yellow", markup=False)
        self.jobs: list[Job] = []
        self.trials = [
            self._reopen(frozen) for frozen in self._frozen("RUNNING") if self._is_mine(frozen, unnamed=True)
        ]
        self.total = (len(plan.points()) if plan.search == "grid" else plan.trials) * len(self.units)
        self.done_before = self._share_done()
        self.started = time.monotonic()

    def _frozen(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """The trials of the study; of one that was tried again, the last."""
        trials = [t for t in self.study.get_trials(deepcopy=False) if "surplus" not in t.user_attrs]
        last = {t.user_attrs.get("folder", t.number): t for t in trials}
        return [t for t in last.values() if not states or t.state.name in states]

    def _is_mine(self, frozen: optuna.trial.FrozenTrial, *, unnamed: bool = False) -> bool:
        return bool(frozen.user_attrs.get("owner", self.me if unnamed else "") == self.me)

    # -- trials

    def _reopen(self, frozen: optuna.trial.FrozenTrial) -> Trial:
        """A trial that an earlier process worked on."""
        import optuna

        trial = self._open(optuna.trial.Trial(self.study, frozen._trial_id))
        trial.done = {u.name: frozen.user_attrs[u.name]["AP"] for u in self.units if u.name in frozen.user_attrs}
        trial.todo = [unit for unit in self.units if unit.name not in trial.done]
        trial.reported = dict(frozen.intermediate_values)
        return trial

    def _open(self, handle: optuna.trial.Trial) -> Trial:
        """Own, suggest and name what is not yet; a process may have been killed at any of these lines."""
        handle.set_user_attr("owner", self.me)
        for key, values in self.plan.dimensions.items():
            if not isinstance(values, Range):
                handle.suggest_categorical(key, values)
            elif values.whole:
                handle.suggest_int(key, int(values.low), int(values.high), log=values.log)
            else:
                handle.suggest_float(key, values.low, values.high, log=values.log)
        folder = handle.user_attrs.get("folder")
        if folder is None:
            folder = self.plan.name_of(handle.params)
            if folder in {trial.user_attrs.get("folder") for trial in self._frozen()}:
                folder += f"_{handle.number}"
            handle.set_user_attr("folder", folder)
        epochs = self.plan.config_of(handle.params).train.epochs
        return Trial(handle, self.output_dir / "trials" / folder, epochs, list(self.units))

    def _ask(self) -> Trial | None:
        """A new trial, if there is one left."""
        from optuna.trial import TrialState

        waiting = len(self._frozen("WAITING"))
        if not waiting and (self.plan.search == "grid" or len(self._frozen()) >= self.plan.trials):
            return None
        handle = self.study.ask()
        if self.plan.search == "grid" and "queued" not in handle.user_attrs:  # another machine took the last one
            handle.set_user_attr("surplus", True)
            self.study.tell(handle, state=TrialState.FAIL)
            return None
        trial = self._open(handle)
        self.trials.append(trial)
        return trial

    def _next(self) -> tuple[Trial, Unit] | None:
        """The run to start: a new trial's first, so that all have had one before any has its second and the hopeless are
        known early. TPE learns from whole trials only, so there it is the oldest trial's next."""
        while True:
            ready = [trial for trial in self.trials if trial.todo and not trial.why]
            trial = None if self.plan.search == "tpe" and ready else self._ask()
            if trial is None and ready:
                trial = min(ready, key=lambda t: 0 if self.plan.search == "tpe" else len(self.units) - len(t.todo))
            if trial is None:
                return None
            if not self._give_up_if_hopeless(trial):
                return trial, trial.todo.pop(0)

    def _give_up_if_hopeless(self, trial: Trial) -> bool:
        if not self.prune or not trial.reported or trial.why:
            return False
        step = max(trial.reported)
        others = [t.intermediate_values for t in self._frozen() if t.number != trial.handle.number]
        why = hopeless(step, trial.reported[step], others)
        if why:
            trial.why, trial.todo = f"pruned: {why}", []
            for job in [job for job in self.jobs if job.trial is trial]:
                _end([job.process])
                self._leave(job)
            self._close(trial)
        return bool(why)

    def _close(self, trial: Trial) -> None:
        """Tell Optuna about a trial that nothing is left to do of."""
        from optuna.trial import TrialState

        if trial.running or trial.todo:
            return
        if trial.why:
            trial.handle.set_user_attr("why", trial.why)
            self.study.tell(trial.handle, state=TrialState.PRUNED if trial.why[0] == "p" else TrialState.FAIL)
            self._say(f"{trial.folder.name}: {trial.why}")
        else:
            self.study.tell(trial.handle, statistics.fmean(trial.done.values()))
        self.trials.remove(trial)

    # -- runs

    def _start(self, trial: Trial, unit: Unit, slot: int) -> None:
        run = trial.folder / unit.name
        overrides = [*self.plan.overrides_of(trial.handle.params), f"train.seed={unit.seed}"]
        if unit.fold is not None:
            train = self.plan.config_of(trial.handle.params).data.train
            assert train is not None, "settle has looked"
            fold = self.folds[unit.fold]
            overrides += [
                f"data.train.annotations={fold.train}", f"data.val.images={train.images}",
                f"data.val.annotations={fold.val}",
            ]  # fmt: skip
        recipe = self.plan.recipe_of(trial.handle.params)
        command = [*self.programs.train, "--config", str(recipe), "--output-dir", str(run), "--resume", "auto"]
        make_folder(run)
        started = None if (run / "metrics.jsonl").exists() else time.monotonic()
        process = self._spawn([*command, *overrides], run, slot)
        trial.running += 1
        self.jobs.append(Job(trial, unit, slot, process, started))

    def _spawn(self, command: Sequence[str], run: Path, slot: int) -> subprocess.Popen[bytes]:
        """Start a program for a run; the run's lock is the child's as long as it lives, also when this process is gone."""
        threads = max(1, len(os.sched_getaffinity(0)) // self.workers)
        env = {"OMP_NUM_THREADS": str(threads), **os.environ}
        named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        devices = named or [str(i) for i in range(torch.cuda.device_count())]
        if devices:
            env["CUDA_VISIBLE_DEVICES"] = devices[slot % len(devices)]
        with (run / ".lock").open("w") as lock, (run / "log.txt").open("ab") as log:
            _wait_for(lock, run)
            return subprocess.Popen(
                [*(_WITH_PARENT if sys.platform == "linux" else ()), *command],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, pass_fds=[lock.fileno()],
                start_new_session=True,  # a Ctrl-C is for this process, which passes it on once
            )  # fmt: skip

    def _watch(self, job: Job) -> None:
        """Report what a run has reached; when its process ends, go on with it or close it."""
        code = job.process.poll()
        if not job.detecting:
            self._report(job, finished=code == 0)
            if job not in self.jobs:  # given up
                return
        if code is None:
            return
        if code != 0:
            error = last_words(job.folder / "log.txt", code)
            job.trial.why = f"failed: {job.unit.name}: {error} (log: {job.folder / 'log.txt'})"
            job.trial.todo = []
        elif not job.detecting:
            job.detecting = True
            job.process = self._spawn([*self.programs.detect, str(job.folder)], job.folder, job.slot)
            return
        else:
            metrics = json.loads((job.folder / "metrics.json").read_text())
            metrics.pop("test", None)
            seconds = time.monotonic() - job.started if job.started is not None else None
            job.trial.handle.set_user_attr("config", (job.folder / "config.yaml").read_text())
            job.trial.handle.set_user_attr(job.unit.name, {**metrics, "seconds": seconds})
            job.trial.done[job.unit.name] = metrics["AP"]
            job.share = 0.0  # from here on it counts as finished
            took = f", {duration(seconds)}" if seconds is not None else ""
            self._say(f"{job.name}: AP {metrics['AP']:.3f}{took}")
        self._leave(job)
        self._close(job.trial)

    def _report(self, job: Job, *, finished: bool) -> None:
        curve = learning_curve(job.folder / "metrics.jsonl")
        job.share = min(1.0, curve.epoch / job.trial.epochs)
        values = {max(1, round(STEPS * epoch / job.trial.epochs)): ap for epoch, ap in curve.ap.items()}
        if finished and values:  # perhaps stopped early
            values[STEPS] = max(values.values())
        before = self.units.index(job.unit) * STEPS
        new = {before + step: ap for step, ap in values.items() if before + step not in job.trial.reported}
        for step, ap in new.items():
            job.trial.handle.report(ap, step)
            job.trial.reported[step] = ap
        if new and not finished:
            self._give_up_if_hopeless(job.trial)

    def _leave(self, job: Job) -> None:
        self.jobs.remove(job)
        job.trial.running -= 1

    # -- the loop

    def run(self) -> None:
        """Until nothing is left to do.

        Raises:
            Interrupted: a signal came; every process was asked to end, and has.
        """
        with stop_on_signal() as stop, self._bar() as bar:
            task = bar.add_task("runs", total=self.total, eta="")
            try:
                while self._fill():
                    time.sleep(POLL)
                    if stop.signum is not None:
                        raise Interrupted(stop.signum)
                    for job in list(self.jobs):
                        if job in self.jobs:  # not given up with another
                            self._watch(job)
                    text = ", ".join(f"{job.name} {job.share:.0%}" for job in self.jobs)
                    bar.update(task, completed=self._share_done() * self.total, description=text, eta=self._eta())
            finally:
                _end([job.process for job in self.jobs])

    def _fill(self) -> bool:
        """Give every free worker a run; whether any works."""
        for slot in sorted(set(range(self.workers)) - {job.slot for job in self.jobs}):
            following = self._next()
            if following is None:
                break
            self._start(*following, slot)
        return bool(self.jobs)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.fields[eta]}"),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip

    def _share_done(self) -> float:
        """Of all runs, those that are finished, given up, or so far done."""
        done = sum(min(job.share, 0.99) for job in self.jobs)  # its last picture is not its end
        for frozen in self._frozen():
            over = frozen.state.is_finished()
            done += len(self.units) if over else sum(unit.name in frozen.user_attrs for unit in self.units)
        return min(1.0, done / max(1, self.total))

    def _eta(self) -> str:
        share = self._share_done()
        if share <= self.done_before:
            return "eta -"
        elapsed = time.monotonic() - self.started
        return f"eta {duration(elapsed * (1 - share) / (share - self.done_before))}"

    def _say(self, text: str) -> None:
        percent = math.floor(100 * self._share_done())  # 100 when all is done, not a little before
        self.console.print(f"[{percent}%, {self._eta()}] {text}", markup=False)

    # -- the end

    def finish(self) -> Comparison:
        """Compare all trials of the study, also other machines', and write what was found."""
        arms: list[Arm] = []
        seconds: dict[str, float] = {}
        configs: dict[str, tuple[dict[str, Any], str]] = {}
        for frozen in self._frozen("COMPLETE", "FAIL", "PRUNED", "RUNNING"):
            attrs = frozen.user_attrs
            if "folder" not in attrs:  # asked for and cut off before it had a name
                continue
            arm = Arm(
                attrs["folder"], why_out=attrs.get("why", "" if frozen.state.is_finished() else "running elsewhere")
            )
            for unit in (unit.name for unit in self.units if unit.name in attrs):
                folder = self.output_dir / "trials" / arm.name / unit
                if self._is_mine(frozen) and (folder / "metrics.json").exists():
                    note = add_run(arm, unit, folder)
                    if note:
                        self.console.print(f"{arm.name}/{unit}: {note}", markup=False)
                arm.metrics[unit] = attrs[unit]
                arm.truth[unit] = unit  # the same data for all trials, by definition
            if arm.metrics:
                took = [run["seconds"] for run in arm.metrics.values() if run["seconds"] is not None]
                seconds[arm.name] = statistics.fmean(took) if took else math.inf
                configs[arm.name] = dict(frozen.params), attrs["config"]
            arms.append(arm)
        comparison = compare(arms, preferred=self._preferred(arms, seconds, configs))
        write_json(comparison.to_json(), self.output_dir / "results.json")
        (self.output_dir / "results.md").write_text(comparison.markdown())
        try:
            figure(comparison, self.output_dir / "results.svg")
        except FigureError as error:
            self.console.print(f"no results.svg: {error}", markup=False)
        if comparison.reference is not None:
            self._write_winner(comparison, *configs[comparison.reference.name])
        return comparison

    def _preferred(
        self, arms: Sequence[Arm], seconds: Mapping[str, float], configs: Mapping[str, tuple[dict[str, Any], str]]
    ) -> list[tuple[str, str]]:
        """What to take where the best cannot be told: the recipe as it is, or what trains faster by a tenth."""
        best = max((arm for arm in arms if arm.metrics and not arm.why_out), key=lambda arm: arm.mean, default=None)
        if best is None:
            return []
        point = self.plan.usual()
        usual = [(name, "the recipe as it is") for name, (params, _) in configs.items() if params == point]
        faster = sorted((t, name) for name, t in seconds.items() if t < 0.9 * seconds[best.name])
        return [*usual, *((name, f"the fastest to train, {duration(t)} a run") for t, name in faster)]

    def _write_winner(self, comparison: Comparison, params: Mapping[str, Any], text: str) -> None:
        best, path = comparison.reference, self.output_dir / "winner.yaml"
        assert best is not None, "the caller has looked"
        path.write_text(text)
        data = resolve_data_paths(self.plan.config_of(params)).data
        config = load_config(path)
        splits = {name: getattr(data, name) for name in ("train", "val", "test")}  # not a fold's
        config = config.model_copy(update={"data": config.data.model_copy(update=splits)})
        head = [
            f"{best.name}: AP {best.mean:.3f}, the mean of {len(best.metrics)} (chosen by it, so a little flattering)",
            comparison.verdict,
            f"python tools/train.py --config {path}",
        ]
        path.write_text("".join(f"# {line}\n" for line in head) + config.to_yaml())


class Curve(NamedTuple):
    """How far a run is."""

    epoch: float
    ap: dict[float, float]
    """Best val AP so far, by epoch."""


def learning_curve(path: Path) -> Curve:
    """Read a run's metrics.jsonl, which may be in the middle of being written."""
    epoch, best, ap = 0.0, 0.0, {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            record = json.loads(line)
        except ValueError:
            break
        epoch = record["epoch"]
        if record.get("split") == "val":
            best = max(best, record["AP"])
            ap[epoch] = best
    return Curve(epoch, ap)


def last_words(log: Path, code: int) -> str:
    """The line of a log that says why its program ended."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}" + (" (out of memory?)" if code == -signal.SIGKILL else "")
    return (told or lines or [f"exit code {code}"])[-1][:200]


# ---- processes -----------------------------------------------------------------------------------------------------

_WITH_PARENT = (
    sys.executable, "-S", "-c",
    "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 15); os.execv(sys.argv[1], sys.argv[1:])",
)  # fmt: skip
"""Before a command: have the kernel send it SIGTERM when the parent is gone (Linux)."""


def _end(processes: Sequence[subprocess.Popen[bytes]], *, patience: float = 60) -> None:
    """Ask processes to end, which a training does by a checkpoint; end those that do not."""
    for process in processes:
        process.terminate()
    until = time.monotonic() + patience
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its loader's workers, too
            process.wait()


def _wait_for(lock: Any, run: Path, *, patience: float = 120) -> None:
    """Until no process of an earlier sweep, which was killed and could not take it along, works on a run any more."""
    until = time.monotonic() + patience
    while True:
        try:
            return fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > until:
                raise RunError(f"a process of an earlier sweep still trains in {run}; end it first") from None
            time.sleep(0.1)


@contextlib.contextmanager
def _only_one(path: Path, otherwise: str) -> Iterator[None]:
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(otherwise) from None
        yield


def require_same_study(definition: dict[str, Any], output_dir: Path) -> None:
    """Refuse a folder that holds another study.

    Raises:
        RunError: naming what differs.
    """
    path = output_dir / "study.json"
    then = json.loads(path.read_text()) if path.exists() else definition
    if then != definition:
        keys = [key for key in {**then, **definition} if then.get(key) != definition.get(key)]
        lines = [f"  {key}: {then.get(key)!r} there, {definition.get(key)!r} now" for key in keys]
        raise RunError(
            "\n".join(
                [
                    f"{output_dir} holds another study, got:",
                    *lines[:12],
                    *(["  ..."] if len(lines) > 12 else []),
                    "Choose another --output-dir, or go on with the command that began this one.",
                ]
            )
        )
