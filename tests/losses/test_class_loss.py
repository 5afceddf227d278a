"""The class loss of a batch for every kind and setting against the papers' formulas in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from detector.losses import ClassLoss, RetinaNetLoss
from detector.losses.class_loss import _softmax_alpha
from detector.losses.retinanet import Normalizers
from detector.structures import HeadOutputs, Targets

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

CLASSES = 4
BY_CLASS = [0.5, 2.0, 1.0, 0.3]

# --- the oracle


@dataclass(frozen=True)
class Settings:
    """The settings of a class loss; the defaults are those that `ClassLoss` must have."""

    kind: str
    activation: str = "sigmoid"
    alpha: float | Sequence[float] | None = 0.25
    gamma: float = 2.0
    negative_weight: float | None = None
    star_beta: float = 1.0
    poly_epsilon: float = 1.0
    varifocal_alpha: float = 0.75
    ghm_bins: int = 10
    ohem_batch: int = 256
    ohem_nms_thresh: float = 0.7
    ohem_negatives_per_positive: int | None = None
    bootstrap_fraction: float = 0.01


class Example(NamedTuple):
    """Input of the oracle: logits (B, A, C), labels and qualities (B, A), predicted boxes (B, A, 4)."""

    logits: Array
    labels: Labels
    quality: Array
    boxes: Array


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def balance(settings: Settings) -> tuple[Array, float]:
    """Return the weights of the positives of each class, and of negatives."""
    alpha = settings.alpha
    positive = np.broadcast_to(np.array(1.0 if alpha is None else alpha, dtype=np.float64), (CLASSES,))
    negative = 1 - alpha if isinstance(alpha, float) else 1.0
    return positive, negative if settings.negative_weight is None else settings.negative_weight


def entry_losses(settings: Settings, example: Example) -> Array:
    """Return the loss of every entry (B, A, K), or, with a softmax, of every anchor (B, A, 1)."""
    return (softmax_losses if settings.activation == "softmax" else sigmoid_losses)(settings, example)


def sigmoid_losses(settings: Settings, example: Example) -> Array:
    x, gamma = example.logits, settings.gamma
    positive = example.labels[..., None] == np.arange(CLASSES)
    true = np.where(positive, x, -x)
    wrong, cross = sigmoid(-true), softplus(-true)  # 1 - p_t and -log p_t
    quality = np.where(positive, example.quality[..., None], 0.0)
    soft_cross = quality * softplus(-x) + (1 - quality) * softplus(x)
    weight = np.where(positive, *balance(settings))
    match settings.kind:
        case "focal":
            return weight * wrong**gamma * cross
        case "focal_star":
            return weight * softplus(-(gamma * true + settings.star_beta)) / gamma
        case "poly1_focal":
            weight = np.where(positive, *balance(replace(settings, negative_weight=None)))
            return weight * (wrong**gamma * cross + settings.poly_epsilon * wrong ** (gamma + 1))
        case "quality_focal":
            return np.abs(quality - sigmoid(x)) ** gamma * soft_cross
        case "varifocal":
            negative = settings.varifocal_alpha * sigmoid(x) ** gamma * softplus(x)
            return np.where(quality > 0, quality * soft_cross, negative)
    return cross


def softmax_losses(settings: Settings, example: Example) -> Array:
    x, gamma = example.logits, settings.gamma
    target = np.where(example.labels < 0, CLASSES, example.labels)[..., None]
    is_target = np.arange(CLASSES + 1) == target
    true = x[is_target].reshape(target.shape) - np.logaddexp.reduce(
        np.where(is_target, -np.inf, x), axis=-1, keepdims=True
    )
    positive, negative = balance(settings)
    weight = np.array([*positive, negative])[target]
    match settings.kind:
        case "focal":
            return weight * sigmoid(-true) ** gamma * softplus(-true)
        case "focal_star":
            return weight * softplus(-(gamma * true + settings.star_beta)) / gamma
    return softplus(-true)


def shares(settings: Settings, example: Example) -> Array:
    """Return the factor of every entry's loss in its image's sum or mean: (B, A, 1), or (B, A, K) for GHM."""
    if settings.kind == "ghm":
        return ghm_shares(settings, example)
    counted = (example.labels >= -1).astype(np.float64)
    if settings.kind in ("ohem", "bootstrap"):
        losses = entry_losses(settings, example).sum(axis=-1)
        choose = hardest if settings.kind == "bootstrap" else hard_without_overlap
        for row, loss, label, boxes in zip(counted, losses, example.labels, example.boxes, strict=True):
            chosen = choose(settings, loss, label, boxes)
            row[:] = 0
            row[chosen] = 1 / max(1, len(chosen))
    return counted[..., None]


def ghm_shares(settings: Settings, example: Example) -> Array:
    """Return N / (entries of the bin * bins in use), divided by N for a mean, times the number of images."""
    positive = example.labels[..., None] == np.arange(CLASSES)
    counted = np.broadcast_to((example.labels >= -1)[..., None], positive.shape)
    place = np.floor(np.abs(sigmoid(example.logits) - positive) * settings.ghm_bins).astype(np.int64)
    count = np.bincount(place[counted], minlength=settings.ghm_bins)
    images = counted.any(axis=(1, 2)).sum()
    share: Array = np.where(counted, images / (count.clip(1)[place] * (count > 0).sum()), 0.0)
    return share


def hardest(settings: Settings, loss: Array, label: Labels, boxes: Array) -> list[int]:
    order = [int(a) for a in np.argsort(-loss) if label[a] >= -1]
    return order[: max(1, round(settings.bootstrap_fraction * len(order)))]


def hard_without_overlap(settings: Settings, loss: Array, label: Labels, boxes: Array) -> list[int]:
    """OHEM: the hardest anchors that do not overlap a harder one, of all or of positives and negatives."""
    apart = iou(boxes[:, None], boxes) <= settings.ohem_nms_thresh
    kept: list[int] = []
    for a in np.argsort(-loss):
        if label[a] >= -1 and apart[a][kept].all():
            kept.append(int(a))
    ratio = settings.ohem_negatives_per_positive
    if ratio is None:
        return kept[: settings.ohem_batch]
    positives = [a for a in kept if label[a] >= 0][: settings.ohem_batch // (1 + ratio)]
    room = min(settings.ohem_batch - len(positives), ratio * max(1, len(positives)))
    return positives + [a for a in kept if label[a] < 0][:room]


def iou(boxes: Array, other: Array) -> Array:
    """IoU of boxes (..., 4) and (..., 4), which broadcast."""
    shared = np.minimum(boxes[..., 2:], other[..., 2:]) - np.maximum(boxes[..., :2], other[..., :2])
    inter = shared.clip(0).prod(axis=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(axis=-1) for b in (boxes, other)]
    overlap: Array = inter / (areas[0] + areas[1] - inter)
    return overlap


def decoded(deltas: Array, anchors: Array) -> Array:
    """Decode the boxes of anchors (R-CNN, appendix C)."""
    size = anchors[:, 2:] - anchors[:, :2]
    center = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[..., :2] * size
    half = size * np.exp(deltas[..., 2:]) / 2
    return np.concatenate([center - half, center + half], axis=-1)


def expected_sums(settings: Settings, example: Example) -> Array:
    """(B,)."""
    total: Array = (shares(settings, example) * entry_losses(settings, example)).sum(axis=(1, 2))
    return total


def expected_gradient(settings: Settings, example: Example, step: float = 1e-5) -> Array:
    """Return (B, A, C) central differences, with the selection of entries and their weights fixed."""
    share, x, columns = shares(settings, example), example.logits, []
    for unit in np.eye(x.shape[-1]):
        sides = [entry_losses(settings, example._replace(logits=x + side * step * unit)) for side in (1, -1)]
        columns.append((share * (sides[0] - sides[1])).sum(axis=-1) / (2 * step))
    return np.stack(columns, axis=-1)


# --- inputs

NON_DEFAULT: dict[str, Any] = {
    "alpha": 0.6, "gamma": 1.3, "negative_weight": 0.2, "star_beta": 0.4, "poly_epsilon": 0.6, "varifocal_alpha": 0.5,
    "ghm_bins": 7, "ohem_batch": 24, "ohem_nms_thresh": 0.4, "bootstrap_fraction": 0.1,
}  # fmt: skip
"""Every setting far from its default: those a kind does not use must have no effect."""

BALANCES: dict[str, dict[str, Any]] = {
    "by default": {},
    "unweighted": {"alpha": None, "gamma": 0.5},
    "by class": {"alpha": BY_CLASS, "gamma": 3.0},
    "by class and background": {"alpha": BY_CLASS, "negative_weight": 0.2},
    "background only": {"alpha": None, "negative_weight": 0.2},
    "non-default": NON_DEFAULT,
}
CASES: dict[str, dict[str, Any]] = {
    f"{kind} {activation} {name}": {"kind": kind, "activation": activation, **settings}
    for kind in ("focal", "focal_star")
    for activation in ("sigmoid", "softmax")
    for name, settings in BALANCES.items()
} | {
    f"{kind} {name}": {"kind": kind, **settings}
    for kind in ("poly1_focal", "quality_focal", "varifocal", "ghm", "ohem", "bootstrap")
    for name, settings in {"by default": {}, "non-default": NON_DEFAULT}.items()
} | {
    "focal sigmoid gamma 0": {"kind": "focal", "gamma": 0.0},
    "focal softmax gamma 0": {"kind": "focal", "gamma": 0.0, "activation": "softmax"},
    "poly1_focal by class": {"kind": "poly1_focal", "alpha": BY_CLASS, "poly_epsilon": -0.5},
    "poly1_focal unweighted": {"kind": "poly1_focal", "alpha": None},
    "ohem of few": {"kind": "ohem", "ohem_batch": 3},
    "ohem 1:3": {"kind": "ohem", "ohem_batch": 40, "ohem_negatives_per_positive": 3},
    "ohem 1:1 non-default": {"kind": "ohem", **NON_DEFAULT, "ohem_negatives_per_positive": 1},
    "ohem softmax": {"kind": "ohem", "activation": "softmax", **NON_DEFAULT},
    "bootstrap softmax": {"kind": "bootstrap", "activation": "softmax", **NON_DEFAULT},
}  # fmt: skip
MEANS = ("ghm", "ohem", "bootstrap")


class Heads(NamedTuple):
    """Outputs of a network: logits (B, A, C), deltas (B, A, 4), and anchors (A, 4)."""

    logits: Tensor
    deltas: Tensor
    anchors: Tensor

    def outputs(self) -> HeadOutputs:
        """Split the outputs into two levels."""
        sizes = [150, self.logits.shape[1] - 150]
        return HeadOutputs(torch.split(self.logits, sizes, 1), torch.split(self.deltas, sizes, 1), self.anchors)

    def boxes(self) -> Array:
        return decoded(double(self.deltas), double(self.anchors))


def double(tensor: Tensor) -> Array:
    array: Array = tensor.detach().double().numpy()
    return array


def random_heads(settings: Settings, *, batch: int, anchors: int = 240) -> Heads:
    """Predicted boxes lie so far from their anchors that their overlaps differ from those of the anchors."""
    random = torch.Generator().manual_seed(0)
    columns = CLASSES + (settings.activation == "softmax")
    logits = torch.randn(batch, anchors, columns, generator=random) * 2 - 2
    deltas = torch.randn(batch, anchors, 4, generator=random) * 0.3
    corner = torch.rand(anchors, 2, generator=random) * 100
    size = 20 + torch.rand(anchors, 2, generator=random) * 20
    return Heads(logits.requires_grad_(), deltas.requires_grad_(), torch.cat([corner, corner + size], dim=1))


def random_batch(settings: Settings) -> tuple[Heads, Tensor, Tensor]:
    """Outputs, labels and qualities of two images with objects, one without, and a filler."""
    heads = random_heads(settings, batch=4)
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(-2, CLASSES, (4, 240), generator=random)
    labels = torch.where(torch.rand(4, 240, generator=random) < 0.8, -1, labels)
    labels[2].clamp_(max=-1)
    labels[3] = -2
    return heads, labels, torch.rand(4, 240, generator=random) * (labels >= 0)


def example_of(heads: Heads, labels: Tensor, quality: Tensor) -> Example:
    return Example(double(heads.logits), labels.numpy(), double(quality), heads.boxes())


def close(found: Tensor, expected: Array, *, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    np.testing.assert_allclose(double(found), expected, rtol=rtol, atol=atol)


# --- ClassLoss


@pytest.mark.parametrize("case", CASES)
def test_sums_of_every_kind_equal_the_papers_formulas(case: str) -> None:
    """On the path with gradients and on the one without."""
    loss, settings = ClassLoss(**CASES[case]), Settings(**CASES[case])
    heads, labels, quality = random_batch(settings)
    expected = expected_sums(settings, example_of(heads, labels, quality))
    assert (expected[:3] > 0).all()
    assert expected[3] == 0
    close(loss(heads.outputs(), labels, quality), expected)
    close(loss(heads._replace(logits=heads.logits.detach()).outputs(), labels, quality), expected)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_kind_equal_the_derivatives_of_the_papers_formulas(case: str) -> None:
    loss, settings = ClassLoss(**CASES[case]), Settings(**CASES[case])
    heads, labels, quality = random_batch(settings)
    scale = torch.tensor([0.5, 2.0, 1.5, 1.0])
    sums = loss(heads.outputs(), labels, quality, scale)
    torch.autograd.backward(sums.sum())
    assert heads.logits.grad is not None
    assert heads.deltas.grad is None, "the class loss has no gradient for boxes"
    example, factor = example_of(heads, labels, quality), double(scale)
    close(sums, expected_sums(settings, example) * factor)
    close(heads.logits.grad, expected_gradient(settings, example) * factor[:, None, None], rtol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if "by default" in c and CASES[c]["kind"] not in MEANS])
def test_small_gradients_of_fp16_logits_survive_with_a_gradient_scaler(case: str) -> None:
    """Gradients of easy negatives are below fp16's 6e-8 until multiplied by the scaler's 65,536, after the loss."""
    loss, settings = ClassLoss(**CASES[case]), Settings(**CASES[case])
    heads, labels, quality = random_batch(settings)
    easier = heads.logits.detach().clone()
    easier[..., :CLASSES] -= 5
    heads = heads._replace(logits=easier.half().requires_grad_())
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaled = scaler.scale(loss(heads.outputs(), labels, quality).sum() * 0.01)
    torch.autograd.backward(scaled)
    assert heads.logits.grad is not None
    assert heads.logits.grad.dtype == torch.float16
    expected = expected_gradient(settings, example_of(heads, labels, quality))
    tiny = 2.0**-24
    close(heads.logits.grad, expected * 655.36, rtol=2e-3, atol=tiny)
    lost = (np.abs(expected) < tiny / 2) & (np.abs(expected) * 655.36 > 10 * tiny)
    assert lost.sum() > 20, "a buffer of fp16 would lose them"


@pytest.mark.parametrize("kind", ["poly1_focal", "quality_focal", "varifocal"])
def test_kinds_without_a_softmax_form_are_rejected(kind: Any) -> None:
    settings = Settings(kind, activation="softmax")
    heads, labels, quality = random_batch(settings)
    with pytest.raises(ValueError, match=f"{kind} has no softmax form"):
        ClassLoss(kind, activation="softmax")(heads.outputs(), labels, quality)


# --- RetinaNetLoss

OBJECTS = Targets(
    torch.tensor([
        [[10.0, 10, 40, 45], [50, 20, 80, 50], [30, 60, 65, 90]], [[60, 60, 95, 90], *[[0] * 4] * 2], [[0] * 4] * 3,
    ]),
    torch.tensor([[3, 0, 1], [2, -1, -1], [-1, -1, -1]]),
    torch.zeros(3, 0, 4),
)  # fmt: skip
"""Three images: with three objects, one, and none."""


def matched(heads: Heads) -> Example:
    """The paper's assignment: IoU of at least 0.5 gives the object's class, below 0.4 background, ignored between."""
    overlaps = np.nan_to_num(iou(double(heads.anchors)[:, None], double(OBJECTS.boxes)[:, None]))  # (B, A, M)
    best, highest = overlaps.argmax(axis=2), overlaps.max(axis=2)
    labels = np.take_along_axis(OBJECTS.labels.numpy(), best, axis=1)
    labels = np.where(highest >= 0.5, labels, np.where(highest < 0.4, -1, -2))
    objects = np.take_along_axis(double(OBJECTS.boxes), best[..., None], axis=1)
    quality = np.where(labels >= 0, iou(heads.boxes(), objects), 0.0)
    return Example(double(heads.logits), labels, quality, heads.boxes())


def expected_loss(settings: Settings, example: Example, normalizer: str) -> float:
    """Means are divided by images under both normalizers; sums by all positives, or by each image's, then by images."""
    sums, positives = expected_sums(settings, example), (example.labels >= 0).sum(axis=1)
    if settings.kind in MEANS:
        return float(sums.mean())
    if normalizer == "global":
        return float(sums.sum() / positives.sum())
    return float((sums / positives.clip(1)).mean())


