#!/usr/bin/env python
"""Fetch public datasets, convert Pascal VOC annotations to COCO, or split a COCO file.

examples:
  python tools/get_data.py bccd
  python tools/get_data.py coco2017 --parts val,annotations
  python tools/get_data.py voc --images VOC2007/JPEGImages --annotations VOC2007/Annotations \\
      --list VOC2007/ImageSets/Main/train.txt --output VOC2007/train.json
  python tools/get_data.py split data/shapes/annotations/train.json --val 0.2 --output-dir /tmp/shapes_split

Every command has its own --help. An interrupted download resumes when the same command is run again.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command
from detector.dataset_tools.public import COCO2017, get_bccd, get_coco2017
from detector.dataset_tools.voc import convert_voc
from detector.datasets.problems import ANNOTATION_LEFT_OUT, IMAGE_LEFT_OUT, examples, group, write_problems
from detector.text import cut, printable

HELP = {
    "bccd": """Fetch BCCD: 364 images of blood cells, 3 classes, 8 MB.

examples:
  python tools/get_data.py bccd
  python tools/get_data.py bccd --root /data --keep-archives
""",
    "coco2017": """Fetch COCO 2017; all parts need 42 GB of disk space while unpacking.

examples:
  python tools/get_data.py coco2017
  python tools/get_data.py coco2017 --parts val,annotations
""",
    "voc": """Convert Pascal VOC annotations (one XML file per image) to one COCO file.

examples:
  python tools/get_data.py voc --images VOC2007/JPEGImages --annotations VOC2007/Annotations \\
      --list VOC2007/ImageSets/Main/train.txt --output VOC2007/train.json
  python tools/get_data.py voc --images VOC2007/JPEGImages --annotations VOC2007/Annotations \\
      --list VOC2007/ImageSets/Main/val.txt --output VOC2007/val.json --categories cat,dog,person
""",
    "split": """Split a COCO file into training, validation and test sets, stratified by class.

examples:
  python tools/get_data.py split data/shapes/annotations/train.json --val 0.2 --output-dir /tmp/shapes_split
  python tools/get_data.py split data/shapes/annotations/train.json --val 0.15 --test 0.15 --output-dir /tmp/shapes_3
""",
}


@command
def main(argv: list[str] | None = None) -> int:
    """Run one command."""
    arguments = make_parser().parse_args(argv)
    if arguments.command == "bccd":
        get_bccd(arguments.root, keep_archives=arguments.keep_archives)
    elif arguments.command == "coco2017":
        get_coco2017(arguments.root, parts=arguments.parts.split(","), keep_archives=arguments.keep_archives)
    elif arguments.command == "voc":
        convert(arguments)
    else:
        split(arguments)
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser with all commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    bccd, coco2017, voc, split = (
        commands.add_parser(name, help=text.splitlines()[0], description=text, formatter_class=raw)
        for name, text in HELP.items()
    )
    for fetch in (bccd, coco2017):
        fetch.add_argument("--root", type=Path, default=Path("data"), help="folder of all datasets (default: data)")
        fetch.add_argument(
            "--keep-archives", action="store_true", help="keep the zip files in ROOT/archives (default: delete them)"
        )
    parts = ",".join(COCO2017)
    coco2017.add_argument("--parts", default=parts, help="comma-separated parts to fetch (default: %(default)s)")

    voc.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images (required)")
    voc.add_argument(
        "--annotations", type=Path, required=True, metavar="DIR", help="folder of the XML files (required)"
    )
    voc.add_argument(
        "--list", type=Path, required=True, metavar="FILE", help="image names, one per line, without suffix (required)"
    )
    voc.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="F.json",
        help="COCO file to write; problems are listed in F.problems.tsv (required)",
    )
    voc.add_argument("--categories", metavar="A,B", help="category names in id order (default: those found, sorted)")

    split.add_argument("annotations", type=Path, metavar="F.json", help="COCO file to split")
    split.add_argument("--val", type=float, default=0.2, help="validation share of the images (default: %(default)s)")
    split.add_argument("--test", type=float, help="test share of the images (default: no test set)")
    split.add_argument("--seed", type=int, default=0, help="random seed of the split (default: %(default)s)")
    split.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="folder for train.json, val.json and test.json (default: the folder of F.json)",
    )
    return parser


def split(arguments: argparse.Namespace) -> None:
    """Split a COCO file and print the size and classes of each part."""
    from detector.dataset_tools.stratify import split_file  # loads torch

    fractions = {"val": arguments.val} | ({"test": arguments.test} if arguments.test is not None else {})
    output_dir = arguments.output_dir or arguments.annotations.parent
    parts = split_file(arguments.annotations, fractions, output_dir=output_dir, seed=arguments.seed)
    for name, part in parts.items():
        counts = Counter(repr(a.get("category_id")) for a in part["annotations"] if isinstance(a, dict))
        named = [(str(c.get("name")), counts[repr(c.get("id"))]) for c in part["categories"] if isinstance(c, dict)]
        named.sort(key=lambda item: -item[1])
        classes = cut([f"{printable(title)} {count}" for title, count in named], 100)
        print(f"{output_dir / name}.json: {len(part['images'])} images, {len(part['annotations'])} objects ({classes})")


def convert(arguments: argparse.Namespace) -> None:
    """Convert VOC annotations; print examples of the problems and a summary, and write all problems to a file."""
    categories = None if arguments.categories is None else arguments.categories.split(",")
    output = arguments.output
    result = convert_voc(
        arguments.images, arguments.annotations, list_file=arguments.list, output=output, categories=categories
    )
    problems, boxes = result.problems, result.coco["annotations"]
    findings, actions = group(problems), Counter(problem.action for problem in problems)
    listed = output.with_suffix(".problems.tsv")
    write_problems(listed, findings)
    if findings:
        print(f"{examples(findings)}\nall {len(problems)} problems are listed in {listed}")
    difficult = sum("ignore" in box for box in boxes)
    print(
        f"{output}: {len(result.coco['images'])} images, {len(boxes)} boxes ({difficult} difficult, marked ignore); "
        f"left out: {actions[IMAGE_LEFT_OUT]} images, {actions[ANNOTATION_LEFT_OUT]} boxes of other images; "
        f"{len(problems)} problems"
    )


if __name__ == "__main__":
    sys.exit(main())
