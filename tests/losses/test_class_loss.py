"""What training computes, the class loss of a batch of every kind and setting, against the papers' formulas in float64."""

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
from detector.structures import HeadOutputs, Targets

Array = NDArray[np.float64]
Labels = NDArray[np.int64]

CLASSES = 4
BY_CLASS = [0.5, 2.0, 1.0, 0.3]

# ---- the oracle -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Of a class loss; the defaults are those that `ClassLoss` must have."""

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
    """A batch as the oracle sees it: logits (B, A, C), labels and qualities (B, A), predicted boxes (B, A, 4)."""

    logits: Array
    labels: Labels
    quality: Array
    boxes: Array


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def softplus(x: Array) -> Array:
    return np.logaddexp(0, x)


def balance(settings: Settings) -> tuple[Array, float]:
    """Weights of the positives of each class, and of negatives."""
    alpha = settings.alpha
    positive = np.broadcast_to(np.array(1.0 if alpha is None else alpha, dtype=np.float64), (CLASSES,))
    negative = 1 - alpha if isinstance(alpha, float) else 1.0
    return positive, negative if settings.negative_weight is None else settings.negative_weight


def entry_losses(settings: Settings, example: Example) -> Array:
    """Of every entry (B, A, K), or, with a softmax, of every anchor (B, A, 1)."""
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
    mine = np.arange(CLASSES + 1) == target
    true = x[mine].reshape(target.shape) - np.logaddexp.reduce(np.where(mine, -np.inf, x), axis=-1, keepdims=True)
    positive, negative = balance(settings)
    weight = np.array([*positive, negative])[target]
    match settings.kind:
        case "focal":
            return weight * sigmoid(-true) ** gamma * softplus(-true)
        case "focal_star":
            return weight * softplus(-(gamma * true + settings.star_beta)) / gamma
    return softplus(-true)


def shares(settings: Settings, example: Example) -> Array:
    """How much of every entry's loss its image's sum, or mean, gets: (B, A, 1), or (B, A, K) for GHM."""
    if settings.kind == "ghm":
        return harmonised(settings, example)
    counted = (example.labels >= -1).astype(np.float64)
    if settings.kind in ("ohem", "bootstrap"):
        losses = entry_losses(settings, example).sum(axis=-1)
        choose = hardest if settings.kind == "bootstrap" else hard_apart
        for row, loss, label, boxes in zip(counted, losses, example.labels, example.boxes, strict=True):
            chosen = choose(settings, loss, label, boxes)
            row[:] = 0
            row[chosen] = 1 / max(1, len(chosen))
    return counted[..., None]


def harmonised(settings: Settings, example: Example) -> Array:
    """N / (entries of its bin * bins in use), over N for a mean, times the images."""
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


def hard_apart(settings: Settings, loss: Array, label: Labels, boxes: Array) -> list[int]:
    """OHEM: the hardest that do not overlap a harder one, of all or of either side."""
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
    """(..., 4) with (..., 4) that broadcast."""
    shared = np.minimum(boxes[..., 2:], other[..., 2:]) - np.maximum(boxes[..., :2], other[..., :2])
    inter = shared.clip(0).prod(axis=-1)
    areas = [(b[..., 2:] - b[..., :2]).prod(axis=-1) for b in (boxes, other)]
    overlap: Array = inter / (areas[0] + areas[1] - inter)
    return overlap


def decoded(deltas: Array, anchors: Array) -> Array:
    """The boxes that anchors become (R-CNN, appendix C)."""
    size = anchors[:, 2:] - anchors[:, :2]
    center = (anchors[:, :2] + anchors[:, 2:]) / 2 + deltas[..., :2] * size
    half = size * np.exp(deltas[..., 2:]) / 2
    return np.concatenate([center - half, center + half], axis=-1)


def expected_sums(settings: Settings, example: Example) -> Array:
    """(B,)."""
    total: Array = (shares(settings, example) * entry_losses(settings, example)).sum(axis=(1, 2))
    return total


def expected_gradient(settings: Settings, example: Example, step: float = 1e-5) -> Array:
    """(B, A, C) by central differences, the choice of entries and their weights held."""
    share, x, columns = shares(settings, example), example.logits, []
    for unit in np.eye(x.shape[-1]):
        sides = [entry_losses(settings, example._replace(logits=x + side * step * unit)) for side in (1, -1)]
        columns.append((share * (sides[0] - sides[1])).sum(axis=-1) / (2 * step))
    return np.stack(columns, axis=-1)


