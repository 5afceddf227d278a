#!/usr/bin/env python
"""Compare focal losses with cross entropy on imbalanced image classification, over several seeds.

Two problems on scikit-learn's 1,797 handwritten digits of 8x8 pixels, each with a small network:

- one digit against the rest, its training examples subsampled to 1:100 (sigmoid), scored by average precision;
- all ten digits with a long tail: each has fewer training examples than the one before, the rarest 5 (softmax), scored
  by the mean recall of the classes.

The test sets are not subsampled. Needs scikit-learn: pip install -e .[examples]

examples:
  python docs/examples/digits.py
  python docs/examples/digits.py --seeds 2
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score, recall_score
from torch import Tensor, nn

from detector.losses import (
    effective_number,
    inverse_frequency,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
    softmax_focal_star_loss,
)

Loss = Callable[[Tensor, Tensor], Tensor]


class Problem(NamedTuple):
    """Pixels (N, 64) and labels of the training and test sets; `outputs` is the number of logits."""

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    outputs: int


def subsampled(
    seed: int, keep: Callable[[int, int], int], relabel: Callable[[np.ndarray], np.ndarray], outputs: int
) -> Problem:
    """Split the digits in halves and subsample the training half.

    Args:
        seed: random seed of the split.
        keep: maps a digit and its number of training examples to the number of examples to keep.
        relabel: maps digits (N,) to labels.
        outputs: number of logits.
    """
    digits = load_digits()
    random = np.random.default_rng(seed)
    order = random.permutation(len(digits.target))
    x, y = digits.data[order].astype(np.float32) / 16, digits.target[order]
    half = len(y) // 2
    rows = np.concatenate([np.flatnonzero(y[:half] == d)[: keep(d, int((y[:half] == d).sum()))] for d in range(10)])
    labels = relabel(y)
    return Problem(
        torch.from_numpy(x[:half][rows]), torch.from_numpy(labels[:half][rows]),
        torch.from_numpy(x[half:]), torch.from_numpy(labels[half:]), outputs,
    )  # fmt: skip


def train_and_predict(problem: Problem, loss: Loss, seed: int, *, steps: int = 300) -> Tensor:
    """Train a small network and return its logits (N, outputs) on the test set."""
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, problem.outputs))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3, weight_decay=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(network(problem.train_x), problem.train_y).backward()
        optimizer.step()
    with torch.no_grad():
        logits: Tensor = network(problem.test_x)
    return logits


def one_against_the_rest(seed: int) -> dict[str, float]:
    """Return the average precision of the digit 8 by loss."""
    others = 800

    def keep(digit: int, count: int) -> int:
        return others // 100 if digit == 8 else count

    problem = subsampled(seed, keep, lambda y: (y == 8).astype(np.float32)[:, None], 1)
    losses: dict[str, Loss] = {
        "cross entropy": lambda x, y: sigmoid_focal_loss(x, y, alpha=None, gamma=0.0, reduction="mean"),
        "cross entropy, alpha 0.75": lambda x, y: sigmoid_focal_loss(x, y, alpha=0.75, gamma=0.0, reduction="mean"),
        "cross entropy, alpha 0.99": lambda x, y: sigmoid_focal_loss(x, y, alpha=0.99, gamma=0.0, reduction="mean"),
        "focal, gamma 2, no alpha": lambda x, y: sigmoid_focal_loss(x, y, alpha=None, gamma=2.0, reduction="positives"),
        "focal, gamma 2, alpha 0.25": lambda x, y: sigmoid_focal_loss(
            x, y, alpha=0.25, gamma=2.0, reduction="positives"
        ),
        "FL*, gamma 2, beta 1": lambda x, y: sigmoid_focal_star_loss(x, y, reduction="mean"),
    }
    labels = problem.test_y[:, 0].numpy()
    return {
        n: float(average_precision_score(labels, train_and_predict(problem, f, seed)[:, 0].numpy()))
        for n, f in losses.items()
    }


def long_tail(seed: int) -> dict[str, float]:
    """Return the mean recall of the ten digits by loss; digit d keeps 90 * (5 / 90)^(d / 9) training examples."""

    def keep(digit: int, count: int) -> int:
        return min(count, round(90 * (5 / 90) ** (digit / 9)))

    problem = subsampled(seed, keep, lambda y: y.astype(np.int64), 10)
    counts = torch.bincount(problem.train_y, minlength=10)
    inverse, effective = inverse_frequency(counts), effective_number(counts, beta=0.99)
    losses: dict[str, Loss] = {
        "cross entropy": lambda x, y: softmax_focal_loss(x, y, gamma=0.0, reduction="mean"),
        "cross entropy, inverse frequency": lambda x, y: softmax_focal_loss(
            x, y, gamma=0.0, alpha=inverse, reduction="mean"
        ),
        "cross entropy, effective number": lambda x, y: softmax_focal_loss(
            x, y, gamma=0.0, alpha=effective, reduction="mean"
        ),
        "focal, gamma 2": lambda x, y: softmax_focal_loss(x, y, gamma=2.0, reduction="mean"),
        "focal, gamma 2, inverse frequency": lambda x, y: softmax_focal_loss(
            x, y, gamma=2.0, alpha=inverse, reduction="mean"
        ),
        "FL*, gamma 2, beta 1": lambda x, y: softmax_focal_star_loss(x, y, reduction="mean"),
    }
    labels = problem.test_y.numpy()
    return {
        n: float(recall_score(labels, train_and_predict(problem, f, seed).argmax(dim=1).numpy(), average="macro"))
        for n, f in losses.items()
    }


def main(argv: list[str] | None = None) -> int:
    """Run both problems; print means with standard errors, also of the paired differences from cross entropy."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10, help="number of random seeds (default: %(default)s)")
    arguments = parser.parse_args(argv)
    for title, run in (
        ("8 against the rest, 1:100: average precision", one_against_the_rest),
        ("long tail: mean recall", long_tail),
    ):
        results = [run(seed) for seed in range(arguments.seeds)]
        print(f"\n{title} ({arguments.seeds} seeds)\n{'':34} mean (standard error)   minus cross entropy")
        for name in results[0]:
            values = np.array([r[name] for r in results])
            difference = values - [r["cross entropy"] for r in results]
            columns = (
                f"{each.mean():{sign}.3f} ({standard_error(each):.3f})"
                for each, sign in ((values, ""), (difference, "+"))
            )
            print(f"{name:34} {'          '.join(columns)}")
    return 0


def standard_error(values: np.ndarray) -> float:
    """Return the standard error of the mean; nan for a single value."""
    return float(values.std(ddof=1) / np.sqrt(len(values))) if len(values) > 1 else float("nan")


if __name__ == "__main__":
    sys.exit(main())
