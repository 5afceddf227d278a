#!/usr/bin/env python
"""Detect objects in images: draw them, and write detections.json."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.atomic import make_folder
from detector.cli import command, require_checkpoint
from detector.inference.image_files import find_images

EXAMPLES = """\
Writes each image with its detections drawn (STEM.jpg), detections.jsonl (one line per input, written at once) and, at
the end, detections.json (COCO results format with file_name and category_name; image_id counts the inputs). A file that
cannot be predicted is reported and does not stop the others. A checkpoint needs no config. EMA weights are used where
there are any.

examples:
  python tools/predict.py --checkpoint runs/quickstart/checkpoints/best.pt data/shapes/images/val --output-dir out
  python tools/predict.py --checkpoint best.pt 'scans/**/*.png' extra.tif --output-dir out --score-thresh 0.5
"""


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, predict, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs", nargs="+", metavar="INPUT", help="image file, folder (searched recursively) or glob (required)"
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="P.pt",
        help="checkpoint to use, or a RetinaNet of torchvision, detectron2 or mmdetection (required)",
    )  # fmt: skip
    parser.add_argument(
        "--output-dir", type=Path, required=True, metavar="DIR", help="folder for the results (required)"
    )
    parser.add_argument(
        "--score-thresh", type=float, default=0.3, metavar="S",
        help="minimum score of a detection, 0 to 1 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda", "mps"], default="auto",
        help="where to run; auto: a CUDA device, else MPS, else the CPU (default: %(default)s)",
    )  # fmt: skip
    arguments = parser.parse_intermixed_args(argv)
    if not 0 <= arguments.score_thresh <= 1:
        parser.error(f"--score-thresh must be within 0 and 1, got {arguments.score_thresh}")
    require_checkpoint(arguments.checkpoint)
    paths = find_images(arguments.inputs, output_dir=arguments.output_dir)
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    from detector.inference.predictions import predict_to_folder
    from detector.inference.predictor import load_predictor
    from detector.inference.progress import CountProgress
    from detector.reports.draw import draw_detections

    predictor = load_predictor(arguments.checkpoint, device=arguments.device, score_thresh=arguments.score_thresh)
    print("\n".join(predictor.origin), end="\n" * bool(predictor.origin), file=sys.stderr)
    make_folder(arguments.output_dir)
    with CountProgress("predicting", len(paths)) as progress:
        summary = predict_to_folder(
            predictor, paths, arguments.output_dir, draw=draw_detections, progress=progress.update
        )
    print(
        f"{summary.detections} detections with a score of at least {arguments.score_thresh:g} in "
        f"{summary.predicted} images; drawn images, detections.json and detections.jsonl are in {arguments.output_dir}"
    )
    print(summary.report(), end="", file=sys.stderr)
    return summary.exit_code


if __name__ == "__main__":
    sys.exit(main())
