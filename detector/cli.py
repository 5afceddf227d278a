"""How commands end and print.

Exit codes: 0 done, 2 (rarely 1) a user error with one message, 128 + signal when stopped by one.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from detector.errors import CheckpointError, Interrupted, ReportedElsewhere, UserError
from detector.files import os_error_reason, os_error_text, require_regular
from detector.text import printable_lines


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Decorate a tool's `main(argv) -> exit code`: report user errors without a traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        with surviving_output():
            try:
                return main(argv)
            except ReportedElsewhere as error:
                return error.exit_code
            except UserError as error:
                _report(f"error: {_without_traceback(str(error))}", error)
                return error.exit_code
            except OSError as error:
                text = os_error_text(error) if error.errno else _without_traceback(str(error))
                _report(f"error: {text}", error)
                return UserError.exit_code
            except Interrupted as stopped:
                _report(str(stopped), stopped)
                return 128 + stopped.signum
            except KeyboardInterrupt as interrupt:
                _report("interrupted", interrupt)
                return 128 + signal.SIGINT

    return run


def _report(text: str, error: BaseException) -> None:
    """Print an error and its notes, with the text of other people's files made harmless."""
    for line in (text, *getattr(error, "__notes__", ())):
        print(printable_lines(line), file=sys.stderr)


@contextlib.contextmanager
def surviving_output() -> Iterator[None]:
    """Within the block, losing the terminal or the reader of a pipe ends the output but not the command."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Survivor(stream) for stream in before)
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        sys.stdout, sys.stderr = before


class _Survivor:
    """A text stream whose `write` and `flush` never fail.

    Args:
        stream: sys.stdout or sys.stderr; None if the process was started without it.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        if isinstance(self._stream, io.TextIOWrapper):
            self._stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 gets escapes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text, if it can be written."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        """Flush, if it can be flushed."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Discard all further output, including what is still buffered."""
        with contextlib.suppress(OSError, ValueError):
            descriptor = self._stream.fileno()
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
            if descriptor == 1:
                print(f"warning: standard output is lost ({error.strerror}); continuing without it", file=sys.stderr)


def _without_traceback(text: str) -> str:
    """Strip the worker's traceback from the message of an error that was raised in a loader worker."""
    if not text.startswith("Caught ") or "in DataLoader worker process" not in text.splitlines()[0]:
        return text
    return text.rstrip().splitlines()[-1].partition(": ")[2]


def require_checkpoint(path: Path) -> None:
    """Check that a checkpoint file exists, before torch, which reads it, is loaded.

    Raises:
        CheckpointError: it does not, or is no regular file.
    """
    try:
        require_regular(os.stat(path).st_mode, path)
    except FileNotFoundError:
        near = sorted(path.parent.glob("**/*.pt"))[:3] if path.parent.is_dir() else []
        hint = f"; there is {', '.join(map(str, near))}" if near else ""
        raise CheckpointError(f"checkpoint {path} does not exist{hint}") from None
    except (OSError, ValueError) as error:
        reason = os_error_reason(error) if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"checkpoint {path} cannot be read: {reason}") from None


def package_folder(name: str) -> Path:
    """The folder of the command-line `tools` or of the `configs`: in an installed package, or next to it in a clone."""
    package = Path(__file__).resolve().parent
    installed = package / name
    return installed if installed.is_dir() else package.parent / name
