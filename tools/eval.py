#!/usr/bin/env python
"""Score a checkpoint, or an existing COCO results file, on a config's validation or test set."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command, require_checkpoint
from detector.config_packages import require_packages
from detector.config_yaml import load_config

EXAMPLES = """\
Writes metrics.json (COCO's twelve numbers and AP per class) and detections.json (COCO results format).

examples:
  python tools/eval.py --config configs/quickstart.yaml --checkpoint runs/quickstart/checkpoints/best.pt
  python tools/eval.py --config configs/quickstart.yaml --checkpoint runs/quickstart/checkpoints/best.pt \\
      --output-dir eval_800 data.min_size=800 postprocess.score_thresh=0.01
  python tools/eval.py --config configs/quickstart.yaml \\
      --detections runs/quickstart/checkpoints/eval_val/detections.json
  torchrun --nproc-per-node 4 tools/eval.py --config C.yaml --checkpoint P.pt      # on several GPUs
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, score, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--config", type=Path, required=True, metavar="C.yaml", help="YAML config: data, metric, image size (required)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint", type=Path, metavar="P.pt", help="checkpoint to score: its model and classes are used"
    )
    source.add_argument(
        "--detections", type=Path, metavar="F.json", help="COCO results file to score: only the annotations are read"
    )
    parser.add_argument(
        "--split", choices=["val", "test"], default="val", help="score on data.val or data.test (default: %(default)s)"
    )
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR",
        help="folder for the results (default: eval_SPLIT in the folder of the checkpoint or results file)",
    )  # fmt: skip
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="config overrides, e.g. eval.engine=pycocotools (default: none)",
    )
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(arguments.config, arguments.overrides)
    require_packages(config, training=False)
    if arguments.checkpoint is not None:
        require_checkpoint(arguments.checkpoint)
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    from detector.evaluation.score import score_checkpoint, score_results_file

    path = arguments.checkpoint or arguments.detections
    output_dir = arguments.output_dir or path.parent / f"eval_{arguments.split}"
    score = score_results_file if arguments.checkpoint is None else score_checkpoint
    metrics = score(config, path, split=arguments.split, output_dir=output_dir)
    print(metrics.table())
    print(f"metrics.json and detections.json are in {output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
