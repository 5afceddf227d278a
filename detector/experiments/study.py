"""The Optuna study of a sweep: its storage, its queue of trials, heartbeats, retries and pruning."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import time
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detector.atomic import read_json, write_json
from detector.errors import RunError
from detector.experiments.search_space import Range, SweepPlan
from detector.text import printable, shown

if TYPE_CHECKING:
    import optuna
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

HEARTBEAT_INTERVAL = 60
"""Seconds between two heartbeats of a running trial in a shared storage."""
GRACE_PERIOD = 600
"""Seconds without a heartbeat after which other machines retry a trial."""
STEPS_PER_RUN = 1000
"""Optuna steps per run, whatever its number of epochs. Those of the second run of a trial start at 1000."""
PRUNED_SHARE = 0.25
"""A trial is pruned if its best AP is below this quantile of the completed trials' AP at the same step."""
MIN_COMPLETED = 4
"""Completed trials that pruning needs."""
WARMUP = 0.3
"""Share of its first run in which a trial is never pruned."""


class SweepStudy:
    """The trials of a sweep in an Optuna storage. Each machine that shares the storage runs its own trials.

    A trial whose process died is retried: Optuna's trial fails, and a new one with the same parameters, finished runs
    and learning curve is enqueued. Only the latest attempt counts as a trial here.

    Args:
        plan: what to try.
        definition: the result of `study_definition`, which gives the study its name.
        output_dir: folder of this machine; holds the SQLite file if there is no shared storage.
        storage_url: database that several machines share. Without one, Optuna writes an SQLite file: transactions
            survive a killed process, whereas a journal file cut off within a line becomes unreadable.
        prune: whether trials may be pruned.
        retry_failed: whether to retry failed trials, too.

    Raises:
        RunError: the storage cannot be opened.
    """

    def __init__(
        self,
        plan: SweepPlan,
        definition: dict[str, Any],
        output_dir: Path,
        storage_url: str | None = None,
        *,
        prune: bool = True,
        retry_failed: bool = False,
    ) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.plan, self.shared, self.machine = plan, storage_url is not None, _machine_id(output_dir)
        digest = hashlib.sha256(json.dumps(definition, sort_keys=True).encode()).hexdigest()[:12]
        self.optuna_study, self._storage = _open_study(
            f"sweep-{digest}", storage_url or f"sqlite:///{output_dir.absolute() / 'study.db'}",
            heartbeat={
                "heartbeat_interval": HEARTBEAT_INTERVAL, "grace_period": GRACE_PERIOD,
                "heartbeat_stale_trial_callback": _enqueue_again,
            } if self.shared else {},
            pruner=optuna.pruners.PercentilePruner(
                100 * (1 - PRUNED_SHARE), n_startup_trials=MIN_COMPLETED, n_warmup_steps=round(WARMUP * STEPS_PER_RUN),
                n_min_trials=MIN_COMPLETED,
            ) if prune else optuna.pruners.NopPruner(),
        )  # fmt: skip
        self._next_heartbeat = time.monotonic() + HEARTBEAT_INTERVAL
        unchanged = plan.unchanged_point()  # a search starts with it, for comparison
        points = plan.points() if plan.search == "grid" else [unchanged] if unchanged is not None else []
        for point in points:
            self.optuna_study.enqueue_trial(point, skip_if_exists=True)
        for trial in self.trials("FAIL") if retry_failed else []:
            _enqueue_again(self.optuna_study, trial)

    def trials(self, *states: str) -> list[FrozenTrial]:
        """The latest attempt of every trial, if it is in one of the states (default: any)."""
        latest = {}
        for trial in self._attempts():
            latest[_first_attempt(trial)] = trial
        return [trial for trial in latest.values() if not states or trial.state.name in states]

    def _attempts(self) -> list[FrozenTrial]:
        return [t for t in self.optuna_study.get_trials(deepcopy=False) if "surplus" not in t.user_attrs]

    def is_own(self, trial: FrozenTrial) -> bool:
        """Whether a trial belongs to this machine. In a shared storage, a new one has no owner for a moment."""
        return bool(trial.user_attrs.get("owner", None if self.shared else self.machine) == self.machine)

    def running_elsewhere(self) -> list[FrozenTrial]:
        """The running trials of other machines."""
        return [trial for trial in self.trials("RUNNING") if not self.is_own(trial)]

    @property
    def detection_time(self) -> float:
        """Seconds after which trials of a dead machine have been retried."""
        return GRACE_PERIOD + 2 * HEARTBEAT_INTERVAL

    def ask(self) -> tuple[optuna.Trial, FrozenTrial] | None:
        """Take a trial from the queue, or create one of a search; None if there is none left.

        Returns:
            The trial, and its content in the storage.
        """
        search = self.plan.search != "grid"
        while self.trials("WAITING") or (search and len(self.trials()) < self.plan.trials):
            with _experimental_api():
                trial = self.optuna_study.ask()
            if not self._is_surplus(trial.number):
                self._set_up(trial)
                return trial, self.optuna_study.get_trials(deepcopy=False)[trial.number]
            trial.set_user_attr("surplus", True)
            self.finish(trial.number, "FAIL")
        return None

    def _is_surplus(self, number: int) -> bool:
        """Whether a trial is one too many, because several machines filled the queue or asked at the same moment."""
        attempts = {trial.number: trial for trial in self._attempts()}
        new = attempts[number]
        if _first_attempt(new) != number:
            return False
        earlier = [trial for trial in attempts.values() if trial.number < number]
        point = new.system_attrs.get("fixed_params")
        if point is None:
            return len({_first_attempt(trial) for trial in earlier}) >= self.plan.trials
        return any(trial.system_attrs.get("fixed_params") == point for trial in earlier)

    def _set_up(self, trial: optuna.Trial) -> None:
        """Set owner, parameters and folder of a trial."""
        from optuna.samplers import RandomSampler, TPESampler

        trial.set_user_attr("owner", self.machine)
        self.record_heartbeat(trial.number)
        # a seed of its own for every trial, so that machines and resumed sweeps do not repeat the same points
        sampler = TPESampler if self.plan.search == "tpe" else RandomSampler
        self.optuna_study.sampler = sampler(seed=trial.number)
        for key, values in self.plan.dimensions.items():
            if not isinstance(values, Range):
                trial.suggest_categorical(key, values)
            elif values.whole:
                trial.suggest_int(key, int(values.low), int(values.high), log=values.log)
            else:
                trial.suggest_float(key, values.low, values.high, log=values.log)
        if "folder" not in trial.user_attrs:
            folder = self.plan.trial_name(trial.params)
            if folder in {other.user_attrs.get("folder") for other in self.trials()}:
                folder += f"_{trial.number}"
            trial.set_user_attr("folder", folder)

    def finish(self, number: int, state: Literal["COMPLETE", "PRUNED", "FAIL"], ap: float | None = None) -> None:
        """Store the final state of a trial, unless it has one."""
        from optuna.trial import TrialState

        self.optuna_study.tell(number, ap, TrialState[state], skip_if_finished=True)

    def retry(self, trial: FrozenTrial) -> None:
        """Fail a trial that no process works on any more, and enqueue it again."""
        self.finish(trial.number, "FAIL")
        _enqueue_again(self.optuna_study, trial)

    def record_heartbeat(self, number: int) -> None:
        """Show other machines that a trial is alive."""
        if self.shared:
            study_id = self._storage.get_study_id_from_name(self.optuna_study.study_name)
            self._storage.record_heartbeat(self._storage.get_trial_id_from_study_id_trial_number(study_id, number))

    def exchange_heartbeats(self, numbers: list[int]) -> None:
        """When it is time: record a heartbeat of this machine's trials, and retry those of dead machines."""
        import optuna

        late = time.monotonic() - self._next_heartbeat
        if not self.shared or late < 0:
            return
        for number in numbers:
            self.record_heartbeat(number)
        if late < GRACE_PERIOD / 2:  # after a longer failure of the storage, other machines record first
            with _experimental_api():
                optuna.storages.fail_stale_trials(self.optuna_study)
        self._next_heartbeat = time.monotonic() + HEARTBEAT_INTERVAL


