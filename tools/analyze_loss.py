#!/usr/bin/env python
"""Who holds the class loss: python tools/analyze_loss.py --config C.yaml --checkpoint P [--split val|test] [key=value ...].

Looks at every positive entry (an anchor and a class) of a set and at its negative ones, all of them or, above two million,
a sample, and says how many: the cumulative distribution of the focal loss for several gammas (the paper's figure 4), the
share that the hardest examples hold, how positives and negatives weigh against each other under the checkpoint's own alpha,
the probabilities of the truth, and whether scores mean what they say. Writes figures (.svg), loss.csv and loss.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command
from detector.config_yaml import load_config
from detector.reports.loss_analysis import GAMMAS, analyze_checkpoint


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, analyze, print the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file: the data")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--gammas", type=numbers, default=GAMMAS, metavar="G,G,...")
    parser.add_argument("--output-dir", type=Path, help="default: loss_SPLIT beside the checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    output_dir = arguments.output_dir or arguments.checkpoint.parent / f"loss_{arguments.split}"
    lines = analyze_checkpoint(
        config, arguments.checkpoint, split=arguments.split, gammas=arguments.gammas, output_dir=output_dir
    )
    print("\n".join(lines))
    print(f"figures, loss.csv and loss.json are in {output_dir}")
    return 0


def numbers(text: str) -> tuple[float, ...]:
    """For argparse, which tells a ValueError as the user's mistake."""
    gammas = tuple(float(part) for part in text.split(","))
    if min(gammas) < 0:
        raise ValueError
    return gammas


if __name__ == "__main__":
    sys.exit(main())