@pytest.mark.parametrize("normalizer", ["global", "per_image"])
@pytest.mark.parametrize("case", [c for c in CASES if "default" in c or "ohem" in c])
def test_the_class_loss_of_a_batch_equals_the_oracle(case: str, normalizer: Any) -> None:
    settings = Settings(**CASES[case])
    heads = random_heads(settings, batch=3)
    example = matched(heads)
    positives = (example.labels >= 0).sum(axis=1)
    assert positives[0] > positives[1] > 2
    assert positives[2] == 0
    losses = RetinaNetLoss(ClassLoss(**CASES[case]), normalizer=normalizer)(heads.outputs(), OBJECTS)
    assert losses["loss_cls"].item() == pytest.approx(expected_loss(settings, example, normalizer), rel=1e-5)


@pytest.mark.parametrize("kind", ["quality_focal", "varifocal"])
def test_quality_is_the_iou_of_the_predicted_box_and_has_no_gradient(kind: Any) -> None:
    """It is neither 1 nor the IoU of the anchor, which would give a different loss."""
    settings = Settings(kind)
    heads = random_heads(settings, batch=3)
    loss = RetinaNetLoss(ClassLoss(kind))(heads.outputs(), OBJECTS)["loss_cls"]
    right = matched(heads)
    unmoved = matched(heads._replace(deltas=torch.zeros_like(heads.deltas)))
    assert loss.item() == pytest.approx(expected_loss(settings, right, "global"), rel=1e-5)
    for quality in (np.ones_like(right.quality), unmoved.quality):
        wrong = expected_loss(settings, right._replace(quality=quality), "global")
        assert loss.item() != pytest.approx(wrong, rel=1e-3)
    frozen = heads._replace(logits=heads.logits.detach())  # not on the CPU's path, which would drop such a gradient
    assert not RetinaNetLoss(ClassLoss(kind))(frozen.outputs(), OBJECTS)["loss_cls"].requires_grad
    torch.autograd.backward(loss)
    assert heads.deltas.grad is None
    assert heads.logits.grad is not None
    close(heads.logits.grad, expected_gradient(settings, right) / (right.labels >= 0).sum(), rtol=1e-4)


@pytest.mark.parametrize("normalizer", ["global", "per_image"])
@pytest.mark.parametrize("kind", MEANS)
def test_means_are_divided_by_the_images_of_the_step_and_not_by_its_positives(kind: Any, normalizer: Any) -> None:
    settings = Settings(kind)
    heads = random_heads(settings, batch=3)
    loss = RetinaNetLoss(ClassLoss(kind), normalizer=normalizer)
    positives, images = torch.tensor(1000.0), torch.tensor(12.0)
    found = loss(heads.outputs(), OBJECTS, normalizers=Normalizers(positives, positives, images))["loss_cls"]
    assert found.item() == pytest.approx(expected_sums(settings, matched(heads)).sum() / 12, rel=1e-5)
    torch.autograd.backward(found)
    assert heads.logits.grad is not None
    close(heads.logits.grad, expected_gradient(settings, matched(heads)) / 12, rtol=1e-4)


def test_integer_weights_equal_float_weights_in_a_softmax() -> None:
    loss = ClassLoss(activation="softmax", alpha=[0.2, 0.3], negative_weight=1)
    weights = _softmax_alpha(loss, torch.zeros(1, 3))
    assert weights is not None
    assert weights.tolist() == pytest.approx([0.2, 0.3, 1.0])
