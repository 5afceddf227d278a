"""The focal loss against torchvision's and an independent formula in fp64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss as torchvision_focal_loss

from detector.losses import dense as dense_module
from detector.losses.dense import _plain_focal_loss, dense_focal_loss
from detector.losses.focal import sigmoid_focal_loss
from detector.losses.focal_variants import ghm_loss, poly1_focal_loss, quality_focal_loss, varifocal_loss

Dense = Callable[[Tensor, Tensor, float | None, float], Tensor]


def on_cpu(logits: Tensor, labels: Tensor, alpha: float | None, gamma: float) -> Tensor:
    return dense_focal_loss(logits, labels, alpha=alpha, gamma=gamma)


def plain(logits: Tensor, labels: Tensor, alpha: float | None, gamma: float) -> Tensor:
    """The path of a GPU."""
    positive, negative = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    return _plain_focal_loss(logits, labels, torch.full(logits.shape[-1:], positive), negative, gamma)


both_paths = pytest.mark.parametrize("dense", [on_cpu, plain])


def formula(logits: Tensor, labels: Tensor, alpha: float | None, gamma: float) -> Tensor:
    """Equation 5 of the paper in fp64, summed per image: (B, A, K), (B, A) to (B,)."""
    x = logits.double()
    one_hot = torch.stack([labels == k for k in range(logits.shape[-1])], dim=-1)
    x_t = torch.where(one_hot, x, -x)
    alpha_t = torch.where(one_hot, alpha, 1 - alpha).double() if alpha is not None else torch.ones_like(x)
    losses = -alpha_t * torch.sigmoid(-x_t) ** gamma * F.logsigmoid(x_t)
    return (losses * (labels >= -1)[..., None]).sum(dim=(1, 2))


def gradient_of(loss: Dense, logits: Tensor, labels: Tensor, alpha: float | None, gamma: float) -> Tensor:
    """Return the gradient of the sums, each image's with a different factor."""
    leaf = logits.clone().requires_grad_()
    sums = loss(leaf, labels, alpha, gamma)
    torch.autograd.backward((sums * torch.arange(1, len(sums) + 1)).sum())
    assert leaf.grad is not None
    return leaf.grad


def random_case(batch: int, anchors: int, classes: int, scale: float = 3.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(batch, anchors, classes, generator=random) * scale).clamp(-100, 100)
    return logits, torch.randint(-2, classes, (batch, anchors), generator=random)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.75])
def test_entrywise_loss_equals_torchvisions(alpha: float | None, gamma: float) -> None:
    logits, labels = random_case(2, 200, 6)
    targets = (labels[..., None] == torch.arange(6)).float()
    expected = torchvision_focal_loss(logits, targets, alpha=-1 if alpha is None else alpha, gamma=gamma)
    torch.testing.assert_close(
        sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma), expected, rtol=2e-5, atol=1e-7
    )


def test_entrywise_loss_of_an_empty_batch_is_empty() -> None:
    assert sigmoid_focal_loss(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0, 3)


def test_gamma_zero_without_alpha_is_cross_entropy() -> None:
    logits, labels = random_case(2, 100, 4)
    targets = (labels[..., None] == torch.arange(4)).float()
    expected = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    assert torch.equal(sigmoid_focal_loss(logits, targets, alpha=None, gamma=0.0), expected)
    dense = dense_focal_loss(logits, labels.clamp(min=-1), alpha=None, gamma=0.0)
    torch.testing.assert_close(dense, expected.sum(dim=(1, 2)))


def test_entrywise_loss_takes_soft_targets_and_keeps_fp64() -> None:
    logits, targets = torch.tensor([1.0], dtype=torch.float64), torch.tensor([0.3], dtype=torch.float64)
    loss = sigmoid_focal_loss(logits, targets, alpha=None, gamma=0.0)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, F.binary_cross_entropy_with_logits(logits, targets, reduction="none"))


