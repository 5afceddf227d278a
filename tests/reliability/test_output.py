"""A lost terminal, a closed pipe and hostile text change nothing but what is printed."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from detector.cli import command, surviving_output
from detector.errors import UserError
from detector.training.signals import stop_on_signal
from tests.conftest import Run
from tests.tiny import REPO, differing, last_checkpoint, records, start_process, start_tool, wait, wait_for
from tools import train as train_tool


def run_python(
    code: str, stdout: int = subprocess.PIPE, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60, env=env
    )


PRINTS = """
from detector.cli import command
import sys
@command
def main(argv=None):
    for line in range(3):
        print("x" * 100_000)
    print("done", file=sys.stderr)
    return 0
sys.exit(main())
"""


def test_output_to_a_terminal_or_file_is_unchanged() -> None:
    done = run_python(PRINTS)
    assert (done.returncode, done.stderr) == (0, "done\n")
    assert done.stdout == 3 * ("x" * 100_000 + "\n")


def test_a_command_survives_the_end_of_its_reader() -> None:
    read, write = os.pipe()
    os.close(read)
    done = run_python(PRINTS, stdout=write)
    os.close(write)
    assert done.returncode == 0
    assert done.stderr == "warning: standard output is lost (Broken pipe); continuing without it\ndone\n"


def test_a_command_survives_a_full_disk_under_its_log() -> None:
    with open("/dev/full", "w") as full:
        done = run_python(PRINTS, stdout=full.fileno())
    assert done.returncode == 0
    assert "standard output is lost (No space left on device)" in done.stderr


def test_a_command_without_standard_streams_runs() -> None:
    done = subprocess.run(f"{sys.executable} -c '{PRINTS}' >&- 2>&-", shell=True, cwd=REPO, timeout=60)
    assert done.returncode == 0


def test_a_terminal_without_utf8_gets_escapes() -> None:
    code = "from detector.cli import surviving_output\nwith surviving_output(): print('\\u2026 \\ud800')"
    done = run_python(code, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "\\u2026 \\ud800\n")


def test_the_streams_are_restored(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    with surviving_output():
        print("inside")
    assert (sys.stdout, sys.stderr) == before
    assert capsys.readouterr().out == "inside\n"


@pytest.mark.parametrize("error", [UserError, ValueError], ids=["error", "note"])
def test_errors_escape_what_a_terminal_would_obey(error: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "a\x1b[2J\u202eb\ud800\nc\td"

    @command
    def main(_: list[str] | None) -> int:
        failure = UserError(hostile if error is UserError else "short")
        failure.add_note("" if error is UserError else hostile)
        raise failure

    assert main() == 2
    printed = capsys.readouterr().err
    assert "a\\x1b[2J\\u202eb\\ud800\nc\td" in printed
    assert "\x1b" not in printed


def test_an_error_of_ten_megabytes_is_shortened(capsys: pytest.CaptureFixture[str]) -> None:
    @command
    def main(_: list[str] | None) -> int:
        raise UserError("x" * 10_000_000)

    assert main() == 2
    assert len(capsys.readouterr().err) < 4200


def test_an_error_of_the_operating_system_is_one_line_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    @command
    def main(_: list[str] | None) -> int:
        raise OSError(28, "No space left on device", str(tmp_path / "a"))

    assert main() == 2
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/a: No space left on device; free disk space, or write to another disk\n"
    )


def train_into(pipe: Path, argv: list[str]) -> None:
    """Train with standard output going into a pipe."""
    os.dup2(os.open(pipe, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.exit(train_tool.main(argv))


def test_a_training_whose_terminal_closes_continues_to_its_end(whole: Run, tmp_path: Path) -> None:
    """As `train.py | head -1`."""
    pipe, log = tmp_path / "pipe", tmp_path / "log"
    os.mkfifo(pipe)
    argv = ["--config", str(whole.config), "--output-dir", str(tmp_path / "run")]
    process = start_process(train_into, (pipe, argv), log)
    reader = os.open(pipe, os.O_RDONLY)
    os.read(reader, 10)
    os.close(reader)
    assert wait([process], log) == [0], log.read_text()
    assert "standard output is lost" in log.read_text()
    assert differing(last_checkpoint(tmp_path / "run"), last_checkpoint(whole.out)) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_each_signal_saves_and_prints_how_to_resume(signum: signal.Signals, whole: Run, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    argv = ["--config", str(whole.config), "--output-dir", str(out), "train.epochs=500"]
    process = start_tool("train", argv, log)
    wait_for(lambda: (out / "metrics.jsonl").exists() and bool(records(out)), process, log)
    assert process.pid is not None
    os.kill(process.pid, signum)
    assert wait([process], log) == [128 + signum], log.read_text()
    assert f"stopped by {signum.name}; checkpoint saved; continue with --resume auto" in log.read_text()
    assert last_checkpoint(out).step >= 1


def test_an_ignored_hangup_stays_ignored() -> None:
    """As under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signal() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signum is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_output_survives_without_a_descriptor() -> None:
    """As in a notebook, whose streams are no files."""
    stream = io.StringIO()
    before, sys.stdout = sys.stdout, stream
    try:
        with surviving_output():
            print("x")
    finally:
        sys.stdout = before
    assert stream.getvalue() == "x\n"
