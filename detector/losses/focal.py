"""The focal loss and FL* of single entries (Lin et al. 2017, section 3 and appendix A), for logits of any origin.

With a sigmoid every entry of the logits is a binary problem of its own (binary and multi-label classification, dense
detectors); with a softmax every example belongs to one of several classes. With gamma 0 each focal loss is its cross
entropy. All compute in fp32 (fp64 for fp64 logits) whatever the input type, and can be differentiated twice.
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
    """Compute the focal loss -alpha_t (1 - p_t)^gamma log(p_t) of every entry (Lin et al. 2017, equation 5).

    Args:
        logits: any shape, before the sigmoid, any floating type.
        targets: ground truth in 0..1, in the shape of `logits`. Soft targets mix the cross entropy, 1 - p_t and alpha_t
            of the two sides, each linearly; the three are then multiplied (as in torchvision), so the loss as a whole
            is not linear in the targets.
        alpha: weight of positives, where negatives get 1 - alpha; or a tensor (C,) for the last axis of `logits`: one
            weight per class for positives, where negatives get 1. None: no weights.
        gamma: focusing parameter, at least 0; 0 is (alpha-balanced) cross entropy (equations 1 and 3).
        negative_weight: weight of negatives, if not the one that follows from `alpha`.
        weights: factors of the loss, aligned with its first axes: for logits (N, C), a tensor (N,) weights rows, also
            if N equals C, (N, C) entries, and (1, C) columns.
        ignore: mask, in a shape as for `weights`; where it is True, loss and gradient are 0 whatever the logit is.
        reduction: "none"; "sum"; "mean" over entries not ignored, weighted by `weights` but not by `alpha`;
            "positives": the sum divided by the number of positives not ignored, at least 1 (section 4.1).

    Returns:
        The loss of every entry, in the shape of `logits`, or a scalar; fp32 (fp64 for fp64 logits). Second derivatives
        for a gamma between 0 and 1 are finite for logits up to about 40 in fp32.

    Raises:
        ValueError: the shapes do not match, gamma is below 0, or the reduction is unknown.

    Example:
        >>> logits, targets = torch.tensor([1.0, -1.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> sigmoid_focal_loss(logits, targets)  # the third is hard
        tensor([0.0057, 0.0170, 2.0747])
        >>> sigmoid_focal_loss(logits, targets, gamma=0.0, alpha=None, reduction="mean")  # cross entropy
        tensor(1.2250)
    """
    logits, targets = prepare(logits, targets, ignore)
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if gamma == 0:  # bit-identical to torch
        loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    else:
        loss = cross_entropy(logits, targets) * power(one_minus_pt(logits, targets), gamma)
    loss = apply_alpha(loss, targets, alpha, negative_weight)
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
    """Compute FL* = -log(sigmoid(gamma x_t + beta)) / gamma of every entry (Lin et al. 2017, equations 6 and 7).

    `x_t` is the logit of the ground truth: x for positives, -x for negatives. Gamma 1 with beta 0 is cross entropy.

    Args:
        logits: any shape, before the sigmoid, any floating type.
        targets: ground truth in 0..1, in the shape of `logits`. Soft targets mix the losses of the two sides, and their
            weights, linearly.
        gamma: steepness, above 0.
        beta: shift of the logit; larger values reduce the loss.
        alpha, negative_weight: weights of positives and negatives, as in `sigmoid_focal_loss`.
        weights, ignore, reduction: factors of the loss, mask and reduction, as in `sigmoid_focal_loss`.

    Returns:
        The loss of every entry, in the shape of `logits`, or a scalar; fp32 (fp64 for fp64 logits).

    Raises:
        ValueError: the shapes do not match, gamma is not above 0, or the reduction is unknown.

    Example:
        >>> logits, targets = torch.tensor([1.0, -1.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
        >>> sigmoid_focal_star_loss(logits, targets)
        tensor([0.0243, 0.0243, 2.5034])
    """
    logits, targets = prepare(logits, targets, ignore)
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")
    # softplus(-(gamma x_t + beta)) on both sides, as cross entropies of shifted logits
    positive = F.softplus(-(gamma * logits + beta)) / gamma
    negative = F.softplus(gamma * logits - beta) / gamma
    loss = targets * positive + (1 - targets) * negative
    loss = apply_alpha(loss, targets, alpha, negative_weight)
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
    """Compute the focal loss -alpha_y (1 - p_y)^gamma log(p_y) of every example, where p is the softmax of its logits.

    The multi-class form that Lin et al. 2017 mention in section 3.

    Args:
        logits: (..., C), or with the C classes along axis `dim`; any floating type.
        targets: classes 0..C-1, int64, in the shape of `logits` without the class axis; or soft targets, floating, in
            the shape of `logits`, which mix the losses of the classes linearly.
        alpha: (C,) weights of the classes. None: no weights.
        gamma: focusing parameter, at least 0; 0 is (weighted) cross entropy.
        dim: class axis of `logits`.
        background: class that does not count as positive; needed for the reduction "positives".
        weights: factors of the examples' losses, aligned with the first axes of the loss: (N,) for losses (N, H, W)
            has one value per image.
        ignore: mask, in a shape as for `weights`; where it is True, loss and gradient are 0 whatever logits and target
            are.
        reduction: "none"; "sum"; "mean" over examples not ignored, weighted by `weights` but not by `alpha`;
            "positives": the sum divided by the number of examples that are neither background nor ignored, at least 1.

    Returns:
        The loss of every example, in the shape of `logits` without the class axis, or a scalar; fp32 (fp64 for fp64
        logits).

    Raises:
        ValueError: the shapes do not match, gamma is below 0, or the reduction is unknown or needs `background`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]])
        >>> softmax_focal_loss(logits, torch.tensor([0, 2]))
        tensor([0.0041, 1.1125])
        >>> image = torch.zeros(1, 3, 8, 8)  # (N, C, H, W), as in segmentation
        >>> softmax_focal_loss(image, torch.zeros(1, 8, 8, dtype=torch.int64), dim=1).shape
        torch.Size([1, 8, 8])
    """
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")

    def focal(log_p: Tensor) -> Tensor:
        if gamma == 0:
            return -log_p
        # 1 - p from expm1, so that confident examples keep their digits
        return -log_p * power(-torch.expm1(log_p), gamma)

    return _softmax_loss(focal, logits, targets, alpha, dim, background, weights, ignore, reduction)


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
    """Compute FL* of every example with x_t = log(p_y / (1 - p_y)), the logit of its class against all others.

    The multi-class form of Lin et al. 2017, equations 6 and 7. Gamma 1 with beta 0 is cross entropy.

    Args:
        logits: (..., C), or with the C classes along axis `dim`; any floating type.
        targets: classes or soft targets, as in `softmax_focal_loss`.
        gamma: steepness, above 0.
        beta: shift of the logit; larger values reduce the loss.
        alpha, dim, background: class weights (C,), class axis, and the class that is not positive, as in
            `softmax_focal_loss`.
        weights, ignore, reduction: factors of the loss, mask and reduction, as in `softmax_focal_loss`.

    Returns:
        The loss of every example, in the shape of `logits` without the class axis, or a scalar; fp32 (fp64 for fp64
        logits).

    Raises:
        ValueError: the shapes do not match, gamma is not above 0, or the reduction is unknown or needs `background`.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0]])
        >>> softmax_focal_star_loss(logits, torch.tensor([0, 2]))
        tensor([0.0063, 1.0407])
    """
    if gamma <= 0:
        raise ValueError(f"gamma must be above 0, got {gamma}")

    def focal_star(log_p: Tensor) -> Tensor:
        # log(p / (1 - p)) from log(p), finite everywhere
        x_t = log_p - torch.log((-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny))
        return F.softplus(-(gamma * x_t + beta)) / gamma

    return _softmax_loss(focal_star, logits, targets, alpha, dim, background, weights, ignore, reduction)


def _softmax_loss(
    loss_of_log_p: Callable[[Tensor], Tensor],
    logits: Tensor,
    targets: Tensor,
    alpha: Tensor | None,
    dim: int,
    background: int | None,
    weights: Tensor | None,
    ignore: Tensor | None,
    reduction: Reduction,
) -> Tensor:
    """Apply an elementwise loss to the log-probability of the true class, or of all classes for soft targets."""
    logits = to_float32_or_64(logits).movedim(dim, -1)
    if ignore is not None:
        ignore = expand_to_loss(ignore, logits.shape[:-1], "ignore").bool()
        logits = zero_ignored(logits, ignore)
    alpha = None if alpha is None else _class_alpha(alpha, logits)
    log_p = torch.log_softmax(logits, dim=-1)
    if targets.is_floating_point():
        soft = targets.movedim(dim, -1) if targets.dim() == logits.dim() else targets
        _require_shape(soft, logits.shape, "targets (soft)")
        by_class = loss_of_log_p(log_p) * soft.to(logits.dtype)
        loss = (by_class if alpha is None else by_class * alpha).sum(dim=-1)
        positives = None if background is None else 1 - soft[..., background]
    else:
        _require_shape(targets, logits.shape[:-1], "targets")
        if ignore is not None:
            targets = torch.where(ignore, 0, targets)  # the target of an ignored example need not be a class
        loss = loss_of_log_p(log_p.gather(-1, targets[..., None]).squeeze(-1))
        if alpha is not None:
            loss = loss * alpha[targets]
        positives = None if background is None else (targets != background).to(loss)
    return reduce_loss(loss, weights=weights, ignore=ignore, reduction=reduction, positives=positives)


def prepare(logits: Tensor, targets: Tensor, ignore: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return logits in fp32 or fp64, with zeros where ignored, and targets of the same dtype and shape.

    Raises:
        ValueError: `targets` or `ignore` do not have a shape for these logits.
    """
    logits = zero_ignored(to_float32_or_64(logits), ignore)
    _require_shape(targets, logits.shape, "targets")
    return logits, targets.to(logits.dtype)


