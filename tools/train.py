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
from detector.config_packages import require_packages
from detector.config_yaml import load_config


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, train, print a summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--config", type=Path, help="YAML file of the run (required, unless --replay is given)")
    what.add_argument(
        "--replay", type=Path, metavar="FILE", help="instead of training, repeat the step that a run's nonfinite.json "
        "describes and name the first thing that is not finite; exit code 0 if that is the same again, 1 if not",
    )  # fmt: skip
    parser.add_argument(
        "--redact", action="store_true", help="after --replay, write copies of nonfinite.json and replay.json without "
        "paths, host and user names, to send to others (other files: tools/redact.py)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir",
        type=Path,
        help="folder of the run (default: runs/CONFIG_NAME, or runs/CONFIG_NAME-2, -3, ... where that holds a run)",
    )
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
    if arguments.redact and arguments.replay is None:
        parser.error("--redact needs --replay; tools/redact.py redacts other files")
    if arguments.replay is not None:
        if arguments.output_dir is not None or arguments.resume is not None or arguments.init_from is not None:
            parser.error("--replay takes its run from the file: --output-dir, --resume and --init-from have no effect")
        from detector.training.replay import replay

        code = replay(arguments.replay, overrides)
        if arguments.redact:
            from detector.redact import Redactor, this_machine, write_redacted

            files = [arguments.replay, arguments.replay.with_name("replay.json")]
            copies = write_redacted(files, Redactor(this_machine()))
            print(f"to send to others, after reading them: {' '.join(map(str, copies))}")
        return code
    if arguments.init_from is not None:
        overrides.append(f"train.init_from={arguments.init_from}")
    config = load_config(arguments.config, overrides)
    require_packages(config, training=True)
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    from detector.memory import keep_freed_memory
    from detector.training.resume import place_run
    from detector.training.train import train

    keep_freed_memory()
    default = Path("runs") / arguments.config.stem
    output_dir, resume = place_run(
        arguments.output_dir or default, is_default=arguments.output_dir is None, resume=arguments.resume
    )
    if output_dir not in (arguments.output_dir, default) and os.environ.get("RANK", "0") == "0":
        print(f"{default} holds a run already; this one is {output_dir} (--output-dir {output_dir} resumes it)")
    metrics = train(config, output_dir, resume=resume)
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
        f"results in {output_dir}: metrics.json, checkpoints/model.pt, curves and images for TensorBoard\n"
        "next, see what it detects:\n"
        f"  {python} tools/predict.py --checkpoint {output_dir}/checkpoints/model.pt {images} "
        f"--output-dir {output_dir}/detections"
    )


if __name__ == "__main__":
    sys.exit(main())
