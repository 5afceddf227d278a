#!/usr/bin/env python
"""Score a checkpoint, or an existing COCO results file, on a config's val or test set.

python tools/eval.py --config C.yaml --checkpoint P [--split val|test] [key=value ...]
python tools/eval.py --config C.yaml --detections results.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command
from detector.config_yaml import load_config
from detector.evaluation.score import score_checkpoint, score_results_file


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, score, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file: the data and how to score")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--checkpoint", type=Path, help="the model and its classes")
    what.add_argument("--detections", type=Path, help="a COCO results file; only the annotations are read")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument("--output-dir", type=Path, help="default: eval_SPLIT beside the checkpoint or results file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    source = arguments.checkpoint or arguments.detections
    output_dir = arguments.output_dir or source.parent / f"eval_{arguments.split}"
    if arguments.checkpoint is not None:
        metrics = score_checkpoint(config, arguments.checkpoint, split=arguments.split, output_dir=output_dir)
    else:
        metrics = score_results_file(config, arguments.detections, split=arguments.split, output_dir=output_dir)
    print(metrics.table())
    print(f"metrics.json and detections.json are in {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
