#!/usr/bin/env python
"""Find objects in pictures: python tools/predict.py --checkpoint P INPUT... --output-dir D.

An INPUT is a file, a folder or a glob. D gets every picture with its objects drawn, and detections.json.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.progress import track

from detector.atomic import make_folder
from detector.cli import command
from detector.distributed import pick_device
from detector.inference.predictor import find_pictures, load_predictor, predict_files, result_records, write_records
from detector.reports.draw import draw_detections


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, predict, draw, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("inputs", nargs="+", metavar="INPUT")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--score-thresh", type=float, default=0.3, help="weakest score kept (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.score_thresh <= 1:
        parser.error(f"--score-thresh must be within 0 and 1, got {arguments.score_thresh}")
    paths = find_pictures(arguments.inputs, output_dir=arguments.output_dir)
    device = pick_device(arguments.device)
    predictor = load_predictor(arguments.checkpoint, device=device, score_thresh=arguments.score_thresh)
    print("\n".join(predictor.origin), end="\n" * bool(predictor.origin), file=sys.stderr)
    make_folder(arguments.output_dir)
    records, unreadable, used = [], [], set()
    for image_id, prediction in enumerate(track(predict_files(predictor, paths), "predicting", total=len(paths))):
        if prediction.image is None or prediction.detections is None:
            unreadable.append(f"  {prediction.error}")
            continue
        detections = prediction.detections
        records += result_records(image_id, str(prediction.path), detections, predictor.categories)
        stem = prediction.path.stem
        while stem in used:  # another folder's file of the same name
            stem += f"_{image_id}"
        used.add(stem)
        drawn = draw_detections(prediction.image, detections, predictor.categories.names)
        drawn.save(arguments.output_dir / f"{stem}.jpg", quality=92)
    write_records(records, arguments.output_dir / "detections.json")
    print(
        f"{len(records)} objects of score {arguments.score_thresh:g} or more in {len(paths) - len(unreadable)} pictures; "
        f"drawn pictures and detections.json are in {arguments.output_dir}"
    )
    if unreadable:
        print("\n".join([f"error: {len(unreadable)} inputs could not be read:", *unreadable]), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
