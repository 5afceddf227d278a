"""Sweeps: train every trial of a plan for several seeds and folds, prune unpromising trials, and compare the results.

This process only asks the study for trials, starts `tools/train.py` for their runs, reads their logs, and reports to
the study. Every run has a process and a folder of its own, so a crash affects no other run. After an interruption the
same command continues: finished runs are in the storage, interrupted ones resume by train's `--resume auto`.
"""

from __future__ import annotations

import math
import statistics
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

from detector.atomic import make_folder, write_json
from detector.dataset_tools.stratify import Fold, write_folds
from detector.errors import Interrupted, RunError
from detector.experiments.compare import Comparison
from detector.experiments.run_process import (
    Commands,
    error_from_log,
    exclusive_lock,
    read_progress,
    start_process,
    stop_processes,
)
from detector.experiments.search_space import RunKey, SweepPlan, study_definition
from detector.experiments.statistics import require_packages
from detector.experiments.study import PRUNED_SHARE, STEPS_PER_RUN, SweepStudy, require_same_study, storage_error
from detector.experiments.sweep_results import write_results
from detector.reports.records import read_metrics
from detector.training.logger import duration
from detector.training.signals import stop_on_signal

if TYPE_CHECKING:
    import optuna

POLL_INTERVAL = 0.5
"""Seconds between two checks of the running processes."""
STORAGE_TIMEOUT = 1800.0
"""Seconds for which the storage may be unavailable; trainings continue meanwhile."""


@dataclass
class Trial:
    """A trial that this process works on."""

    handle: optuna.Trial
    folder: Path
    epochs: int
    """Length of each of its runs."""
    pending: list[RunKey]
    """Runs to start."""
    ap: dict[str, float]
    """AP of finished runs, by run key."""
    reported: dict[int, float]
    """Best AP so far by Optuna step, as reported to the study."""
    why: str = ""
    """Why it has no result: starts with `failed` or `pruned`; empty if it has one, or may still get one."""


@dataclass(eq=False)
class Job:
    """A process that works on a run: first the training, then writing detections.json."""

    trial: Trial
    key: RunKey
    worker: int
    process: subprocess.Popen[bytes]
    started: float | None
    """Start of the training; None for a resumed run, whose total duration is unknown."""
    detecting: bool = False
    share: float = 0.0
    """Finished share of the training."""

    @property
    def folder(self) -> Path:
        """Output folder of the run."""
        return self.trial.folder / self.key.name

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        return f"{self.trial.folder.name}/{self.key.name}"


def sweep(
    plan: SweepPlan,
    output_dir: Path,
    *,
    workers: int = 1,
    storage: str | None = None,
    prune: bool = True,
    retry_failed: bool = False,
    commands: Commands | None = None,
) -> Comparison:
    """Run a sweep to its end, or continue it; write results.md, results.json, results.svg and winner.yaml.

    Args:
        plan: the result of `validate_plan`.
        output_dir: folder for all runs and results.
        workers: number of parallel runs, each with its share of the CPU threads, and its own GPU if there are several.
        storage: URL of a database that several machines share, each with its own folder; None: a file in the folder.
        prune: whether to stop unpromising trials early. A sweep over recipes alone never does.
        retry_failed: whether to retry failed trials, e.g. after freeing disk space.
        commands: programs to run; None: those of this package.

    Raises:
        RunError: optuna or scipy is not installed; the folder holds another study, or another sweep works in it; the
            storage is unavailable for a long time.
        Interrupted: after SIGINT or SIGTERM; all runs have saved a checkpoint.
    """
    require_packages("optuna", "scipy")
    from optuna.exceptions import StorageInternalError

    make_folder(output_dir)
    message = f"another sweep is running in {output_dir}; wait for its end, or choose another --output-dir"
    with exclusive_lock(output_dir / ".lock", message):
        definition = study_definition(plan)
        require_same_study(definition, output_dir)
        prune = prune and bool(plan.space)
        try:
            study = SweepStudy(plan, definition, output_dir, storage, prune=prune, retry_failed=retry_failed)
            process = _Sweep(study, output_dir.absolute(), workers, commands or Commands())
            write_json(definition, output_dir / "study.json")
            process.run()
            return write_results(study, output_dir.absolute(), process.note)
        except StorageInternalError as error:
            raise RunError(f"the storage is unavailable: {storage_error(error)}; repair it and start again") from None


