#!/usr/bin/env python
"""Analyze the class loss of a checkpoint: which share of it the hardest examples hold, and the scores' calibration."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command, require_checkpoint
from detector.config_yaml import load_config

EXAMPLES = """\
Collects every positive entry (an anchor and a class) of the data and the negative ones, all of them or, above two
million, a sample, and computes from their logits, for several gammas:
  - the cumulative distribution of the focal loss (figure 4 of Lin et al. 2017) and the share of the hardest examples
  - the ratio of the positives' to the negatives' loss under the checkpoint's alpha
  - the probabilities of the ground truth, and the calibration of the scores
Writes cumulative_loss.svg, probabilities.svg, calibration.svg, loss.csv and loss.json.
Needs matplotlib (the extra `plots`).

examples:
  python tools/analyze_loss.py --config configs/quickstart.yaml --checkpoint runs/quickstart/checkpoints/best.pt
  python tools/analyze_loss.py --config configs/quickstart.yaml --checkpoint runs/quickstart/checkpoints/best.pt \\
      --gammas 0,2 --output-dir loss_at_800 data.min_size=800
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, analyze, print the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, required=True, metavar="C.yaml", help="YAML config: the data (required)")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="P.pt", help="checkpoint to analyze (required)"
    )
    parser.add_argument(
        "--split",
        choices=["val", "test"],
        default="val",
        help="analyze on data.val or data.test (default: %(default)s)",
    )
    parser.add_argument(
        "--gammas", type=gamma_list, metavar="G,G,...",
        help="focusing parameters to compare (default: those of the paper, 0,0.5,1,2,5)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR",
        help="folder for the results (default: loss_SPLIT in the folder of the checkpoint)",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config overrides, e.g. data.min_size=800 (default: none)"
    )
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    require_checkpoint(arguments.checkpoint)
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    from detector.reports.loss_analysis import analyze_checkpoint
    from detector.reports.loss_statistics import GAMMAS

    output_dir = arguments.output_dir or arguments.checkpoint.parent / f"loss_{arguments.split}"
    lines = analyze_checkpoint(
        config, arguments.checkpoint, split=arguments.split, gammas=arguments.gammas or GAMMAS, output_dir=output_dir
    )
    print("\n".join(lines))
    print(f"figures, loss.csv and loss.json are in {output_dir}")
    return 0


def gamma_list(text: str) -> tuple[float, ...]:
    """Parse numbers >= 0; argparse reports the ValueError as a user error."""
    gammas = tuple(float(part) for part in text.split(","))
    if min(gammas) < 0:
        raise ValueError
    return gammas


if __name__ == "__main__":
    sys.exit(main())
