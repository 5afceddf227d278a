"""Confidence intervals and standard errors over repetitions."""

from __future__ import annotations

import functools
import math
import re
import statistics
from collections.abc import Mapping

import numpy as np

CONFIDENCE = 0.95


# ---- statistics ----------------------------------------------------------------------------------------------------


@functools.cache
def student_quantile(probability: float, freedom: int) -> float:
    """Student's t: the value not exceeded with a probability, for 1 or more degrees of freedom.

    With t = sqrt(freedom) tan(angle) the density is cos(angle)^(freedom - 1), which is smooth on a bounded interval.
    """
    angle = np.linspace(-math.pi / 2, math.pi / 2, 400_001)
    density = np.cos(angle) ** (freedom - 1)
    mass = np.concatenate([[0.0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(float(np.interp(probability, mass / mass[-1], angle)))


def by_repetition(values: Mapping[str, float]) -> tuple[list[float], float]:
    """Numbers that can be taken for independent repetitions, and the share by which they cannot.

    Without folds, each seed is one. With k folds, the seeds of a fold are averaged and each fold is one; but any two of
    them share most of their training set, so the variance of their mean is (1/n + 1/(k - 1)) s^2 and not s^2/n
    (Nadeau and Bengio 2003). Returns the numbers and that 1/(k - 1), or 0.
    """
    folds: dict[str, list[float]] = {}
    for unit, value in values.items():
        fold = re.search(r"fold\d+", unit)
        folds.setdefault(fold[0] if fold else unit, []).append(value)
    repetitions = [statistics.fmean(each) for each in folds.values()]
    shared = any("fold" in unit for unit in values) and len(repetitions) > 1
    return repetitions, 1 / (len(repetitions) - 1) if shared else 0.0


def standard_error(values: Mapping[str, float]) -> float:
    """Of the mean, over seeds and folds; nan for fewer than two."""
    repetitions, shared = by_repetition(values)
    if len(repetitions) < 2:
        return math.nan
    return statistics.stdev(repetitions) * math.sqrt(1 / len(repetitions) + shared)