# ---- what it is asked about -------------------------------------------------------------------------------------

LOUD: dict[str, Any] = {
    "alpha": 0.6, "gamma": 1.3, "negative_weight": 0.2, "star_beta": 0.4, "poly_epsilon": 0.6, "varifocal_alpha": 0.5,
    "ghm_bins": 7, "ohem_batch": 24, "ohem_nms_thresh": 0.4, "bootstrap_fraction": 0.1,
}  # fmt: skip
"""Every setting far from its default: those a kind does not use must change nothing."""

BALANCES: dict[str, dict[str, Any]] = {
    "by default": {},
    "unweighted": {"alpha": None, "gamma": 0.5},
    "by class": {"alpha": BY_CLASS, "gamma": 3.0},
    "by class and background": {"alpha": BY_CLASS, "negative_weight": 0.2},
    "background only": {"alpha": None, "negative_weight": 0.2},
    "loud": LOUD,
}
CASES: dict[str, dict[str, Any]] = {
    f"{kind} {activation} {name}": {"kind": kind, "activation": activation, **settings}
    for kind in ("focal", "focal_star")
    for activation in ("sigmoid", "softmax")
    for name, settings in BALANCES.items()
} | {
    f"{kind} {name}": {"kind": kind, **settings}
    for kind in ("poly1_focal", "quality_focal", "varifocal", "ghm", "ohem", "bootstrap")
    for name, settings in {"by default": {}, "loud": LOUD}.items()
} | {
    "focal sigmoid gamma 0": {"kind": "focal", "gamma": 0.0},
    "focal softmax gamma 0": {"kind": "focal", "gamma": 0.0, "activation": "softmax"},
    "poly1_focal by class": {"kind": "poly1_focal", "alpha": BY_CLASS, "poly_epsilon": -0.5},
    "poly1_focal unweighted": {"kind": "poly1_focal", "alpha": None},
    "ohem of few": {"kind": "ohem", "ohem_batch": 3},
    "ohem 1:3": {"kind": "ohem", "ohem_batch": 40, "ohem_negatives_per_positive": 3},
    "ohem 1:1 loud": {"kind": "ohem", **LOUD, "ohem_negatives_per_positive": 1},
    "ohem softmax": {"kind": "ohem", "activation": "softmax", **LOUD},
    "bootstrap softmax": {"kind": "bootstrap", "activation": "softmax", **LOUD},
}  # fmt: skip
MEANS = ("ghm", "ohem", "bootstrap")


class Said(NamedTuple):
    """What a network says: logits (B, A, C), deltas (B, A, 4), of anchors (A, 4)."""

    logits: Tensor
    deltas: Tensor
    anchors: Tensor

    def outputs(self) -> HeadOutputs:
        """In two levels."""
        sizes = [150, self.logits.shape[1] - 150]
        return HeadOutputs(torch.split(self.logits, sizes, 1), torch.split(self.deltas, sizes, 1), self.anchors)

    def boxes(self) -> Array:
        return decoded(double(self.deltas), double(self.anchors))


def double(tensor: Tensor) -> Array:
    array: Array = tensor.detach().double().numpy()
    return array


def says(settings: Settings, *, batch: int, anchors: int = 240) -> Said:
    """Boxes stray so far from anchors that it matters which of them overlap."""
    random = torch.Generator().manual_seed(0)
    columns = CLASSES + (settings.activation == "softmax")
    logits = torch.randn(batch, anchors, columns, generator=random) * 2 - 2
    deltas = torch.randn(batch, anchors, 4, generator=random) * 0.3
    corner = torch.rand(anchors, 2, generator=random) * 100
    size = 20 + torch.rand(anchors, 2, generator=random) * 20
    return Said(logits.requires_grad_(), deltas.requires_grad_(), torch.cat([corner, corner + size], dim=1))


def a_batch(settings: Settings) -> tuple[Said, Tensor, Tensor]:
    """Of two images, one without objects, and a filler that is none: what is said, labels, and qualities."""
    said = says(settings, batch=4)
    random = torch.Generator().manual_seed(1)
    labels = torch.randint(-2, CLASSES, (4, 240), generator=random)
    labels = torch.where(torch.rand(4, 240, generator=random) < 0.8, -1, labels)
    labels[2].clamp_(max=-1)
    labels[3] = -2
    return said, labels, torch.rand(4, 240, generator=random) * (labels >= 0)