def require_same_study(definition: dict[str, Any], output_dir: Path) -> None:
    """Reject a folder that holds another study.

    Raises:
        RunError: lists the differences.
    """
    path = output_dir / "study.json"
    stored = read_json(path) if path.exists() else definition
    if stored == definition:
        return
    if not isinstance(stored, dict):
        raise RunError(f"{path} must hold the definition of a study, got {shown(stored)}; it may be damaged")
    keys = [key for key in {**stored, **definition} if stored.get(key) != definition.get(key)]
    lines = [
        f"  {printable(key, 100)}: {shown(stored.get(key), 100)} there, {shown(definition.get(key), 100)} now"
        for key in keys
    ]
    if len(lines) > 12:
        lines[12:] = ["  ..."]
    advice = "Choose another --output-dir, or continue with the command that started this study."
    raise RunError("\n".join([f"{output_dir} must hold the same study, got another one:", *lines, advice]))


def _open_study(
    name: str, url: str, *, heartbeat: dict[str, Any], pruner: optuna.pruners.BasePruner
) -> tuple[optuna.Study, RDBStorage]:
    import optuna
    from sqlalchemy.exc import DBAPIError

    engine = {"pool_pre_ping": True, "connect_args": {"timeout": 60} if url.startswith("sqlite") else {}}
    for attempt in range(3):
        try:
            with _experimental_api():
                storage = optuna.storages.RDBStorage(url, engine_kwargs=engine, **heartbeat)
            study = optuna.create_study(
                storage=storage, pruner=pruner, study_name=name, direction="maximize", load_if_exists=True
            )
            return study, storage
        except Exception as error:  # noqa: BLE001 (errors of SQLAlchemy and of every database driver)
            if attempt == 2 or not isinstance(error, DBAPIError | optuna.exceptions.StorageInternalError):
                raise RunError(f"--storage cannot be opened: {storage_error(error)}") from None
            time.sleep(1)  # another machine may be creating the same tables
    raise AssertionError("unreachable")