@pytest.mark.parametrize(
    ("logit", "target", "expected"),
    [(0.0, 1.0, 0.25 * 0.25 * 0.693147), (0.0, 0.0, 0.75 * 0.25 * 0.693147), (-100.0, 1.0, 25.0), (100.0, 0.0, 75.0)],
)
def test_values_worked_out_by_hand(logit: float, target: float, expected: float) -> None:
    loss = sigmoid_focal_loss(torch.tensor([logit]), torch.tensor([target])).item()
    assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("logit", [5.0, 10.0, 15.0, 20.0, 30.0])
@pytest.mark.parametrize("kind", [sigmoid_focal_loss, poly1_focal_loss, quality_focal_loss, varifocal_loss, ghm_loss])
def test_confident_entries_keep_their_digits_on_both_sides(kind: Callable[..., Tensor], logit: float) -> None:
    """1 - p by subtraction would be 0 from a logit of 17 on, and so would torch's cross entropy of a negative."""
    results = []
    for dtype in (torch.float32, torch.float64):
        logits = torch.tensor([logit, -logit], dtype=dtype, requires_grad=True)
        loss = kind(logits, torch.tensor([1.0, 0.0]))
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        results.append((loss.double(), gradient.double()))
    assert (results[1][0] > 0).all()
    torch.testing.assert_close(*results, rtol=1e-5, atol=0)


def test_soft_targets_mix_cross_entropy_one_minus_pt_and_alpha() -> None:
    x, y = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64), torch.tensor([0.3, 0.5, 0.9], dtype=torch.float64)
    p = torch.sigmoid(x)
    cross, one_minus_pt, alpha = (
        -(y * p.log() + (1 - y) * (1 - p).log()),
        y * (1 - p) + (1 - y) * p,
        0.25 * y + 0.75 * (1 - y),
    )
    torch.testing.assert_close(sigmoid_focal_loss(x, y), alpha * cross * one_minus_pt**2)
    torch.testing.assert_close(sigmoid_focal_loss(x, y), torchvision_focal_loss(x, y))
    torch.testing.assert_close(
        poly1_focal_loss(x, y, epsilon=0.6), alpha * (cross * one_minus_pt**2 + 0.6 * one_minus_pt**3)
    )


@both_paths
@given(
    batch=st.integers(0, 3),
    anchors=st.integers(0, 40),
    classes=st.integers(1, 9),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
    alpha=st.sampled_from([None, 0.25, 0.75]),
    scale=st.sampled_from([0.1, 3.0, 100.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_dense_loss_and_gradient_equal_the_formula(
    dense: Dense, batch: int, anchors: int, classes: int, gamma: float, alpha: float | None, scale: float, seed: int
) -> None:
    logits, labels = random_case(batch, anchors, classes, scale, seed)
    sums = dense(logits, labels, alpha, gamma)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), formula(logits, labels, alpha, gamma), rtol=1e-5, atol=1e-30)
    actual = gradient_of(dense, logits, labels, alpha, gamma)
    expected = gradient_of(formula, logits, labels, alpha, gamma)
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-9)


@both_paths
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [1, 1203])
def test_one_class_and_many_classes_equal_the_formula(dense: Dense, classes: int, dtype: torch.dtype) -> None:
    """In more than one block of anchors."""
    anchors = 2 * dense_module.CHUNK // classes + 7 if classes > 1 else 500
    logits, labels = random_case(2, anchors, classes)
    logits = logits.to(dtype)
    sums = dense(logits, labels, 0.25, 2.0)
    torch.testing.assert_close(sums.double(), formula(logits, labels, 0.25, 2.0), rtol=1e-5, atol=0)
    actual = gradient_of(dense, logits, labels, 0.25, 2.0)
    expected = gradient_of(formula, logits.double(), labels, 0.25, 2.0)
    rounding = {torch.float32: 2e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=rounding, atol=1e-7)


