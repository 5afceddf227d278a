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

from detector.atomic import make_folder, write_json
from detector.config import resolve_data_paths
from detector.config_yaml import to_yaml
from detector.dataset_tools.folds import Fold, write_folds
from detector.errors import FigureError, Interrupted, RunError
from detector.experiments.compare import Arm, Comparison, add_run, compare, figure
from detector.experiments.search_space import Plan, Range, Unit, definition_of
from detector.training.logger import duration
from detector.training.signals import stop_on_signal

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
BEAT = 60.0
"""Seconds between two signs of life, for which a machine that shares a study looks at the others', too."""
SILENCE = 10
"""So many of its own beats in a row without one of another machine, and a machine takes over that one's trials."""
PATIENCE = 1800.0
"""Seconds for which a storage may fail; trainings go on meanwhile."""
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
        RunError: no Optuna; the folder belongs to another study or is being worked on; the storage fails for long.
        Interrupted: after SIGINT or SIGTERM; all runs have left a checkpoint.
    """
    make_folder(output_dir)
    with _only_one(output_dir / ".lock", f"another sweep is at work in {output_dir}; wait for it or choose another"):
        definition = definition_of(plan)
        require_same_study(definition, output_dir)
        study = open_study(plan, definition, output_dir, storage, retry_failed=retry_failed)
        from optuna.exceptions import StorageInternalError

        try:
            state = _Sweep(
                plan, output_dir.absolute(), study, workers, prune, programs or Programs(), shared=storage is not None
            )
            write_json(definition, output_dir / "study.json")
            state.run()
            return state.finish()
        except StorageInternalError as error:
            raise RunError(f"the storage fails: {_reason(error)}; mended, the same command goes on") from None


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
    from sqlalchemy.exc import DBAPIError

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]
    url = storage or f"sqlite:///{output_dir.absolute() / 'study.db'}"
    engine = {"pool_pre_ping": True, "connect_args": {"timeout": 60} if url.startswith("sqlite") else {}}
    for attempt in range(3):
        try:
            study = optuna.create_study(
                storage=optuna.storages.RDBStorage(url, engine_kwargs=engine),
                sampler=optuna.samplers.RandomSampler(), study_name=f"sweep-{digest}", direction="maximize",
                load_if_exists=True,
            )  # fmt: skip
            break
        except Exception as error:  # noqa: BLE001 (SQLAlchemy's and every driver's own)
            made = isinstance(error, DBAPIError | optuna.exceptions.StorageInternalError)
            if not made or attempt == 2:
                raise RunError(f"--storage cannot be opened: {_reason(error)}") from None
            time.sleep(1)  # another machine may be making the same tables in this moment
    first = plan.usual()  # something to compare with
    points = plan.points() if plan.search == "grid" else [first] if first is not None else []
    for point in points:
        study.enqueue_trial(point, skip_if_exists=True)
    folders = [trial.user_attrs.get("folder") for trial in study.trials]
    for trial in study.trials if retry_failed else []:
        folder = trial.user_attrs.get("folder")
        again = folder is None or folder in folders[trial.number + 1 :]
        if trial.state.name == "FAIL" and not again:
            study.enqueue_trial(trial.params, user_attrs={"folder": folder})
    return study


def _reason(error: BaseException) -> str:
    """Optuna hides what the driver said in an advice of its own."""
    return (str(error.__cause__ or error).splitlines() or [repr(error)])[0]


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
        self, plan: Plan, output_dir: Path, study: optuna.Study, workers: int, prune: bool, programs: Programs,
        *, shared: bool,
    ) -> None:  # fmt: skip
        self.plan, self.output_dir, self.study, self.programs = plan, output_dir, study, programs
        self.prune = prune and bool(plan.space)
        self.me, self.shared = owner_of(output_dir), shared
        self.next_beat = -math.inf
        self.heard: dict[str, tuple[Any, int]] = {}
        """By other machine at work: its last beat, and how often it was the same."""
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
        self.trials: list[Trial] = []
        self.total = (len(plan.points()) if plan.search == "grid" else plan.trials) * len(self.units)
        self.done_before = self._share_done()
        self.started = time.monotonic()

    def _frozen(self, *states: str) -> list[optuna.trial.FrozenTrial]:
        """The trials of the study; of one that was tried again, the last."""
        trials = [t for t in self.study.get_trials(deepcopy=False) if "surplus" not in t.user_attrs]
        last = {t.user_attrs.get("folder", t.number): t for t in trials}
        return [t for t in last.values() if not states or t.state.name in states]

    def _owner(self, frozen: optuna.trial.FrozenTrial) -> str:
        """Which machine works on a trial; of one that a process asked for and was killed, none that others know of."""
        owner: str = frozen.user_attrs.get("owner", "" if self.shared else self.me)
        return owner

    # -- trials

    def _look(self) -> None:
        """Work on all trials that are this machine's in the storage, and only on those."""
        import optuna

        mine = {t.number: t for t in self._frozen("RUNNING") if self._owner(t) == self.me}
        for trial in [trial for trial in self.trials if trial.handle.number not in mine]:
            self._end_runs(trial)
            self.trials.remove(trial)
            self._say(f"{trial.folder.name}: no longer this machine's, which was not heard of for long")
        for number in mine.keys() - {trial.handle.number for trial in self.trials}:
            self._open(mine[number])
        if not self.shared or time.monotonic() < self.next_beat:
            return
        self.next_beat = time.monotonic() + BEAT
        self.study.set_user_attr(f"beat {self.me}", time.time())
        beats, others = self.study.user_attrs, self._others()
        before, self.heard = self.heard, {}
        for owner in {self._owner(frozen) for frozen in others}:
            beat = beats.get(f"beat {owner}")  # compared with itself only: clocks may differ
            last, times = before.get(owner, (beat, 0))
            self.heard[owner] = (beat, times + 1 if beat == last else 0)
        for frozen in others:
            if self.heard[self._owner(frozen)][1] > SILENCE:  # back into the queue, which gives it to one machine only
                self.study._storage.set_trial_user_attr(frozen._trial_id, "owner", "")
                self.study._storage.set_trial_state_values(frozen._trial_id, optuna.trial.TrialState.WAITING)
                self._say(f"{frozen.user_attrs.get('folder')}: its machine is not heard of any more; taken over")

    def _others(self) -> list[optuna.trial.FrozenTrial]:
        """The trials that other machines work on."""
        return [t for t in self._frozen("RUNNING") if self._owner(t) != self.me] if self.shared else []

    def _open(self, frozen: optuna.trial.FrozenTrial) -> Trial:
        """Own, suggest and name what is not yet; a process may have been killed at any of these lines."""
        import optuna

        samplers = optuna.samplers  # by number, so that no two trials, of whatever machine, draw the same
        self.study.sampler = (
            samplers.TPESampler(seed=frozen.number, constant_liar=True)
            if self.plan.search == "tpe"
            else samplers.RandomSampler(seed=frozen.number)
        )
        handle = optuna.trial.Trial(self.study, frozen._trial_id)
        handle.set_user_attr("owner", self.me)
        for key, values in self.plan.dimensions.items():
            if not isinstance(values, Range):
                handle.suggest_categorical(key, values)
            elif values.whole:
                handle.suggest_int(key, int(values.low), int(values.high), log=values.log)
            else:
                handle.suggest_float(key, values.low, values.high, log=values.log)
        folder = frozen.user_attrs.get("folder")
        if folder is None:
            folder = self.plan.name_of(handle.params)
            if folder in {trial.user_attrs.get("folder") for trial in self._frozen()}:
                folder += f"_{handle.number}"
            handle.set_user_attr("folder", folder)
        epochs = self.plan.config_of(handle.params).train.epochs
        done = {u.name: frozen.user_attrs[u.name]["AP"] for u in self.units if u.name in frozen.user_attrs}
        todo = [unit for unit in self.units if unit.name not in done]
        path = self.output_dir / "trials" / folder
        self.trials.append(Trial(handle, path, epochs, todo, done, dict(frozen.intermediate_values)))
        return self.trials[-1]

    def _ask(self) -> Trial | None:
        """A new trial, or one that another machine left, if there is one."""
        from optuna.trial import TrialState

        search = self.plan.search != "grid"
        while self._frozen("WAITING") or (search and len(self._frozen()) < self.plan.trials):
            handle = self.study.ask()
            frozen = next(t for t in self.study.get_trials(deepcopy=False) if t.number == handle.number)
            if not self._is_surplus(frozen):
                return self._open(frozen)
            handle.set_user_attr("surplus", True)
            self.study.tell(handle, state=TrialState.FAIL)
        return None

    def _is_surplus(self, frozen: optuna.trial.FrozenTrial) -> bool:
        """Whether machines that filled the queue, or asked, in the same moment made one trial too many."""
        if "folder" in frozen.user_attrs:  # tried again or taken over
            return False
        earlier = [trial for trial in self._frozen() if trial.number < frozen.number]
        point = frozen.system_attrs.get("fixed_params")
        if point is None:
            return len(earlier) >= self.plan.trials
        return any(trial.system_attrs.get("fixed_params") == point for trial in earlier)

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
            self._end_runs(trial)
        return bool(why)

    def _close(self, trial: Trial) -> None:
        """Tell Optuna about a trial that nothing is left to do of."""
        from optuna.trial import TrialState

        if trial.running or trial.todo:
            return
        if trial.why:
            trial.handle.set_user_attr("why", trial.why)
            self.study.tell(trial.handle, state=TrialState.PRUNED if trial.why[0] == "p" else TrialState.FAIL)
            self.trials.remove(trial)
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
            job.trial.handle.set_user_attr(job.unit.name, {**metrics, "seconds": seconds})
            job.trial.done[job.unit.name] = metrics["AP"]
            job.share = 0.0  # from here on it counts as finished
            took = f", {duration(seconds)}" if seconds is not None else ""
            self._say(f"{job.name}: AP {metrics['AP']:.3f}{took}")
        self._leave(job)

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

    def _end_runs(self, trial: Trial) -> None:
        jobs = [job for job in self.jobs if job.trial is trial]
        _end([job.process for job in jobs])
        for job in jobs:
            self._leave(job)

    # -- the loop

    def run(self) -> None:
        """Until nothing is left to do.

        Raises:
            Interrupted: a signal came; every process was asked to end, and has.
        """
        from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

        with stop_on_signal() as stop, self._bar() as bar:
            task = bar.add_task("runs", total=self.total, eta="")
            fails_since = None
            try:
                while True:
                    # Whatever a failing storage cuts short, the next step begins with reading what is so.
                    try:
                        if not self._step():
                            break
                        share, eta = self._progress()
                        text = ", ".join(f"{job.name} {job.share:.0%}" for job in self.jobs)
                        bar.update(task, completed=share * self.total, description=text, eta=eta)
                        fails_since = None
                    except (StorageInternalError, UpdateFinishedTrialError) as error:
                        if fails_since is None:
                            fails_since = time.monotonic()
                            text = f"warning: the storage fails: {_reason(error)}; trying again"
                            self.console.print(text, style="yellow", markup=False)
                        if time.monotonic() - fails_since > PATIENCE:
                            raise
                    time.sleep(POLL)
                    if stop.signum is not None:
                        raise Interrupted(stop.signum)
            finally:
                _end([job.process for job in self.jobs])

    def _step(self) -> bool:
        """See to every run once; whether there is more to do or to wait for."""
        self._look()
        for trial in list(self.trials):  # right after looking, so that no other machine's is told
            self._close(trial)
        self._fill()
        for job in list(self.jobs):
            if job in self.jobs:  # not given up with another
                self._watch(job)
        doubtful = [t for t in self._others() if self.heard.get(self._owner(t), (None, 1))[1]]
        return bool(self.jobs or self.trials or doubtful)  # until others' machines are heard of, or theirs are ours

    def _fill(self) -> None:
        """Give every free worker a run."""
        for slot in sorted(set(range(self.workers)) - {job.slot for job in self.jobs}):
            following = self._next()
            if following is None:
                break
            self._start(*following, slot)

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

    def _progress(self) -> tuple[float, str]:
        """The share of all runs that is done, and when they all will be."""
        share, elapsed = self._share_done(), time.monotonic() - self.started
        new = share - self.done_before
        return share, f"eta {duration(elapsed * (1 - share) / new)}" if new > 0 else "eta -"

    def _say(self, text: str) -> None:
        share, eta = self._progress()
        percent = math.floor(100 * share)  # 100 when all is done, not a little before
        self.console.print(f"[{percent}%, {eta}] {text}", markup=False)

    # -- the end

    def finish(self) -> Comparison:
        """Compare all trials of the study, also other machines', and write what was found."""
        arms: list[Arm] = []
        seconds: dict[str, float] = {}
        points: dict[str, dict[str, Any]] = {}
        for frozen in self._frozen("COMPLETE", "FAIL", "PRUNED", "RUNNING"):
            attrs = frozen.user_attrs
            if "folder" not in attrs:  # asked for and cut off before it had a name
                continue
            arm = Arm(
                attrs["folder"], why_out=attrs.get("why", "" if frozen.state.is_finished() else "running elsewhere")
            )
            for unit in (unit.name for unit in self.units if unit.name in attrs):
                folder = self.output_dir / "trials" / arm.name / unit
                if self._owner(frozen) == self.me and (folder / "metrics.json").exists():
                    note = add_run(arm, unit, folder)
                    if note:
                        self.console.print(f"{arm.name}/{unit}: {note}", markup=False)
                arm.metrics[unit] = attrs[unit]
                arm.truth[unit] = unit  # the same data for all trials, by definition
            if arm.metrics:
                took = [run["seconds"] for run in arm.metrics.values() if run["seconds"] is not None]
                seconds[arm.name] = statistics.fmean(took) if took else math.inf
                points[arm.name] = dict(frozen.params)
            arms.append(arm)
        comparison = compare(arms, preferred=self._preferred(arms, seconds, points))
        write_json(comparison.to_json(), self.output_dir / "results.json")
        (self.output_dir / "results.md").write_text(comparison.markdown())
        try:
            figure(comparison, self.output_dir / "results.svg")
        except FigureError as error:
            self.console.print(f"no results.svg: {error}", markup=False)
        if comparison.reference is not None:
            self._write_winner(comparison, points[comparison.reference.name])
        return comparison

    def _preferred(
        self, arms: Sequence[Arm], seconds: Mapping[str, float], points: Mapping[str, dict[str, Any]]
    ) -> list[tuple[str, str]]:
        """What to take where the best cannot be told: the recipe as it is, or what trains faster by a tenth."""
        best = max((arm for arm in arms if arm.metrics and not arm.why_out), key=lambda arm: arm.mean, default=None)
        if best is None:
            return []
        as_it_is = self.plan.usual()
        usual = [(name, "the recipe as it is") for name, point in points.items() if point == as_it_is]
        faster = sorted((t, name) for name, t in seconds.items() if t < 0.9 * seconds[best.name])
        return [*usual, *((name, f"the fastest to train, {duration(t)} a run") for t, name in faster)]

    def _write_winner(self, comparison: Comparison, point: Mapping[str, Any]) -> None:
        """The recipe with the winning settings: of no seed and fold."""
        best, path = comparison.reference, self.output_dir / "winner.yaml"
        assert best is not None, "the caller has looked"
        head = [
            f"{best.name}: AP {best.mean:.3f}, the mean of {len(best.metrics)} (chosen by it, so a little flattering)",
            comparison.verdict,
            f"python tools/train.py --config {path}",
        ]
        config = resolve_data_paths(self.plan.config_of(point))
        path.write_text("".join(f"# {line}\n" for line in head) + to_yaml(config))


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
