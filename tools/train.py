#!/usr/bin/env python
r"""Train a detector from a YAML config.

examples:
  python tools/train.py --config configs/quickstart.yaml
  python tools/train.py --config configs/quickstart.yaml \
      --output-dir runs/short train.epochs=2 optim.lr=1e-3
  python tools/train.py --config configs/quickstart.yaml --resume auto
  torchrun --nproc-per-node 2 tools/train.py --config configs/quickstart.yaml
"""

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


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, train, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file of the run (required)")
    parser.add_argument("--output-dir", type=Path, help="folder of the run (default: runs/NAME_OF_THE_CONFIG)")
    parser.add_argument(
        "--resume", metavar="auto|PATH", help="resume: auto continues the run in the output folder, or starts one "
        "where there is none; PATH is a checkpoint (default: start a new run)",
    )  # fmt: skip
    parser.add_argument(
        "--init-from", metavar="PATH", help="fine-tune from a checkpoint, ours or a RetinaNet of torchvision, "
        "detectron2 or mmdetection (default: start from model.backbone_weights)",
    )  # fmt: skip
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config overrides, e.g. train.epochs=3 (default: none)"
    )
    arguments = parser.parse_intermixed_args(argv)
    overrides = list(arguments.overrides)
    if arguments.init_from is not None:
        overrides.append(f"train.init_from={arguments.init_from}")
    config = load_config(arguments.config, overrides)
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    from detector.memory import keep_freed_memory
    from detector.training.train import train

    keep_freed_memory()
    output_dir = arguments.output_dir or Path("runs") / arguments.config.stem
    metrics = train(config, output_dir, resume=arguments.resume)
    if os.environ.get("RANK", "0") == "0":
        print_summary(metrics, config, output_dir)
    return 0


def print_summary(metrics: dict[str, Any], config: Config, output_dir: Path) -> None:
    """Print the results, where they are, and what to do next."""
    print()
    if "AP" in metrics:
        print(f"best on val:  AP {metrics['AP']:.3f}  AP50 {metrics['AP50']:.3f}")
    if "test" in metrics:
        print(f"on test:      AP {metrics['test']['AP']:.3f}  AP50 {metrics['test']['AP50']:.3f}")
    python = "uv run" if "UV" in os.environ else "python"
    images = config.data.val.images if config.data.val is not None else "IMAGES"
    print(
        f"results in {output_dir}: metrics.json, checkpoints/best.pt, curves and images for TensorBoard\n"
        "next, see what it detects:\n"
        f"  {python} tools/predict.py --checkpoint {output_dir}/checkpoints/best.pt {images} "
        f"--output-dir {output_dir}/detections"
    )


if __name__ == "__main__":
    sys.exit(main())
