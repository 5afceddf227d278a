#!/usr/bin/env python
"""Take paths, URLs, host names and user names out of files, before they are sent to others.

Writes a copy NAME.redacted.SUFFIX next to each file. Equal paths get equal placeholders in all files of one call.

examples:
  python tools/redact.py runs/quickstart/nonfinite.json runs/quickstart/replay.json
  python tools/redact.py runs/quickstart/config.yaml runs/quickstart/problems_train.tsv terminal.log
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from detector.cli import command
from detector.redact import SUFFIXES, Redactor, this_machine, write_redacted


@command
def main(argv: list[str] | None = None) -> int:
    """Parse the arguments, write the copies, print their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help=f"one of {' '.join(SUFFIXES)} (required)")
    arguments = parser.parse_args(argv)
    for copy in write_redacted(arguments.files, Redactor(this_machine())):
        print(f"wrote {copy}; read it before you send it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
