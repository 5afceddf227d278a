"""The focal loss (Lin et al. 2017, section 3): entry by entry for any use, and summed over dense anchors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

CHUNK = 1 << 18
"""Logits looked at together on a CPU: 1 MiB of fp32, which stays in the cache between the dozen passes over it."""


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, *, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """-alpha_t (1 - p_t)^gamma log(p_t) of every entry (Lin et al. 2017, equation 5).

    Args:
        logits: any shape, before the sigmoid, any floating type (computed in fp32 or wider).
        targets: the same shape, 0..1; soft targets mix the two sides linearly.
        alpha: weight of the positive side, 1 - alpha of the negative; None for the unbalanced form (equation 4).
        gamma: focusing; 0 is (alpha-balanced) cross entropy (equations 1 and 3).

    Returns:
        The loss of every entry, in the shape of `logits`, fp32 (fp64 for fp64 logits).
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    if gamma > 0:
        # 1 - p_t, from two sigmoids rather than by subtraction so that confident entries keep their digits
        wrong = torch.sigmoid(logits) * (1 - targets) + torch.sigmoid(-logits) * targets
        loss = loss * wrong.clamp_min(torch.finfo(logits.dtype).tiny) ** gamma
    if alpha is not None:
        loss = loss * (alpha * targets + (1 - alpha) * (1 - targets))
    return loss


def dense_focal_loss(logits: Tensor, labels: Tensor, *, alpha: float | None = 0.25, gamma: float = 2.0) -> Tensor:
    """The focal loss of a dense head, summed per image, without ever building one-hot targets.

    Args:
        logits: (B, A, K), any floating type; sums are fp32 whatever it is.
        labels: (B, A) int64: a class 0..K-1, -1 for background (negative for every class), below -1 for ignored
            (counts for nothing).
        alpha, gamma: as in `sigmoid_focal_loss`.

    Returns:
        (B,) fp32. On a CPU the gradient is made along with the loss, in chunks, with one buffer of the logits' size;
        it can be taken once, and not differentiated again.
    """
    weights = (1.0, 1.0) if alpha is None else (alpha, 1 - alpha)
    if logits.device.type == "cpu":
        sums: Tensor = _ChunkedFocalLoss.apply(logits, labels, weights, gamma)
        return sums
    return _plain_focal_loss(logits, labels, weights, gamma)


def _plain_focal_loss(logits: Tensor, labels: Tensor, weights: tuple[float, float], gamma: float) -> Tensor:
    """`dense_focal_loss` in operations that a compiler fuses on a GPU."""
    positive = labels[..., None] == torch.arange(logits.shape[-1], device=logits.device)
    x = logits.float()
    signed = torch.where(positive, -x, x)  # both sides are the same function of the logit of being wrong
    loss = _power(torch.sigmoid(signed), gamma) * F.softplus(signed) * torch.where(positive, *weights)
    return torch.where((labels >= -1)[..., None], loss, 0.0).sum(dim=(1, 2))


class _ChunkedFocalLoss(torch.autograd.Function):
    """Loss and gradient in one pass: every entry as a negative, except the few positive ones, which follow.

    With s = sigmoid(x) and the negative side's loss s^g softplus(x), the derivative is
    s^g (g (1 - s) softplus(x) + s); the positive side is the same at -x with the sign turned.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, weights: tuple[float, float], gamma: float) -> Tensor:
        batch, _, num_classes = logits.shape
        sums = torch.zeros(batch)
        # fp16 cannot hold the gradient of an easy negative before GradScaler's factor arrives in `backward`
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        grad = torch.empty_like(logits, dtype=kept, memory_format=torch.contiguous_format)
        rows = max(1, CHUNK // num_classes)
        for image in range(batch):
            chunks = zip(*(torch.split(t[image], rows) for t in (logits, grad, labels)), strict=True)
            for x, gradient, label in chunks:
                loss, slope = _loss_and_slope(x.float(), gamma)
                positive = torch.nonzero(label >= 0).squeeze(1)
                loss[positive, label[positive]] = 0.0
                weight = (label >= -1).float() * weights[1]
                sums[image] += loss.sum(dim=1).dot(weight)
                gradient.copy_(slope.mul_(weight[:, None]))
        images, anchors = torch.nonzero(labels >= 0, as_tuple=True)
        entry = (images, anchors, labels[images, anchors])
        loss, slope = _loss_and_slope(-logits[entry].float(), gamma)
        sums.index_add_(0, images, weights[0] * loss)
        grad[entry] = (-weights[0] * slope).to(grad.dtype)
        ctx.grad, ctx.dtype = grad, logits.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.grad is None:
            raise RuntimeError("dense_focal_loss keeps one gradient buffer and can be differentiated once, got twice")
        grad, ctx.grad = ctx.grad, None
        return grad.mul_(grad_sums[:, None, None]).to(ctx.dtype), None, None, None


def _loss_and_slope(x: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """The unweighted loss of a negative with logit x, and its derivative."""
    s = torch.sigmoid(x)
    log_term = F.softplus(x)
    weight = _power(s, gamma)
    slope = torch.addcmul(s, log_term, 1 - s, value=gamma).mul_(weight)
    return weight * log_term, slope


def _power(x: Tensor, gamma: float) -> Tensor:
    if gamma == 0:
        return torch.ones_like(x)
    return x * x if gamma == 2 else x.clamp_min(torch.finfo(x.dtype).tiny) ** gamma