def example_of(said: Said, labels: Tensor, quality: Tensor) -> Example:
    return Example(double(said.logits), labels.numpy(), double(quality), said.boxes())


def close(found: Tensor, expected: Array, *, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    np.testing.assert_allclose(double(found), expected, rtol=rtol, atol=atol)


# ---- ClassLoss --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_sums_of_every_kind_are_the_papers(case: str) -> None:
    """On the path that makes gradients and on the one that does not."""
    loss, settings = ClassLoss(**CASES[case]), Settings(**CASES[case])
    said, labels, quality = a_batch(settings)
    expected = expected_sums(settings, example_of(said, labels, quality))
    assert (expected[:3] > 0).all()
    assert expected[3] == 0
    close(loss(said.outputs(), labels, quality), expected)
    close(loss(said._replace(logits=said.logits.detach()).outputs(), labels, quality), expected)


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_every_kind_are_the_slopes_of_the_papers_formulas(case: str) -> None:
    loss, settings = ClassLoss(**CASES[case]), Settings(**CASES[case])
    said, labels, quality = a_batch(settings)
    scale = torch.tensor([0.5, 2.0, 1.5, 1.0])
    sums = loss(said.outputs(), labels, quality, scale)
    torch.autograd.backward(sums.sum())
    assert said.logits.grad is not None
    assert said.deltas.grad is None, "classes teach boxes nothing"
    example, factor = example_of(said, labels, quality), double(scale)
    close(sums, expected_sums(settings, example) * factor)
    close(said.logits.grad, expected_gradient(settings, example) * factor[:, None, None], rtol=1e-4)


@pytest.mark.parametrize("case", [c for c in CASES if "by default" in c and CASES[c]["kind"] not in MEANS])
def test_gradients_of_fp16_logits_survive_where_the_scaler_brings_them_back(case: str) -> None:
    """Easy negatives' are below fp16's 6e-8 until the scaler's 65,536 arrives, from behind the loss."""
    loss, settings = ClassLoss(**CASES[case]), Settings(**CASES[case])
    said, labels, quality = a_batch(settings)
    easier = said.logits.detach().clone()
    easier[..., :CLASSES] -= 5
    said = said._replace(logits=easier.half().requires_grad_())
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaled = scaler.scale(loss(said.outputs(), labels, quality).sum() * 0.01)
    torch.autograd.backward(scaled)
    assert said.logits.grad is not None
    assert said.logits.grad.dtype == torch.float16
    expected = expected_gradient(settings, example_of(said, labels, quality))
    tiny = 2.0**-24
    close(said.logits.grad, expected * 655.36, rtol=2e-3, atol=tiny)
    lost = (np.abs(expected) < tiny / 2) & (np.abs(expected) * 655.36 > 10 * tiny)
    assert lost.sum() > 20, "what a buffer of fp16 would lose"


@pytest.mark.parametrize("kind", ["poly1_focal", "quality_focal", "varifocal"])
def test_kinds_without_a_softmax_form_say_so(kind: Any) -> None:
    settings = Settings(kind, activation="softmax")
    said, labels, quality = a_batch(settings)
    with pytest.raises(ValueError, match=f"{kind} has no softmax form"):
        ClassLoss(kind, activation="softmax")(said.outputs(), labels, quality)


# ---- RetinaNetLoss ----------------------------------------------------------------------------------------------

OBJECTS = Targets(
    torch.tensor([
        [[10.0, 10, 40, 45], [50, 20, 80, 50], [30, 60, 65, 90]], [[60, 60, 95, 90], *[[0] * 4] * 2], [[0] * 4] * 3,
    ]),
    torch.tensor([[3, 0, 1], [2, -1, -1], [-1, -1, -1]]),
    torch.zeros(3, 0, 4),
)  # fmt: skip
"""Three images: of three objects, of one, of none."""


def matched(said: Said) -> Example:
    """As the paper matches: from an overlap of 0.5 on an object's class, below 0.4 background, ignored between."""
    overlaps = np.nan_to_num(iou(double(said.anchors)[:, None], double(OBJECTS.boxes)[:, None]))  # (B, A, M)
    best, highest = overlaps.argmax(axis=2), overlaps.max(axis=2)
    labels = np.take_along_axis(OBJECTS.labels.numpy(), best, axis=1)
    labels = np.where(highest >= 0.5, labels, np.where(highest < 0.4, -1, -2))
    objects = np.take_along_axis(double(OBJECTS.boxes), best[..., None], axis=1)
    quality = np.where(labels >= 0, iou(said.boxes(), objects), 0.0)
    return Example(double(said.logits), labels, quality, said.boxes())


def expected_loss(settings: Settings, example: Example, normalizer: str) -> float:
    """Means over the images whatever the normaliser is; sums by the positives of all, or of each and then the images."""
    sums, positives = expected_sums(settings, example), (example.labels >= 0).sum(axis=1)
    if settings.kind in MEANS:
        return float(sums.mean())
    if normalizer == "global":
        return float(sums.sum() / positives.sum())
    return float((sums / positives.clip(1)).mean())


@pytest.mark.parametrize("normalizer", ["global", "per_image"])
@pytest.mark.parametrize("case", [c for c in CASES if "loud" in c or "default" in c or "ohem" in c])
def test_a_batch_costs_what_its_boxes_and_objects_say(case: str, normalizer: Any) -> None:
    settings = Settings(**CASES[case])
    said = says(settings, batch=3)
    example = matched(said)
    positives = (example.labels >= 0).sum(axis=1)
    assert positives[0] > positives[1] > 2
    assert positives[2] == 0
    losses = RetinaNetLoss(ClassLoss(**CASES[case]), normalizer=normalizer)(said.outputs(), OBJECTS)
    assert losses["loss_cls"].item() == pytest.approx(expected_loss(settings, example, normalizer), rel=1e-5)


@pytest.mark.parametrize("kind", ["quality_focal", "varifocal"])
def test_quality_is_the_overlap_of_the_predicted_box_and_gets_no_gradient(kind: Any) -> None:
    """Not one, nor the anchor's overlap: each would be another loss."""
    settings = Settings(kind)
    said = says(settings, batch=3)
    loss = RetinaNetLoss(ClassLoss(kind))(said.outputs(), OBJECTS)["loss_cls"]
    right = matched(said)
    unmoved = matched(said._replace(deltas=torch.zeros_like(said.deltas)))
    assert loss.item() == pytest.approx(expected_loss(settings, right, "global"), rel=1e-5)
    for quality in (np.ones_like(right.quality), unmoved.quality):
        wrong = expected_loss(settings, right._replace(quality=quality), "global")
        assert loss.item() != pytest.approx(wrong, rel=1e-3)
    frozen = said._replace(logits=said.logits.detach())  # off the CPU's path, which would drop such a gradient
    assert not RetinaNetLoss(ClassLoss(kind))(frozen.outputs(), OBJECTS)["loss_cls"].requires_grad
    torch.autograd.backward(loss)
    assert said.deltas.grad is None
    assert said.logits.grad is not None
    close(said.logits.grad, expected_gradient(settings, right) / (right.labels >= 0).sum(), rtol=1e-4)


@pytest.mark.parametrize("normalizer", ["global", "per_image"])
@pytest.mark.parametrize("kind", MEANS)
def test_means_are_divided_by_the_images_of_the_step_and_not_by_its_positives(kind: Any, normalizer: Any) -> None:
    settings = Settings(kind)
    said = says(settings, batch=3)
    loss = RetinaNetLoss(ClassLoss(kind), normalizer=normalizer)
    step: dict[str, Tensor] = {"num_pos": torch.tensor(1000), "num_images": torch.tensor(12)}
    found = loss(said.outputs(), OBJECTS, **step)["loss_cls"]
    assert found.item() == pytest.approx(expected_sums(settings, matched(said)).sum() / 12, rel=1e-5)
    torch.autograd.backward(found)
    assert said.logits.grad is not None
    close(said.logits.grad, expected_gradient(settings, matched(said)) / 12, rtol=1e-4)


def test_whole_numbers_weigh_a_softmax_like_any_others() -> None:
    loss = ClassLoss(activation="softmax", alpha=[0.2, 0.3], negative_weight=1)
    weights = loss._softmax_weights(2, torch.device("cpu"))
    assert weights is not None
    assert weights.tolist() == pytest.approx([0.2, 0.3, 1.0])
