"""A sample of the fuzz cases; `pytest -m long` runs all. See README.md."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from detector.errors import UserError
from detector.models.resnet import ARCHITECTURES
from tests.fuzz import server
from tests.fuzz.__main__ import KINDS, branches_taken
from tests.fuzz.server import Case, Result, coverage_of, load_kind, run_cases
from tests.tiny import WHOLE, start_process, wait

SAMPLE = 60
COUNTS = {"coco_json": 5000, "yaml_config": 5000, "images": 2000, "weights": 1000, "checkpoint": 1000}
"""Cases of each kind under `pytest -m long`."""


def run_and_write(names: list[str], seed: int, count: int, folder: Path) -> None:
    """Run the regressions and the cases of some kinds, and write their results to `NAME.json`; in its own process."""
    for name in names:
        ARCHITECTURES["resnet18"] = WHOLE
        kind = load_kind(name)
        cases = [*map(Case.parse, kind.REGRESSIONS), *(Case(seed, number) for number in range(count))]
        results = list(run_cases(kind, cases, folder / name))
        (folder / f"{name}.json").write_text(json.dumps([[str(r.case), r.outcome, r.detail] for r in results]))


def outcomes(name: str, folder: Path) -> Counter[str]:
    results = json.loads((folder / f"{name}.json").read_text())
    failures = [f"{name} {case}: {detail}" for case, outcome, detail in results if outcome == "failed"]
    assert not failures, "\n\n".join(failures)
    return Counter(outcome for _, outcome, _ in results)


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    process = start_process(run_and_write, (list(KINDS), 0, SAMPLE, folder), folder / "log")
    assert wait([process], folder / "log", seconds=600) == [0], (folder / "log").read_text()
    return folder


@pytest.mark.parametrize("name", KINDS)
def test_damaged_and_hostile_files_are_read_or_are_one_user_error(name: str, sample: Path) -> None:
    counts = outcomes(name, sample)
    assert counts["refused"] > 0
    assert counts.total() - counts["refused"] > 0, "a generator whose files are all refused tests little"


@pytest.mark.long
@pytest.mark.parametrize("name", KINDS)
def test_thousands_of_files_are_read_or_are_one_user_error(name: str, tmp_path: Path) -> None:
    process = start_process(run_and_write, ([name], 1, COUNTS[name], tmp_path), tmp_path / "log")
    assert wait([process], tmp_path / "log", seconds=3600) == [0], (tmp_path / "log").read_text()
    outcomes(name, tmp_path)


class Misbehaving:
    """A kind whose cases do everything that a case must not do."""

    MODULES: tuple[str, ...] = ("tests.fuzz.mutations",)
    REGRESSIONS: tuple[str, ...] = ()
    WAYS = ("read", "refuse", "raise", "exit", "loop", "fill", "fill and refuse", "long", "escape", "die", "read")

    def prepare(self, folder: Path) -> None:
        (folder / "shared.txt").write_text("x")

    def make(self, rng: random.Random, folder: Path) -> Path:
        (folder / "file").write_text(str(rng.random()))
        return folder / "file"

    def use(self, path: Path) -> str:
        assert (path.parent.parent / "shared" / "shared.txt").exists()
        way = self.WAYS[self.number(path)]
        if way == "raise":
            raise ValueError("a bug")
        if way == "exit":
            raise SystemExit(3)
        if way in ("refuse", "long", "escape"):
            raise UserError({"refuse": "wrong", "long": "x" * 5000, "escape": "\x1b[2J"}[way])
        if way == "loop":
            while True:
                time.monotonic()
        if way.startswith("fill"):
            try:
                bytearray(6 * 2**30)
            except MemoryError:
                if way == "fill":
                    raise
                raise UserError("damaged") from None
        if way == "die":
            os.kill(os.getpid(), signal.SIGSEGV)
        return "read"

    def number(self, path: Path) -> int:
        numbers = [str(random.Random(str(Case(0, number))).random()) for number in range(len(self.WAYS))]
        return numbers.index(path.read_text())


def misbehave(folder: Path) -> None:
    """Run all cases of `Misbehaving`, in its own process."""
    server.PROCESSOR_SECONDS = 1
    results = list(run_cases(Misbehaving(), [Case(0, k) for k in range(len(Misbehaving.WAYS))], folder / "cases"))
    (folder / "results.json").write_text(json.dumps(results))


def test_every_way_to_misbehave_is_noticed(tmp_path: Path) -> None:
    process = start_process(misbehave, (tmp_path,), tmp_path / "log")
    assert wait([process], tmp_path / "log", seconds=300) == [0], (tmp_path / "log").read_text()
    results = [Result(*fields) for fields in json.loads((tmp_path / "results.json").read_text())]
    found = {way: (result.outcome, result.detail) for way, result in zip(Misbehaving.WAYS, results, strict=True)}
    assert found["read"] == ("read", "")
    assert found["refuse"] == ("refused", "wrong")
    expected = {
        "raise": "ValueError: a bug", "exit": "SystemExit: 3", "loop": "it took more than 1 s of a processor",
        "fill": "MemoryError", "fill and refuse": "it took more memory than it may",
        "long": "the message has 5,000 characters", "escape": "the message has characters that are not printable",
        "die": "the process was ended by SIGSEGV",
    }  # fmt: skip
    for way, detail in expected.items():
        assert found[way][0] == "failed", way
        assert detail in found[way][1], way
    assert not list((tmp_path / "cases" / "case").glob("*"))


def test_a_case_depends_on_its_name_only(tmp_path: Path) -> None:
    kind = load_kind("coco_json")
    contents = []
    for k in range(2):
        (tmp_path / str(k)).mkdir()
        contents.append(kind.make(random.Random(str(Case(3, 14))), tmp_path / str(k)).read_bytes())
    assert contents[0] == contents[1]


def test_branches_are_counted(tmp_path: Path) -> None:
    process = start_process(measure_branches, (tmp_path,), tmp_path / "log")
    assert wait([process], tmp_path / "log", seconds=300) == [0], (tmp_path / "log").read_text()


def measure_branches(folder: Path) -> None:
    """More cases take more branches; in its own process."""
    taken = []
    for count in (2, 40):
        place = folder / str(count)
        list(run_cases(load_kind("coco_json"), [Case(0, k) for k in range(count)], place, measure=True))
        counts = branches_taken(coverage_of(load_kind("coco_json"), place), place)
        assert all(0 < some < total for some, total in counts.values()), counts
        taken.append(sum(some for some, _ in counts.values()))
    assert taken[0] < taken[1]
