"""Time our code beside a peer's, in one process, with the same weights and inputs; refuses where results differ.

python tools/benchmark.py train --size 512x512 --batch 2
python tools/benchmark.py loss --batch 2 --json loss.json
python tools/benchmark.py train infer match --device cuda --batch 16 --size 800x800
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from detector.distributed import pick_device
from tools.benchmarks.cases import CASES, DifferentError, Options
from tools.benchmarks.measure import machine
from tools.benchmarks.report import table


def size(text: str) -> tuple[int, int]:
    """ "800x1333" to height and width."""
    height, _, width = text.partition("x")
    if not (height.isdigit() and width.isdigit()):
        raise argparse.ArgumentTypeError(f"must be HEIGHTxWIDTH, as in 800x1333, got {text!r}")
    return int(height), int(width)


def main(argv: list[str] | None = None) -> int:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="+", choices=[*CASES], metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--size", type=size, nargs="+", default=[(800, 800)], metavar="HxW")
    parser.add_argument("--batch", type=int, nargs="+", default=[2], help="images; several: one run each")
    parser.add_argument("--boxes", type=int, nargs="+", default=[10], help="objects in the fullest image")
    parser.add_argument("--classes", type=int, nargs="+", default=[80])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--precision", choices=["all", "fp32", "bf16", "fp16"], default="all")
    parser.add_argument("--compile", choices=["auto", "yes", "no"], default="auto", help="auto: on a GPU")
    parser.add_argument("--checkpoint-activations", action="store_true", help="ours: train.checkpoint_activations")
    parser.add_argument("--images", type=int, default=5000, help="of eval and open; at most, of feed")
    parser.add_argument("--workers", type=int, default=2, help="of loader and feed")
    parser.add_argument("--picture", type=size, default=(480, 640), metavar="HxW", help="files of loader and feed")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--no-peer", action="store_true", help="ours alone")
    parser.add_argument("--trace", type=Path, metavar="DIR", help="profile ours too: traces of train and infer")
    parser.add_argument("--json", type=Path, metavar="F", help="raw figures")
    arguments = parser.parse_args(argv)
    device = pick_device(arguments.device)
    options = Options(
        device, backbone=arguments.backbone, precision=arguments.precision,
        compiled={"auto": None, "yes": True, "no": False}[arguments.compile], repeats=arguments.repeats,
        checkpoint_activations=arguments.checkpoint_activations, peer=not arguments.no_peer, trace=arguments.trace,
        images=arguments.images, workers=arguments.workers, picture=arguments.picture,
    )  # fmt: skip
    facts, rows = machine(device), []
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    variants = itertools.product(arguments.size, arguments.batch, arguments.boxes, arguments.classes)
    for name, (size_, batch, boxes, classes) in itertools.product(arguments.cases, list(variants)):
        try:
            found = CASES[name](replace(options, size=size_, batch=batch, boxes=boxes, classes=classes))
        except DifferentError as error:
            print(f"error: {name}: {error}", file=sys.stderr)
            return 1
        print(table(found), flush=True)
        rows += found
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        command = " ".join(["python tools/benchmark.py", *(sys.argv[1:] if argv is None else argv)])
        arguments.json.write_text(json.dumps({"command": command, "machine": facts, "rows": rows}, indent=1) + "\n")
    torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
