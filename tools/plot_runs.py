#!/usr/bin/env python
"""Learning curves of runs as a picture: python tools/plot_runs.py RUN... --output curves.svg.

A RUN is an output folder of tools/train.py, optionally as LABEL=FOLDER. Needs matplotlib: pip install -e .[plots].
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command
from detector.reports.figures import pyplot, save


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, read metrics.jsonl of every run, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN")
    parser.add_argument("--output", type=Path, required=True, help=".svg or .png")
    arguments = parser.parse_args(argv)
    plt = pyplot()
    figure, (loss_axes, ap_axes) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for color, text in zip(plt.rcParams["axes.prop_cycle"].by_key()["color"] * 9, arguments.runs, strict=False):
        label, sign, folder = text.partition("=")
        labelled = sign and not Path(text).is_dir()  # a run's own name may hold the sign: runs/lr=0.01
        records = read_records(Path(folder if labelled else text))
        name = label if labelled else Path(text).name
        steps = [r for r in records if "lr" in r]
        scores = [r for r in records if r.get("split") == "val"]
        loss_axes.plot([r["epoch"] for r in steps], [r["loss"] for r in steps], color=color, linewidth=1, label=name)
        epochs = [r["epoch"] for r in scores]
        losses = [r.get("loss", math.nan) for r in scores]
        loss_axes.plot(epochs, losses, color=color, linewidth=1, linestyle=":", marker=".", markersize=3)
        ap_axes.plot(epochs, [r["AP"] for r in scores], color=color, marker="o", markersize=3, label=f"{name}: AP")
        ap_axes.plot(epochs, [r["AP50"] for r in scores], color=color, marker="o", markersize=3, linestyle=":")
    loss_axes.set(xlabel="epoch", ylabel="loss (of val dotted)", yscale="log")
    ap_axes.set(xlabel="epoch", ylabel="val AP (AP50 dotted)", ylim=(0, 1))
    ap_axes.legend(fontsize="small")
    for axes in (loss_axes, ap_axes):
        axes.grid(alpha=0.3)
    save(figure, arguments.output)
    print(f"written: {arguments.output}")
    return 0


def read_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    path = run / "metrics.jsonl"
    if not path.is_file():
        print(f"error: {run} must be the output folder of a run, but has no metrics.jsonl", file=sys.stderr)
        raise SystemExit(2)
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