class _Sweep:
    """Keeps all workers busy, follows their runs, and reports to the study."""

    def __init__(self, study: SweepStudy, output_dir: Path, workers: int, commands: Commands) -> None:
        self.study, self.plan, self.output_dir, self.commands = study, study.plan, output_dir, commands
        self.workers, self.run_keys = workers, self.plan.run_keys()
        self.console = Console(highlight=False, soft_wrap=True)
        self.folds: list[Fold] = []
        if self.plan.folds:
            train = self.plan.config(self.plan.points()[0]).data.train
            assert train is not None, "checked by validate_plan"
            annotations, folder = Path(train.annotations), output_dir / "folds"
            self.folds, warnings = write_folds(annotations, self.plan.folds, output_dir=folder)
            for line in warnings:
                self._warn(line)
        self.jobs: list[Job] = []
        self.trials: dict[int, Trial] = {}  # by Optuna's number
        self.wait_until: float | None = None
        trials = len(self.plan.points()) if self.plan.search == "grid" else self.plan.trials
        self.total = trials * len(self.run_keys)
        self.done_before = self._finished_share()
        self.started = time.monotonic()

    def run(self) -> None:
        """Work until nothing is left to do.

        Raises:
            Interrupted: a signal arrived; all processes have been stopped.
        """
        from optuna.exceptions import StorageInternalError, UpdateFinishedTrialError

        columns = BarColumn(bar_width=24), TaskProgressColumn(), TextColumn("{task.fields[eta]}")
        bar = Progress("{task.description}", *columns, console=self.console, disable=not self.console.is_terminal)
        with stop_on_signal() as stop, bar:
            task = bar.add_task("runs", total=self.total, eta="")
            unavailable_since = None
            try:
                while True:
                    # A step may be cut short by the storage: the next one starts with the state that is stored.
                    try:
                        if not self._step():
                            break
                        share, eta = self._progress()
                        text = ", ".join(f"{job.name} {job.share:.0%}" for job in self.jobs)
                        bar.update(task, completed=share * self.total, description=text, eta=eta)
                        unavailable_since = None
                    except UpdateFinishedTrialError:
                        pass  # another machine retries the trial; the next step drops it
                    except StorageInternalError as error:
                        if unavailable_since is None:
                            unavailable_since = time.monotonic()
                            self._warn(f"the storage is unavailable: {storage_error(error)}; trying again")
                        if time.monotonic() - unavailable_since > STORAGE_TIMEOUT:
                            raise
                    time.sleep(POLL_INTERVAL)
                    if stop.signum is not None:
                        raise Interrupted(stop.signum)
            finally:
                stop_processes([job.process for job in self.jobs])

    def _step(self) -> bool:
        """Check every trial and run once; returns whether there is more to do or to wait for."""
        self._synchronize()
        for trial in list(self.trials.values()):
            self._finish(trial)
        for worker in sorted(set(range(self.workers)) - {job.worker for job in self.jobs}):
            trial_and_key = self._next_run()
            if trial_and_key is None:
                break
            self._start(*trial_and_key, worker)
        for job in list(self.jobs):
            if job in self.jobs:  # not pruned together with another
                self._follow(job)
        return bool(self.jobs or self.trials) or self._wait_for_others()

    def _synchronize(self) -> None:
        """Drop trials that another machine has retried, and retry those that a killed process of this folder left."""
        self.study.exchange_heartbeats(list(self.trials))
        running = {frozen.number: frozen for frozen in self.study.trials("RUNNING") if self.study.is_own(frozen)}
        for number in self.trials.keys() - running.keys():
            trial = self.trials.pop(number)
            self._stop_runs(trial)
            self._print(f"{trial.folder.name}: stopped, because another machine retries it after missing heartbeats")
        for number in running.keys() - self.trials.keys():
            self.study.retry(running[number])

    def _wait_for_others(self) -> bool:
        """Whether trials of other machines may turn out to be dead and become this machine's."""
        others = self.study.running_elsewhere()
        if not others:
            return False
        if self.wait_until is None:
            self.wait_until = time.monotonic() + self.study.detection_time
            self._print(f"waiting until it is known whether the machines of {len(others)} trials are alive")
        if time.monotonic() < self.wait_until:
            return True
        without_owner = [frozen for frozen in others if "owner" not in frozen.user_attrs]
        for frozen in without_owner:  # its machine died before it recorded a heartbeat
            self.study.retry(frozen)
        return bool(without_owner)

    # --- trials

    def _next_run(self) -> tuple[Trial, RunKey] | None:
        """The next run of the oldest trial, or the first run of a new trial. Pruning and TPE need complete trials."""
        while True:
            trial = next((trial for trial in self.trials.values() if trial.pending), None) or self._ask()
            if trial is None:
                return None
            if trial.pending and not self._prune_if_unpromising(trial):
                return trial, trial.pending.pop(0)

    def _ask(self) -> Trial | None:
        asked = self.study.ask()
        if asked is None:
            return None
        handle, frozen = asked
        attributes = frozen.user_attrs
        ap = {key.name: attributes[key.name]["AP"] for key in self.run_keys if key.name in attributes}
        trial = Trial(
            handle,
            self.output_dir / "trials" / attributes["folder"],
            self.plan.config(frozen.params).train.epochs,
            pending=[key for key in self.run_keys if key.name not in ap],
            ap=ap,
            reported=dict(frozen.intermediate_values),
        )
        self.trials[handle.number] = trial
        self.wait_until = None
        if "failed_trial" in frozen.system_attrs:
            self._print(f"{trial.folder.name}: retried, because the last attempt was interrupted or failed")
        return trial

    def _prune_if_unpromising(self, trial: Trial) -> bool:
        if trial.why or not trial.handle.should_prune():
            return False
        share = ((max(trial.reported) - 1) % STEPS_PER_RUN + 1) / STEPS_PER_RUN
        best = max(trial.reported.values())
        trial.why = (
            f"pruned: AP {best:.3f} at {share:.0%} of a run, in the lowest {PRUNED_SHARE:.0%} of completed trials"
        )
        trial.pending = []
        self._stop_runs(trial)
        return True

    def _finish(self, trial: Trial) -> None:
        """Report a trial that has nothing left to do to the study."""
        if trial.pending or any(job.trial is trial for job in self.jobs):
            return
        number = trial.handle.number
        if trial.why:
            trial.handle.set_user_attr("why", trial.why)
            self.study.finish(number, "PRUNED" if trial.why.startswith("pruned") else "FAIL")
            self._print(f"{trial.folder.name}: {trial.why}")
        else:
            self.study.finish(number, "COMPLETE", statistics.fmean(trial.ap.values()))
        del self.trials[number]

    # --- runs

    def _start(self, trial: Trial, key: RunKey, worker: int) -> None:
        run = trial.folder / key.name
        overrides = [*self.plan.trial_overrides(trial.handle.params), f"train.seed={key.seed}"]
        if key.fold is not None:
            train = self.plan.config(trial.handle.params).data.train
            assert train is not None, "checked by validate_plan"
            fold = self.folds[key.fold]
            overrides += [
                f"data.train.annotations={fold.train}", f"data.val.images={train.images}",
                f"data.val.annotations={fold.val}",
            ]  # fmt: skip
        recipe = self.plan.recipe(trial.handle.params)
        command = [*self.commands.train, "--config", str(recipe), "--output-dir", str(run), "--resume", "auto"]
        make_folder(run)
        started = None if (run / "metrics.jsonl").exists() else time.monotonic()
        process = start_process([*command, *overrides], run, worker=worker, workers=self.workers)
        self.jobs.append(Job(trial, key, worker, process, started))

    def _follow(self, job: Job) -> None:
        """Report the progress of a run; when its process has ended, start the next one or record the result."""
        exit_code = job.process.poll()
        if not job.detecting:
            self._report_progress(job, finished=exit_code == 0)
            if job not in self.jobs:  # pruned
                return
        if exit_code is None:
            return
        if exit_code != 0:
            log = job.folder / "log.txt"
            why = f"failed: {job.key.name}: {error_from_log(log, exit_code)} (log: {log})"
            job.trial.why = job.trial.why or why
            job.trial.pending = []
        elif not job.detecting:
            job.detecting = True
            command = [*self.commands.detect, str(job.folder)]
            job.process = start_process(command, job.folder, worker=job.worker, workers=self.workers)
            return
        else:
            self._record(job)
        self.jobs.remove(job)

    def _report_progress(self, job: Job, *, finished: bool) -> None:
        progress, epochs = read_progress(job.folder / "metrics.jsonl"), job.trial.epochs
        job.share = min(1.0, progress.epoch / epochs)
        best_ap = {max(1, round(STEPS_PER_RUN * epoch / epochs)): ap for epoch, ap in progress.best_ap.items()}
        if finished and best_ap:  # early stopping may have shortened the run
            best_ap[STEPS_PER_RUN] = max(best_ap.values())
        before = self.run_keys.index(job.key) * STEPS_PER_RUN
        new = {before + step: ap for step, ap in best_ap.items() if before + step not in job.trial.reported}
        for step, ap in new.items():
            job.trial.handle.report(ap, step)
            job.trial.reported[step] = ap
        if new and not finished:
            self._prune_if_unpromising(job.trial)

    def _record(self, job: Job) -> None:
        """Store the metrics of a finished run in the study."""
        metrics = read_metrics(job.folder / "metrics.json")
        seconds = time.monotonic() - job.started if job.started is not None else None
        job.trial.handle.set_user_attr(job.key.name, {**metrics, "seconds": seconds})
        job.trial.ap[job.key.name] = metrics["AP"]
        job.share = 0.0  # the study counts it as finished
        took = f", {duration(seconds)}" if seconds is not None else ""
        self._print(f"{job.name}: AP {metrics['AP']:.3f}{took}")

    def _stop_runs(self, trial: Trial) -> None:
        stop_processes([job.process for job in self.jobs if job.trial is trial])
        self.jobs = [job for job in self.jobs if job.trial is not trial]

    # --- messages

    def _finished_share(self) -> float:
        """Share of all runs that is done: finished, pruned, or the finished part of a running one."""
        done = sum(min(job.share, 0.99) for job in self.jobs)  # after its last epoch, a run is not yet finished
        for frozen in self.study.trials():
            finished = sum(key.name in frozen.user_attrs for key in self.run_keys)
            done += len(self.run_keys) if frozen.state.is_finished() else finished
        return min(1.0, done / max(1, self.total))

    def _progress(self) -> tuple[float, str]:
        """Finished share of the sweep, and the estimated remaining time."""
        share, elapsed = self._finished_share(), time.monotonic() - self.started
        new = share - self.done_before
        return share, f"eta {duration(elapsed * (1 - share) / new)}" if new > 0 else "eta -"

    def _print(self, text: str) -> None:
        share, eta = self._progress()
        self.note(f"[{math.floor(100 * share)}%, {eta}] {text}")  # 100 % only if all is done

    def _warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def note(self, text: str) -> None:
        """Print a line above the progress bar."""
        self.console.print(text, markup=False)
