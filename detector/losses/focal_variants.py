"""Relatives of the focal loss: other rules for how much each entry of sigmoid logits contributes.

Types and arguments are those of `detector.losses.focal`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detector.losses.focal import (
    Reduction,
    apply_alpha,
    cross_entropy,
    expand_to_loss,
    one_minus_pt,
    power,
    prepare,
    reduce_loss,
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
    """Compute the Poly-1 focal loss, the focal loss plus epsilon alpha_t (1 - p_t)^(gamma + 1), of every entry.

    The addition changes the coefficient of the first term of the loss's expansion in 1 - p_t by epsilon (Leng et al.
    2022, "PolyLoss", section 5).

    Args:
        logits: any shape, before the sigmoid, any floating type.
        targets: ground truth in 0..1, in the shape of `logits`.
        alpha: weight of positives, or (C,) one per class, as in `sigmoid_focal_loss`.
        gamma: focusing parameter, at least 0.
        epsilon: coefficient of the additional term; 0 is the focal loss.
        weights, ignore, reduction: factors of the loss, mask and reduction, as in `sigmoid_focal_loss`.

    Returns:
        The loss of every entry, in the shape of `logits`, or a scalar; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the shapes do not match, or the reduction is unknown.

    Example:
        >>> logits, targets = torch.tensor([1.0, -1.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> poly1_focal_loss(logits, targets)
        tensor([0.0105, 0.0316, 2.7230])
    """
    x, targets = prepare(logits, targets, ignore)
    wrong = one_minus_pt(x, targets)
    loss = cross_entropy(x, targets) * power(wrong, gamma) + epsilon * power(wrong, gamma + 1)
    loss = apply_alpha(loss, targets, alpha, None)
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
    """Compute |q - p|^gamma times the cross entropy of p with the soft target q, of every entry.

    At a quality of 0 or 1 it is the focal loss without alpha (Li et al. 2020, "Generalized Focal Loss", equation 5,
    where gamma is called beta).

    Args:
        logits: any shape, before the sigmoid, any floating type.
        quality: soft target in the shape of `logits`: 0 for negatives, 0..1 for positives (the IoU of the predicted box
            with its object).
        gamma: focusing parameter, at least 0.
        weights, ignore, reduction: factors of the loss, mask and reduction, as in `sigmoid_focal_loss`; entries with a
            quality above 0 are positives.

    Returns:
        The loss of every entry, in the shape of `logits`, or a scalar; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the shapes do not match, or the reduction is unknown.

    Example:
        >>> quality_focal_loss(torch.tensor([2.0, -1.0]), torch.tensor([0.8, 0.0]))
        tensor([0.0034, 0.0227])
    """
    x, quality = prepare(logits, quality, ignore)
    # the smaller of two equal differences, so that confident entries keep their digits
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
    """Compute the cross entropy with the soft target q, times q for positives and alpha p^gamma for negatives.

    Only negatives are focused; positives count by their quality (Zhang et al. 2021, "VarifocalNet", equation 2).

    Args:
        logits: any shape, before the sigmoid, any floating type.
        quality: soft target in the shape of `logits`: 0 for negatives, 0..1 for positives (the IoU of the predicted box
            with its object).
        alpha: weight of negatives.
        gamma: focusing parameter of negatives, at least 0.
        weights, ignore, reduction: factors of the loss, mask and reduction, as in `sigmoid_focal_loss`; entries with a
            quality above 0 are positives.

    Returns:
        The loss of every entry, in the shape of `logits`, or a scalar; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the shapes do not match, or the reduction is unknown.

    Example:
        >>> varifocal_loss(torch.tensor([2.0, -1.0]), torch.tensor([0.8, 0.0]))
        tensor([0.4215, 0.0170])
    """
    x, quality = prepare(logits, quality, ignore)
    loss = torch.where(quality > 0, quality, alpha * power(torch.sigmoid(x), gamma)) * cross_entropy(x, quality)
    return reduce_loss(loss, weights=weights, ignore=ignore, reduction=reduction, positives=(quality > 0).to(loss))


def ghm_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    bins: int = 10,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """Compute GHM-C: the cross entropy of every entry, weighted by the density of similar gradients.

    Li et al. 2019, "Gradient Harmonized Single-stage Detector", equation 10, with the weights of `ghm_weights`. Without
    the paper's moving average over steps, which would make a step depend on earlier ones.

    Args:
        logits: any shape, before the sigmoid, any floating type.
        targets: ground truth in 0..1, in the shape of `logits`.
        bins: number of bins of equal width for the gradient |p - target|.
        ignore, reduction: mask and reduction, as in `sigmoid_focal_loss`; ignored entries do not count in the density.

    Returns:
        The loss of every entry, in the shape of `logits`, or a scalar; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the shapes do not match, or the reduction is unknown.

    Example:
        >>> ghm_loss(torch.tensor([2.0, -2.0, 3.0]), torch.tensor([1.0, 0.0, 0.0]))  # two easy entries, a hard one
        tensor([0.0952, 0.0952, 4.5729])
    """
    x, targets = prepare(logits, targets, ignore)
    weight = ghm_weights((torch.sigmoid(x) - targets).abs(), bins=bins, ignore=ignore)
    loss = cross_entropy(x, targets) * weight
    return reduce_loss(loss, weights=None, ignore=ignore, reduction=reduction, positives=targets)


def ghm_weights(gradient: Tensor, *, bins: int = 10, ignore: Tensor | None = None) -> Tensor:
    """Weight every entry by the inverse density of gradients of about its size (Li et al. 2019, equation 9).

    The weight is N / (number of entries in the same bin * number of bins that are not empty).

    Args:
        gradient: |p - target| of every entry, 0..1, any shape.
        bins: number of bins of equal width.
        ignore: mask of entries to leave out, in a shape as in `sigmoid_focal_loss`.

    Returns:
        Weights in the shape of `gradient`, 0 where ignored; their mean over the other entries is 1.
    """
    index = bin_index(gradient, bins)
    valid = torch.ones_like(gradient, dtype=torch.bool)
    if ignore is not None:
        valid = ~expand_to_loss(ignore, gradient.shape, "ignore").bool()
    weights = bin_weights(bin_counts(index, valid, bins))
    return torch.where(valid, weights.to(gradient.dtype)[index], 0.0)


def bin_index(gradient: Tensor, bins: int) -> Tensor:
    """Return which of `bins` of equal width each gradient in 0..1 falls into: int64, in the shape of `gradient`."""
    return (gradient.detach() * bins).long().clamp(0, bins - 1)


def bin_counts(index: Tensor, valid: Tensor, bins: int) -> Tensor:
    """Count the valid entries of each bin: (bins,) int64 (a sum of ones in fp32 would stop growing at 16.8 million)."""
    counts = torch.zeros(bins, dtype=torch.int64, device=index.device)
    return counts.index_add_(0, index.flatten(), valid.flatten().long())


def bin_weights(counts: Tensor) -> Tensor:
    """Return the weight of an entry of each bin, (bins,) fp64, from the counts (bins,)."""
    filled = (counts > 0).sum().clamp(min=1)
    return counts.sum().double() / (counts.clamp(min=1) * filled).double()
