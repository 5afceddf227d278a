"""Dense losses, on every path, against the losses of single anchors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from detector.losses import ClassLoss
from detector.losses.dense import AnchorLoss, anchor_losses, dense_loss
from detector.memory import peak_of
from detector.structures import HeadOutputs

KINDS: dict[str, dict[str, Any]] = {
    "focal": {}, "focal by class": {"alpha": [0.5, 2.0, 1.0, 0.3]}, "focal_star": {"alpha": None},
    "focal_star softmax": {"activation": "softmax"}, "focal softmax": {"activation": "softmax"},
    "focal softmax by class": {"activation": "softmax", "alpha": [0.5, 2.0, 1.0, 0.3], "negative_weight": 0.2},
    "poly1_focal": {}, "quality_focal": {}, "varifocal": {}, "ghm": {}, "ohem": {"ohem_batch": 30, "alpha": None},
    "ohem 1:3": {"ohem_batch": 32, "alpha": None, "ohem_negatives_per_positive": 3},
    "bootstrap": {"bootstrap_fraction": 0.1, "alpha": None}, "bootstrap softmax": {"activation": "softmax",
    "alpha": None},
}  # fmt: skip


def class_loss(name: str) -> ClassLoss:
    kind: Any = name.partition(" ")[0]
    return ClassLoss(kind, **KINDS[name])


def head(anchors: int = 150, *, softmax: bool, batch: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, labels, qualities and anchors of a head."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, anchors, 4 + softmax, generator=random) - 2
    labels = torch.randint(-2, 4, (batch, anchors), generator=random)
    labels = torch.where(torch.rand(batch, anchors, generator=random) < 0.8, -1, labels)
    quality = torch.rand(batch, anchors, generator=random) * (labels >= 0)
    corner = torch.rand(anchors, 2, generator=random) * 100
    return logits, labels, quality, torch.cat([corner, corner + 20 + torch.rand(anchors, 2, generator=random) * 20], 1)


def outputs_of(logits: Tensor, anchors: Tensor, cut: int = 100) -> HeadOutputs:
    """Outputs in two levels."""
    deltas = torch.zeros(*logits.shape[:2], 4)
    sizes = [cut, logits.shape[1] - cut]
    return HeadOutputs(torch.split(logits, sizes, 1), torch.split(deltas, sizes, 1), anchors)


@pytest.mark.parametrize("name", KINDS)
def test_the_order_of_anchors_does_not_matter(name: str) -> None:
    loss = class_loss(name)
    logits, labels, quality, anchors = head(softmax=loss.activation == "softmax")
    order = torch.randperm(150, generator=torch.Generator().manual_seed(9))
    one = loss(outputs_of(logits, anchors), labels, quality)
    other = loss(outputs_of(logits[:, order], anchors[order]), labels[:, order], quality[:, order])
    assert one.shape == (2,)
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", KINDS)
def test_ignored_anchors_have_no_loss_whatever_their_logits(name: str) -> None:
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
def test_dense_sums_and_gradients_equal_those_of_single_anchors(
    name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the fast path of the focal loss, too: `per_anchor` is the plain form."""
    monkeypatch.setattr("detector.losses.dense.CHUNK", chunk)
    loss = class_loss(name)
    logits, labels, quality, anchors = head(softmax=loss.activation == "softmax")
    fast, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    scale = torch.tensor([0.5, 2.0])
    sums = loss(outputs_of(fast, anchors), labels, quality, scale)
    losses = torch.stack(
        [loss.per_anchor(x, y.clamp(min=-1), q) for x, y, q in zip(plain, labels, quality, strict=True)]
    )
    expected = torch.where(labels >= -1, losses, 0.0).sum(dim=1) * scale
    torch.testing.assert_close(sums, expected)
    weights = torch.tensor([1.0, 3.0])  # a factor for each image
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
    assert 0.9 < needed < 2.0, "the gradient, and buffers of the size of the labels"


def test_a_dense_loss_keeps_one_buffer_and_can_be_differentiated_once() -> None:
    loss = class_loss("focal_star")
    logits, labels, _, _ = head(softmax=False)
    leaf = logits.requires_grad_()
    sums = dense_loss(loss.per_anchor, leaf, labels)
    torch.autograd.backward(sums.sum(), retain_graph=True)
    with pytest.raises(RuntimeError, match="once, got twice"):
        torch.autograd.backward(sums.sum())
    half = leaf.detach().half().requires_grad_()
    torch.autograd.backward(dense_loss(loss.per_anchor, half, labels).sum() * 1e-3)
    assert half.grad is not None
    torch.testing.assert_close(half.grad.float(), leaf.grad * 1e-3, rtol=2e-2, atol=1e-6)  # type: ignore[operator]


