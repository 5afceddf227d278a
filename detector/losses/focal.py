"""The focal loss and its family (Lin et al. 2017, section 3 and appendix A), entry by entry, for logits of any origin.

Two activations: sigmoid (every entry is a yes or no of its own: binary and multi-label problems, dense detectors) and
softmax (one class out of several). With gamma 0 each is its cross entropy. All compute in fp32 (fp64 for fp64 logits)
whatever they are given, can be differentiated twice, and take the same arguments:

- `alpha`: balance of the two sides (sigmoid: a number weighs positives by alpha and negatives by 1 - alpha; one number per
  class weighs positives only) or of the classes (softmax: one number per class). None weighs nothing.
- `weights`: of examples. Their axes are the first ones of the loss (of equal length, or 1): where a sigmoid's loss is (N, C), (N,)
  weighs its rows, also where N is C, and (N, C) its entries. Classes are weighed by `alpha`, or by (1, C).
- `ignore`: a mask, of shapes as for `weights`; True counts for nothing, whatever the logits are.
- `reduction`: "none"; "sum"; "mean" over what is not ignored, by `weights` (alpha is no part of the denominator);
  "positives": the sum divided by the number of positives that are not ignored, at least 1 (the paper's, section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Reduction = Literal["none", "sum", "mean", "positives"]


def sigmoid_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    negative_weight: float | None = None,
    weights: Tensor | None = None,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log(p_t) of every entry (Lin et al. 2017, equation 5).

    Args:
        logits: any shape, before the sigmoid, any floating type.
        targets: the same shape, 0..1. Soft targets mix the two sides' cross entropies, their 1 - p_t and their weights,
            each linearly, and then multiply them (as torchvision's function does), so the whole is not linear in them.
        alpha: see above; a tensor broadcasts against the last axis of `logits`.
        gamma: focusing; 0 is (alpha-balanced) cross entropy (equations 1 and 3).
        negative_weight: of the negative side; None: 1 - alpha for a number, 1 otherwise.
        weights, ignore, reduction: see above.

    Returns:
        The loss of every entry, in the shape of `logits`, or a scalar; fp32 (fp64 for fp64 logits). Second derivatives with
        a gamma between 0 and 1 are finite up to logits of some 40 in fp32.

    Raises:
        ValueError: shapes that do not go together; gamma below 0.
    """
    logits = unignored(wide(logits), ignore)
    targets = _as_targets(targets, logits)
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if gamma == 0:  # torch's own, to the last bit
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    else:
        loss = cross_entropy(logits, targets) * power(wrongness(logits, targets), gamma)
    loss = balanced(loss, targets, alpha, negative_weight)
    return reduce_loss(loss, weights=weights, ignore=ignore, reduction=reduction, positives=targets)


def sigmoid_focal_star_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    beta: float = 1.0,
    alpha: float | Tensor | None = None,
    negative_weight: float | None = None,
    weights: Tensor | None = None,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """FL* = -log(sigmoid(gamma x_t + beta)) / gamma (Lin et al. 2017, appendix A, equations 6 and 7).

    Cross entropy at gamma 1, beta 0. Arguments as in `sigmoid_focal_loss`; soft targets mix the two sides' losses, and
    their weights, linearly.

    Raises:
        ValueError: shapes that do not go together; gamma not above 0.
    """
    logits = unignored(wide(logits), ignore)
    targets = _as_targets(targets, logits)
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    # softplus(-(gamma x_t + beta)) on both sides, as cross entropies of shifted logits
    positive = F.softplus(-(gamma * logits + beta)) / gamma
    negative = F.softplus(gamma * logits - beta) / gamma
    loss = targets * positive + (1 - targets) * negative
    loss = balanced(loss, targets, alpha, negative_weight)
    return reduce_loss(loss, weights=weights, ignore=ignore, reduction=reduction, positives=targets)


