#!/usr/bin/env python
"""Train many variants and say which is best, as far as that can be said.

python tools/sweep.py --config a.yaml b.yaml c.yaml --seeds 3 --output-dir D
python tools/sweep.py --config C.yaml --grid loss.gamma=0,0.5,1,2,5 loss.alpha=0.25,0.5,0.75 --seeds 3 --output-dir D
python tools/sweep.py --config C.yaml --search tpe --trials 30 --space optim.lr=1e-4..1e-2:log loss.gamma=0..5 --output-dir D

The same command goes on after an interruption. Needs optuna: pip install -e .[sweep].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command
from detector.errors import Interrupted, RunError
from detector.experiments.search_space import Plan, read_space, settle
from detector.experiments.sweep import sweep


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, run the study, print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, nargs="+", action="extend", required=True, help="one or more recipes")
    parser.add_argument("--grid", nargs="+", action="extend", metavar="KEY=V,V,...", help="try every combination")
    parser.add_argument("--search", choices=["random", "tpe"], help="try --trials points of --space instead")
    parser.add_argument("--trials", type=int, help="how many, with --search")
    parser.add_argument(
        "--space", nargs="+", action="extend", metavar="KEY=LOW..HIGH[:log]", help="ranges, or lists as in --grid"
    )
    parser.add_argument("--folds", type=int, default=0, metavar="K", help="cross-validate in K folds of data.train")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="train every variant with N seeds")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="runs side by side")
    parser.add_argument("--storage", metavar="URL", help="a database that several machines share")
    parser.add_argument("--no-prune", action="store_true", help="finish also what is hopeless")
    parser.add_argument("--retry-failed", action="store_true", help="go on with trials that failed before")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of all runs, as train.epochs=3")
    arguments = parser.parse_intermixed_args(argv)
    if (arguments.search is None) != (arguments.space is None and arguments.trials is None) or (
        arguments.search and (arguments.grid or not arguments.space or not arguments.trials)
    ):
        raise RunError("--search must come with --trials and --space, and --grid without them")
    if min(arguments.seeds, arguments.workers) < 1 or arguments.folds < 0 or arguments.folds == 1:
        raise RunError("--seeds and --workers must be at least 1, and --folds at least 2")
    # an override right after --config or --grid looks like one of theirs
    paths = [path for path in arguments.config if "=" not in str(path) or path.exists()]
    overrides = [*(str(path) for path in arguments.config if path not in paths), *arguments.overrides]
    names = [path.stem for path in paths]
    recipes = {str(p) if names.count(p.stem) > 1 else p.stem: p for p in paths}
    plan = Plan(
        recipes,
        tuple(overrides),
        read_space(arguments.space or arguments.grid or (), ranges=arguments.search is not None),
        arguments.search or "grid",
        trials=arguments.trials or 0,
        seeds=arguments.seeds,
        folds=arguments.folds,
    )
    try:
        comparison = sweep(
            settle(plan), arguments.output_dir, workers=arguments.workers, storage=arguments.storage,
            prune=not arguments.no_prune, retry_failed=arguments.retry_failed,
        )  # fmt: skip
    except Interrupted as stopped:
        print(f"{stopped}; the same command goes on", file=sys.stderr)
        return 128 + stopped.signum
    comparison.show()
    files = ("results.md", "results.json", "results.svg", "winner.yaml")
    written = [file for file in files if (arguments.output_dir / file).exists()]
    print(f"{', '.join(written)}: in {arguments.output_dir}")
    if comparison.reference is None:
        print("error: no run came to its end, so there is no winner; the reasons stand above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