def apply_alpha(loss: Tensor, targets: Tensor, alpha: float | Tensor | None, negative_weight: float | None) -> Tensor:
    """Multiply the loss of positives by `alpha` and that of negatives by their weight, as in `sigmoid_focal_loss`."""
    if alpha is None and negative_weight is None:
        return loss
    if alpha is not None and not isinstance(alpha, float | int):
        alpha = _class_alpha(alpha, loss)
    negative = resolve_negative_weight(alpha, negative_weight)
    return loss * ((1.0 if alpha is None else alpha) * targets + negative * (1 - targets))


def resolve_negative_weight(alpha: float | Tensor | None, negative_weight: float | None) -> float:
    """Return the weight of negatives: `negative_weight`, or if None 1 - alpha for a number and 1 otherwise."""
    if negative_weight is not None:
        return negative_weight
    return 1.0 if alpha is None or isinstance(alpha, Tensor) else 1 - alpha


def _class_alpha(alpha: Tensor, like: Tensor) -> Tensor:
    """Return class weights with the device and dtype of `like`, whose last axis must have one entry per class."""
    alpha = torch.as_tensor(alpha, device=like.device)
    _require_shape(alpha, like.shape[-1:], "alpha")
    return alpha.to(like)


def _require_shape(tensor: Tensor, shape: torch.Size, name: str) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {tuple(shape)} for these logits, got {tuple(tensor.shape)}; the class axis of a "
            "softmax is the last one, or `dim`"
        )


