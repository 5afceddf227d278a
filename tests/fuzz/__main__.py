"""Fuzz the readers; see README.md.

examples:
  python -m tests.fuzz coco_json --count 5000 --seed 0
  python -m tests.fuzz weights --case 0:1234
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import coverage

from tests.fuzz.server import Case, Kind, Result, coverage_of, load_kind, run_cases

KINDS = tuple(
    sorted(
        path.stem for path in Path(__file__).parent.glob("*.py") if "\ndef make(" in path.read_text(encoding="utf-8")
    )
)


def main(argv: list[str] | None = None) -> int:
    """Run cases of one kind or of all, and print failures and branch coverage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*KINDS, "all"])
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="cases (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the cases (default: %(default)s)")
    parser.add_argument("--case", metavar="SEED:NUMBER", help="run one case in this process, without limits")
    parser.add_argument("--html", type=Path, metavar="DIR", help="write pages that show the branches not taken")
    arguments = parser.parse_args(argv)
    failed = 0
    for name in KINDS if arguments.kind == "all" else [arguments.kind]:
        kind = load_kind(name)
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            if arguments.case is not None:
                return run_here(kind, Case.parse(arguments.case), Path(folder))
            cases = [Case(arguments.seed, number) for number in range(arguments.count)]
            failed += fuzz(name, kind, cases, Path(folder), arguments.html)
    return 1 if failed else 0


def run_here(kind: Kind, case: Case, folder: Path) -> int:
    """Run one case in this process."""
    (folder / "shared").mkdir()
    (folder / "case").mkdir()
    kind.prepare(folder / "shared")
    path = kind.make(random.Random(str(case)), folder / "case")
    print(f"{path}: {path.stat().st_size:,} bytes, starting with {path.read_bytes()[:300]!r}")
    print(kind.use(path))
    return 0


def fuzz(name: str, kind: Kind, cases: list[Case], folder: Path, pages: Path | None) -> int:
    """Run cases with progress; returns the number of failures."""
    started, shown = time.monotonic(), 0.0
    outcomes: Counter[str] = Counter()
    failures: list[Result] = []
    slowest = Result(cases[0], "", "", 0.0)
    for result in run_cases(kind, cases, folder, measure=True):
        outcomes[result.outcome] += 1
        slowest = max(slowest, result, key=lambda result: result.seconds)
        if result.outcome == "failed":
            failures.append(result)
            print(f"\n{name} {result.case} failed: {result.detail}", flush=True)
        elapsed, done = time.monotonic() - started, outcomes.total()
        if elapsed - shown > 5:
            shown = elapsed
            left = elapsed / done * (len(cases) - done)
            print(f"{name}: {done:,} of {len(cases):,}, {len(failures)} failed, {left:.0f} s left", flush=True)
    minutes = (time.monotonic() - started) / 60
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in outcomes.most_common())
    print(f"{name}: {len(cases):,} cases in {minutes:.1f} minutes: {counts}")
    print(f"the slowest, {slowest.case}, took {slowest.seconds:.1f} s of a processor")
    if failures:
        print(f"failing cases: {' '.join(str(failure.case) for failure in failures)}")
    print("branches taken:")
    measured = coverage_of(kind, folder)
    for module, (taken, total) in branches_taken(measured, folder).items():
        print(f"  {module:<40} {taken:>5} of {total:>5}  {taken / max(1, total):4.0%}")
    if pages is not None:
        measured.html_report(directory=str(pages))
    return len(failures)


def branches_taken(measured: coverage.Coverage, folder: Path) -> dict[str, tuple[int, int]]:
    """The branches that were taken and all branches, of each file; `folder` is for a temporary file."""
    measured.json_report(outfile=str(folder / "coverage.json"))
    files = json.loads((folder / "coverage.json").read_text())["files"]
    return {
        name: (facts["summary"]["covered_branches"], facts["summary"]["num_branches"]) for name, facts in files.items()
    }


if __name__ == "__main__":
    sys.exit(main())