def softmax_focal_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    alpha: Tensor | None = None,
    gamma: float = 2.0,
    dim: int = -1,
    background: int | None = None,
    weights: Tensor | None = None,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """-alpha_y (1 - p_y)^gamma log(p_y) of every example, p being the softmax (the paper's remark at the end of section 3).

    Args:
        logits: (..., C), or with the C classes along another axis, see `dim`; any floating type.
        targets: the shape of `logits` without the class axis, int64: classes 0..C-1; or the shape of `logits`, floating:
            soft targets, which mix the classes' losses linearly.
        alpha: (C,) weights of the classes.
        gamma: focusing; 0 is (weighted) cross entropy.
        dim: the class axis.
        background: the class that "positives" does not count.
        weights, ignore: of examples; see above.
        reduction: see above; "positives" needs `background`.

    Returns:
        The loss of every example, in the shape of `logits` without the class axis, or a scalar.

    Raises:
        ValueError: shapes that do not go together; gamma below 0.
    """
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")

    def each(log_p: Tensor) -> Tensor:
        if gamma == 0:
            return -log_p
        # 1 - p by expm1, so that confident examples keep their digits
        return -log_p * power(-torch.expm1(log_p), gamma)

    return _softmax_family(each, logits, targets, alpha, dim, background, weights, ignore, reduction)


def softmax_focal_star_loss(
    logits: Tensor,
    targets: Tensor,
    *,
    gamma: float = 2.0,
    beta: float = 1.0,
    alpha: Tensor | None = None,
    dim: int = -1,
    background: int | None = None,
    weights: Tensor | None = None,
    ignore: Tensor | None = None,
    reduction: Reduction = "none",
) -> Tensor:
    """FL* with x_t = log(p_y / (1 - p_y)), the logit of the true class against all others; cross entropy at gamma 1, beta 0.

    Arguments as in `softmax_focal_loss`.

    Raises:
        ValueError: shapes that do not go together; gamma not above 0.
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")

    def each(log_p: Tensor) -> Tensor:
        return F.softplus(-(gamma * logit_of_log(log_p) + beta)) / gamma

    return _softmax_family(each, logits, targets, alpha, dim, background, weights, ignore, reduction)


def _softmax_family(
    each: Callable[[Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    alpha: Tensor | None,
    dim: int,
    background: int | None,
    weights: Tensor | None,
    ignore: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """`each` gives the loss of log-probabilities of the true class."""
    logits = wide(logits).movedim(dim, -1)
    if ignore is not None:
        ignore = by_example(ignore, logits.shape[:-1], "ignore").bool()
        logits = unignored(logits, ignore[..., None])
    if alpha is not None:
        alpha = torch.as_tensor(alpha, device=logits.device)
        _require_shape(alpha, logits.shape[-1:], "alpha")
    log_p = torch.log_softmax(logits, dim=-1)
    if targets.is_floating_point():
        soft = targets.movedim(dim, -1) if targets.dim() == logits.dim() else targets
        _require_shape(soft, logits.shape, "targets (soft)")
        by_class = each(log_p) * soft.to(logits.dtype)
        loss = (by_class if alpha is None else by_class * alpha.to(by_class)).sum(dim=-1)
        positives = None if background is None else 1 - soft[..., background]
    else:
        _require_shape(targets, logits.shape[:-1], "targets")
        if ignore is not None:
            targets = torch.where(ignore, 0, targets)  # what an ignored one says need not be a class
        loss = each(log_p.gather(-1, targets[..., None]).squeeze(-1))
        if alpha is not None:
            loss = loss * alpha.to(loss)[targets]
        positives = None if background is None else (targets != background).to(loss)
    return reduce_loss(loss, weights=weights, ignore=ignore, reduction=reduction, positives=positives)


def reduce_loss(
    loss: Tensor, *, weights: Tensor | None, ignore: Tensor | None, reduction: Reduction, positives: Tensor | None
) -> Tensor:
    """Weigh, leave out and sum up losses of any shape; see the head of this module.

    `positives`: how much of a positive each entry is, 0..1, for the reduction of this name.

    Raises:
        ValueError: "positives" without anything to count; an unknown reduction; weights or masks of another shape.
    """
    ignore = None if ignore is None else by_example(ignore, loss.shape, "ignore").bool()
    counted = torch.ones_like(loss)
    if weights is not None:
        counted = by_example(weights, loss.shape, "weights").to(loss)
        loss = loss * counted
    if ignore is not None:
        loss = torch.where(ignore, 0.0, loss)
        counted = torch.where(ignore, 0.0, counted)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / counted.sum().clamp(min=torch.finfo(loss.dtype).tiny)
    if reduction != "positives":
        raise ValueError(f"reduction must be none, sum, mean or positives, got {reduction!r}")
    if positives is None:
        raise ValueError('reduction "positives" must know what a positive is: name the background class')
    if ignore is not None:
        positives = torch.where(ignore, 0.0, positives)
    return loss.sum() / positives.sum().clamp(min=1)


def by_example(values: Tensor, shape: torch.Size, what: str) -> Tensor:
    """Weights or a mask, whose axes are the first ones of `shape`, in all of that shape; see the head of this module.

    Not torch's broadcasting, which lets (N,) weigh the columns of an (N, N) loss without a word.

    Raises:
        ValueError: an axis of neither that length nor 1, or too many axes.
    """
    missing = len(shape) - values.dim()
    if missing < 0 or any(mine not in (1, its) for mine, its in zip(values.shape, shape, strict=False)):
        raise ValueError(
            f"{what} must have the first axes of the loss, which has shape {tuple(shape)}, or 1 in their place, got "
            f"{tuple(values.shape)}; one for each entry of the last axis is {what}[{', '.join(['None'] * (len(shape) - 1) + [':'])}], "
            "one for each class of a softmax is alpha"
        )
    return values[(..., *[None] * missing)].expand(shape)


def unignored(logits: Tensor, ignore: Tensor | None) -> Tensor:
    """Zeros in place of ignored logits, so that not even NaN among them reaches a gradient."""
    return logits if ignore is None else torch.where(by_example(ignore, logits.shape, "ignore").bool(), 0.0, logits)


def power(x: Tensor, gamma: float) -> Tensor:
    """x^gamma for x >= 0, with a finite slope everywhere."""
    if gamma == 0:
        return torch.ones_like(x)
    return x * x if gamma == 2 else x.clamp_min(torch.finfo(x.dtype).tiny) ** gamma


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of every entry; unlike torch's, which takes a difference of like numbers, it keeps the digits of
    a sure negative's small loss."""
    return F.softplus(-logits) * targets + F.softplus(logits) * (1 - targets)


