"""The focal loss's family, its relatives and its baselines: oracles, identities, extremes."""

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
from torchvision.ops import box_iou

from detector.losses import (
    ClassLoss,
    effective_number,
    ghm_loss,
    hardest_fraction,
    inverse_frequency,
    online_hard_examples,
    poly1_focal_loss,
    quality_focal_loss,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
    softmax_focal_star_loss,
    varifocal_loss,
)
from detector.losses.dense import anchor_losses, dense_loss
from detector.losses.focal_variants import ghm_weights
from detector.memory import peak_of
from detector.structures import HeadOutputs

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


# ---- closed forms -----------------------------------------------------------------------------------------------


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


def test_the_class_axis_can_be_any() -> None:
    scores, classes = examples(24, 4)
    picture = scores.reshape(2, 3, 4, 4).permute(0, 3, 1, 2)  # (N, C, H, W), as segmentation has it
    found = softmax_focal_loss(picture, classes.reshape(2, 3, 4), dim=1)
    torch.testing.assert_close(found.flatten(), softmax_focal_loss(scores, classes))
    with pytest.raises(ValueError, match=r"targets must have shape \(2, 4, 3\)"):
        softmax_focal_loss(picture, classes.reshape(2, 3, 4))


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


def test_ghm_weighs_by_the_density_of_gradients() -> None:
    """Six entries in one bin, two in another, of ten bins."""
    p = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.91, 0.95])
    weights = ghm_weights(p)
    torch.testing.assert_close(weights, torch.tensor([8 / (6 * 2)] * 6 + [8 / (2 * 2)] * 2))
    ignored = torch.tensor([False] * 6 + [True] * 2)
    assert ghm_weights(p, ignore=ignored).tolist() == [1.0] * 6 + [0.0] * 2
    loss = ghm_loss(torch.logit(p), torch.zeros(8))
    torch.testing.assert_close(loss, -torch.log(1 - p) * weights)


# ---- one set of arguments for all -------------------------------------------------------------------------------


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
    found = SOFTMAX[name](logits, classes, weights=weights, ignore=ignore, background=4, reduction="positives")
    torch.testing.assert_close(found, total / (classes[~ignore] != 4).sum())
    mean = SOFTMAX[name](logits, classes, weights=weights, ignore=ignore, reduction="mean")
    torch.testing.assert_close(mean, total / weights[~ignore].sum())
    with pytest.raises(ValueError, match="name the background class"):
        SOFTMAX[name](logits, classes, reduction="positives")


@pytest.mark.parametrize("name", [n for n in SIGMOID if n != "ghm"])
@pytest.mark.parametrize("examples_", [5, 3])
def test_weights_and_masks_of_examples_are_of_rows_even_where_there_are_as_many_classes(
    name: str, examples_: int
) -> None:
    logits, targets = (t.reshape(examples_, 3) for t in entries(3 * examples_))
    loss, weights = SIGMOID[name](logits, targets), torch.arange(examples_, dtype=torch.float64)
    ignore = weights == 1
    for by_row in (weights, weights[:, None], weights[:, None].expand(-1, 3)):
        torch.testing.assert_close(SIGMOID[name](logits, targets, weights=by_row), loss * weights[:, None])
    total = (loss * weights[:, None])[~ignore].sum()
    found = SIGMOID[name](logits, targets, weights=weights, ignore=ignore, reduction="mean")
    torch.testing.assert_close(found, total / (3 * weights[~ignore].sum()))
    by_class = torch.tensor([1.0, 0, 2], dtype=torch.float64)
    torch.testing.assert_close(SIGMOID[name](logits, targets, weights=by_class[None]), loss * by_class)
    torch.testing.assert_close(SIGMOID[name](logits, targets, ignore=by_class[None] == 0), loss * (by_class > 0))
    torch.testing.assert_close(SIGMOID[name](logits, targets, weights=torch.tensor(2.0)), 2 * loss)


def test_masks_of_examples_are_of_rows_for_ghm_too() -> None:
    logits, targets = (t.reshape(3, 3) for t in entries(9))
    rows = torch.tensor([True, False, False])
    torch.testing.assert_close(ghm_loss(logits, targets, ignore=rows)[1:], ghm_loss(logits[1:], targets[1:]))
    assert not ghm_loss(logits, targets, ignore=rows)[0].any()


