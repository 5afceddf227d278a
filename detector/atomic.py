"""Files that are complete or absent: write to a temporary file, then rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from detector.errors import RunError


def make_folder(path: Path) -> None:
    """Make a folder for results, with those above it, if it is not there.

    Raises:
        RunError: the file system refuses.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"--output-dir must be a folder to write in, got {path}: {error.strerror}; choose another"
        ) from None


def write_json(content: Any, path: Path) -> None:
    """Write a file that is whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)
