#!/usr/bin/env python
"""Draw loss functions, or the learning curves of runs, as a .svg or .png file. Needs matplotlib (the extra `plots`)."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command

LOSSES = """Draw loss functions of a positive against the probability of the ground truth."""
LOSSES_EXAMPLES = """\
forms and their settings (with defaults):
  ce
  focal:gamma=2         also alpha (no weighting)
  focal_star:gamma=2,beta=1
  poly1:gamma=2,epsilon=1
  varifocal
  quality_focal:gamma=2

examples, for figures of Lin et al. 2017 (arXiv 1708.02002v2):
  figure 1:
    python tools/plot.py losses --output losses.svg
  figure 5, the loss by x_t:
    python tools/plot.py losses ce focal:gamma=2 focal_star:gamma=2,beta=1 focal_star:gamma=4,beta=0 \\
        --against x_t --output losses_by_logit.svg
  figure 6, its derivative by x_t:
    python tools/plot.py losses ce focal:gamma=2 focal_star:gamma=2,beta=1 focal_star:gamma=4,beta=0 \\
        --against x_t --gradient --output loss_gradients.svg
"""
EXAMPLES = """\
examples:
  python tools/plot.py losses --output losses.svg
  python tools/plot.py runs runs/quickstart --output curves.svg
"""
RUNS = """Draw the training loss, validation loss and validation AP of runs over epochs."""
RUNS_EXAMPLES = """\
example:
  python tools/plot.py runs runs/quickstart baseline=runs/quickstart-2 --output curves.svg
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, draw."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(dest="what", required=True, metavar="losses|runs")

    losses = commands.add_parser(
        "losses", help="loss functions", description=LOSSES, epilog=LOSSES_EXAMPLES, formatter_class=raw
    )
    losses.add_argument(
        "forms", nargs="*", metavar="FORM",
        help="a loss, optionally with settings, as NAME:key=number,... (default: the five of the paper's figure 1)",
    )  # fmt: skip
    losses.add_argument(
        "--against", choices=["p_t", "x_t"], default="p_t",
        help="horizontal axis: probability or logit of the ground truth (default: %(default)s)",
    )  # fmt: skip
    losses.add_argument("--gradient", action="store_true", help="draw the derivative by the logit (default: the loss)")
    losses.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help=".svg or .png file to write (required)"
    )

    runs = commands.add_parser(
        "runs", help="learning curves of runs", description=RUNS, epilog=RUNS_EXAMPLES, formatter_class=raw
    )
    runs.add_argument(
        "runs", nargs="+", metavar="[LABEL=]RUN",
        help="output folder of tools/train.py, optionally with a label (default: the folder's name)",
    )  # fmt: skip
    runs.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help=".svg or .png file to write (required)"
    )

    arguments = parser.parse_args(argv)
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    from detector.reports.plots import FIGURE_1, plot_losses, plot_runs

    if arguments.what == "losses":
        plot_losses(
            arguments.forms or FIGURE_1, arguments.output, against=arguments.against, gradient=arguments.gradient
        )
    else:
        plot_runs(arguments.runs, arguments.output)
    print(f"wrote {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
