"""What watching the class loss costs a run, by the run's own clock: python -m tools.benchmarks.diagnostics RUN_DIR.

A line for each time it was done: seconds of the diagnostics (scalar loss_holders/seconds) beside those of the steps since the
time before (metrics.jsonl).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import NamedTuple

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from detector.config_yaml import load_config

TAG = "loss_holders/seconds"


class Cost(NamedTuple):
    """Of the diagnostics, once."""

    step: int
    seconds: float
    of_steps: float
    """Seconds of the steps since the time before."""


def costs(run_dir: Path) -> list[Cost]:
    """Of a run; none where no evaluation had the time to look."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0})
    events.Reload()
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    speed = statistics.median(record["images_per_s"] for record in records if "images_per_s" in record)
    step_seconds = load_config(run_dir / "config.yaml").train.batch_size / speed
    found: list[Cost] = []
    if TAG not in events.Tags()["scalars"]:
        return found
    before = 0
    for event in events.Scalars(TAG):
        found.append(Cost(event.step, event.value, (event.step - before) * step_seconds))
        before = event.step
    return found


def main(argv: list[str] | None = None) -> int:
    """Read, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    found = costs(parser.parse_args(argv).run_dir)
    if not found:
        print(
            "no evaluation of this run looked at who holds the loss: train.loss_images is 0, or its steps took too little time"
        )
    for cost in found:
        print(
            f"step {cost.step}: {cost.seconds:.2f} s beside {cost.of_steps:.1f} s of steps, {cost.seconds / cost.of_steps:.2%}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
