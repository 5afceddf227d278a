"""How every tool ends: 0 done, 2 the user's mistake in one clear error, 128 + signal when stopped, else a traceback."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from detector.coco_eval import ResultsError
from detector.config import ConfigError
from detector.datasets.coco import DatasetError
from detector.datasets.images import ImageError
from detector.engine.checkpoint import CheckpointError
from detector.engine.errors import Interrupted, RunError
from detector.engine.predict import InputError
from detector.models.reading import WeightsError
from detector.reports.figures import FigureError

USER_ERRORS = (
    ConfigError,
    DatasetError,
    ImageError,
    ResultsError,
    CheckpointError,
    WeightsError,
    RunError,
    InputError,
    FigureError,
)


def command(main: Callable[[list[str] | None], int]) -> Callable[..., int]:
    """Turn a tool's main into one that tells users' mistakes without a traceback."""

    @functools.wraps(main)
    def run(argv: list[str] | None = None) -> int:
        try:
            return main(argv)
        except USER_ERRORS as error:
            print(f"error: {_without_traceback(str(error))}", file=sys.stderr)
            return 2
        except Interrupted as stopped:
            print(f"{stopped}; a checkpoint is written, go on with --resume auto", file=sys.stderr)
            return 128 + stopped.signum
        except KeyboardInterrupt:
            return 130

    return run


def _without_traceback(text: str) -> str:
    """An error that a loader's worker raised comes with the worker's traceback; its last line is the message."""
    if not text.startswith("Caught ") or "in DataLoader worker process" not in text.splitlines()[0]:
        return text
    return text.rstrip().splitlines()[-1].partition(": ")[2]
