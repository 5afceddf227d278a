"""The focal loss family: oracles, identities, extreme inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from detector.losses import (
    ghm_loss,
    poly1_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
    softmax_focal_star_loss,
    varifocal_loss,
)
from detector.losses.focal_variants import ghm_weights

SIGMOID: dict[str, Callable[..., Tensor]] = {
    "focal": sigmoid_focal_loss,
    "focal gamma 0": lambda x, y, **k: sigmoid_focal_loss(x, y, gamma=0.0, alpha=None, **k),
    "focal gamma 0.5": lambda x, y, **k: sigmoid_focal_loss(x, y, gamma=0.5, **k),
    "star": sigmoid_focal_star_loss,
    "poly1": poly1_focal_loss,
    "quality": quality_focal_loss,
    "varifocal": varifocal_loss,
    "ghm": ghm_loss,
}
SOFTMAX: dict[str, Callable[..., Tensor]] = {
    "focal": softmax_focal_loss,
    "focal gamma 0": lambda x, y, **k: softmax_focal_loss(x, y, gamma=0.0, **k),
    "focal gamma 0.5": lambda x, y, **k: softmax_focal_loss(x, y, gamma=0.5, **k),
    "star": softmax_focal_star_loss,
}


def entries(n: int = 40, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, generator=random, dtype=torch.float64) * 3
    return logits.to(dtype), (torch.rand(n, generator=random) < 0.4).to(dtype)


def examples(n: int = 30, classes: int = 5, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, classes, generator=random, dtype=torch.float64) * 3
    return logits, torch.randint(0, classes, (n,), generator=random)


# --- closed forms


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 4.0])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_focal_star_is_the_papers_formula(gamma: float, beta: float) -> None:
    logits, targets = entries()
    x_t = torch.where(targets > 0, logits, -logits)
    expected = -torch.log(torch.sigmoid(gamma * x_t + beta)) / gamma
    torch.testing.assert_close(sigmoid_focal_star_loss(logits, targets, gamma=gamma, beta=beta), expected)
    scores, classes = examples()
    p = scores.softmax(-1).gather(1, classes[:, None])[:, 0]
    expected = -torch.log(torch.sigmoid(gamma * torch.log(p / (1 - p)) + beta)) / gamma
    torch.testing.assert_close(softmax_focal_star_loss(scores, classes, gamma=gamma, beta=beta), expected)


def test_focal_star_at_gamma_1_and_beta_0_is_cross_entropy() -> None:
    logits, targets = entries()
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    torch.testing.assert_close(sigmoid_focal_star_loss(logits, targets, gamma=1.0, beta=0.0), expected)
    scores, classes = examples()
    torch.testing.assert_close(
        softmax_focal_star_loss(scores, classes, gamma=1.0, beta=0.0),
        F.cross_entropy(scores, classes, reduction="none"),
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_softmax_focal_loss_is_the_formula(gamma: float, weighted: bool) -> None:
    scores, classes = examples()
    alpha = torch.tensor([0.2, 1.0, 3.0, 0.5, 0.0], dtype=torch.float64) if weighted else None
    p = scores.softmax(-1).gather(1, classes[:, None])[:, 0]
    expected = -((1 - p) ** gamma) * p.log() * (1 if alpha is None else alpha[classes])
    torch.testing.assert_close(softmax_focal_loss(scores, classes, gamma=gamma, alpha=alpha), expected)
    if gamma == 0:
        by_torch = F.cross_entropy(scores, classes, weight=alpha, reduction="none")
        torch.testing.assert_close(softmax_focal_loss(scores, classes, gamma=0.0, alpha=alpha), by_torch)


def test_a_softmax_over_two_classes_is_a_sigmoid_of_the_difference() -> None:
    scores, classes = examples(classes=2)
    difference, targets = scores[:, 1] - scores[:, 0], classes.double()
    torch.testing.assert_close(softmax_focal_loss(scores, classes), sigmoid_focal_loss(difference, targets, alpha=None))
    torch.testing.assert_close(softmax_focal_star_loss(scores, classes), sigmoid_focal_star_loss(difference, targets))


def test_soft_targets_mix_the_classes_losses_linearly() -> None:
    scores, _ = examples(classes=3)
    soft = torch.softmax(torch.randn(30, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64), -1)
    alpha = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    one_by_one = [softmax_focal_loss(scores, torch.full((30,), k), alpha=alpha) for k in range(3)]
    expected = sum(soft[:, k] * one_by_one[k] for k in range(3))
    torch.testing.assert_close(softmax_focal_loss(scores, soft, alpha=alpha), expected)
    torch.testing.assert_close(
        softmax_focal_loss(scores, soft, gamma=0.0), F.cross_entropy(scores, soft, reduction="none")
    )


def test_any_axis_can_be_the_class_axis() -> None:
    scores, classes = examples(24, 4)
    image = scores.reshape(2, 3, 4, 4).permute(0, 3, 1, 2)  # (N, C, H, W), as segmentation has it
    actual = softmax_focal_loss(image, classes.reshape(2, 3, 4), dim=1)
    torch.testing.assert_close(actual.flatten(), softmax_focal_loss(scores, classes))
    with pytest.raises(ValueError, match=r"targets must have shape \(2, 4, 3\)"):
        softmax_focal_loss(image, classes.reshape(2, 3, 4))


def test_poly1_adds_a_term_of_the_expansion() -> None:
    logits, targets = entries()
    p = torch.sigmoid(logits)
    p_t = torch.where(targets > 0, p, 1 - p)
    for alpha, alpha_t in ((None, 1.0), (0.3, torch.where(targets > 0, 0.3, 0.7))):
        expected = alpha_t * (-((1 - p_t) ** 2) * p_t.log() + 0.7 * (1 - p_t) ** 3)
        torch.testing.assert_close(poly1_focal_loss(logits, targets, alpha=alpha, epsilon=0.7), expected)
    torch.testing.assert_close(poly1_focal_loss(logits, targets, epsilon=0.0), sigmoid_focal_loss(logits, targets))


def test_quality_and_varifocal_are_their_papers_formulas() -> None:
    logits, targets = entries()
    quality = targets * torch.rand(len(targets), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    p = torch.sigmoid(logits)
    cross = -(quality * p.log() + (1 - quality) * (1 - p).log())
    torch.testing.assert_close(quality_focal_loss(logits, quality), (quality - p).abs() ** 2 * cross)
    expected = torch.where(quality > 0, quality * cross, -0.75 * p**2 * (1 - p).log())
    torch.testing.assert_close(varifocal_loss(logits, quality), expected)
    torch.testing.assert_close(quality_focal_loss(logits, targets), sigmoid_focal_loss(logits, targets, alpha=None))


def test_ghm_weights_are_inverse_to_the_density_of_gradients() -> None:
    """Six entries in one bin, two in another, of ten bins."""
    p = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.91, 0.95])
    weights = ghm_weights(p)
    torch.testing.assert_close(weights, torch.tensor([8 / (6 * 2)] * 6 + [8 / (2 * 2)] * 2))
    ignored = torch.tensor([False] * 6 + [True] * 2)
    assert ghm_weights(p, ignore=ignored).tolist() == [1.0] * 6 + [0.0] * 2
    loss = ghm_loss(torch.logit(p), torch.zeros(8))
    torch.testing.assert_close(loss, -torch.log(1 - p) * weights)


# --- arguments shared by all losses


@pytest.mark.parametrize("name", [n for n in SIGMOID if n != "ghm"])
def test_reductions_weights_and_masks_of_the_sigmoid_forms(name: str) -> None:
    logits, targets = entries()
    loss = SIGMOID[name](logits, targets)
    weights = torch.linspace(0.5, 2, len(loss), dtype=torch.float64)
    ignore = torch.arange(len(loss)) % 3 == 0
    kept = ~ignore
    with_all: dict[str, Any] = {"weights": weights, "ignore": ignore}
    torch.testing.assert_close(SIGMOID[name](logits, targets, **with_all), torch.where(kept, loss * weights, 0.0))
    total = (loss * weights)[kept].sum()
    for reduction, expected in {
        "sum": total, "mean": total / weights[kept].sum(), "positives": total / targets[kept].sum()
    }.items():  # fmt: skip
        torch.testing.assert_close(SIGMOID[name](logits, targets, reduction=reduction, **with_all), expected)
    none = torch.zeros_like(targets)
    assert SIGMOID[name](logits, none, reduction="positives") == SIGMOID[name](logits, none).sum(), "at least 1"


@pytest.mark.parametrize("name", SOFTMAX)
def test_reductions_weights_and_masks_of_the_softmax_forms(name: str) -> None:
    logits, classes = examples()
    loss = SOFTMAX[name](logits, classes)
    weights, ignore = torch.linspace(0.5, 2, len(loss), dtype=torch.float64), torch.arange(len(loss)) % 3 == 0
    total = (loss * weights)[~ignore].sum()
    actual = SOFTMAX[name](logits, classes, weights=weights, ignore=ignore, background=4, reduction="positives")
    torch.testing.assert_close(actual, total / (classes[~ignore] != 4).sum())
    mean = SOFTMAX[name](logits, classes, weights=weights, ignore=ignore, reduction="mean")
    torch.testing.assert_close(mean, total / weights[~ignore].sum())
    with pytest.raises(ValueError, match="must know which class is not positive: pass `background`"):
        SOFTMAX[name](logits, classes, reduction="positives")


@pytest.mark.parametrize("name", [n for n in SIGMOID if n != "ghm"])
@pytest.mark.parametrize("examples_", [5, 3])
def test_weights_and_masks_align_with_rows_even_if_there_are_as_many_classes(name: str, examples_: int) -> None:
    logits, targets = (t.reshape(examples_, 3) for t in entries(3 * examples_))
    loss, weights = SIGMOID[name](logits, targets), torch.arange(examples_, dtype=torch.float64)
    ignore = weights == 1
    for by_row in (weights, weights[:, None], weights[:, None].expand(-1, 3)):
        torch.testing.assert_close(SIGMOID[name](logits, targets, weights=by_row), loss * weights[:, None])
    total = (loss * weights[:, None])[~ignore].sum()
    actual = SIGMOID[name](logits, targets, weights=weights, ignore=ignore, reduction="mean")
    torch.testing.assert_close(actual, total / (3 * weights[~ignore].sum()))
    by_class = torch.tensor([1.0, 0, 2], dtype=torch.float64)
    torch.testing.assert_close(SIGMOID[name](logits, targets, weights=by_class[None]), loss * by_class)
    torch.testing.assert_close(SIGMOID[name](logits, targets, ignore=by_class[None] == 0), loss * (by_class > 0))
    torch.testing.assert_close(SIGMOID[name](logits, targets, weights=torch.tensor(2.0)), 2 * loss)


def test_masks_align_with_rows_in_ghm_too() -> None:
    logits, targets = (t.reshape(3, 3) for t in entries(9))
    rows = torch.tensor([True, False, False])
    torch.testing.assert_close(ghm_loss(logits, targets, ignore=rows)[1:], ghm_loss(logits[1:], targets[1:]))
    assert not ghm_loss(logits, targets, ignore=rows)[0].any()


def test_weights_of_images_align_with_the_first_axes() -> None:
    scores, classes = examples(24, 4)
    scores, classes = scores.reshape(2, 2, 6, 4), classes.reshape(2, 2, 6)
    loss = softmax_focal_loss(scores, classes)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(softmax_focal_loss(scores, classes, weights=weights), loss * weights[:, None, None])
    actual = softmax_focal_loss(scores, classes, ignore=weights == 3)
    torch.testing.assert_close(actual, loss * (weights == 1)[:, None, None])


@pytest.mark.parametrize("shape", [(3,), (5, 2), (2, 1), (1, 5, 3)])
def test_weights_and_masks_of_other_shapes_are_rejected(shape: tuple[int, ...]) -> None:
    logits, targets = torch.zeros(5, 3), torch.zeros(5, 3)
    for what, values in {"weights": torch.ones(shape), "ignore": torch.ones(shape, dtype=torch.bool)}.items():
        argument: dict[str, Any] = {what: values}
        with pytest.raises(ValueError, match=rf"{what} must match the first axes .*\(5, 3\).*{what}\[None, :\]"):
            sigmoid_focal_loss(logits, targets, **argument)


def test_alpha_per_class_weights_positives_and_leaves_negatives_their_own_weight() -> None:
    logits, _ = examples(20, 3)
    targets = torch.eye(3, dtype=torch.float64)[torch.arange(20) % 3]
    plain = sigmoid_focal_loss(logits, targets, alpha=None)
    alpha = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets, alpha=alpha), plain * torch.where(targets > 0, alpha, 1.0)
    )
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets, alpha=alpha, negative_weight=0.1),
        plain * torch.where(targets > 0, alpha, 0.1),
    )


@pytest.mark.parametrize("name", SIGMOID)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 4)])
def test_losses_have_the_shape_of_the_logits(name: str, shape: tuple[int, ...]) -> None:
    assert SIGMOID[name](torch.zeros(shape), torch.zeros(shape)).shape == shape
    with pytest.raises((ValueError, RuntimeError)):
        SIGMOID[name](torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize("bad", [-0.5, 0.0])
def test_invalid_gammas_are_rejected(bad: float) -> None:
    for star in (sigmoid_focal_star_loss, softmax_focal_star_loss):
        with pytest.raises(ValueError, match="gamma must be above 0"):
            star(torch.zeros(2, 2), torch.zeros(2, 2), gamma=bad)
    if bad < 0:
        with pytest.raises(ValueError, match="gamma must be at least 0"):
            sigmoid_focal_loss(torch.zeros(2), torch.zeros(2), gamma=bad)


# --- numerics


@pytest.mark.parametrize("name", [n for n in SIGMOID if n not in ("ghm", "varifocal")])
def test_first_and_second_derivatives_of_the_sigmoid_forms(name: str) -> None:
    logits, targets = entries(12)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SIGMOID[name](x, targets), leaf)
    assert torch.autograd.gradgradcheck(lambda x: SIGMOID[name](x, targets), leaf)


@pytest.mark.parametrize("name", SOFTMAX)
def test_first_and_second_derivatives_of_the_softmax_forms(name: str) -> None:
    logits, classes = examples(6, 4)
    leaf = logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: SOFTMAX[name](x, classes), leaf)
    assert torch.autograd.gradgradcheck(lambda x: SOFTMAX[name](x, classes), leaf)


@pytest.mark.parametrize("name", SIGMOID)
@given(
    logits=st.lists(st.floats(-100, 100), min_size=1, max_size=20),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    positive=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_sigmoid_losses_and_gradients_are_finite_for_any_logit_and_dtype(
    name: str, logits: list[float], dtype: torch.dtype, positive: bool
) -> None:
    leaf = torch.tensor(logits).to(dtype).requires_grad_()
    loss = SIGMOID[name](leaf, torch.full((len(logits),), float(positive)))
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.isfinite(loss).all()
    assert (loss >= 0).all()
    torch.autograd.backward(loss.sum())
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", SOFTMAX)
@given(
    logits=st.lists(st.lists(st.floats(-100, 100), min_size=3, max_size=3), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    label=st.integers(0, 2),
)
@settings(max_examples=40, deadline=None)
def test_softmax_losses_and_gradients_are_finite_for_any_logit_and_dtype(
    name: str, logits: list[list[float]], dtype: torch.dtype, label: int
) -> None:
    leaf = torch.tensor(logits).to(dtype).requires_grad_()
    loss = SOFTMAX[name](leaf, torch.full((len(logits),), label))
    assert torch.isfinite(loss).all()
    assert (loss >= 0).all()
    torch.autograd.backward(loss.sum())
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize("name", SIGMOID)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_ignored_entries_reach_neither_loss_nor_gradient(name: str, value: float) -> None:
    logits, targets = entries(9)
    ignore = torch.arange(9) % 3 == 0
    leaf = torch.where(ignore, value, logits).requires_grad_()
    loss = SIGMOID[name](leaf, targets, ignore=ignore)
    torch.autograd.backward(loss.sum())
    assert leaf.grad is not None
    assert torch.isfinite(loss).all()
    assert not loss[ignore].any()
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[ignore].any()


@pytest.mark.parametrize("name", SOFTMAX)
def test_ignored_examples_may_have_any_logits_and_target(name: str) -> None:
    """-100 is what torch's own cross entropy ignores."""
    logits, classes = examples(9)
    ignore = torch.arange(9) % 3 == 0
    leaf = torch.where(ignore[:, None], math.nan, logits).requires_grad_()
    loss = SOFTMAX[name](leaf, torch.where(ignore, -100, classes), ignore=ignore.int())
    torch.autograd.backward(loss.sum())
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    torch.testing.assert_close(loss[~ignore], SOFTMAX[name](logits, classes)[~ignore].detach())


def test_invalid_arguments_are_rejected() -> None:
    logits, classes = examples(6, 3)
    for alpha in ([1.0, 2.0], [1.0] * 5):
        with pytest.raises(ValueError, match=r"alpha must have shape \(3,\)"):
            softmax_focal_loss(logits, classes, alpha=torch.tensor(alpha))
        with pytest.raises(ValueError, match=r"alpha must have shape \(3,\)"):
            sigmoid_focal_loss(logits, torch.zeros(6, 3), alpha=torch.tensor(alpha))
    wrong: Any = "avg"
    with pytest.raises(ValueError, match="reduction must be none, sum, mean or positives, got 'avg'"):
        sigmoid_focal_loss(logits, torch.zeros(6, 3), reduction=wrong)
