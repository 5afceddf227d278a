#!/usr/bin/env python
"""Compare finished runs and test whether their differences in AP are significant."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.atomic import write_json, write_text
from detector.cli import command

EXAMPLES = """\
examples:
  python tools/compare.py runs/paper/shapes       (all runs in it: ce/seed0, ce/seed1, focal/seed0, ...)
  python tools/compare.py runs/ce/seed* runs/focal/seed* --baseline ce --detect --markdown table.md

Runs are grouped by parent folder and paired by their own names (seed0, seed0_fold1).
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Compare runs; print and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="FOLDER", help="output folder of a run, or a folder that contains runs")
    add("--baseline", metavar="NAME", help="group to compare with (default: the best)")
    add("--classes", default="", metavar="A,B", help="classes whose AP gets a column (default: none)")
    add("--detect", action="store_true", help="write missing detections.json, which the bootstrap needs (default: no)")
    add(
        "--replicates", type=int, metavar="N",
        help="number of bootstrap samples of the images; 0 for none (default: 500)",
    )  # fmt: skip
    add("--json", type=Path, metavar="FILE", help="write all numbers, unrounded (default: none)")
    add("--markdown", type=Path, metavar="FILE", help="write the table and the verdict (default: none)")
    add("--figure", type=Path, metavar="FILE", help="write a .svg or .png figure; needs matplotlib (default: none)")
    arguments = parser.parse_args(argv)
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    from detector.experiments.compare import compare, write_figure
    from detector.experiments.finished_runs import REPLICATES, find_runs, group_runs, is_finished, write_detections

    runs = find_runs(arguments.runs)
    if arguments.detect:
        for run in runs:
            if not (run / "detections.json").exists() and is_finished(run):
                write_detections(run)
    arms, notes = group_runs(runs, replicates=REPLICATES if arguments.replicates is None else arguments.replicates)
    comparison = compare(arms, baseline=arguments.baseline)
    classes = [name for name in arguments.classes.split(",") if name]
    for line in notes:
        print(line)
    comparison.show(classes)
    if arguments.json is not None:
        write_json(comparison.to_json(), arguments.json)
    if arguments.markdown is not None:
        write_text(comparison.markdown(classes), arguments.markdown)
    if arguments.figure is not None:
        write_figure(comparison, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