@both_paths
@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)])
def test_half_precision_logits_lose_no_more_than_their_own_rounding(
    dense: Dense, dtype: torch.dtype, digits: float
) -> None:
    logits, labels = random_case(2, 500, 7)
    logits = logits.to(dtype)
    sums = dense(logits, labels, 0.25, 2.0)
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums.double(), formula(logits, labels, 0.25, 2.0), rtol=1e-5, atol=0)
    gradient = gradient_of(dense, logits, labels, 0.25, 2.0)
    assert gradient.dtype == dtype
    expected = gradient_of(formula, logits.float(), labels, 0.25, 2.0)
    torch.testing.assert_close(gradient.float(), expected, rtol=2 * digits, atol=1.2e-7)


@both_paths
@pytest.mark.parametrize("logit", [-4.0, -6.0])
def test_fp16_gradients_survive_gradscalers_factor(dense: Dense, logit: float) -> None:
    """It starts at 65536, which fp16 cannot hold, and the unscaled gradient at -6 (3e-8) is too small for fp16."""
    leaf, background = torch.full((1, 1, 1), logit, dtype=torch.float16, requires_grad=True), torch.tensor([[-1]])
    torch.autograd.backward(dense(leaf, background, 0.25, 2.0).sum() * 65536)
    assert leaf.grad is not None
    expected = 65536 * gradient_of(formula, leaf.detach().float(), background, 0.25, 2.0)
    torch.testing.assert_close(leaf.grad.float(), expected, rtol=1e-3, atol=0)


@both_paths
def test_ignored_anchors_have_no_loss_and_no_gradient(dense: Dense) -> None:
    logits, labels = random_case(2, 50, 3)
    ignored = torch.full_like(labels, -2)
    assert dense(logits, ignored, 0.25, 2.0).tolist() == [0.0, 0.0]
    assert not gradient_of(dense, logits, ignored, 0.25, 2.0).any()
    counted = labels[:, :30]
    torch.testing.assert_close(
        dense(logits, torch.cat([counted, ignored[:, 30:]], dim=1), 0.25, 2.0),
        dense(logits[:, :30], counted, 0.25, 2.0),
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
def test_ignored_anchors_may_have_any_logits(value: float) -> None:
    logits, labels = random_case(2, 50, 3)
    corrupted = torch.where((labels < -1)[..., None], value, logits)
    torch.testing.assert_close(on_cpu(corrupted, labels, 0.25, 2.0), on_cpu(logits, labels, 0.25, 2.0))
    gradient = gradient_of(on_cpu, corrupted, labels, 0.25, 2.0)
    torch.testing.assert_close(gradient, gradient_of(on_cpu, logits, labels, 0.25, 2.0))


def test_an_ignored_nan_does_not_change_confident_errors_in_the_same_block() -> None:
    logits, labels = torch.full((1, 4, 3), -3.0), torch.full((1, 4), -1)
    logits[0, 1, 0] = 20.0
    expected = on_cpu(logits, labels, 0.25, 2.0)
    labels[0, 0], logits[0, 0] = -2, float("nan")
    assert float(on_cpu(logits, labels, 0.25, 2.0)) == pytest.approx(float(expected), rel=1e-3)
    assert gradient_of(on_cpu, logits, labels, 0.25, 2.0).isfinite().all()


def test_both_formulas_of_a_negatives_loss_keep_its_digits() -> None:
    """From log1p(-sigmoid) up to LOG1P_MAX_LOGIT, from softplus above."""
    for x in (
        torch.linspace(-25, dense_module.LOG1P_MAX_LOGIT, 100_001),
        torch.linspace(dense_module.LOG1P_MAX_LOGIT, 60, 1001),
    ):
        actual = dense_module._negative_loss_terms(x, 2.0)
        s = torch.sigmoid(x.double())
        log_rest = -F.softplus(x.double())
        for part, exact in zip(actual, (s**2, log_rest, s**2 * (s - 2 * log_rest * (1 - s))), strict=True):
            torch.testing.assert_close(part.double(), exact, rtol=2e-6, atol=0)


def test_a_scale_multiplies_sums_and_gradients_alike() -> None:
    logits, labels = random_case(3, 50, 3)
    scale = torch.tensor([0.5, 0.0, 3.0])
    torch.testing.assert_close(dense_focal_loss(logits, labels, scale=scale), on_cpu(logits, labels, 0.25, 2.0) * scale)
    gradient = gradient_of(lambda x, y, *_: dense_focal_loss(x, y, scale=scale), logits, labels, None, 0.0)
    expected = gradient_of(on_cpu, logits, labels, 0.25, 2.0) * scale[:, None, None]
    torch.testing.assert_close(gradient, expected)


@both_paths
def test_background_is_a_negative_for_every_class(dense: Dense) -> None:
    logits, _ = random_case(2, 50, 3)
    sums = dense(logits, torch.full((2, 50), -1), 0.25, 2.0)
    expected = torchvision_focal_loss(logits, torch.zeros_like(logits)).sum(dim=(1, 2))
    torch.testing.assert_close(sums, expected)


@both_paths
@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0, 5.0])
def test_extreme_logits_give_finite_losses_and_gradients(dense: Dense, gamma: float) -> None:
    logits = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4]).repeat(1, 2, 1)
    for label in range(-2, 5):
        labels = torch.full((1, 2), label)
        assert dense(logits, labels, 0.25, gamma).isfinite().all()
        assert gradient_of(dense, logits, labels, 0.25, gamma).isfinite().all()


