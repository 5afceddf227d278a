"""Run fuzz cases in forked processes with limits of time and memory, and report what each did."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
import traceback
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import coverage

from detector.errors import UserError

BATCH = 40
"""Cases that one process runs."""
MEMORY = 2 * 2**30
"""Bytes of memory that a process may take in addition to what the server has."""
PROCESSOR_SECONDS = 10
"""Of a case. Waiting is limited too, but more generously: other programs may keep the processor busy."""
WAITING_SECONDS = 120
MAX_MESSAGE = 4096
"""Bytes of a user error."""


class Kind(Protocol):
    """A module of this folder; see README.md."""

    MODULES: tuple[str, ...]
    REGRESSIONS: tuple[str, ...]

    def prepare(self, folder: Path) -> None: ...
    def make(self, rng: random.Random, folder: Path) -> Path: ...
    def use(self, path: Path) -> str: ...


class Case(NamedTuple):
    """Names a case; its content depends on nothing else."""

    seed: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Case:
        """Read SEED:NUMBER."""
        seed, _, number = text.partition(":")
        return cls(int(seed), int(number))

    def __str__(self) -> str:
        return f"{self.seed}:{self.number}"


class Result(NamedTuple):
    """What a case did."""

    case: Case
    outcome: str
    """"refused" for a user error, "failed", or the word that `use` returned."""
    detail: str
    """The user error, or why the case failed."""
    seconds: float


def load_kind(name: str) -> Kind:
    """Import a kind's module."""
    module: Any = importlib.import_module(f"tests.fuzz.{name}")
    return module  # type: ignore[no-any-return]


def run_cases(kind: Kind, cases: Sequence[Case], folder: Path, *, measure: bool = False) -> Iterator[Result]:
    """Run cases one after the other.

    Args:
        kind: the module of a kind of file.
        cases: to run.
        folder: an empty folder for the files of all cases; a case's files are removed after it.
        measure: whether to measure which branches the cases take; `coverage_of` reads the result.
    """
    kind.prepare(_new_folder(folder / "shared"))
    left = list(cases)
    while left:
        done = 0
        for result in _run_batch(kind, left[:BATCH], folder, measure=measure):
            done += 1
            yield result
        left = left[done:]


def coverage_of(kind: Kind, folder: Path) -> coverage.Coverage:
    """Which lines and branches of a kind's modules were taken by the cases that ran in a folder."""
    measured = _coverage(kind, folder)
    measured.combine([str(folder)])
    return measured


def _coverage(kind: Kind, folder: Path) -> coverage.Coverage:
    files = [str(importlib.import_module(name).__file__) for name in kind.MODULES]
    return coverage.Coverage(
        data_file=str(folder / ".coverage"), data_suffix=True, branch=True, include=files, config_file=False
    )


def _run_batch(kind: Kind, cases: Sequence[Case], folder: Path, *, measure: bool) -> Iterator[Result]:
    """Run cases in one process until one of them ends it."""
    sys.stdout.flush()
    sys.stderr.flush()
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.close(reader)
        _end_child(kind, cases, folder, _coverage(kind, folder) if measure else None, writer)
    os.close(writer)
    received = 0
    with os.fdopen(reader, "rb") as lines:
        for line in lines:
            record = json.loads(line)
            yield Result(cases[received], record["outcome"], record["detail"], record["seconds"])
            received += 1
    _, status = os.waitpid(child, 0)
    if received < len(cases):
        yield Result(cases[received], "failed", _why_ended(status), 0.0)
    shutil.rmtree(folder / "case", ignore_errors=True)


def _end_child(
    kind: Kind, cases: Sequence[Case], folder: Path, measured: coverage.Coverage | None, writer: int
) -> None:
    """Run cases in the forked process, which then ends without any clean-up of the server's."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for case in cases:
            # The default action of both signals ends the process, in whatever code it is.
            signal.setitimer(signal.ITIMER_PROF, PROCESSOR_SECONDS)
            signal.setitimer(signal.ITIMER_REAL, WAITING_SECONDS)
            _send(writer, _run_case(kind, case, folder, measured)._asdict())
        if measured is not None:
            measured.save()
    finally:
        os._exit(0)


def _send(writer: int, record: dict[str, Any]) -> None:
    data = json.dumps(record).encode() + b"\n"
    while data:
        data = data[os.write(writer, data) :]


def _run_case(kind: Kind, case: Case, folder: Path, measured: coverage.Coverage | None) -> Result:
    place = _new_folder(folder / "case")
    started = time.process_time()
    outcome, detail = "failed", ""
    try:
        path = kind.make(random.Random(str(case)), place)
        started = time.process_time()
        with measured.collect() if measured is not None else contextlib.nullcontext():
            outcome = kind.use(path)
    except UserError as error:
        detail = str(error)
        problem = _problem_of(error)
        outcome = "failed" if problem else "refused"
        detail = f"{problem}\n{detail[:1000]}" if problem else detail
    except BaseException:  # noqa: BLE001 - whatever it is, it is the result
        detail = traceback.format_exc()[-2500:]
    seconds = time.process_time() - started
    return Result(case, outcome, detail, seconds)


def _problem_of(error: UserError) -> str:
    """What is wrong with a user error; empty if nothing is."""
    text = str(error)
    if len(text.encode(errors="backslashreplace")) > MAX_MESSAGE:
        return f"the message has {len(text):,} characters"
    if not is_harmless(text):
        return "the message has characters that are not printable"
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "it took more memory than it may"
        cause = cause.__cause__ or cause.__context__
    return ""


def is_harmless(text: str) -> bool:
    """Whether text of several lines controls no terminal and hides nothing."""
    harmful = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
    return all(c in "\n\t\u200c\u200d" or unicodedata.category(c) not in harmful for c in text)


def _why_ended(status: int) -> str:
    if not os.WIFSIGNALED(status):
        return f"the process ended with exit code {os.waitstatus_to_exitcode(status)}"
    name = signal.Signals(os.WTERMSIG(status)).name
    if name == "SIGPROF":
        return f"it took more than {PROCESSOR_SECONDS} s of a processor"
    return f"it waited for more than {WAITING_SECONDS} s" if name == "SIGALRM" else f"the process was ended by {name}"


def _new_folder(path: Path) -> Path:
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    return path
