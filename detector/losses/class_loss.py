"""The class loss of a dense head: which of the family, with which balance, over which anchors, divided by what."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from detector.boxes import decode
from detector.losses.dense import anchor_losses, blocks, dense_focal_loss, dense_loss, one_hot
from detector.losses.focal import (
    cross_entropy,
    sigmoid_focal_loss,
    sigmoid_focal_star_loss,
    softmax_focal_loss,
    softmax_focal_star_loss,
    weight_of_negatives,
)
from detector.losses.focal_variants import (
    bin_of,
    entries_of_bins,
    poly1_focal_loss,
    quality_focal_loss,
    varifocal_loss,
    weights_of_bins,
)
from detector.losses.hard_example_mining import hardest_fraction, online_hard_examples
from detector.structures import HeadOutputs

Kind = Literal["focal", "focal_star", "poly1_focal", "quality_focal", "varifocal", "ghm", "ohem", "bootstrap"]
Activation = Literal["sigmoid", "softmax"]


USES: dict[Kind, tuple[str, ...]] = {
    "focal": ("alpha", "negative_weight", "gamma"),
    "focal_star": ("alpha", "negative_weight", "gamma", "star_beta"),
    "poly1_focal": ("alpha", "gamma", "poly_epsilon"),
    "quality_focal": ("gamma",),
    "varifocal": ("varifocal_alpha", "gamma"),
    "ghm": ("ghm_bins",),
    "ohem": ("ohem_batch", "ohem_nms_thresh", "ohem_negatives_per_positive"),
    "bootstrap": ("bootstrap_fraction",),
}
"""The settings of `loss` that matter to each kind; ohem and bootstrap are plain cross entropy."""


class ClassLoss(nn.Module):
    """A class loss with its settings; called with what the network says and what it should have said. Settings that a kind
    does not use (see USES) change nothing. Several alphas belong on the logits' device (`.to`), or are copied there at every call.

    Args:
        kind: of `loss.cls`.
        activation: of the class scores.
        alpha, gamma, negative_weight: as in `sigmoid_focal_loss`; several alphas, one per class, weigh positives.
        star_beta: of FL*.
        poly_epsilon: of Poly-1.
        varifocal_alpha: of varifocal, for negatives.
        ghm_bins: of GHM-C.
        ohem_batch, ohem_nms_thresh, ohem_negatives_per_positive: of OHEM.
        bootstrap_fraction: of bootstrapping.
    """

    def __init__(
        self,
        kind: Kind = "focal",
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
        self.kind: Kind = kind
        self.activation: Activation = activation
        alpha = alpha if "alpha" in USES[kind] else None
        self.alpha: float | Tensor | None
        if isinstance(alpha, Sequence):
            self.register_buffer("alpha", torch.tensor(alpha), persistent=False)  # so that it lies where the logits do
        else:
            self.alpha = alpha
        self.gamma = gamma if "gamma" in USES[kind] else 0.0
        self.negative_weight = negative_weight if "negative_weight" in USES[kind] else None
        self.varifocal_alpha = varifocal_alpha
        self.star_beta = star_beta
        self.poly_epsilon = poly_epsilon
        self.ghm_bins = ghm_bins
        self.ohem_batch = ohem_batch
        self.ohem_nms_thresh = ohem_nms_thresh
        self.ohem_negatives_per_positive = ohem_negatives_per_positive
        self.bootstrap_fraction = bootstrap_fraction
        self.is_mean = kind in ("ghm", "ohem", "bootstrap")
        """Whether it is a mean over entries or anchors already, so that the number of images divides it rather than that of
        the positives."""

    def forward(
        self, outputs: HeadOutputs, labels: Tensor, quality: Tensor | None, scale: Tensor | None = None
    ) -> Tensor:
        """Sums per image, or means where `is_mean`, times `scale`.

        Args:
            outputs: of the network.
            labels: (B, A): a class, -1 for background, below -1 for ignored.
            quality: (B, A) overlap of each positive anchor's box with its object; only where `needs_quality`.
            scale: (B,); ones if not given.

        Returns:
            (B,) fp32.
        """
        scale = torch.ones(len(labels), device=labels.device) if scale is None else scale
        sizes = [logits.shape[1] for logits in outputs.cls_logits]
        if self.kind == "ghm":
            return self._harmonised(outputs.cls_logits, torch.split(labels, sizes, dim=1)) * scale
        if self.kind in ("ohem", "bootstrap"):
            labels = self._choose(outputs, labels)
            scale = scale / (labels >= -1).sum(dim=1).clamp(min=1)
        qualities = torch.split(quality, sizes, dim=1) if quality is not None else [None] * len(sizes)
        return torch.stack(
            [
                self.level(logits, level, q, scale)
                for logits, level, q in zip(
                    outputs.cls_logits, torch.split(labels, sizes, dim=1), qualities, strict=True
                )
            ]
        ).sum(dim=0)

    def balance(self, num_classes: int) -> tuple[Tensor, float]:
        """What `alpha` and `negative_weight` multiply the positives of each class by, (K,) fp64, and negatives."""
        positive = torch.as_tensor(1.0 if self.alpha is None else self.alpha, dtype=torch.float64, device="cpu")
        return positive.expand(num_classes), weight_of_negatives(self.alpha, self.negative_weight)

    @property
    def needs_quality(self) -> bool:
        """Whether it asks how well boxes fit."""
        return self.kind in ("quality_focal", "varifocal")

    def level(self, logits: Tensor, labels: Tensor, quality: Tensor | None, scale: Tensor) -> Tensor:
        """Sums per image (B,), times `scale` (B,), of some of the anchors: (B, A, C) logits, (B, A) labels, (B, A) qualities."""
        if self.activation == "sigmoid" and self.gamma_family:
            return dense_focal_loss(
                logits, labels, alpha=self.alpha, gamma=self.gamma, negative_weight=self.negative_weight, scale=scale
            )
        return dense_loss(self.each, logits, labels, quality) * scale

    @property
    def gamma_family(self) -> bool:
        """Whether a single anchor's loss is the focal loss (of any gamma)."""
        return self.kind in ("focal", "ohem", "bootstrap")

    def each(self, logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
        """Loss of each of some anchors: (n, C) logits, (n,) labels, (n,) qualities to (n,)."""
        if self.activation == "softmax":
            return self._softmax(logits, labels)
        targets = one_hot(labels, logits.shape[-1])
        if self.gamma_family:
            loss = sigmoid_focal_loss(
                logits, targets, alpha=self.alpha, gamma=self.gamma, negative_weight=self.negative_weight
            )
        elif self.kind == "focal_star":
            loss = sigmoid_focal_star_loss(
                logits,
                targets,
                gamma=self.gamma,
                beta=self.star_beta,
                alpha=self.alpha,
                negative_weight=self.negative_weight,
            )
        elif self.kind == "poly1_focal":
            loss = poly1_focal_loss(
                logits, targets.float(), alpha=self.alpha, gamma=self.gamma, epsilon=self.poly_epsilon
            )
        elif self.kind == "quality_focal":
            loss = quality_focal_loss(logits, targets * quality[:, None], gamma=self.gamma)
        elif self.kind == "varifocal":
            loss = varifocal_loss(logits, targets * quality[:, None], alpha=self.varifocal_alpha, gamma=self.gamma)
        else:
            raise ValueError(f"{self.kind} has no loss of single anchors")
        return loss.sum(dim=1)

    def _softmax(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Background is the last column."""
        num_classes = logits.shape[-1] - 1
        targets = torch.where(labels < 0, num_classes, labels)
        weights = self._softmax_weights(num_classes, logits.device)
        if self.kind == "focal_star":
            return softmax_focal_star_loss(logits, targets, alpha=weights, gamma=self.gamma, beta=self.star_beta)
        if self.gamma_family:
            return softmax_focal_loss(logits, targets, alpha=weights, gamma=self.gamma)
        raise ValueError(f"loss.cls {self.kind} has no softmax form")

    def _softmax_weights(self, num_classes: int, device: torch.device) -> Tensor | None:
        """Of the classes and, last, the background."""
        if self.alpha is None and self.negative_weight is None:
            return None
        background = float(weight_of_negatives(self.alpha, self.negative_weight))
        weights = torch.full((num_classes + 1,), background, device=device)
        weights[:num_classes] = 1.0 if self.alpha is None else self.alpha
        return weights

    def _harmonised(self, logits: Sequence[Tensor], labels: Sequence[Tensor]) -> Tensor:
        """GHM-C over the entries of the whole batch, (B, A, K) logits and (B, A) labels of each level, so that the sums of its
        images add up to the mean times the images. Looked at twice: entries are counted, then weighed."""

        def places(x: Tensor, targets: Tensor) -> Tensor:
            return bin_of((torch.sigmoid(x) - targets).abs(), self.ghm_bins)

        def each(x: Tensor, label: Tensor, _quality: Tensor) -> Tensor:
            targets = one_hot(label, x.shape[-1]).float()
            return (cross_entropy(x, targets) * weights[places(x, targets)]).sum(dim=1)

        counts = torch.zeros(self.ghm_bins, dtype=torch.int64, device=labels[0].device)
        for level in zip(logits, labels, strict=True):
            for _, x, label in blocks(*level):
                place = places(x.detach().float(), one_hot(label, x.shape[-1]).float())
                counts += entries_of_bins(place, (label >= -1)[:, None].expand_as(x), self.ghm_bins)
        weights = weights_of_bins(counts).float()
        sums = torch.stack([dense_loss(each, *level) for level in zip(logits, labels, strict=True)]).sum(dim=0)
        images = torch.stack([(level >= -1).any(dim=1) for level in labels]).any(dim=0).sum()  # fillers are none
        return sums * images / counts.sum().clamp(min=1)

    @torch.no_grad()
    def _choose(self, outputs: HeadOutputs, labels: Tensor) -> Tensor:
        losses = anchor_losses(self.each, outputs.all_cls_logits(), labels)
        if self.kind == "bootstrap":
            return hardest_fraction(losses, labels, fraction=self.bootstrap_fraction)
        boxes = decode(outputs.all_box_deltas().float(), outputs.anchors)
        return online_hard_examples(
            losses,
            labels,
            boxes,
            batch_size=self.ohem_batch,
            nms_thresh=self.ohem_nms_thresh,
            negatives_per_positive=self.ohem_negatives_per_positive,
        )
