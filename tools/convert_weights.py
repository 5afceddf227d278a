#!/usr/bin/env python
"""Turn another program's RetinaNet into a checkpoint of ours, or ours into one that torchvision loads.

python tools/convert_weights.py SRC DST.pt [--source torchvision|detectron2|mmdet] [key=value ...]
python tools/convert_weights.py CHECKPOINT.pt DST.pth --to torchvision

SRC is recognised by the names of its tensors. What it does not say can be given: --categories, --norm-eps, --style, or any
setting of the model, the post-processing or the data as key=value. Nothing in SRC is ever run.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from detector.checkpoint import import_checkpoint, load_checkpoint, save_checkpoint
from detector.cli import command
from detector.config_yaml import with_overrides
from detector.errors import RunError
from detector.inference.predictor import model_of
from detector.weights.foreign import SOURCES
from detector.weights.name_maps import Said
from detector.weights.to_torchvision import advice_for_torchvision, to_torchvision


def four_numbers(text: str) -> tuple[float, float, float, float]:
    """For argparse, which tells a ValueError as the user's mistake."""
    x, y, w, h = (float(number) for number in text.split(","))
    if not all(math.isfinite(number) and number > 0 for number in (x, y, w, h)):
        raise ValueError
    return x, y, w, h


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, convert, say what was assumed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("src", type=Path, metavar="SRC", help=".pt, .pth, .pkl, .npz or .safetensors")
    parser.add_argument("dst", type=Path, metavar="DST", help="file to write; must not exist")
    parser.add_argument(
        "--source", choices=["auto", *SOURCES], default="auto", help="whose it is (default: recognise it)"
    )
    parser.add_argument("--categories", metavar="FILE.json|A,B,C", help="classes in the order of the outputs")
    parser.add_argument("--norm-eps", type=float, help="epsilon of the backbone's batch norms")
    parser.add_argument("--style", choices=["pytorch", "caffe"], help="of mmdetection's backbone and pictures")
    parser.add_argument(
        "--box-weights",
        metavar="X,Y,W,H",
        type=four_numbers,
        help="what predicted boxes are divided by (default: 1,1,1,1)",
    )
    parser.add_argument("--to", choices=["torchvision"], help="the other direction")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change, as model.stride_in=3x3")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.dst.exists():
        parser.error(f"{arguments.dst} exists; remove it or choose another name")
    if arguments.dst.suffix not in (".pt", ".pth"):
        parser.error(f"DST must end in .pt or .pth, got {arguments.dst}")
    if not arguments.dst.parent.is_dir():
        parser.error(f"the folder of {arguments.dst} does not exist; make it first")
    if arguments.norm_eps is not None and not 0 <= arguments.norm_eps < 1:
        parser.error(f"--norm-eps must be within 0 and 1, got {arguments.norm_eps}")
    told = [arguments.categories, arguments.norm_eps, arguments.style, arguments.box_weights]
    if arguments.to == "torchvision":
        if any(option is not None for option in told) or arguments.overrides:
            parser.error("--to torchvision takes no other options: the checkpoint says everything")
        state = load_checkpoint(arguments.src)
        written = to_torchvision(state.weights, state.config.model, state.categories)
        temporary = arguments.dst.with_name(f".{arguments.dst.name}.tmp")
        try:
            torch.save(written, temporary)
            temporary.replace(arguments.dst)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            raise RunError(f"{arguments.dst} cannot be written: {error}") from None
        finally:
            temporary.unlink(missing_ok=True)
        print(f"{arguments.dst}: a state dict for torchvision")
        print("\n".join(advice_for_torchvision(state.config.model, state.categories)))
        return 0
    said = Said(
        None if arguments.source == "auto" else arguments.source,
        arguments.categories,
        arguments.norm_eps,
        arguments.style,
        arguments.box_weights,
    )
    state = import_checkpoint(arguments.src, said=said)
    state.config = with_overrides(state.config, arguments.overrides)
    model_of(state, torch.device("cpu"))  # overrides may describe another network than the file's
    save_checkpoint(state, arguments.dst)
    print("\n".join(state.origin))
    names = state.categories.names
    print(
        f"{arguments.dst}: {state.config.model.backbone}, {len(names)} classes ({', '.join(names[:4])}{', ...' * (len(names) > 4)})\n"
        "next:\n"
        f"  python tools/predict.py --checkpoint {arguments.dst} PICTURES --output-dir DIR\n"
        f"  python tools/train.py --config configs/finetune_from_coco.yaml --init-from {arguments.dst}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
