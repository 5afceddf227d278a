"""Exit codes of the commands: 0 done, 2 (rarely 1) a user error with one message, 128 + signal when stopped by one."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path

from detector.errors import CheckpointError, Interrupted, UserError


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Decorate a tool's `main(argv) -> exit code`: report user errors without a traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except UserError as error:
            print(f"error: {_without_traceback(str(error))}", file=sys.stderr)
            return error.exit_code
        except Interrupted as stopped:
            print(f"{stopped}; checkpoint saved; continue with --resume auto", file=sys.stderr)
            return 128 + stopped.signum
        except KeyboardInterrupt:
            return 130

    return run


def _without_traceback(text: str) -> str:
    """Strip the worker's traceback from the message of an error that was raised in a loader worker."""
    if not text.startswith("Caught ") or "in DataLoader worker process" not in text.splitlines()[0]:
        return text
    return text.rstrip().splitlines()[-1].partition(": ")[2]


def require_checkpoint(path: Path) -> None:
    """Check that a checkpoint file exists, before torch, which reads it, is loaded.

    Raises:
        CheckpointError: it does not.
    """
    if not path.is_file():
        near = sorted(path.parent.glob("**/*.pt"))[:3] if path.parent.is_dir() else []
        hint = f"; there is {', '.join(map(str, near))}" if near else ""
        raise CheckpointError(f"checkpoint {path} does not exist{hint}")


def package_folder(name: str) -> Path:
    """The folder of the command-line `tools` or of the `configs`: in an installed package, or next to it in a clone."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
