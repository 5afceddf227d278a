#!/usr/bin/env python
"""Train a detector as a config says: python tools/train.py --config configs/quickstart.yaml [key=value ...]."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command
from detector.config import Config
from detector.config_yaml import load_config
from detector.memory import keep_freed_memory
from detector.training.train import train


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, train, say where the results are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="YAML file")
    parser.add_argument("--output-dir", type=Path, help="default: runs/NAME-OF-THE-CONFIG")
    parser.add_argument("--resume", metavar="auto|PATH", help="go on with an interrupted run")
    parser.add_argument("--init-from", metavar="PATH", help="fine-tune from a checkpoint")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, as train.epochs=3")
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.init_from is not None:
        overrides.append(f"train.init_from={arguments.init_from}")
    config = load_config(arguments.config, overrides)
    keep_freed_memory()
    output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    metrics = train(config, output_dir, resume=arguments.resume)
    if os.environ.get("RANK", "0") == "0":
        print_summary(metrics, config, output_dir)
    return 0


def print_summary(metrics: dict[str, Any], config: Config, output_dir: Path) -> None:
    """Where the results are, and what to do next."""
    print()
    if "AP" in metrics:
        print(f"best on val:  AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}")
    if "test" in metrics:
        print(f"on test:      AP {metrics['test']['AP']:.3f}  AP50 {metrics['test']['AP50']:.3f}")
    python = "uv run" if "UV" in os.environ else "python"
    pictures = config.data.val.images if config.data.val is not None else "PICTURES"
    print(
        f"results in {output_dir}: metrics.json, checkpoints/best.pt, curves and pictures for TensorBoard\n"
        "next, look at what it finds:\n"
        f"  {python} tools/predict.py --checkpoint {output_dir}/checkpoints/best.pt {pictures} "
        f"--output-dir {output_dir}/pictures"
    )


if __name__ == "__main__":
    sys.exit(main())
