"""Relatives of the focal loss: other ways to tell which entries matter. Arguments as in `detector.losses.focal`."""

from __future__ import annotations

import torch
from torch import Tensor

from detector.losses.focal import (
    Reduction,
    balanced,
    by_example,
    cross_entropy,
    power,
    reduce_loss,
    unignored,
    wide,
    wrongness,
)


def poly1_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    epsilon: float = 1.0,
    weights: Tensor | None = None,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Focal loss plus epsilon alpha_t (1 - p_t)^(gamma + 1) (Leng et al. 2022, "PolyLoss", section 5): the weight of the
    first term of the loss's expansion in 1 - p_t, changed by epsilon."""
    x = unignored(wide(logits), ignore)
    targets = targets.to(x.dtype)
    wrong = wrongness(x, targets)
    loss = cross_entropy(x, targets) * power(wrong, gamma) + epsilon * power(wrong, gamma + 1)
    loss = balanced(loss, targets, alpha, None)
    return reduce_loss(loss, weights=weights, ignore=ignore, reduction=reduction, positives=targets)


def quality_focal_loss(
    logits: Tensor,
    quality: Tensor,
    *,
    gamma: float = 2.0,
    weights: Tensor | None = None,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """|q - p|^gamma times the cross entropy of p with the soft target q (Li et al. 2020, "Generalized Focal Loss",
    equation 5, there beta for gamma).

    `quality`: in the shape of `logits`, 0 for negatives, 0..1 for positives (the overlap of the predicted box with its
    object). At a quality of 0 or 1 it is the focal loss without alpha.
    """
    x = unignored(wide(logits), ignore)
    quality = quality.to(x.dtype)
    # |q - p| by the smaller of two differences of like numbers: confident entries keep their digits
    distance = torch.where(quality > 0.5, torch.sigmoid(-x) - (1 - quality), torch.sigmoid(x) - quality).abs()
    loss = power(distance, gamma) * cross_entropy(x, quality)
    return reduce_loss(loss, weights=weights, ignore=ignore, reduction=reduction, positives=(quality > 0).to(loss))


def varifocal_loss(
    logits: Tensor,
    quality: Tensor,
    *,
    alpha: float = 0.75,
    gamma: float = 2.0,
    weights: Tensor | None = None,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Positives: q times the cross entropy with q; negatives: alpha p^gamma times theirs (Zhang et al. 2021,
    "VarifocalNet", equation 2): only negatives are focused, positives count by their quality. `quality` as in
    `quality_focal_loss`."""
    x = unignored(wide(logits), ignore)
    quality = quality.to(x.dtype)
    loss = torch.where(quality > 0, quality, alpha * power(torch.sigmoid(x), gamma)) * cross_entropy(x, quality)
    return reduce_loss(loss, weights=weights, ignore=ignore, reduction=reduction, positives=(quality > 0).to(loss))


def ghm_weights(gradient: Tensor, *, bins: int = 10, ignore: Tensor | None = None) -> Tensor:
    """Weight of every entry by how many others have a gradient of about its size (Li et al. 2019, "Gradient Harmonized
    Single-stage Detector", equation 9): N / (entries in its bin * bins that are not empty).

    Args:
        gradient: |p - target| of every entry, 0..1, any shape.
        bins: of equal width.
        ignore: entries that neither count nor weigh, of shapes as in `detector.losses.focal`.

    Returns:
        In the shape of `gradient`; 0 where ignored. The mean over what is not ignored is 1.
    """
    place = bin_of(gradient, bins)
    valid = torch.ones_like(gradient, dtype=torch.bool)
    if ignore is not None:
        valid = ~by_example(ignore, gradient.shape, "ignore").bool()
    weights = weights_of_bins(entries_of_bins(place, valid, bins))
    return torch.where(valid, weights.to(gradient.dtype)[place], 0.0)


def bin_of(gradient: Tensor, bins: int) -> Tensor:
    """Which of `bins` of equal width each gradient of 0..1 is in; no gradient."""
    return (gradient.detach() * bins).long().clamp(0, bins - 1)


def entries_of_bins(place: Tensor, valid: Tensor, bins: int) -> Tensor:
    """(bins,) int64: how many valid entries are in each (a sum of ones in fp32 would stand still at 16.8 million)."""
    counts = torch.zeros(bins, dtype=torch.int64, device=place.device)
    return counts.index_add_(0, place.flatten(), valid.flatten().long())


def weights_of_bins(counts: Tensor) -> Tensor:
    """What the entries of each bin weigh, (bins,) fp64, for `counts` (bins,) of them."""
    filled = (counts > 0).sum().clamp(min=1)
    return counts.sum().double() / (counts.clamp(min=1) * filled).double()


def ghm_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    bins: int = 10,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Cross entropy of every entry, weighed by `ghm_weights` (GHM-C, equation 10; without the moving average over steps,
    which would make a step depend on those before it)."""
    x = unignored(wide(logits), ignore)
    targets = targets.to(x.dtype)
    weight = ghm_weights((torch.sigmoid(x) - targets).abs(), bins=bins, ignore=ignore)
    loss = cross_entropy(x, targets) * weight
    return reduce_loss(loss, weights=None, ignore=ignore, reduction=reduction, positives=targets)