def test_weights_of_examples_in_a_picture_are_of_its_first_axes() -> None:
    scores, classes = examples(24, 4)
    scores, classes = scores.reshape(2, 2, 6, 4), classes.reshape(2, 2, 6)
    loss = softmax_focal_loss(scores, classes)
    weights = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(softmax_focal_loss(scores, classes, weights=weights), loss * weights[:, None, None])
    found = softmax_focal_loss(scores, classes, ignore=weights == 3)
    torch.testing.assert_close(found, loss * (weights == 1)[:, None, None])


@pytest.mark.parametrize("shape", [(3,), (5, 2), (2, 1), (1, 5, 3)])
def test_weights_and_masks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    logits, targets = torch.zeros(5, 3), torch.zeros(5, 3)
    for what, values in {"weights": torch.ones(shape), "ignore": torch.ones(shape, dtype=torch.bool)}.items():
        argument: dict[str, Any] = {what: values}
        with pytest.raises(ValueError, match=rf"{what} must have the first axes .*\(5, 3\).*{what}\[None, :\]"):
            sigmoid_focal_loss(logits, targets, **argument)


def test_alpha_by_class_weighs_positives_and_the_negative_side_by_itself() -> None:
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
def test_any_shape_goes_in_and_comes_out(name: str, shape: tuple[int, ...]) -> None:
    assert SIGMOID[name](torch.zeros(shape), torch.zeros(shape)).shape == shape
    with pytest.raises((ValueError, RuntimeError)):
        SIGMOID[name](torch.zeros(3), torch.zeros(4))


@pytest.mark.parametrize("bad", [-0.5, 0.0])
def test_gammas_that_mean_nothing_are_refused(bad: float) -> None:
    for star in (sigmoid_focal_star_loss, softmax_focal_star_loss):
        with pytest.raises(ValueError, match="gamma must be above 0"):
            star(torch.zeros(2, 2), torch.zeros(2, 2), gamma=bad)
    if bad < 0:
        with pytest.raises(ValueError, match="gamma must be at least 0"):
            sigmoid_focal_loss(torch.zeros(2), torch.zeros(2), gamma=bad)


