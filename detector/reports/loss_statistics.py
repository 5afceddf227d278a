"""Which share of the class loss the hardest examples hold, for any gamma, and how well scores are calibrated.

Lin et al. 2017, section 5.1 and figure 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.reports.loss_examples import Examples

HARDEST = (0.001, 0.01, 0.1, 0.2)
"""Shares of the examples whose share of the loss is reported."""
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""Those of the paper's figure 1; its figure 4 has all but the last."""


def focal_losses(x_t: NDArray[np.float32], gamma: float) -> NDArray[np.float64]:
    """(1 - p_t)^gamma times -log(p_t), without alpha."""
    x = x_t.astype(np.float64)
    log_wrong = -np.logaddexp(0, x)  # log(1 - p_t)
    losses: NDArray[np.float64] = np.exp(gamma * log_wrong) * np.logaddexp(0, -x)
    return losses


class CumulativeLoss(NamedTuple):
    """The share of the loss that the easiest examples up to each one hold (figure 4). (n,) each, ascending."""

    examples: NDArray[np.float64]
    """Share of the examples."""
    loss: NDArray[np.float64]
    """Share of the loss."""

    def share_of_hardest(self, share: float) -> float:
        """The share of the loss that this share of the examples, the hardest ones, holds."""
        if not len(self.loss):
            return 0.0
        return float(1 - np.interp(1 - share, np.r_[0.0, self.examples], np.r_[0.0, self.loss]))


def cumulate(losses: NDArray[np.float64], weight: NDArray[np.float64]) -> CumulativeLoss:
    """Accumulate losses (n,) from the easiest example to the hardest, each representing `weight` (n,) examples."""
    order = np.argsort(losses)
    examples, loss = np.cumsum(weight[order]), np.cumsum((losses * weight)[order])
    if not len(order) or loss[-1] <= 0:
        return CumulativeLoss(np.zeros(0), np.zeros(0))
    return CumulativeLoss(examples / examples[-1], loss / loss[-1])


def cumulative_losses(examples: Examples, gammas: Sequence[float]) -> dict[str, dict[str, CumulativeLoss]]:
    """The curves of figure 4, by side (positive, negative) and gamma."""
    return {
        side: {f"{gamma:g}": cumulate(focal_losses(some.x_t, gamma) * some.alpha, some.weight) for gamma in gammas}
        for side, some in examples.by_side().items()
    }


class TableRow(NamedTuple):
    """The positive or negative examples of a group under one gamma."""

    kind: Literal["all", "class", "level"]
    """Kind of the group; a class may well be named "all" or "P3"."""
    group: str
    """The name of the class, or P3 for the level."""
    gamma: float
    side: str
    """positive or negative."""
    entries: float
    loss: float
    """The sum of the losses, with alpha."""
    hardest: tuple[float, ...]
    """Share of the loss that the hardest examples hold, for each of HARDEST."""
    ratio: float | None
    """Loss of the group's positives over that of its negatives; None if the latter is 0."""
    calibration_error: float
    """Expected calibration error of the group, both sides together."""


def loss_table(examples: Examples, *, gammas: Sequence[float], names: Sequence[str]) -> list[TableRow]:
    """The table for all examples, for each class and for each level that has any positive; `names` of the classes."""
    rows = group_rows(examples, gammas)
    for k in np.unique(examples.label[examples.positive]):
        rows += group_rows(examples.select(examples.label == k), gammas, kind="class", group=names[k])
    for level in np.unique(examples.level[examples.positive]):
        rows += group_rows(examples.select(examples.level == level), gammas, kind="level", group=f"P{level + 3}")
    return rows


def group_rows(
    examples: Examples, gammas: Sequence[float], *, kind: Literal["all", "class", "level"] = "all", group: str = "all"
) -> list[TableRow]:
    """The table's rows for one group, for each gamma the positives first."""
    sides = examples.by_side()
    error = calibration(examples).expected_error
    rows = []
    for gamma in gammas:
        losses = {side: focal_losses(some.x_t, gamma) * some.alpha for side, some in sides.items()}
        total = {side: float(losses[side] @ some.weight) for side, some in sides.items()}
        ratio = total["positive"] / total["negative"] if total["negative"] else None
        for side, some in sides.items():
            cumulative = cumulate(losses[side], some.weight)
            hardest = tuple(cumulative.share_of_hardest(share) for share in HARDEST)
            rows.append(
                TableRow(kind, group, gamma, side, float(some.weight.sum()), total[side], hardest, ratio, error)
            )
    return rows


class Calibration(NamedTuple):
    """Scores compared with the share of positives, by bins of score. (bins,) each."""

    score: NDArray[np.float64]
    """Mean score; NaN where a bin is empty."""
    frequency: NDArray[np.float64]
    """Share of positives."""
    entries: NDArray[np.float64]

    @property
    def expected_error(self) -> float:
        """Mean difference of score and share, weighted by entries (Guo et al. 2017, equation 3)."""
        filled = self.entries > 0
        if not filled.any():
            return 0.0
        gap = np.abs(self.score - self.frequency)[filled]
        return float((gap * self.entries[filled]).sum() / self.entries.sum())


def calibration(examples: Examples, *, bins: int = 15, above: float = 0.05) -> Calibration:
    """Calibrate the entries that score at least `above`: the others are nearly all background and would dominate."""
    x = np.where(examples.positive, examples.x_t, -examples.x_t).astype(np.float64)
    score = 1 / (1 + np.exp(-x))
    kept = score >= above
    index = np.minimum(((score[kept] - above) / (1 - above) * bins).astype(int), bins - 1)
    weight, positive = examples.weight[kept], examples.positive[kept]
    count = np.bincount(index, weight, bins).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return Calibration(
            np.bincount(index, weight * score[kept], bins) / count,
            np.bincount(index, weight * positive, bins) / count,
            count,
        )
