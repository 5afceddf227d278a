"""One owner at a time for a run folder."""

from __future__ import annotations

import errno
import fcntl
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from detector.config_yaml import load_config
from detector.errors import RunError
from detector.training.ownership import LOCK_NAME, own_folder
from detector.training.resume import place_run
from detector.training.train import train
from tests.conftest import EVERYTHING_ON, Run
from tests.tiny import (
    TinyData,
    differing,
    last_checkpoint,
    records,
    start_process,
    start_tool,
    wait,
    wait_for,
    write_config,
)


def hold(folder: str) -> None:
    """Own a folder until this process is killed."""
    with own_folder(Path(folder)):
        print("owned", flush=True)
        time.sleep(300)


def test_a_folder_is_created_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    with own_folder(tmp_path / "a" / "run") as warning:
        assert warning is None
        assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == [LOCK_NAME]
    assert not (tmp_path / "a" / "run").exists(), "nothing was written, so nothing looks like a run"
    (tmp_path / "run").mkdir()
    with own_folder(tmp_path / "run"):
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_a_second_owner_is_refused_and_the_first_one_named(tmp_path: Path) -> None:
    process = start_process(hold, (str(tmp_path / "run"),), tmp_path / "log")
    log = tmp_path / "log"
    wait_for(lambda: log.exists() and "owned" in log.read_text(), process, log)
    expected = rf"another run is active in .*: process {process.pid} on .*, since 20"
    with pytest.raises(RunError, match=expected), own_folder(tmp_path / "run"):
        pass
    process.kill()
    process.join()
    with own_folder(tmp_path / "run"):
        pass


def test_two_runs_of_one_process_are_refused_too(tmp_path: Path) -> None:
    refused = pytest.raises(RunError, match="another run of this process is active")
    with own_folder(tmp_path), refused, own_folder(tmp_path / "x" / ".."):
        pass
    with own_folder(tmp_path):
        pass


def test_a_file_system_without_locks_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    with own_folder(tmp_path) as warning:
        assert warning is not None
        assert "has no locks (No locks available): start only one run in it" in warning


def test_a_folder_that_cannot_be_written_is_an_error_before_anything_is_read(data: TinyData, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="--output-dir must be a folder to write in"):
        train(load_config(write_config(tmp_path / "c.yaml", data)), tmp_path / "file" / "run")


def test_of_two_trainings_in_one_folder_the_second_ends_and_the_first_is_unharmed(
    whole: Run, data: TinyData, tmp_path: Path
) -> None:
    compete(whole, data, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("_", range(20))
def test_two_trainings_in_one_folder_twenty_times(_: int, whole: Run, data: TinyData, tmp_path: Path) -> None:
    compete(whole, data, tmp_path)


def compete(whole: Run, data: TinyData, folder: Path) -> None:
    """Start two trainings of one folder, with different seeds, at about the same time."""
    out = folder / "run"
    other = write_config(folder / "other.yaml", data, **EVERYTHING_ON, train__seed=2)
    logs = folder / "log1", folder / "log2"
    first = start_tool("train", ["--config", str(whole.config), "--output-dir", str(out)], logs[0])
    wait_for(lambda: (out / LOCK_NAME).exists() and (out / LOCK_NAME).stat().st_size > 0, first, logs[0])
    second = start_tool("train", ["--config", str(other), "--output-dir", str(out), "--resume", "auto"], logs[1])
    assert wait([second], logs[1]) == [2], logs[1].read_text()
    assert f"another run is active in {out}: process {first.pid}" in logs[1].read_text()
    assert wait([first], logs[0]) == [0], logs[0].read_text()
    assert differing(last_checkpoint(out), last_checkpoint(whole.out)) == []
    assert records(out) == records(whole.out)


def test_a_killed_owner_leaves_no_lock_behind(whole: Run, tmp_path: Path) -> None:
    """Its loader workers live a few seconds longer; they must not hold the folder."""
    out, log = tmp_path / "run", tmp_path / "log"
    argv = ["--config", str(whole.config), "--output-dir", str(out), "data.num_workers=2"]
    process = start_tool("train", argv, log)
    wait_for(lambda: (out / "metrics.jsonl").exists() and bool(records(out)), process, log)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with own_folder(out):
        pass


def holds(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("")
    return folder


def test_only_the_default_folder_of_a_fresh_run_is_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    free = tmp_path / "free"
    assert place_run(free, is_default=True, resume=None) == (free, None)
    taken = holds(tmp_path / "taken")
    assert place_run(taken, is_default=True, resume=None) == (tmp_path / "taken-2", None)
    holds(tmp_path / "taken-2")
    assert place_run(taken, is_default=True, resume=None) == (tmp_path / "taken-3", None)
    assert place_run(taken, is_default=True, resume="auto") == (taken, "auto")
    assert place_run(taken, is_default=False, resume=None) == (taken, None), "it is refused when the run is opened"


def test_a_restart_by_torchrun_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = holds(tmp_path / "taken")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(RunError, match="--output-dir must be given with torchrun --max-restarts"):
        place_run(taken, is_default=True, resume=None)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert place_run(taken, is_default=False, resume=None) == (taken, "auto")
    assert place_run(taken, is_default=False, resume="old/last.pt") == (taken, "old/last.pt"), "nothing was saved yet"
    (taken / "checkpoints").mkdir()
    (taken / "checkpoints" / "last.pt").write_text("")
    assert place_run(taken, is_default=False, resume="old/last.pt") == (taken, "auto")
