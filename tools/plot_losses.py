#!/usr/bin/env python
"""Losses against the probability of the truth, for positives: python tools/plot_losses.py FORM... --output losses.svg.

A FORM is a name, or NAME:key=value,...; without any, the paper's figure 1. Names and their settings:
ce, focal (gamma, alpha), focal_star (gamma, beta), poly1 (gamma, epsilon), varifocal, quality_focal (gamma).

Figures of Lin et al. 2017 (arXiv 1708.02002v2), whose forms are
    SET="ce focal:gamma=2 focal_star:gamma=2,beta=1 focal_star:gamma=4,beta=0"
figure 5, the loss by x_t:             $SET --against x_t
figure 6, its derivative by the logit: $SET --against x_t --gradient
Figure 7 is curves as in figure 5, of FL* with many gammas and betas, coloured by the AP of detectors trained with each; their curves
can be drawn here, but not their AP.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from detector.cli import command
from detector.errors import FigureError
from detector.losses import (
    poly1_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    varifocal_loss,
)
from detector.reports.figures import loss_curves, save

FIGURE_1 = ["focal:gamma=0", "focal:gamma=0.5", "focal:gamma=1", "focal:gamma=2", "focal:gamma=5"]


def _with_alpha(logits: Tensor, targets: Tensor, *, gamma: float = 2.0, alpha: float | None = None) -> Tensor:
    return sigmoid_focal_loss(logits, targets, gamma=gamma, alpha=alpha)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return sigmoid_focal_loss(logits, targets, gamma=0.0, alpha=None)


def _poly1(logits: Tensor, targets: Tensor, *, gamma: float = 2.0, epsilon: float = 1.0) -> Tensor:
    return poly1_focal_loss(logits, targets, alpha=None, gamma=gamma, epsilon=epsilon)


FORMS: dict[str, Callable[..., Tensor]] = {
    "ce": _cross_entropy,
    "focal": _with_alpha,
    "focal_star": sigmoid_focal_star_loss,
    "poly1": _poly1,
    "varifocal": varifocal_loss,
    "quality_focal": quality_focal_loss,
}


@command
def main(argv: list[str] | None = None) -> int:
    """Parse, compute, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("forms", nargs="*", metavar="FORM", default=FIGURE_1)
    parser.add_argument("--against", choices=["p_t", "x_t"], default="p_t", help="probability or logit of the truth")
    parser.add_argument("--gradient", action="store_true", help="the derivative by the logit instead of the loss")
    parser.add_argument("--output", type=Path, required=True, help=".svg or .png")
    arguments = parser.parse_args(argv)
    x = torch.linspace(-7, 7, 701, dtype=torch.float64)
    if arguments.against == "p_t":
        x = torch.logit(torch.linspace(0.001, 0.999, 999, dtype=torch.float64))
    curves = {}
    for form in arguments.forms:
        loss, settings = parse_form(form)
        leaf = x.clone().requires_grad_()
        try:
            value = loss(leaf, torch.ones_like(leaf), **settings)
        except (TypeError, ValueError) as error:
            raise FigureError(f"form {form} cannot be drawn: {error}") from None
        y = torch.autograd.grad(value.sum(), leaf)[0] if arguments.gradient else value.detach()
        curves[form] = ((x if arguments.against == "x_t" else torch.sigmoid(x)).numpy(), y.numpy())
    what = "derivative by x_t" if arguments.gradient else "loss"
    name = "x_t, logit of the truth" if arguments.against == "x_t" else "p_t, probability of the truth"
    save(loss_curves(curves, x_label=name, y_label=what, title="losses of positives"), arguments.output)
    print(f"written: {arguments.output}")
    return 0


def parse_form(text: str) -> tuple[Callable[..., Tensor], dict[str, float]]:
    """A form's function and its settings.

    Raises:
        FigureError: an unknown name, or settings that are no numbers.
    """
    name, _, rest = text.partition(":")
    if name not in FORMS:
        raise FigureError(f"a form must be one of {', '.join(FORMS)}, got {name!r}")
    try:
        pairs = [pair.split("=") for pair in rest.split(",")] if rest else []
        return FORMS[name], {key: float(value) for key, value in pairs}
    except ValueError:
        raise FigureError(f"settings of a form must be key=number,..., got {rest!r} in {text!r}") from None


if __name__ == "__main__":
    sys.exit(main())