@both_paths
def test_confident_correct_predictions_have_no_loss(dense: Dense) -> None:
    """Adding positives as negatives first and subtracting them again would leave the rounding of large numbers."""
    logits = torch.full((1, 100, 2), -40.0)
    logits[..., 0] = 40.0
    loss = dense(logits, torch.zeros(1, 100, dtype=torch.int64), 0.25, 2.0).item()
    assert 0 <= loss < 1e-30


@pytest.mark.parametrize("chunk", [1, 7, 21, 70, 71, 10_000])
def test_chunks_of_any_size_give_the_same_loss_and_gradient(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits, labels = random_case(3, 10, 7)
    whole, gradient = on_cpu(logits, labels, 0.25, 2.0), gradient_of(on_cpu, logits, labels, 0.25, 2.0)
    monkeypatch.setattr(dense_module, "CHUNK", chunk)
    torch.testing.assert_close(on_cpu(logits, labels, 0.25, 2.0), whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_of(on_cpu, logits, labels, 0.25, 2.0), gradient, rtol=1e-6, atol=0)


def test_logits_need_not_be_contiguous() -> None:
    logits, labels = random_case(2, 30, 5)
    permuted = logits.transpose(1, 2).contiguous().transpose(1, 2)
    assert not permuted.is_contiguous()
    torch.testing.assert_close(on_cpu(permuted, labels, 0.25, 2.0), on_cpu(logits, labels, 0.25, 2.0))
    torch.testing.assert_close(
        gradient_of(on_cpu, permuted, labels, 0.25, 2.0), gradient_of(on_cpu, logits, labels, 0.25, 2.0)
    )


def test_a_second_backward_is_rejected() -> None:
    logits, labels = random_case(1, 5, 3)
    loss = dense_focal_loss(logits.requires_grad_(), labels).sum()
    torch.autograd.backward(loss, retain_graph=True)
    with pytest.raises(RuntimeError, match="can be differentiated once, got twice"):
        torch.autograd.backward(loss)


def test_a_second_derivative_is_rejected() -> None:
    logits, labels = random_case(1, 5, 3)
    leaf = logits.requires_grad_()
    factor = torch.ones((), requires_grad=True)
    (gradient,) = torch.autograd.grad((dense_focal_loss(leaf, labels) * factor).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.backward(gradient.sum())


def test_inputs_are_not_modified() -> None:
    logits, labels = random_case(2, 20, 3)
    before = logits.clone(), labels.clone()
    gradient_of(on_cpu, logits, labels, 0.25, 2.0)
    assert torch.equal(logits, before[0])
    assert torch.equal(labels, before[1])
