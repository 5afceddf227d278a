"""Fetch a public dataset into the data folder, convert Pascal VOC annotations to COCO, or divide a COCO file.

    python tools/get_data.py bccd                              364 blood-cell images, 8 MB
    python tools/get_data.py coco2017 --parts val,annotations  COCO 2017; all parts need 42 GB while unpacking
    python tools/get_data.py voc --images DIR --annotations DIR --list FILE --output F.json
    python tools/get_data.py split F.json --val 0.2            train.json and val.json beside it

Run it again after any interruption: it goes on where it stopped.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.dataset_tools.download import nearest
from detector.dataset_tools.public import COCO2017, get_bccd, get_coco2017
from detector.dataset_tools.stratify import split_file
from detector.dataset_tools.voc import VocResult, convert_voc
from detector.errors import DownloadError

COMMANDS = ("bccd", "coco2017", "voc", "split")
SHOWN_PROBLEMS = 20


class Parser(argparse.ArgumentParser):
    """argparse, but a mistake is a DownloadError: one line, no usage text."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse wants to print."""
        raise DownloadError(f"{message}; see {self.prog} --help", exit_code=2)


def main(argv: list[str] | None = None) -> int:
    """Run the tool; return 0, 2 for what the user can mend, 1 for other failures, 130 when stopped by Ctrl-C."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def run(argv: list[str]) -> None:
    """Parse and do it; raises DownloadError."""
    if argv and not argv[0].startswith("-") and argv[0] not in COMMANDS:
        choices = ", ".join(COMMANDS)
        raise DownloadError(
            f"dataset must be one of {choices}, got {argv[0]!r}{nearest(argv[0], COMMANDS)}", exit_code=2
        )
    args = parse(argv)
    if args.dataset == "bccd":
        get_bccd(args.root, keep_archives=args.keep_archives)
    elif args.dataset == "coco2017":
        get_coco2017(args.root, parts=args.parts.split(","), keep_archives=args.keep_archives)
    elif args.dataset == "split":
        split(args)
    else:
        categories = None if args.categories is None else args.categories.split(",")
        try:
            result = convert_voc(
                args.images, args.annotations, list_file=args.list, output=args.output, categories=categories
            )
        except ValueError as error:
            raise DownloadError(str(error), exit_code=2) from error
        report(result, args.output)


def split(args: argparse.Namespace) -> None:
    """Divide a COCO file and print what the parts hold."""
    fractions = {"val": args.val} | ({"test": args.test} if args.test is not None else {})
    output_dir = args.output_dir or args.annotations.parent
    try:
        parts = split_file(args.annotations, fractions, output_dir=output_dir, seed=args.seed)
    except ValueError as error:  # DatasetError is one
        raise DownloadError(str(error), exit_code=2) from error
    for name, part in parts.items():
        counts = Counter(a.get("category_id") for a in part["annotations"] if isinstance(a, dict))
        named = {
            c["name"]: counts[c["id"]] for c in part["categories"] if isinstance(c, dict) and {"id", "name"} <= c.keys()
        }
        classes = ", ".join(f"{title} {count}" for title, count in sorted(named.items(), key=lambda item: -item[1]))
        print(f"{output_dir / name}.json: {len(part['images'])} images, {len(part['annotations'])} objects ({classes})")


def report(result: VocResult, output: Path) -> None:
    """Print the problems, of many the first with all in a file, and what was written and left out."""
    problems, boxes = result.problems, result.coco["annotations"]
    for problem in problems[:SHOWN_PROBLEMS]:
        print(problem)
    if len(problems) > SHOWN_PROBLEMS:
        listed = output.with_suffix(".problems.txt")
        listed.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8")
        print(f"... and {len(problems) - SHOWN_PROBLEMS} more problems; all {len(problems)} are listed in {listed}")
    difficult = sum("ignore" in box for box in boxes)
    lost_images, lost_boxes = (sum(problem.lost == what for problem in problems) for what in ("image", "box"))
    print(
        f"{output}: {len(result.coco['images'])} images, {len(boxes)} boxes ({difficult} difficult, marked ignore); "
        f"left out: {lost_images} images, {lost_boxes} boxes of other images; {len(problems)} problems"
    )


def parse(argv: list[str]) -> argparse.Namespace:
    """Parse the arguments; raises DownloadError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="dataset", required=True)
    for name in ("bccd", "coco2017"):
        command = commands.add_parser(name)
        command.add_argument("--root", type=Path, default=Path("data"), help="folder for the datasets (default: data)")
        command.add_argument("--keep-archives", action="store_true", help="keep the zip files in ROOT/archives")
        if name == "coco2017":
            parts = ",".join(COCO2017)
            command.add_argument("--parts", default=parts, help=f"comma-separated, default: {parts}")
    voc = commands.add_parser("voc")
    voc.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    voc.add_argument("--annotations", type=Path, required=True, metavar="DIR", help="folder of the XML files")
    voc.add_argument("--list", type=Path, required=True, metavar="FILE", help="image names, one a line, no suffix")
    voc.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="F.json",
        help=f"COCO JSON to write; more than {SHOWN_PROBLEMS} problems are listed in F.problems.txt beside it",
    )
    voc.add_argument("--categories", metavar="A,B", help="names in id order (default: those found, sorted)")
    division = commands.add_parser("split")
    division.add_argument("annotations", type=Path, metavar="F.json", help="COCO JSON")
    division.add_argument("--val", type=float, default=0.2, help="share of the images (default: %(default)s)")
    division.add_argument("--test", type=float, help="share of the images (default: none)")
    division.add_argument("--seed", type=int, default=0, help="another one divides otherwise (default: 0)")
    division.add_argument("--output-dir", type=Path, metavar="D", help="default: the folder of F.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
