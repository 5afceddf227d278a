"""Errors that a user can cause or fix. `detector.cli` converts a `UserError` to one message and exit code 2."""

from __future__ import annotations

import signal


class UserError(ValueError):
    """A mistake in a command, a config or the data. The message states what, where, and what to do."""

    exit_code = 2


class ConfigError(UserError):
    """Invalid settings. The message lists all of them, each with its full key, its source and a remedy."""


class DatasetError(UserError):
    """A dataset that cannot be used. The message lists every reason."""


class ImageError(UserError):
    """An image file that cannot be used. The message names the file and the reason."""


class ResultsError(UserError):
    """A COCO results file that cannot be scored. The message lists everything wrong with it."""


class WeightsError(UserError):
    """Weights that cannot be read or do not fit the model. The message names the file and the tensors."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or used. The message names the file and the reason."""


class RunError(UserError):
    """A run that cannot start or continue, or a file that it cannot read or write."""


class WorkerError(RunError):
    """A loader worker that died or hangs. The message names it and the image that it read."""


class RankError(RunError):
    """Another process of the run that died, hangs or is too slow. The message names it."""


class ReportedElsewhere(RunError):  # noqa: N818 (it is no error of its own)
    """An error that another process of the run reports, so that it is printed once."""


class DivergedError(RunError):
    """A loss, a gradient or a weight is no longer finite."""


class InputError(UserError):
    """Inputs of a prediction that name no image, or an argument that is no image."""


class DownloadError(UserError):
    """A dataset that cannot be fetched or unpacked.

    Args:
        message: what, where and what to do.
        exit_code: 2 where the user can fix it, 1 where the network or the server is at fault.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class FigureError(UserError):
    """A figure that cannot be drawn."""


class Interrupted(Exception):  # noqa: N818 (not an error: the user asked for it)
    """A signal ended the run; no finished step is lost.

    Args:
        signum: the signal's number.
        outcome: what was saved, and how to continue.
    """

    def __init__(self, signum: int, outcome: str = "checkpoint saved; continue with --resume auto") -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {outcome}")
        self.signum = signum
