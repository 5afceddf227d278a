"""Full disks and I/O errors: training continues or ends with one error, and what was safe before stays safe."""

from __future__ import annotations

import errno
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from detector.checkpoint import TrainState, load_checkpoint
from detector.config_yaml import load_config
from detector.errors import RunError
from detector.training import checkpoints as checkpoints_module
from detector.training.checkpoints import save_best, save_last
from detector.training.record_writers import JsonLinesWriter
from detector.training.train import train
from tests.conftest import Run
from tests.reliability.faults import FaultyDisk, faulty_disk, small_disk
from tests.tiny import differing, last_checkpoint, records
from tools.train import main

FULL, IO_ERROR = errno.ENOSPC, errno.EIO


@pytest.fixture(autouse=True)
def _no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints_module, "FIRST_PAUSE", 0.001)


def assert_as_left_alone(out: Path, whole: Run) -> None:
    """The weights, the records and the results of a run without faults; and no temporary file."""
    assert differing(last_checkpoint(out), last_checkpoint(whole.out)) == []
    assert records(out) == records(whole.out)
    assert (out / "metrics.json").read_bytes() == (whole.out / "metrics.json").read_bytes()
    assert [path.name for path in out.rglob(".*")] == []


def writes_of(part: str, whole: Run, folder: Path) -> int:
    """Number of writes of a run without faults to files of this name."""
    with faulty_disk(FaultyDisk(part)) as disk:
        train(load_config(whole.config), folder / "counted")
    return disk.writes


