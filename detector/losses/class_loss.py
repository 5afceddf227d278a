"""The class loss of a dense head: which member of the family, with which weights, over which anchors.

To add a class loss, write its loss of a block of anchors, add a row to `CLASS_LOSSES` here, and its name (and settings,
if it has new ones) to `LossConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from detector.boxes import decode
from detector.config import Activation, ClassLossKind
from detector.losses.dense import anchor_losses, blocks, dense_focal_loss, dense_loss, one_hot
from detector.losses.focal import (
    cross_entropy,
    resolve_negative_weight,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
    softmax_focal_star_loss,
)
from detector.losses.focal_variants import (
    bin_counts,
    bin_index,
    bin_weights,
    poly1_focal_loss,
    quality_focal_loss,
    varifocal_loss,
)
from detector.losses.hard_example_mining import hardest_fraction, online_hard_examples
from detector.structures import HeadOutputs


class ClassLoss(nn.Module):
    """A class loss with its settings. Settings that a kind does not use (see `CLASS_LOSSES`) have no effect.

    Per-class alphas are a buffer: move the module to the logits' device, or they are copied there at every call.

    Args:
        kind: name of the loss, a key of `CLASS_LOSSES`.
        activation: sigmoid (one yes or no per class) or softmax (one class or the background).
        alpha, gamma, negative_weight: as in `sigmoid_focal_loss`; one alpha per class weighs the positives.
        star_beta: the shift of focal_star.
        poly_epsilon: the coefficient of poly1_focal.
        varifocal_alpha: the weight of negatives in varifocal.
        ghm_bins: the number of gradient bins of ghm.
        ohem_batch, ohem_nms_thresh, ohem_negatives_per_positive: of ohem, as in `online_hard_examples`.
        bootstrap_fraction: the fraction of anchors that bootstrap keeps.

    Raises:
        ValueError: the kind has no softmax form.

    Example:
        >>> loss = ClassLoss("focal", alpha=0.25, gamma=2.0)
        >>> outputs = HeadOutputs((torch.zeros(1, 3, 2),), (torch.zeros(1, 3, 4),), anchors=torch.zeros(3, 4))
        >>> loss(outputs, labels=torch.tensor([[0, -1, -2]]), quality=None)  # class 0, background, ignored
        tensor([0.4332])
    """

    def __init__(
        self,
        kind: ClassLossKind = "focal",
        *,
        activation: Activation = "sigmoid",
        alpha: float | Sequence[float] | None = 0.25,
        gamma: float = 2.0,
        negative_weight: float | None = None,
        star_beta: float = 1.0,
        poly_epsilon: float = 1.0,
        varifocal_alpha: float = 0.75,
        ghm_bins: int = 10,
        ohem_batch: int = 256,
        ohem_nms_thresh: float = 0.7,
        ohem_negatives_per_positive: int | None = None,
        bootstrap_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        self.kind: ClassLossKind = kind
        self.activation: Activation = activation
        self.spec = CLASS_LOSSES[kind]
        if activation == "softmax" and self.spec.softmax is None:
            raise ValueError(f"loss.cls {kind} has no softmax form")
        used = self.spec.settings
        alpha = alpha if "alpha" in used else None
        self.alpha: float | Tensor | None
        if isinstance(alpha, Sequence):
            self.register_buffer("alpha", torch.tensor(alpha), persistent=False)  # so that it moves with the module
        else:
            self.alpha = alpha
        self.gamma = gamma if "gamma" in used else 0.0
        self.negative_weight = negative_weight if "negative_weight" in used else None
        self.varifocal_alpha = varifocal_alpha
        self.star_beta = star_beta
        self.poly_epsilon = poly_epsilon
        self.ghm_bins = ghm_bins
        self.ohem_batch = ohem_batch
        self.ohem_nms_thresh = ohem_nms_thresh
        self.ohem_negatives_per_positive = ohem_negatives_per_positive
        self.bootstrap_fraction = bootstrap_fraction

    @property
    def is_mean(self) -> bool:
        """Whether it is a mean over entries or anchors already, to be divided by images rather than by positives."""
        return self.spec.reduce is not None or self.spec.select is not None

    @property
    def needs_quality(self) -> bool:
        """Whether its targets are soft: the IoU of each positive anchor's box, or the assigner's target scores."""
        return self.spec.needs_quality

    def forward(
        self,
        outputs: HeadOutputs,
        labels: Tensor,
        quality: Tensor | None,
        scale: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Compute each image's sum over anchors, or its mean where `is_mean`, times `scale`.

        Args:
            outputs: of the network.
            labels: (B, A): a class, -1 for background, below -1 for ignored.
            quality: (B, A) soft target of each positive anchor; only where `needs_quality`.
            scale: (B,) factor of each image; None means 1.
            weights: (B, A) factor of each anchor; None means 1.

        Returns:
            (B,) fp32.
        """
        scale = torch.ones(len(labels), device=labels.device) if scale is None else scale
        sizes = [logits.shape[1] for logits in outputs.cls_logits]
        if self.spec.reduce is not None:
            return self.spec.reduce(self, outputs.cls_logits, torch.split(labels, sizes, dim=1), weights) * scale
        if self.spec.select is not None:
            with torch.no_grad():
                labels = self.spec.select(self, outputs, labels)
            scale = scale / (labels >= -1).sum(dim=1).clamp(min=1)

        def by_level(values: Tensor | None) -> Sequence[Tensor | None]:
            return [None] * len(sizes) if values is None else torch.split(values, sizes, dim=1)

        levels = zip(
            outputs.cls_logits, torch.split(labels, sizes, dim=1), by_level(quality), by_level(weights), strict=True
        )
        return torch.stack([self.level(x, label, q, scale, w) for x, label, q, w in levels]).sum(dim=0)

    def level(
        self, logits: Tensor, labels: Tensor, quality: Tensor | None, scale: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Compute sums per image (B,), times `scale` (B,), over some of the anchors.

        Args:
            logits: (B, A, C).
            labels, quality, weights: (B, A) each, as in `forward`.
            scale: (B,).
        """
        if self.activation == "sigmoid" and self.spec.sigmoid is _focal and weights is None:
            return dense_focal_loss(
                logits, labels, alpha=self.alpha, gamma=self.gamma, negative_weight=self.negative_weight, scale=scale
            )
        return dense_loss(self.per_anchor, logits, labels, quality, weights) * scale

    def per_anchor(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        """Compute the loss of each of n anchors: (n, C) logits, (n,) labels, (n,) soft targets to (n,)."""
        loss = self.spec.softmax if self.activation == "softmax" else self.spec.sigmoid
        if loss is None:
            raise ValueError(f"loss.cls {self.kind} has no loss of single anchors")
        return loss(self, logits, labels, quality)

    def balance(self, num_classes: int) -> tuple[Tensor, float]:
        """The factors of `alpha` and `negative_weight`: (K,) fp64 of each class's positives, and that of negatives."""
        positive = torch.as_tensor(1.0 if self.alpha is None else self.alpha, dtype=torch.float64, device="cpu")
        return positive.expand(num_classes), resolve_negative_weight(self.alpha, self.negative_weight)


# The losses of a block of anchors: (n, C) logits, (n,) labels, (n,) soft targets to (n,). For a softmax the background
# is the last column.


def _focal(loss: ClassLoss, logits: Tensor, labels: Tensor, _quality: Tensor) -> Tensor:
    targets = one_hot(labels, logits.shape[-1])
    return sigmoid_focal_loss(
        logits, targets, alpha=loss.alpha, gamma=loss.gamma, negative_weight=loss.negative_weight
    ).sum(dim=1)


def _focal_star(loss: ClassLoss, logits: Tensor, labels: Tensor, _quality: Tensor) -> Tensor:
    return sigmoid_focal_star_loss(
        logits, one_hot(labels, logits.shape[-1]), gamma=loss.gamma, beta=loss.star_beta, alpha=loss.alpha,
        negative_weight=loss.negative_weight,
    ).sum(dim=1)  # fmt: skip


def _poly1_focal(loss: ClassLoss, logits: Tensor, labels: Tensor, _quality: Tensor) -> Tensor:
    targets = one_hot(labels, logits.shape[-1]).float()
    return poly1_focal_loss(logits, targets, alpha=loss.alpha, gamma=loss.gamma, epsilon=loss.poly_epsilon).sum(dim=1)


def _quality_focal(loss: ClassLoss, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    return quality_focal_loss(logits, one_hot(labels, logits.shape[-1]) * quality[:, None], gamma=loss.gamma).sum(dim=1)


def _varifocal(loss: ClassLoss, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    soft = one_hot(labels, logits.shape[-1]) * quality[:, None]
    return varifocal_loss(logits, soft, alpha=loss.varifocal_alpha, gamma=loss.gamma).sum(dim=1)


def _softmax_focal(loss: ClassLoss, logits: Tensor, labels: Tensor, _quality: Tensor) -> Tensor:
    return softmax_focal_loss(
        logits, _softmax_targets(logits, labels), alpha=_softmax_alpha(loss, logits), gamma=loss.gamma
    )


def _softmax_focal_star(loss: ClassLoss, logits: Tensor, labels: Tensor, _quality: Tensor) -> Tensor:
    targets, alpha = _softmax_targets(logits, labels), _softmax_alpha(loss, logits)
    return softmax_focal_star_loss(logits, targets, alpha=alpha, gamma=loss.gamma, beta=loss.star_beta)


def _softmax_targets(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.where(labels < 0, logits.shape[-1] - 1, labels)


def _softmax_alpha(loss: ClassLoss, logits: Tensor) -> Tensor | None:
    """(C,) weights of the classes and, last, the background."""
    if loss.alpha is None and loss.negative_weight is None:
        return None
    background = float(resolve_negative_weight(loss.alpha, loss.negative_weight))
    weights = torch.full((logits.shape[-1],), background, device=logits.device)
    weights[:-1] = 1.0 if loss.alpha is None else loss.alpha
    return weights


def _gradient_harmonized(
    loss: ClassLoss,
    logits: Sequence[Tensor],
    labels: Sequence[Tensor],
    _weights: Tensor | None,
) -> Tensor:
    """GHM-C over the entries of the whole batch, in two passes: count the entries of each bin, then weigh them.

    Each image's result is its part of the batch mean times the number of images, so that the results average to it.
    """

    def bins(x: Tensor, targets: Tensor) -> Tensor:
        return bin_index((torch.sigmoid(x) - targets).abs(), loss.ghm_bins)

    def per_anchor(x: Tensor, label: Tensor, _quality: Tensor) -> Tensor:
        targets = one_hot(label, x.shape[-1]).float()
        return (cross_entropy(x, targets) * weights[bins(x, targets)]).sum(dim=1)

    counts = torch.zeros(loss.ghm_bins, dtype=torch.int64, device=labels[0].device)
    for level in zip(logits, labels, strict=True):
        for _, x, label in blocks(*level):
            place = bins(x.detach().float(), one_hot(label, x.shape[-1]).float())
            counts += bin_counts(place, (label >= -1)[:, None].expand_as(x), loss.ghm_bins)
    weights = bin_weights(counts).float()
    sums = torch.stack([dense_loss(per_anchor, *level) for level in zip(logits, labels, strict=True)]).sum(dim=0)
    images = torch.stack([(level >= -1).any(dim=1) for level in labels]).any(dim=0).sum()  # without fillers
    return sums * images / counts.sum().clamp(min=1)


def _select_bootstrap(loss: ClassLoss, outputs: HeadOutputs, labels: Tensor) -> Tensor:
    losses = anchor_losses(loss.per_anchor, outputs.all_cls_logits(), labels)
    return hardest_fraction(losses, labels, fraction=loss.bootstrap_fraction)


def _select_ohem(loss: ClassLoss, outputs: HeadOutputs, labels: Tensor) -> Tensor:
    return online_hard_examples(
        anchor_losses(loss.per_anchor, outputs.all_cls_logits(), labels),
        labels,
        decode(outputs.all_box_deltas().float(), outputs.anchors),
        batch_size=loss.ohem_batch,
        nms_thresh=loss.ohem_nms_thresh,
        negatives_per_positive=loss.ohem_negatives_per_positive,
    )


PerAnchor = Callable[[ClassLoss, Tensor, Tensor, Tensor], Tensor]


class ClassLossSpec(NamedTuple):
    """What a class loss consists of and what it uses."""

    settings: tuple[str, ...]
    """The keys of `loss` that it uses."""
    sigmoid: PerAnchor | None = None
    softmax: PerAnchor | None = None
    needs_quality: bool = False
    select: Callable[[ClassLoss, HeadOutputs, Tensor], Tensor] | None = None
    """Chooses anchors: (B, A) labels to (B, A) labels, with the anchors that are not chosen ignored. The result is the
    mean over the chosen ones."""
    reduce: Callable[[ClassLoss, Sequence[Tensor], Sequence[Tensor], Tensor | None], Tensor] | None = None
    """Replaces the sum over anchors, where entries are weighed by statistics of the whole batch."""


CLASS_LOSSES: dict[ClassLossKind, ClassLossSpec] = {
    "focal": ClassLossSpec(("alpha", "negative_weight", "gamma"), _focal, _softmax_focal),
    "focal_star": ClassLossSpec(("alpha", "negative_weight", "gamma", "star_beta"), _focal_star, _softmax_focal_star),
    "poly1_focal": ClassLossSpec(("alpha", "gamma", "poly_epsilon"), _poly1_focal),
    "quality_focal": ClassLossSpec(("gamma",), _quality_focal, needs_quality=True),
    "varifocal": ClassLossSpec(("varifocal_alpha", "gamma"), _varifocal, needs_quality=True),
    "ghm": ClassLossSpec(("ghm_bins",), reduce=_gradient_harmonized),
    # plain cross entropy (gamma is not among their settings, and so 0)
    "ohem": ClassLossSpec(
        ("ohem_batch", "ohem_nms_thresh", "ohem_negatives_per_positive"), _focal, _softmax_focal, select=_select_ohem
    ),
    "bootstrap": ClassLossSpec(("bootstrap_fraction",), _focal, _softmax_focal, select=_select_bootstrap),
}
"""The class losses by their name in `loss.cls`."""
