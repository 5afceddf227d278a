"""How every command ends: 0 done, 2 (rarely 1) a user error as one message, 128 + signal when stopped, else a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from detector.errors import Interrupted, UserError


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
    """The message alone of an error raised in a loader worker, which arrives with the worker's traceback."""
    if not text.startswith("Caught ") or "in DataLoader worker process" not in text.splitlines()[0]:
        return text
    return text.rstrip().splitlines()[-1].partition(": ")[2]