@pytest.mark.parametrize("number", [FULL, IO_ERROR])
@pytest.mark.parametrize("part", ["metrics.jsonl", "tfevents"])
def test_logs_that_cannot_be_written_are_a_warning_and_training_continues(
    part: str, number: int, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    with faulty_disk(FaultyDisk(part, first=1, number=number)) as disk:
        train(load_config(whole.config), out)
    assert disk.failed > 0
    assert differing(last_checkpoint(out), last_checkpoint(whole.out)) == []
    printed = capsys.readouterr()
    assert "training continues" in printed.out
    assert "Traceback" not in printed.err


def test_records_of_a_disk_that_was_full_for_a_while_are_complete(
    whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with faulty_disk(FaultyDisk("metrics.jsonl", first=2, times=3)):
        train(load_config(whole.config), tmp_path / "run")
    assert_as_left_alone(tmp_path / "run", whole)
    assert "metrics.jsonl is written again; no record is missing" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["last.pt", "best.pt", "model.pt", "metrics.json.", "config.yaml"])
def test_a_disk_that_is_full_for_a_moment_delays_a_file_or_stops_before_the_first_step(
    part: str, whole: Run, tmp_path: Path
) -> None:
    fails_once(part, 0, whole, tmp_path)


def fails_once(part: str, first: int, whole: Run, folder: Path, number: int = FULL) -> None:
    """One write fails: the run repeats it, or (before its first step) ends with one error and starts again."""
    out = folder / f"{part}{first}"
    with faulty_disk(FaultyDisk(part, first=first, times=1, number=number)) as disk:
        code = main(["--config", str(whole.config), "--output-dir", str(out)])
    assert disk.failed == 1
    assert code in (0, 2)
    if code:
        assert not (out / "checkpoints" / "last.pt").exists()
        assert main(["--config", str(whole.config), "--output-dir", str(out), "--resume", "auto"]) == 0
    assert_as_left_alone(out, whole)
    shutil.rmtree(out)


@pytest.mark.long
@pytest.mark.parametrize("number", [FULL, IO_ERROR])
@pytest.mark.parametrize("part", ["last.pt", "best.pt", "model.pt", "metrics.json.", "config.yaml"])
def test_a_run_survives_faults_at_ten_writes_of_each_file(part: str, number: int, whole: Run, tmp_path: Path) -> None:
    count = writes_of(part, whole, tmp_path)
    for first in random.Random(part).sample(range(count), min(10, count)):
        fails_once(part, first, whole, tmp_path, number)


@pytest.mark.long
@pytest.mark.parametrize("number", [FULL, IO_ERROR])
@pytest.mark.parametrize("name", ["last.pt", "best.pt", "model.pt"])
def test_a_fault_at_each_write_of_a_checkpoint_leaves_the_one_before(
    name: str, number: int, whole: Run, tmp_path: Path
) -> None:
    newer = last_checkpoint(whole.out)
    older = replace(newer, step=newer.step - 1)

    def save(state: TrainState) -> None:
        save_last(state, tmp_path, keep=1) if name == "last.pt" else save_best(state, tmp_path)

    save(older)
    with faulty_disk(FaultyDisk(f".{name}")) as disk:
        save(older)
    assert disk.writes > 20
    for first in range(disk.writes):
        faults = FaultyDisk(f".{name}", first=first, times=1, number=number)
        with faulty_disk(faults), pytest.raises(RunError, match=f"{name} cannot be written"):
            save(newer)
        assert faults.failed == 1
        assert load_checkpoint(tmp_path / "checkpoints" / name).step == older.step
        assert [path.name for path in tmp_path.rglob(".*")] == []
        if name == "model.pt":
            save(older)  # best.pt, which is written before, is newer
    save(newer)
    assert load_checkpoint(tmp_path / "checkpoints" / name).step == newer.step


@pytest.mark.parametrize(
    "number",
    [
        FULL,
        errno.EMFILE,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (errno.EDQUOT, errno.EROFS, errno.EACCES)),
    ],
)
def test_a_checkpoint_that_cannot_be_written_at_all_ends_the_run_with_what_is_safe(
    number: int, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    argv = ["--config", str(whole.config), "--output-dir", str(out), "train.save_timeout=0.01"]
    with faulty_disk(FaultyDisk(".last.pt", first=None)) as disk:
        assert main(argv) == 0
    second = disk.writes // 4 + 1  # within the second of the four saves
    shutil.rmtree(out)
    with faulty_disk(FaultyDisk(".last.pt", first=second, number=number)):
        assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("error: ") == 1
    assert "last.pt cannot be written" in error
    assert "the checkpoint of step 2 is safe" in error
    assert f"the last checkpoint is {out}/checkpoints/last.pt; continue with --resume auto" in error
    assert load_checkpoint(out / "checkpoints" / "last.pt").step == 2
    assert main(["--config", str(whole.config), "--output-dir", str(out), "--resume", "auto"]) == 0
    assert_as_left_alone(out, whole)


def test_on_a_disk_with_room_for_a_few_checkpoints_the_run_is_refused_or_complete(whole: Run, tmp_path: Path) -> None:
    """A real file system of a few megabytes."""
    size = sum(path.stat().st_size for path in whole.out.rglob("*"))
    with small_disk(tmp_path / "small", f"{size // 2}") as disk:
        assert main(["--config", str(whole.config), "--output-dir", str(disk / "run")]) == 2
        assert not (disk / "run" / "config.yaml").exists()
    with small_disk(tmp_path / "enough", f"{2 * size}") as disk:
        assert main(["--config", str(whole.config), "--output-dir", str(disk / "run")]) == 0
        assert_as_left_alone(disk / "run", whole)


def test_a_disk_that_others_fill_keeps_the_last_checkpoint(
    whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a real small file system that a file of somebody else fills after the first checkpoint."""
    size = sum(path.stat().st_size for path in whole.out.rglob("*"))
    with small_disk(tmp_path / "small", f"{2 * size}") as disk:
        out = disk / "run"
        argv = ["--config", str(whole.config), "--output-dir", str(out), "train.save_timeout=0.01"]
        save_last = checkpoints_module.save_last

        def save_and_fill(*arguments: Any, **options: Any) -> None:
            save_last(*arguments, **options)
            if not (disk / "other").exists():
                free = shutil.disk_usage(disk).free
                (disk / "other").write_bytes(bytes(free - free // 50))

        with monkeypatch.context() as patch:
            patch.setattr("detector.training.run.save_last", save_and_fill)
            assert main(argv) == 2
        assert "No space left on device" in capsys.readouterr().err
        assert load_checkpoint(out / "checkpoints" / "last.pt").step == 2
        (disk / "other").unlink()
        assert main([*argv, "--resume", "auto"]) == 0
        assert_as_left_alone(out, whole)


def test_a_removed_run_folder_is_written_again(whole: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "run"
    save_last = checkpoints_module.save_last

    def save_and_remove(state: Any, *arguments: Any, **options: Any) -> None:
        save_last(state, *arguments, **options)
        if state.step == 3:
            shutil.rmtree(out)

    monkeypatch.setattr("detector.training.run.save_last", save_and_remove)
    train(load_config(whole.config), out)
    assert differing(last_checkpoint(out), last_checkpoint(whole.out)) == []
    assert records(out)[-1] == records(whole.out)[-1]


DAMAGED_LINES = [
    b"\xff\xfe\x80{", b"[1]", b'{"step": "x"}', b'{"step": 1e999}', b'{"step": null}', b'{"loss": 1}', b'{"step": 1',
    b"[" * 100_000,
]  # fmt: skip


@pytest.mark.parametrize("line", DAMAGED_LINES)
def test_damaged_records_are_left_out_when_a_run_resumes(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    warnings: list[str] = []
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n' + line + b"\n" + line + b'\n{"step": 2, "loss": 1.0}\n{"step": 3}\n')
    writer = JsonLinesWriter(path, start_step=2, evaluation_due=False, warn=warnings.append)
    writer.step({"step": 3, "loss": float("nan")})
    writer.close()
    assert [json.loads(x) for x in path.read_text().splitlines()] == [
        {"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": None},
    ]  # fmt: skip
    assert warnings == [f"2 damaged lines of {path} are left out"]


@pytest.mark.parametrize(
    "content",
    [b"", b'{"AP": 0.1', b"\xff", b'{"format": "x"}', b"[" * 100_000, b"[1]", b'{"AP": NaN}', b'{"AP": 0.1}',
     b'{"AP": 1e999, "AP50": 0.1, "per_class": []}'],
)  # fmt: skip
def test_a_damaged_metrics_json_of_a_finished_run_is_one_error(
    content: bytes, whole: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(whole.out, out)
    (out / "metrics.json").write_bytes(content)
    assert main(["--config", str(whole.config), "--output-dir", str(out), "--resume", "auto"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "metrics.json" in error
    assert "tools/eval.py" in error
    with pytest.raises(RunError):
        train(load_config(whole.config), out, resume="auto")