# ---- numbers ----------------------------------------------------------------------------------------------------


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
def test_no_logit_of_any_type_makes_nonsense_of_the_sigmoid_forms(
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
def test_no_logit_of_any_type_makes_nonsense_of_the_softmax_forms(
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
@pytest.mark.parametrize("nonsense", [math.nan, math.inf, -math.inf, 1e30])
def test_nothing_that_is_ignored_reaches_a_loss_or_a_gradient(name: str, nonsense: float) -> None:
    logits, targets = entries(9)
    ignore = torch.arange(9) % 3 == 0
    leaf = torch.where(ignore, nonsense, logits).requires_grad_()
    loss = SIGMOID[name](leaf, targets, ignore=ignore)
    torch.autograd.backward(loss.sum())
    assert leaf.grad is not None
    assert torch.isfinite(loss).all()
    assert not loss[ignore].any()
    assert torch.isfinite(leaf.grad).all()
    assert not leaf.grad[ignore].any()


@pytest.mark.parametrize("name", SOFTMAX)
def test_an_ignored_example_may_say_anything(name: str) -> None:
    """-100 is what torch's own cross entropy ignores."""
    logits, classes = examples(9)
    ignore = torch.arange(9) % 3 == 0
    leaf = torch.where(ignore[:, None], math.nan, logits).requires_grad_()
    loss = SOFTMAX[name](leaf, torch.where(ignore, -100, classes), ignore=ignore.int())
    torch.autograd.backward(loss.sum())
    assert leaf.grad is not None
    assert torch.isfinite(leaf.grad).all()
    torch.testing.assert_close(loss[~ignore], SOFTMAX[name](logits, classes)[~ignore].detach())


def test_arguments_that_make_no_sense_are_refused() -> None:
    logits, classes = examples(6, 3)
    for alpha in ([1.0, 2.0], [1.0] * 5):
        with pytest.raises(ValueError, match=r"alpha must have shape \(3,\)"):
            softmax_focal_loss(logits, classes, alpha=torch.tensor(alpha))
        with pytest.raises(ValueError, match=r"alpha must have shape \(3,\)"):
            sigmoid_focal_loss(logits, torch.zeros(6, 3), alpha=torch.tensor(alpha))
    wrong: Any = "avg"
    with pytest.raises(ValueError, match="reduction must be none, sum, mean or positives, got 'avg'"):
        sigmoid_focal_loss(logits, torch.zeros(6, 3), reduction=wrong)


# ---- weights of classes -----------------------------------------------------------------------------------------


def test_inverse_frequencies_have_mean_1_and_the_right_ratios() -> None:
    counts = torch.tensor([11, 1, 0, 4])
    weights = inverse_frequency(counts)
    assert weights.mean().item() == pytest.approx(1)
    torch.testing.assert_close(weights / weights[0], torch.tensor([1, 11, 11, 11 / 4]))
    torch.testing.assert_close(
        inverse_frequency(counts, exponent=0.5) / inverse_frequency(counts, exponent=0.5)[0],
        torch.tensor([1, 11, 11, 11 / 4]).sqrt(),
    )
    assert inverse_frequency(counts, exponent=0.0).tolist() == [1.0] * 4


def test_effective_numbers_lie_between_none_and_inverse_frequencies() -> None:
    counts = torch.tensor([1000, 10, 1])
    expected = (1 - 0.99) / (1 - 0.99 ** counts.double())
    torch.testing.assert_close(
        effective_number(counts, beta=0.99).double(), expected / expected.mean(), rtol=1e-5, atol=0
    )
    assert effective_number(counts, beta=0.0).tolist() == [1.0] * 3
    torch.testing.assert_close(effective_number(counts, beta=1 - 1e-9), inverse_frequency(counts), rtol=1e-4, atol=0)


def test_weights_of_no_examples_at_all_are_refused() -> None:
    for weigh in (inverse_frequency, effective_number):
        with pytest.raises(ValueError, match="at least one class with an example"):
            weigh(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="beta must be"):
        effective_number(torch.ones(3), beta=1.0)


# ---- dense ------------------------------------------------------------------------------------------------------

KINDS: dict[str, dict[str, Any]] = {
    "focal": {}, "focal by class": {"alpha": [0.5, 2.0, 1.0, 0.3]}, "focal_star": {"alpha": None},
    "focal_star softmax": {"activation": "softmax"}, "focal softmax": {"activation": "softmax"},
    "focal softmax by class": {"activation": "softmax", "alpha": [0.5, 2.0, 1.0, 0.3], "negative_weight": 0.2},
    "poly1_focal": {}, "quality_focal": {}, "varifocal": {}, "ghm": {}, "ohem": {"ohem_batch": 30, "alpha": None},
    "ohem 1:3": {"ohem_batch": 32, "alpha": None, "ohem_negatives_per_positive": 3},
    "bootstrap": {"bootstrap_fraction": 0.1, "alpha": None}, "bootstrap softmax": {"activation": "softmax", "alpha": None},
}  # fmt: skip


def class_loss(name: str) -> ClassLoss:
    kind: Any = name.partition(" ")[0]
    return ClassLoss(kind, **KINDS[name])


def head(anchors: int = 150, *, softmax: bool, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, qualities, anchors."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, anchors, 4 + softmax, generator=random) - 2
    labels = torch.randint(-2, 4, (batch, anchors), generator=random)
    labels = torch.where(torch.rand(batch, anchors, generator=random) < 0.8, -1, labels)
    quality = torch.rand(batch, anchors, generator=random) * (labels >= 0)
    corner = torch.rand(anchors, 2, generator=random) * 100
    return logits, labels, quality, torch.cat([corner, corner + 20 + torch.rand(anchors, 2, generator=random) * 20], 1)


def outputs_of(logits: Tensor, anchors: Tensor, cut: int = 100) -> HeadOutputs:
    """Two levels."""
    deltas = torch.zeros(*logits.shape[:2], 4)
    sizes = [cut, logits.shape[1] - cut]
    return HeadOutputs(torch.split(logits, sizes, 1), torch.split(deltas, sizes, 1), anchors)


@pytest.mark.parametrize("name", KINDS)
def test_anchors_may_come_in_any_order(name: str) -> None:
    loss = class_loss(name)
    logits, labels, quality, anchors = head(softmax=loss.activation == "softmax")
    order = torch.randperm(150, generator=torch.Generator().manual_seed(9))
    one = loss(outputs_of(logits, anchors), labels, quality)
    other = loss(outputs_of(logits[:, order], anchors[order]), labels[:, order], quality[:, order])
    assert one.shape == (2,)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", KINDS)
def test_ignored_anchors_count_for_nothing_whatever_they_say(name: str) -> None:
    loss = class_loss(name)
    logits, labels, quality, anchors = head(softmax=loss.activation == "softmax")
    leaf = logits.clone().requires_grad_()
    sums = loss(outputs_of(leaf, anchors), labels, quality)
    torch.autograd.backward(sums.sum())
    assert leaf.grad is not None
    assert not leaf.grad[labels < -1].any()
    changed = torch.where((labels < -1)[..., None], 50.0, logits)
    torch.testing.assert_close(loss(outputs_of(changed, anchors), labels, quality), sums.detach())
    nothing = torch.full_like(labels, -2)
    leaf = logits.clone().requires_grad_()
    sums = loss(outputs_of(leaf, anchors), nothing, quality)
    torch.autograd.backward(sums.sum())
    assert sums.tolist() == [0.0, 0.0]
    assert leaf.grad is not None
    assert not leaf.grad.any()


@pytest.mark.parametrize("name", [n for n in KINDS if n.split()[0] not in ("ghm", "ohem", "bootstrap")])
@pytest.mark.parametrize("chunk", [7, 1 << 18])
def test_dense_sums_and_gradients_are_those_of_the_single_losses(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast path's too: `each` is the plain form."""
    monkeypatch.setattr("detector.losses.dense.CHUNK", chunk)
    loss = class_loss(name)
    logits, labels, quality, anchors = head(softmax=loss.activation == "softmax")
    fast, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    scale = torch.tensor([0.5, 2.0])
    sums = loss(outputs_of(fast, anchors), labels, quality, scale)
    each = torch.stack([loss.each(x, y.clamp(min=-1), q) for x, y, q in zip(plain, labels, quality, strict=True)])
    expected = torch.where(labels >= -1, each, 0.0).sum(dim=1) * scale
    torch.testing.assert_close(sums, expected)
    weights = torch.tensor([1.0, 3.0])  # images need not count alike
    torch.autograd.backward([(sums * weights).sum(), (expected * weights).sum()])
    torch.testing.assert_close(fast.grad, plain.grad)


@pytest.mark.parametrize("name", [n for n in KINDS if "ohem" not in n and "by class" not in n])
def test_memory_holds_one_buffer_of_the_logits_size(name: str) -> None:
    loss = class_loss(name)
    columns = 20 + (loss.activation == "softmax")
    levels = [torch.randn(1, anchors, columns, requires_grad=True) for anchors in (400_000, 100_000)]
    labels = torch.full((1, 500_000), -1)
    labels[0, ::1000] = torch.arange(500) % 20
    quality = torch.rand(labels.shape)
    outputs = HeadOutputs(tuple(levels), (), torch.zeros(0, 4))

    def work() -> None:
        torch.autograd.backward(loss(outputs, labels, quality).sum())

    needed = peak_of(work, torch.device("cpu")) / sum(level.nbytes for level in levels)
    assert 0.9 < needed < 2.0, "the gradient itself, and what is as large as the labels"


def test_a_dense_loss_keeps_one_buffer_and_can_be_differentiated_once() -> None:
    loss = class_loss("focal_star")
    logits, labels, _, _ = head(softmax=False)
    leaf = logits.requires_grad_()
    sums = dense_loss(loss.each, leaf, labels)
    torch.autograd.backward(sums.sum(), retain_graph=True)
    with pytest.raises(RuntimeError, match="once, got twice"):
        torch.autograd.backward(sums.sum())
    half = leaf.detach().half().requires_grad_()
    torch.autograd.backward(dense_loss(loss.each, half, labels).sum() * 1e-3)
    assert half.grad is not None
    torch.testing.assert_close(half.grad.float(), leaf.grad * 1e-3, rtol=2e-2, atol=1e-6)  # type: ignore[operator]


def test_without_a_gradient_the_same_sums_come_out() -> None:
    loss = class_loss("focal softmax")
    logits, labels, _, _ = head(softmax=True)
    expected = dense_loss(loss.each, logits.clone().requires_grad_(), labels)
    torch.testing.assert_close(dense_loss(loss.each, logits, labels), expected.detach())
    torch.testing.assert_close(anchor_losses(loss.each, logits, labels).sum(dim=1), expected.detach())
    assert dense_loss(loss.each, logits[:0], labels[:0]).shape == (0,)


def test_fillers_are_no_pictures_to_a_mean_over_pictures() -> None:
    """Two pictures and one that stands for none give what the two give, summed."""
    loss = class_loss("ghm")
    logits, labels, _, anchors = head(softmax=False)
    filled = torch.cat([logits, logits[:1] + 9]), torch.cat([labels, torch.full_like(labels[:1], -2)])
    one = loss(outputs_of(logits, anchors), labels, None).sum()
    other = loss(outputs_of(filled[0], anchors), filled[1], None).sum()
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["ohem", "bootstrap"])
def test_chosen_examples_have_plain_cross_entropy_whatever_alpha_and_gamma_are(kind: Any) -> None:
    logits, labels, _, anchors = head(softmax=False)
    found = [
        ClassLoss(kind, alpha=alpha, gamma=gamma, ohem_batch=1000, ohem_nms_thresh=1.0, bootstrap_fraction=1.0)(
            outputs_of(logits, anchors), labels, None
        )
        for alpha, gamma in ((0.25, 2.0), (None, 0.0))
    ]
    torch.testing.assert_close(found[0], found[1])
    cross = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, (labels[..., None] == torch.arange(4)).float(), reduction="none"
    ).sum(dim=2)
    counted = labels >= -1
    torch.testing.assert_close(found[0], (cross * counted).sum(dim=1) / counted.sum(dim=1))


# ---- hard examples ----------------------------------------------------------------------------------------------


def test_bootstrapping_keeps_the_hardest_and_no_others() -> None:
    losses = torch.tensor([[1.0, 5.0, 3.0, 4.0, 9.0], [1.0, 2.0, 3.0, 4.0, 5.0]])
    labels = torch.tensor([[-1, 0, -1, -1, -2], [-2, -2, -2, -2, -2]])
    assert hardest_fraction(losses, labels, fraction=0.5).tolist() == [[-2, 0, -2, -1, -2], [-2] * 5]
    assert hardest_fraction(losses, labels, fraction=1e-9).tolist()[0] == [-2, 0, -2, -2, -2], "at least one"


def test_the_hardest_of_any_examples_are_left_by_a_mask() -> None:
    scores, classes = examples(8, 3)
    loss = softmax_focal_loss(scores, classes, gamma=0.0)
    chosen = hardest_fraction(loss[None], classes[None], fraction=0.25)[0]
    found = softmax_focal_loss(scores, classes, gamma=0.0, ignore=chosen < -1, reduction="mean")
    torch.testing.assert_close(found, loss.topk(2).values.mean())


def test_ohem_keeps_the_hardest_that_do_not_overlap() -> None:
    boxes = torch.tensor([[[0, 0, 10, 10], [0, 0, 10, 11], [50, 50, 60, 60], [80, 80, 90, 90], [0, 0, 9, 10]]]).float()
    losses = torch.tensor([[3.0, 4.0, 2.0, 1.0, 99.0]])
    labels = torch.tensor([[-1, -1, 0, -1, -2]])
    chosen = online_hard_examples(losses, labels, boxes, batch_size=2, nms_thresh=0.7)
    assert chosen.tolist() == [[-2, -1, 0, -2, -2]], "the second suppresses the first; the ignored one does nothing"


@pytest.mark.parametrize("ratio", [1, 3])
def test_ohem_with_a_ratio_keeps_so_many_negatives_for_each_positive(ratio: int) -> None:
    random = torch.Generator().manual_seed(0)
    corner = torch.rand(1, 500, 2, generator=random) * 2000
    boxes = torch.cat([corner, corner + 10], dim=-1)
    assert (torch.triu(box_iou(boxes[0], boxes[0]), 1) > 0.7).sum() < 5
    labels = torch.full((1, 500), -1)
    labels[0, :6] = 2
    losses = torch.rand(1, 500, generator=random)
    losses[0, :6] = 0.001  # easy positives are kept nevertheless
    chosen = online_hard_examples(losses, labels, boxes, batch_size=64, nms_thresh=0.7, negatives_per_positive=ratio)
    assert (chosen >= 0).sum() == 6
    assert (chosen == -1).sum() == 6 * ratio
    kept = losses[chosen == -1]
    assert kept.min() >= losses[(chosen < -1) & (labels == -1)].topk(5).values[-1]


def test_ohem_of_few_anchors_takes_what_there_is() -> None:
    boxes = torch.tensor([[[0.0, 0, 10, 10]]])
    chosen = online_hard_examples(torch.ones(1, 1), torch.tensor([[-1]]), boxes, batch_size=64, nms_thresh=0.7)
    assert chosen.tolist() == [[-1]]
