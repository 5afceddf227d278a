#!/usr/bin/env python
"""Train many variants of a recipe and report which differences are significant."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command
from detector.errors import Interrupted, RunError

EXAMPLES = """\
examples:
  python tools/sweep.py --config configs/quickstart.yaml --grid loss.gamma=0,2 --seeds 3 --output-dir runs/gamma
  python tools/sweep.py --config configs/quickstart.yaml --search tpe --trials 30 \\
      --space optim.lr=1e-4..1e-2:log loss.gamma=0..5 --output-dir runs/search train.epochs=5
  python tools/sweep.py --config configs/paper/small/shapes_ce.yaml configs/paper/small/shapes_fl_gamma2.yaml \\
      --seeds 3 --output-dir runs/losses

After an interruption, the same command continues the sweep. docs/sweeps.md explains the results.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line.

    Raises:
        RunError: options that do not fit together.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--config", type=Path, nargs="+", action="extend", required=True, help="one or more recipes (YAML files)")
    add("--output-dir", type=Path, required=True, help="folder for all runs and results")
    add("--grid", nargs="+", action="extend", metavar="KEY=V,V,...", help="try all combinations (default: the recipes)")
    add("--search", choices=["random", "tpe"], help="try --trials points of --space (default: all points of --grid)")
    add("--trials", type=int, metavar="N", help="number of trials; required by --search")
    add(
        "--space", nargs="+", action="extend", metavar="KEY=LOW..HIGH[:log]",
        help="ranges, or lists as in --grid; required by --search",
    )  # fmt: skip
    add("--seeds", type=int, default=1, metavar="N", help="train every variant with N seeds (default: 1)")
    add(
        "--folds", type=int, default=0, metavar="K",
        help="cross-validate on K folds of data.train (default: validate on data.val)",
    )  # fmt: skip
    add("--workers", type=int, default=1, metavar="N", help="number of parallel runs (default: 1)")
    add("--storage", metavar="URL", help="database that several machines share (default: a file in --output-dir)")
    add("--no-prune", action="store_true", help="never stop unpromising trials early (default: stop them)")
    add("--retry-failed", action="store_true", help="retry failed trials (default: list them as failed)")
    add("overrides", nargs="*", metavar="key=value", help="config overrides of all runs, e.g. train.epochs=3")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.search is None) != (arguments.space is None and arguments.trials is None) or (
        arguments.search and (arguments.grid or not arguments.space or not arguments.trials)
    ):
        raise RunError("--search must come with --trials and --space, and --grid without them")
    if min(arguments.seeds, arguments.workers) < 1 or arguments.folds < 0 or arguments.folds == 1:
        raise RunError("--seeds and --workers must be at least 1, and --folds at least 2")
    # argparse assigns overrides right after --config to it
    misplaced = [path for path in arguments.config if "=" in str(path) and not path.exists()]
    arguments.config = [path for path in arguments.config if path not in misplaced]
    arguments.overrides = [*map(str, misplaced), *arguments.overrides]
    return arguments


@command
def main(argv: list[str] | None = None) -> int:
    """Run a sweep and print its table."""
    arguments = parse_arguments(argv)
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    from detector.experiments.search_space import SweepPlan, parse_space, validate_plan
    from detector.experiments.sweep import sweep

    names = [path.stem for path in arguments.config]
    plan = SweepPlan(
        {str(path) if names.count(path.stem) > 1 else path.stem: path for path in arguments.config},
        tuple(arguments.overrides),
        parse_space(arguments.space or arguments.grid or (), ranges=arguments.search is not None),
        arguments.search or "grid",
        trials=arguments.trials or 0,
        seeds=arguments.seeds,
        folds=arguments.folds,
    )
    try:
        comparison = sweep(
            validate_plan(plan), arguments.output_dir, workers=arguments.workers, storage=arguments.storage,
            prune=not arguments.no_prune, retry_failed=arguments.retry_failed,
        )  # fmt: skip
    except Interrupted as stopped:
        print(f"{stopped}; the same command continues the sweep", file=sys.stderr)
        return 128 + stopped.signum
    comparison.show()
    files = ("results.md", "results.json", "results.svg", "winner.yaml")
    written = [file for file in files if (arguments.output_dir / file).exists()]
    print(f"written to {arguments.output_dir}: {', '.join(written)}")
    if comparison.reference is None:
        print("error: no trial has finished, so there is no winner; the reasons are listed above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
