"""Figures of losses: curves over p_t, and who holds the loss. They need matplotlib (the extra `plots`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import FigureError

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and y, (n,) each."""


def pyplot() -> Any:
    """matplotlib's, drawing into files only.

    Raises:
        FigureError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError:
        raise FigureError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def subplots(*shape: int, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure and its axes without pyplot, which would take over the figures of a notebook that trains.

    Raises:
        FigureError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise FigureError("figures need matplotlib, which is not installed: pip install matplotlib") from None
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def save(figure: Any, path: Path) -> None:
    """Write a .svg or .png, the same bytes for the same figure."""
    if path.suffix not in (".svg", ".png"):
        raise FigureError(f"a figure must end in .svg or .png, got {path}")
    with pyplot().rc_context({"svg.hashsalt": "detector"}):  # else ids are drawn anew each time
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)
    pyplot().close(figure)


def loss_curves(curves: Mapping[str, Curve], *, x_label: str, y_label: str, title: str) -> Any:
    """Lines over p_t or x_t, labelled (the paper's figures 1, 5 and 6)."""
    figure, axes = subplots(figsize=(6.4, 4.2))
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def cumulative_loss(positive: Mapping[str, Curve], negative: Mapping[str, Curve]) -> Any:
    """Share of the loss against share of the examples, easiest first, positives beside negatives (figure 4)."""
    figure, both = subplots(1, 2, figsize=(10, 4.2), sharey=True)
    for axes, curves, side in zip(both, (positive, negative), ("positives", "negatives"), strict=True):
        for name, (x, y) in curves.items():
            axes.plot(x, y, label=name)
        axes.set(xlabel=f"share of the {side}, easiest first", title=side, xlim=(0, 1), ylim=(0, 1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    both[0].set_ylabel("share of their loss")
    return figure


def probabilities(positive: Curve, negative: Curve) -> Any:
    """Histograms of p_t; the x of each are the left edges of its bins, of equal width."""
    figure, axes = subplots(figsize=(6.4, 4.2))
    for (x, y), side in ((negative, "negatives"), (positive, "positives")):
        axes.bar(x, y, width=1 / len(x), align="edge", alpha=0.6, label=side)
    axes.set(xlabel="p_t, probability of the truth", ylabel="entries", yscale="log", xlim=(0, 1))
    axes.legend(fontsize="small")
    return figure


def reliability(score: Sequence[float], frequency: Sequence[float], *, expected_error: float) -> Any:
    """Share of positives against score."""
    figure, axes = subplots(figsize=(4.6, 4.2))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
    axes.plot(score, frequency, marker="o", markersize=4)
    axes.set(
        xlabel="score", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1),
        title=f"expected calibration error {expected_error:.3f}",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    return figure
