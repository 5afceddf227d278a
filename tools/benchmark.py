#!/usr/bin/env python
"""Compare speed and memory with torchvision and pycocotools, in one process and on the same work.

A case first checks that both implementations compute the same and ends with an error if they do not. Then it times them
in alternation; a ratio within the noise of the machine is reported as no difference (docs/benchmarks.md).

cases:
  train        a training step: ours and torchvision's RetinaNet with the same weights
  infer        images on the device to detections in main memory
  loss         the focal loss of all anchors and its gradient
  match        assignment of anchors to objects
  postprocess  raw outputs to detections
  loader       JPEG files to batches
  feed         training steps from JPEG files, compared with the same steps without a loader
  eval         COCO's metrics: hotcoco and pycocotools
  open         an annotation file: ours and pycocotools

examples:
  python tools/benchmark.py train --size 512x512 --batch 2
  python tools/benchmark.py loss --batch 2 --json loss.json
  python tools/benchmark.py train infer match --device cuda --batch 16 --size 800x800
  python tools/benchmark.py loader --size 800x1067 --batch 4 --image-size 3024x4032
"""

from __future__ import annotations

import argparse
import itertools
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.atomic import write_json
from detector.cli import command

CASES = ("train", "infer", "loss", "match", "postprocess", "loader", "feed", "eval", "open")


def height_and_width(text: str) -> tuple[int, int]:
    """Parse "800x1333"."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, for example 800x1333, got {text!r}")
    return int(height), int(width)


def build_parser() -> argparse.ArgumentParser:
    """The command line; options that take several values make one run for each combination."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cases", nargs="+", choices=CASES, metavar="CASE", help="one or more of the cases above (required)")
    size: dict[str, Any] = {"type": height_and_width, "metavar": "HxW"}
    add(
        "--size",
        nargs="+",
        default=[(800, 800)],
        **size,
        help="network input in pixels, one or several (default: 800x800)",
    )
    several: dict[str, Any] = {"nargs": "+", "type": int, "metavar": "N"}
    add("--batch", default=[2], **several, help="images per batch, one or several (default: 2)")
    add("--boxes", default=[10], **several, help="objects in the fullest image, one or several (default: 10)")
    add("--classes", default=[80], **several, help="number of classes, one or several (default: 80)")
    add("--backbone", default="resnet50", help="architecture (default: resnet50)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto, a GPU if there is one)")
    add("--precision", choices=["all", "fp32", "bf16", "fp16"], default="all", help="(default: all, fp32 and bf16)")
    add("--compile", choices=["auto", "yes", "no"], default="auto", help="compile ours (default: auto, on a GPU)")
    add("--checkpoint-activations", action="store_true", help="recompute activations, ours only (default: off)")
    add("--images", type=int, default=5000, metavar="N", help="images of eval and open; bound for feed (default: 5000)")
    add("--image-size", default=(480, 640), **size, help="files of loader and feed in pixels (default: 480x640)")
    add("--workers", type=int, default=2, metavar="N", help="loader processes of loader and feed (default: 2)")
    add("--repeats", type=int, default=7, metavar="N", help="rounds of timing (default: 7)")
    add("--no-peer", action="store_true", help="time ours only (default: off)")
    add("--trace", type=Path, metavar="DIR", help="folder for profiler traces of train and infer (default: no traces)")
    add("--json", type=Path, metavar="F", help="file for all repetitions (default: none)")
    return parser


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print, write."""
    arguments = build_parser().parse_args(argv)
    from detector.distributed import pick_device  # loads torch, as the following do
    from tools.benchmarks import cases
    from tools.benchmarks.measure import machine
    from tools.benchmarks.report import table
    from tools.benchmarks.rows import MismatchError, Options, Row

    device = pick_device(arguments.device)
    options = Options(
        device, backbone=arguments.backbone, precision=arguments.precision,
        compiled={"auto": None, "yes": True, "no": False}[arguments.compile], repeats=arguments.repeats,
        checkpoint_activations=arguments.checkpoint_activations, peer=not arguments.no_peer, trace=arguments.trace,
        images=arguments.images, workers=arguments.workers, image_size=arguments.image_size,
    )  # fmt: skip
    conditions = machine(device)
    print(", ".join(f"{key} {value}" for key, value in conditions.items()))
    combinations = itertools.product(arguments.size, arguments.batch, arguments.boxes, arguments.classes)
    rows: list[Row] = []
    for name, (size, batch, boxes, classes) in itertools.product(arguments.cases, list(combinations)):
        try:
            new = cases.CASES[name](replace(options, size=size, batch=batch, boxes=boxes, classes=classes))
        except MismatchError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        print(table(new), flush=True)
        rows += new
    if arguments.json is not None:
        line = " ".join(["python tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
        write_json({"command": line, "machine": conditions, "rows": rows}, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