def wrongness(logits: Tensor, targets: Tensor) -> Tensor:
    """1 - p_t of every entry, from two sigmoids rather than by subtraction so that confident entries keep their digits."""
    return torch.sigmoid(logits) * (1 - targets) + torch.sigmoid(-logits) * targets


def logit_of_log(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) from log(p), finite everywhere."""
    return log_p - torch.log((-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny))


def wide(logits: Tensor) -> Tensor:
    """In fp32, or fp64 if they are."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _as_targets(targets: Tensor, logits: Tensor) -> Tensor:
    _require_shape(targets, logits.shape, "targets")
    return targets.to(logits.dtype)


def _require_shape(tensor: Tensor, shape: torch.Size, what: str) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{what} must have shape {tuple(shape)} for these logits, got {tuple(tensor.shape)}; the class axis of a softmax "
            "is the last, or `dim`"
        )


def balanced(loss: Tensor, targets: Tensor, alpha: float | Tensor | None, negative_weight: float | None) -> Tensor:
    """Losses of entries, positives times `alpha` and negatives times `negative_weight`; see the head of this module."""
    if alpha is None and negative_weight is None:
        return loss
    if alpha is not None and not isinstance(alpha, float | int):
        alpha = torch.as_tensor(alpha, device=loss.device)
        _require_shape(alpha, loss.shape[-1:], "alpha")
    positive: float | Tensor = 1.0 if alpha is None else alpha.to(loss) if isinstance(alpha, Tensor) else alpha
    return loss * (positive * targets + weight_of_negatives(alpha, negative_weight) * (1 - targets))


def weight_of_negatives(alpha: float | Tensor | None, negative_weight: float | None) -> float:
    """What `alpha` says of negatives where `negative_weight` says nothing; see the head of this module."""
    if negative_weight is not None:
        return negative_weight
    return 1.0 if alpha is None or isinstance(alpha, Tensor) else 1 - alpha