@pytest.mark.parametrize("path", ["chunked", "plain", "compiled"])
def test_weights_multiply_the_losses_and_gradients_of_anchors(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On every path of `dense_loss`; the weight of an ignored anchor has no effect."""
    logits, labels, quality, _ = head(softmax=False)
    weights = torch.rand(labels.shape, generator=torch.Generator().manual_seed(1)) * 3
    weights[:, :5] = 0
    loss = class_loss("quality_focal").per_anchor
    exact = logits.double().requires_grad_()
    q = (labels[..., None] == torch.arange(4)) * quality[..., None].double()
    p = torch.sigmoid(exact)
    losses = ((q - p).abs() ** 2 * -(q * p.log() + (1 - q) * (1 - p).log())).sum(dim=2)
    expected = torch.where(labels >= -1, losses * weights, 0.0).sum(dim=1)

    weights = torch.where(labels < -1, 99.0, weights)
    leaf = logits.clone().requires_grad_()
    if path == "chunked":
        monkeypatch.setattr("detector.losses.dense.CHUNK", 7)
        sums = dense_loss(loss, leaf, labels, quality, weights)
    elif path == "compiled":
        monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
        sums = dense_loss(loss, leaf, labels, quality, weights)
    else:  # logits without a gradient are not processed in chunks, so here it is that of a shift of zeros
        leaf = torch.zeros_like(logits).requires_grad_()

        def shifted_loss(image: int) -> AnchorLoss:
            return lambda x, label, q: loss(x + leaf[image], label, q)

        inputs = (logits, labels, quality, weights)
        sums = torch.cat([dense_loss(shifted_loss(i), *(t[i : i + 1] for t in inputs)) for i in range(2)])
    torch.testing.assert_close(sums, expected.float())
    factors = torch.tensor([1.0, 3.0])
    torch.autograd.backward([(sums * factors).sum(), (expected * factors).sum()])
    assert leaf.grad is not None
    assert exact.grad is not None
    torch.testing.assert_close(leaf.grad, exact.grad.float())
    ones = torch.ones_like(weights)
    assert torch.equal(dense_loss(loss, logits, labels, quality, ones), dense_loss(loss, logits, labels, quality))


def test_sums_are_the_same_without_a_gradient() -> None:
    loss = class_loss("focal softmax")
    logits, labels, _, _ = head(softmax=True)
    expected = dense_loss(loss.per_anchor, logits.clone().requires_grad_(), labels)
    torch.testing.assert_close(dense_loss(loss.per_anchor, logits, labels), expected.detach())
    torch.testing.assert_close(anchor_losses(loss.per_anchor, logits, labels).sum(dim=1), expected.detach())
    assert dense_loss(loss.per_anchor, logits[:0], labels[:0]).shape == (0,)


def test_fillers_do_not_count_in_a_mean_over_images() -> None:
    """The sum over two images and a filler equals the sum over the two images."""
    loss = class_loss("ghm")
    logits, labels, _, anchors = head(softmax=False)
    filled = torch.cat([logits, logits[:1] + 9]), torch.cat([labels, torch.full_like(labels[:1], -2)])
    one = loss(outputs_of(logits, anchors), labels, None).sum()
    other = loss(outputs_of(filled[0], anchors), filled[1], None).sum()
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["ohem", "bootstrap"])
def test_selected_examples_have_plain_cross_entropy_whatever_alpha_and_gamma_are(kind: Any) -> None:
    logits, labels, _, anchors = head(softmax=False)
    actual = [
        ClassLoss(kind, alpha=alpha, gamma=gamma, ohem_batch=1000, ohem_nms_thresh=1.0, bootstrap_fraction=1.0)(
            outputs_of(logits, anchors), labels, None
        )
        for alpha, gamma in ((0.25, 2.0), (None, 0.0))
    ]
    torch.testing.assert_close(actual[0], actual[1])
    cross = torch.nn.functional.binary_cross_entropy_with_logits(
        logits, (labels[..., None] == torch.arange(4)).float(), reduction="none"
    ).sum(dim=2)
    counted = labels >= -1
    torch.testing.assert_close(actual[0], (cross * counted).sum(dim=1) / counted.sum(dim=1))
