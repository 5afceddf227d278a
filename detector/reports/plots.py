"""What `tools/plot.py` draws: loss functions, and the learning curves of runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from detector.errors import FigureError, RunError
from detector.losses import (
    poly1_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    varifocal_loss,
)
from detector.reports.figures import learning_curves, loss_curves, save
from detector.reports.records import read_records
from detector.text import printable

FORMS: dict[str, Callable[..., Tensor]] = {
    "ce": partial(sigmoid_focal_loss, gamma=0.0, alpha=None),
    "focal": partial(sigmoid_focal_loss, alpha=None),
    "focal_star": sigmoid_focal_star_loss,
    "poly1": partial(poly1_focal_loss, alpha=None),
    "varifocal": varifocal_loss,
    "quality_focal": quality_focal_loss,
}
FIGURE_1 = ("focal:gamma=0", "focal:gamma=0.5", "focal:gamma=1", "focal:gamma=2", "focal:gamma=5")
"""The forms of the paper's figure 1."""


def plot_losses(forms: Sequence[str], output: Path, *, against: Literal["p_t", "x_t"], gradient: bool) -> None:
    """Draw loss functions of a positive.

    Args:
        forms: names from FORMS, or NAME:key=number,... with settings.
        output: a .svg or .png file.
        against: the probability (p_t) or the logit (x_t) of the ground truth.
        gradient: draw the derivative with respect to the logit instead of the loss.

    Raises:
        FigureError: an invalid form, another file type, or no matplotlib.
    """
    x = torch.linspace(-7, 7, 701, dtype=torch.float64)
    if against == "p_t":
        x = torch.logit(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    curves = {}
    for form in forms:
        loss, settings = _parse_form(form)
        leaf = x.clone().requires_grad_()
        try:
            value = loss(leaf, torch.ones_like(leaf), **settings)
        except (AttributeError, TypeError, ValueError) as error:
            raise FigureError(f"form {form} cannot be drawn: {error}") from None
        y = torch.autograd.grad(value.sum(), leaf)[0] if gradient else value.detach()
        curves[form] = ((x if against == "x_t" else torch.sigmoid(x)).numpy(), y.numpy())
    x_label = {"x_t": "x_t, logit of the ground truth", "p_t": "p_t, probability of the ground truth"}[against]
    y_label = "derivative by x_t" if gradient else "loss"
    save(loss_curves(curves, x_label=x_label, y_label=y_label, title="losses of positives"), output)


def _parse_form(text: str) -> tuple[Callable[..., Tensor], dict[str, float]]:
    name, _, rest = text.partition(":")
    if name not in FORMS:
        raise FigureError(f"a form must be one of {', '.join(FORMS)}, got {printable(name)!r}")
    try:
        pairs = [pair.split("=") for pair in rest.split(",")] if rest else []
        return FORMS[name], {key: float(value) for key, value in pairs}
    except ValueError:
        raise FigureError(f"settings of a form must be key=number,..., got {rest!r} in {text!r}") from None


def plot_runs(runs: Sequence[str], output: Path) -> None:
    """Draw the learning curves of runs.

    Args:
        runs: output folders of training, each optionally as LABEL=FOLDER.
        output: a .svg or .png file.

    Raises:
        RunError: a folder without a metrics.jsonl, or one that cannot be read.
        FigureError: another file type, or no matplotlib.
    """
    curves: dict[str, list[dict[str, Any]]] = {}
    for text in runs:
        label, sign, folder = text.partition("=")
        if not sign or Path(text).is_dir():  # a run's own name may contain the sign: runs/lr=0.01
            label, folder = Path(text).name, text
        path = Path(folder) / "metrics.jsonl"
        if not path.exists():
            raise RunError(f"a run must be the output folder of a training, got {folder}, which has no metrics.jsonl")
        records = read_records(path)
        if records.damaged:
            print(f"warning: {path}: {records.damaged:,} damaged records are left out", file=sys.stderr)
        curves[printable(label)] = [*records.training, *records.validation]
    save(learning_curves(curves), output)
