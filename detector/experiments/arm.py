"""Arms of a comparison: the runs of a recipe, and paired differences between two recipes with confidence intervals.

Two sources of noise move an AP without a change of the recipe: the seed (and fold) of a training, and the images of the
validation set. The first is measured by the spread over runs, the second by a bootstrap over images. Arms are compared
in pairs: same seeds, same folds, same resampled images.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.experiments.statistics import CONFIDENCE, independent_repetitions, student_quantile

Replicates = NDArray[np.float64]
"""(R,) AP on each of R resamplings of the validation images, the same for all runs with the same validation set."""


@dataclass
class Arm:
    """The runs of one recipe, by run key (`seed0` or `seed0_fold1`). Equal keys of different arms form pairs."""

    name: str
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Contents of each run's metrics.json."""
    replicates: dict[str, Replicates] = field(default_factory=dict)
    """Bootstrap AP of each run that has detections."""
    val_sets: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each run's validation set."""
    excluded: str = ""
    """Why the arm is listed but not compared, e.g. `failed: ...` or `pruned: ...`; empty if it is compared."""

    def values(self, metric: str = "AP") -> dict[str, float]:
        """One number per run: a metric of metrics.json, or the AP of a class. Undefined values are left out."""
        found = {run: _value(metrics, metric) for run, metrics in self.metrics.items()}
        return {run: value for run, value in found.items() if value >= 0}

    @property
    def mean(self) -> float:
        """Mean AP over all runs; nan without runs."""
        values = self.values().values()
        return statistics.fmean(values) if values else math.nan


def _value(metrics: Mapping[str, Any], metric: str) -> float:
    if metric in metrics:
        return float(metrics[metric])
    return next((float(row["AP"]) for row in metrics["per_class"] if row["name"] == metric), -1.0)


def interval_over_images(arm: Arm) -> tuple[float, float] | None:
    """Bootstrap interval of an arm's AP over images, corrected for the bootstrap's bias; None without detections."""
    values = arm.values()
    if not values or not values.keys() <= arm.replicates.keys():
        return None
    means = np.nanmean([arm.replicates[run] for run in values], axis=0)
    shift = float(arm.mean - np.nanmean(means))
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low) + shift, float(high) + shift


class Difference(NamedTuple):
    """AP of one arm minus AP of another, over the runs that both have."""

    mean: float
    low: float
    high: float
    repetitions: int
    over_images: bool
    """Whether the interval covers the choice of validation images, too."""

    @property
    def testable(self) -> bool:
        """Whether there are enough repetitions for a significance test: a single seed has no spread."""
        return self.repetitions > 1

    @property
    def significant(self) -> bool:
        """Whether the confidence interval excludes zero."""
        return self.testable and not self.low <= 0 <= self.high


def paired_difference(one: Arm, other: Arm, *, comparisons: int = 1) -> Difference | None:
    """Compute the paired difference of two arms with its confidence interval; None if they have no run in common.

    The half-width is that over seeds (Student's t: 4.3 standard errors with three seeds) and that over images
    (bootstrap) added in quadrature, so that neither source of noise hides the other. Each fold is tested on other
    images, so the spread over folds covers both sources.

    Args:
        one: the arm to compare.
        other: the arm to subtract.
        comparisons: number of differences whose intervals hold simultaneously with 95 % (Bonferroni correction).

    Raises:
        RunError: scipy is not installed.
    """
    a, b = one.values(), other.values()
    common = [run for run in a if run in b and one.val_sets.get(run) == other.val_sets.get(run)]
    if not common:
        return None
    repetitions, correction = independent_repetitions({run: a[run] - b[run] for run in common})
    n, mean = len(repetitions), statistics.fmean(repetitions)
    tail = (1 - CONFIDENCE) / 2 / comparisons
    over_runs = over_images = 0.0
    if n > 1:
        error = statistics.stdev(repetitions) * math.sqrt(1 / n + correction)
        over_runs = student_quantile(1 - tail, n - 1) * error
    resampled = all(run in one.replicates and run in other.replicates for run in common)
    if resampled and not correction:
        differences = np.nanmean([one.replicates[run] - other.replicates[run] for run in common], axis=0)
        over_images = statistics.NormalDist().inv_cdf(1 - tail) * float(np.nanstd(differences, ddof=1))
    half_width = math.hypot(over_runs, over_images)
    return Difference(mean, mean - half_width, mean + half_width, n, resampled or correction > 0)
