"""Figures of losses, loss concentration and calibration. They need matplotlib (the extra `plots`)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detector.errors import FigureError

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""x and y, (n,) each."""


def import_matplotlib(module: str = "matplotlib") -> Any:
    """Import matplotlib or one of its modules.

    Raises:
        FigureError: matplotlib is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise FigureError(
            f"figures need matplotlib: {error}; pip install 'retinanet-detector[plots]', or, in a clone, "
            "uv sync --extra plots"
        ) from None


def subplots(*shape: int, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """Create a figure and its axes without pyplot, which would interfere with a notebook that trains.

    Raises:
        FigureError: matplotlib is not installed.
    """
    figure = import_matplotlib("matplotlib.figure").Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(*shape, **options)


def save(figure: Any, path: Path) -> None:
    """Write a .svg or .png file; equal figures give equal bytes.

    Raises:
        FigureError: another file type.
    """
    if path.suffix not in (".svg", ".png"):
        raise FigureError(f"a figure must be a .svg or .png file, got {path}")
    with import_matplotlib().rc_context({"svg.hashsalt": "detector"}):  # otherwise ids are random
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=130)


def loss_curves(curves: Mapping[str, Curve], *, x_label: str, y_label: str, title: str) -> Any:
    """Draw labelled lines over p_t or x_t (the paper's figures 1, 5 and 6)."""
    figure, axes = subplots(figsize=(6.4, 4.2))
    for name, (x, y) in curves.items():
        axes.plot(x, y, label=name)
    axes.set(xlabel=x_label, ylabel=y_label, title=title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    return figure


def cumulative_loss(positive: Mapping[str, Curve], negative: Mapping[str, Curve]) -> Any:
    """Draw share of the loss over share of the examples, easiest first, for positives and negatives (figure 4)."""
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
    """Draw histograms of p_t; the x of each are the left edges of its bins, of equal width."""
    figure, axes = subplots(figsize=(6.4, 4.2))
    for (x, y), side in ((negative, "negatives"), (positive, "positives")):
        axes.bar(x, y, width=1 / len(x), align="edge", alpha=0.6, label=side)
    axes.set(xlabel="p_t, probability of the ground truth", ylabel="entries", yscale="log", xlim=(0, 1))
    axes.legend(fontsize="small")
    return figure


def reliability(score: Sequence[float], frequency: Sequence[float], *, expected_error: float) -> Any:
    """Draw the share of positives over the score."""
    figure, axes = subplots(figsize=(4.6, 4.2))
    axes.plot([0, 1], [0, 1], color="grey", linewidth=1, linestyle=":")
    axes.plot(score, frequency, marker="o", markersize=4)
    axes.set(
        xlabel="score", ylabel="share of positives", xlim=(0, 1), ylim=(0, 1),
        title=f"expected calibration error {expected_error:.3f}",
    )  # fmt: skip
    axes.grid(alpha=0.3)
    return figure


def learning_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Any:
    """Draw the losses and the validation AP of runs over epochs.

    Args:
        runs: the records of each run's metrics.jsonl, by the label to show.
    """
    figure, (loss_axes, ap_axes) = subplots(1, 2, figsize=(10, 3.6))
    for i, (name, records) in enumerate(runs.items()):
        color = f"C{i}"
        steps = [r for r in records if "lr" in r]
        scores = [r for r in records if r.get("split") == "val"]
        loss_axes.plot([r["epoch"] for r in steps], [r["loss"] for r in steps], color=color, linewidth=1, label=name)
        epochs = [r["epoch"] for r in scores]
        losses = [r.get("loss", np.nan) for r in scores]
        loss_axes.plot(epochs, losses, color=color, linewidth=1, linestyle=":", marker=".", markersize=3)
        ap_axes.plot(epochs, [r["AP"] for r in scores], color=color, marker="o", markersize=3, label=f"{name}: AP")
        ap_axes.plot(epochs, [r["AP50"] for r in scores], color=color, marker="o", markersize=3, linestyle=":")
    loss_axes.set(xlabel="epoch", ylabel="loss (validation dotted)", yscale="log")
    ap_axes.set(xlabel="epoch", ylabel="validation AP (AP50 dotted)", ylim=(0, 1))
    ap_axes.legend(fontsize="small")
    for axes in (loss_axes, ap_axes):
        axes.grid(alpha=0.3)
    return figure
