#!/usr/bin/env python
"""Convert another framework's RetinaNet to a checkpoint, or a checkpoint to torchvision's format.

examples:
  python tools/convert_weights.py model_final_5bd44e.pkl retinanet.pt
  python tools/convert_weights.py retinanet.pt retinanet_torchvision.pth --to torchvision

The framework (torchvision, detectron2 or mmdetection) is recognised by the names of the tensors. The options supply
facts that a file may lack; docs/weights.md lists what is assumed otherwise. Nothing in a file is ever run.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.atomic import atomic_file
from detector.cli import command
from detector.config_yaml import with_overrides


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the command line, convert, and print what was assumed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "src", type=Path, metavar="SRC", help="file to read: .pt, .pth, .pkl, .npz or .safetensors (required)"
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="file to write, .pt or .pth; must not exist (required)")
    parser.add_argument(
        "--source",
        choices=["auto", "torchvision", "detectron2", "mmdet"],
        default="auto",
        help="framework of SRC; auto: recognise it (default: auto)",
    )
    parser.add_argument(
        "--categories",
        metavar="FILE.json|A,B,C",
        help="classes in the order of the outputs: a COCO file or names (default: the file's names, or COCO's)",
    )
    parser.add_argument(
        "--norm-eps", type=float, metavar="EPS",
        help="epsilon of the backbone's batch norms "
        "(default: 1e-5; 0 for torchvision's frozen ones with COCO's outputs)",
    )  # fmt: skip
    parser.add_argument(
        "--style", choices=["pytorch", "caffe"],
        help="mmdetection's kind of backbone and input (default: from the config in the file, or the file name)",
    )  # fmt: skip
    parser.add_argument(
        "--box-weights", metavar="X,Y,W,H", type=box_weights,
        help="divisors of the predicted dx, dy, dw, dh (default: from the config in the file, or 1,1,1,1)",
    )  # fmt: skip
    parser.add_argument(
        "--to", choices=["torchvision"], help="convert the checkpoint SRC to this framework (default: convert from it)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value",
        help="overrides of the imported settings, e.g. data.min_size=640 (default: none)",
    )  # fmt: skip
    arguments = parser.parse_intermixed_args(argv)
    if arguments.dst.exists():
        parser.error(f"DST must not exist, got {arguments.dst}; remove it or choose another name")
    if arguments.dst.suffix not in (".pt", ".pth"):
        parser.error(f"DST must end in .pt or .pth, got {arguments.dst}")
    if not arguments.dst.parent.is_dir():
        parser.error(f"the folder of DST must exist, got {arguments.dst}; create it first")
    if arguments.norm_eps is not None and not 0 <= arguments.norm_eps < 1:
        parser.error(f"--norm-eps must be at least 0 and less than 1, got {arguments.norm_eps}")
    # Imported only now, because loading torch takes seconds that a mistake above should not cost.
    import torch

    from detector.checkpoint import import_checkpoint, save_checkpoint
    from detector.inference.predictor import model_of
    from detector.weights.import_facts import ImportOptions

    options = ImportOptions(
        source=None if arguments.source == "auto" else arguments.source,
        categories=arguments.categories,
        norm_eps=arguments.norm_eps,
        style=arguments.style,
        box_weights=arguments.box_weights,
    )
    if arguments.to == "torchvision":
        if options != ImportOptions() or arguments.overrides:
            parser.error("--to torchvision takes no other options: the checkpoint contains all facts")
        return export(arguments.src, arguments.dst)
    state = import_checkpoint(arguments.src, options=options)
    state.config = with_overrides(state.config, arguments.overrides)
    model_of(state, torch.device("cpu"))  # raises an error if the overrides describe another network than the file's
    save_checkpoint(state, arguments.dst)
    print("\n".join(state.origin))
    names = state.categories.names
    print(
        f"{arguments.dst}: {state.config.model.backbone}, {len(names)} classes "
        f"({', '.join(names[:4])}{', ...' * (len(names) > 4)})\n"
        "next:\n"
        f"  python tools/predict.py --checkpoint {arguments.dst} IMAGES --output-dir DIR\n"
        f"  python tools/train.py --config configs/finetune_from_coco.yaml --init-from {arguments.dst}"
    )
    return 0


def export(checkpoint: Path, path: Path) -> int:
    """Write a checkpoint's weights for torchvision."""
    import torch

    from detector.checkpoint import load_checkpoint
    from detector.weights.to_torchvision import advice_for_torchvision, to_torchvision

    state = load_checkpoint(checkpoint)
    state_dict = to_torchvision(state.weights, state.config.model, state.categories)
    with atomic_file(path) as file:
        torch.save(state_dict, file)
    print(f"{path}: a state dict for torchvision")
    print("\n".join(advice_for_torchvision(state.config.model, state.categories)))
    return 0


def box_weights(text: str) -> tuple[float, float, float, float]:
    """Parse four positive numbers; argparse reports a ValueError as a user error."""
    x, y, w, h = (float(number) for number in text.split(","))
    if not all(math.isfinite(number) and number > 0 for number in (x, y, w, h)):
        raise ValueError
    return x, y, w, h


if __name__ == "__main__":
    sys.exit(main())
