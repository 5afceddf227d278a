#!/usr/bin/env python
"""Compare finished runs: is one recipe better than another, or was it luck?

python tools/compare.py runs/paper/shapes                      (everything below: ce/seed0, ce/seed1, focal/seed0, ...)
python tools/compare.py runs/ce/seed* runs/focal/seed* --baseline ce --detect

Runs are grouped by parent folder and paired by their own name (seed0, seed0_fold1).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.atomic import write_json
from detector.cli import command
from detector.experiments.compare import REPLICATES, compare, detect, figure, find_runs, group_runs, is_finished


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, detect where asked to, compare, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="a run, or a folder with runs in it")
    parser.add_argument("--baseline", metavar="NAME", help="compare with this group (default: with the best)")
    parser.add_argument("--classes", default="", metavar="A,B", help="columns with the AP of these classes")
    parser.add_argument("--detect", action="store_true", help="make detections.json where it is missing")
    parser.add_argument("--replicates", type=int, default=REPLICATES, help="of the bootstrap over images; 0: none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything, unrounded")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table and the verdict")
    parser.add_argument("--figure", type=Path, metavar="FILE", help=".svg or .png; needs matplotlib")
    arguments = parser.parse_args(argv)
    runs = find_runs(arguments.runs)
    if arguments.detect:
        for run in runs:
            if not (run / "detections.json").exists() and is_finished(run):
                detect(run)
    arms, notes = group_runs(runs, replicates=arguments.replicates)
    comparison = compare(arms, baseline=arguments.baseline)
    classes = [name for name in arguments.classes.split(",") if name]
    for line in notes:
        print(line)
    comparison.show(classes)
    if arguments.json is not None:
        write_json(comparison.to_json(), arguments.json)
    if arguments.markdown is not None:
        arguments.markdown.write_text(comparison.markdown(classes))
    if arguments.figure is not None:
        figure(comparison, arguments.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
