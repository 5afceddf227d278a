"""`python -m detector COMMAND ...`: the tools, from a clone or from an installed package."""

from __future__ import annotations

import importlib.util
import sys

from detector.cli import package_folder

COMMANDS = {
    "train": "train a detector from a YAML config",
    "eval": "evaluate a checkpoint, or any COCO results file, in COCO AP",
    "predict": "detect objects in images",
    "get_data": "download, convert or split datasets",
    "convert_weights": "convert RetinaNets from and to torchvision, detectron2 and mmdetection",
    "sweep": "try settings and seeds, and compare the runs",
    "compare": "test whether differences between runs are significant",
    "analyze_loss": "report which examples dominate the class loss",
    "plot": "plot runs or losses",
    "redact": "take paths, host and user names out of files to send",
}
"""The commands and what each is for; a file of this name in `tools` implements each."""


def usage() -> str:
    """The text of `python -m detector --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {purpose}" for name, purpose in COMMANDS.items()]
    return "\n".join(
        ["usage: python -m detector COMMAND [options]", "", "commands:", *lines, "", "COMMAND --help explains each."]
    )


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        from detector import __version__

        print(__version__)
        return 0
    if name not in COMMANDS:
        print(f"error: COMMAND must be one of {', '.join(COMMANDS)}, got {name}", file=sys.stderr)
        return 2
    path = package_folder("tools") / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"detector_tools_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    tool = importlib.util.module_from_spec(spec)
    before = list(sys.path)
    sys.argv[0] = f"python -m detector {name}"
    spec.loader.exec_module(tool)
    sys.path[:] = before  # a tool puts its clone on the path, which an installed package must not
    return int(tool.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
