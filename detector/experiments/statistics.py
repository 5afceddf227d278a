"""Standard errors and Student's t intervals over seeds and folds."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping
from importlib.util import find_spec

from detector.errors import RunError

CONFIDENCE = 0.95


def require_packages(*names: str) -> None:
    """Check that packages of the extra `sweep` are installed.

    Raises:
        RunError: a package is missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise RunError(
            f"sweeps and comparisons need {' and '.join(missing)}: pip install 'retinanet-detector[sweep]', or "
            "uv sync --extra sweep in a clone"
        )


def student_quantile(probability: float, degrees_of_freedom: int) -> float:
    """Quantile of Student's t distribution.

    Raises:
        RunError: scipy is not installed.
    """
    require_packages("scipy")
    from scipy.special import stdtrit  # computes scipy.stats.t.ppf; scipy.stats takes seconds to import

    return float(stdtrit(degrees_of_freedom, probability))


def independent_repetitions(values: Mapping[str, float]) -> tuple[list[float], float]:
    """Average the values that are not independent, and correct for the training images that folds share.

    Without folds, every seed is a repetition. With k folds, every fold is one: the mean over its seeds. Any two folds
    share most of their training images, so the variance of the mean is (1/n + 1/(k - 1)) s^2 instead of s^2/n
    (Nadeau and Bengio 2003).

    Args:
        values: one number per run, by run key.

    Returns:
        The repetitions, and the correction 1/(k - 1), or 0 without folds.
    """
    groups: dict[str, list[float]] = {}
    for run, value in values.items():
        fold = re.search(r"fold\d+", run)
        groups.setdefault(fold[0] if fold else run, []).append(value)
    repetitions = [statistics.fmean(group) for group in groups.values()]
    has_folds = any("fold" in run for run in values) and len(repetitions) > 1
    return repetitions, 1 / (len(repetitions) - 1) if has_folds else 0.0


def standard_error(values: Mapping[str, float]) -> float:
    """Standard error of the mean over seeds and folds; nan for fewer than two.

    Args:
        values: one number per run, by run key.
    """
    repetitions, correction = independent_repetitions(values)
    if len(repetitions) < 2:
        return math.nan
    return statistics.stdev(repetitions) * math.sqrt(1 / len(repetitions) + correction)