def reduce_loss(
    loss: Tensor, *, weights: Tensor | None, ignore: Tensor | None, reduction: Reduction, positives: Tensor | None
) -> Tensor:
    """Apply weights, mask and reduction, as documented in `sigmoid_focal_loss`, to a loss of any shape.

    `positives`, in the shape of `loss`: how positive each entry is, 0..1, for the reduction of this name.

    Raises:
        ValueError: the reduction is unknown or `positives` is missing; weights or mask have another shape.
    """
    factors = None if weights is None else expand_to_loss(weights, loss.shape, "weights").to(loss)
    loss = zero_ignored(loss if factors is None else loss * factors, ignore)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        total = zero_ignored(torch.ones_like(loss) if factors is None else factors, ignore).sum()
        return loss.sum() / total.clamp(min=torch.finfo(loss.dtype).tiny)
    if reduction != "positives":
        raise ValueError(f"reduction must be none, sum, mean or positives, got {reduction!r}")
    if positives is None:
        raise ValueError('reduction "positives" must know which class is not positive: pass `background`')
    return loss.sum() / zero_ignored(positives, ignore).sum().clamp(min=1)


def expand_to_loss(values: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Expand weights or a mask, whose axes are the first ones of `shape`, to all of that shape.

    Unlike torch's broadcasting, which aligns last axes: there (N,) would silently weight the columns of an (N, N) loss.

    Raises:
        ValueError: an axis has neither that length nor 1, or there are too many axes.
    """
    missing = len(shape) - values.dim()
    if missing < 0 or any(given not in (1, length) for given, length in zip(values.shape, shape, strict=False)):
        columns = f"{name}[{', '.join(['None'] * (len(shape) - 1) + [':'])}]"
        raise ValueError(
            f"{name} must match the first axes of the loss, whose shape is {tuple(shape)}, or have length 1 there, got "
            f"{tuple(values.shape)}; for one value per entry of the last axis pass {columns}, for one per class of a "
            "softmax use alpha"
        )
    return values[(..., *[None] * missing)].expand(shape)


def zero_ignored(values: Tensor, ignore: Tensor | None) -> Tensor:
    """Return `values` with zeros where ignored, so that not even a NaN there reaches a gradient."""
    return values if ignore is None else torch.where(expand_to_loss(ignore, values.shape, "ignore").bool(), 0.0, values)


def to_float32_or_64(logits: Tensor) -> Tensor:
    """Return logits in fp32, or unchanged if they are fp64."""
    return logits if logits.dtype == torch.float64 else logits.float()


def power(x: Tensor, gamma: float) -> Tensor:
    """Compute x^gamma for x >= 0, with a finite slope everywhere."""
    if gamma == 0:
        return torch.ones_like(x)
    return x * x if gamma == 2 else x.clamp_min(torch.finfo(x.dtype).tiny) ** gamma


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute the binary cross entropy of every entry.

    Keeps the digits of a confident negative's small loss, which torch's function loses by subtracting similar numbers.
    """
    return F.softplus(-logits) * targets + F.softplus(logits) * (1 - targets)


def one_minus_pt(logits: Tensor, targets: Tensor) -> Tensor:
    """Compute 1 - p_t from two sigmoids rather than by subtraction, so that confident entries keep their digits."""
    return torch.sigmoid(logits) * (1 - targets) + torch.sigmoid(-logits) * targets