def _enqueue_again(study: optuna.Study, trial: FrozenTrial) -> None:
    """Enqueue a failed trial with its parameters, finished runs and learning curve, for any machine."""
    from optuna.storages import RetryHeartbeatStaleTrialCallback

    trial = copy.copy(trial)
    trial.user_attrs = {name: value for name, value in trial.user_attrs.items() if name != "owner"}
    with _experimental_api():
        RetryHeartbeatStaleTrialCallback(inherit_intermediate_values=True)(study, trial)


def _first_attempt(trial: FrozenTrial) -> int:
    """The Optuna number of a trial's first attempt."""
    number: int = trial.system_attrs.get("failed_trial", trial.number)  # set by RetryHeartbeatStaleTrialCallback
    return number


def storage_error(error: BaseException) -> str:
    """The first line of the database driver's message, which Optuna replaces by advice of its own."""
    return printable((str(error.__cause__ or error).splitlines() or [type(error).__name__])[0])


def _machine_id(output_dir: Path) -> str:
    """The identity of an output folder among the machines that share a study, kept when the folder is moved."""
    path = output_dir / ".owner"
    if not path.exists():
        write_json(uuid.uuid4().hex, path)
    name = read_json(path)
    if not isinstance(name, str):
        raise RunError(f"{path} must hold the identity of the folder, got {shown(name)}; delete the file")
    return name


@contextlib.contextmanager
def _experimental_api() -> Iterator[None]:
    """Silence Optuna's warnings that heartbeats are experimental and intended for `Study.optimize`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
