"""Losses over all anchors of a dense head, from class labels instead of one-hot targets.

The usual one, the sigmoid focal loss, has its own path on a CPU, where loss and gradient are made in one pass. All others
are functions of a block of anchors; on a CPU such blocks are small enough for the cache, and each one's gradient is taken
as soon as its loss is known, so that memory holds one buffer of the logits' size whatever a loss keeps for its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detector.losses.focal import power, weight_of_negatives

CHUNK = 1 << 17
"""Logits looked at together on a CPU: half a MiB of fp32, which stays in the cache between the dozen passes over it."""

SURE = 4.0
"""The logit up to which log(1 - sigmoid) is as good as softplus: 1e-6 of it."""

AnchorLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(n, C) logits in fp32, (n,) labels of -1 and more, (n,) qualities of their boxes: (n,) losses."""


def dense_loss(loss: AnchorLoss, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
    """The sum of a loss over the anchors of each image.

    Args:
        loss: of a block of anchors.
        logits: (B, A, C), any floating type; losses are fp32 whatever it is.
        labels: (B, A) int64: a class from 0 on, -1 for background, below -1 for ignored (counts for nothing).
        quality: (B, A) handed to `loss`; zeros if not given.

    Returns:
        (B,) fp32. On a CPU it can be differentiated once, and not again.
    """
    quality = torch.zeros(labels.shape, device=labels.device) if quality is None else quality
    if logits.device.type == "cpu" and logits.requires_grad and not torch.compiler.is_compiling():
        sums: Tensor = _ChunkedLoss.apply(logits, labels, quality, loss)
        return sums
    if torch.compiler.is_compiling():  # where nothing of the loss's inside is stored, all images are one block
        flat = _counted(loss, logits.flatten(0, 1).float(), labels.flatten(), quality.flatten())
        return flat.view(labels.shape).sum(dim=1)
    each = [_counted(loss, x.float(), label, q) for x, label, q in zip(logits, labels, quality, strict=True)]
    return torch.stack([e.sum() for e in each]) if each else logits.new_zeros(0, dtype=torch.float32)


def anchor_losses(loss: AnchorLoss, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
    """The loss of every anchor, (B, A) fp32, 0 where ignored; without a gradient. Arguments as in `dense_loss`."""
    quality = torch.zeros(labels.shape, device=labels.device) if quality is None else quality
    out = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    with torch.no_grad():
        for _, x, label, q, place in blocks(logits, labels, quality, out):
            place.copy_(_counted(loss, x.float(), label, q))
    return out


def blocks(logits: Tensor, labels: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """The rows of (B, A, C) logits and of what else is (B, A, ...), an image and, on a CPU, CHUNK logits at a time: the
    image's number and the parts, which are views."""
    rows = CHUNK // logits.shape[-1] if logits.device.type == "cpu" else labels.shape[1]
    for image in range(len(logits)):
        parts = (torch.split(t[image], max(1, rows)) for t in (logits, labels, *others))
        yield from ((image, *part) for part in zip(*parts, strict=True))


def _counted(loss: AnchorLoss, x: Tensor, label: Tensor, quality: Tensor) -> Tensor:
    counted = label >= -1
    x = torch.where(counted[:, None], x, 0.0)
    return torch.where(counted, loss(x, label.clamp(min=-1), quality), 0.0)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradient block by block."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, quality: Tensor, loss: AnchorLoss) -> Tensor:
        sums = torch.zeros(len(logits))
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        grad = torch.empty_like(logits, dtype=kept, memory_format=torch.contiguous_format)
        for image, x, label, q, place in blocks(logits, labels, quality, grad):
            leaf = x.float().detach().requires_grad_()
            with torch.enable_grad():
                total = _counted(loss, leaf, label, q).sum()
            place.copy_(torch.autograd.grad(total, leaf)[0])
            sums[image] += total.detach()
        ctx.grad, ctx.dtype = grad, logits.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        return _kept_gradient(ctx, grad_sums), None, None, None


def _kept_gradient(ctx: Any, grad_sums: Tensor) -> Tensor:
    if ctx.grad is None:
        raise RuntimeError("a dense loss keeps one gradient buffer and can be differentiated once, got twice")
    grad, ctx.grad = ctx.grad, None
    if not (grad_sums == 1).all():
        grad.mul_(grad_sums[:, None, None])
    result: Tensor = grad.to(ctx.dtype)
    return result


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """(n,) labels to (n, K) booleans; no class for -1."""
    return labels[..., None] == torch.arange(num_classes, device=labels.device)


# ---- the sigmoid focal loss ---------------------------------------------------------------------------------------


def dense_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    negative_weight: float | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """The focal loss of a dense head, summed per image, without ever building one-hot targets.

    Args:
        logits: (B, A, K), any floating type; sums are fp32 whatever it is.
        labels: (B, A) int64: a class 0..K-1, -1 for background (negative for every class), below -1 for ignored
            (counts for nothing).
        alpha, gamma, negative_weight: as in `sigmoid_focal_loss`.
        scale: (B,) what each image's sum is multiplied by, which costs less here than afterwards; ones if not given.

    Returns:
        (B,) fp32. On a CPU the gradient is made along with the loss, in chunks, with one buffer of the logits' size;
        it can be taken once, and not differentiated again.
    """
    num_classes = logits.shape[-1]
    scalar = 1.0 if alpha is None else alpha
    positive = scalar if isinstance(scalar, Tensor) else torch.full((), scalar, device=logits.device)
    negative_weight = weight_of_negatives(alpha, negative_weight)
    positive = positive.to(logits.device, torch.float32).expand(num_classes)
    if logits.device.type == "cpu" and not torch.compiler.is_compiling():
        scale = torch.ones(len(logits)) if scale is None else scale
        sums: Tensor = _ChunkedFocalLoss.apply(logits, labels, positive, negative_weight, gamma, scale)
        return sums
    sums = _plain_focal_loss(logits, labels, positive, negative_weight, gamma)
    return sums if scale is None else sums * scale


def _plain_focal_loss(
    logits: Tensor, labels: Tensor, positive_weight: Tensor, negative_weight: float, gamma: float
) -> Tensor:
    """`dense_focal_loss` in operations that a compiler fuses on a GPU."""
    positive = one_hot(labels, logits.shape[-1])
    x = logits.float()
    signed = torch.where(positive, -x, x)  # both sides are the same function of the logit of being wrong
    weight = torch.where(positive, positive_weight, negative_weight)
    loss = power(torch.sigmoid(signed), gamma) * F.softplus(signed) * weight
    return torch.where((labels >= -1)[..., None], loss, 0.0).sum(dim=(1, 2))


class _ChunkedFocalLoss(torch.autograd.Function):
    """Loss and gradient in one pass: every entry as a negative, except the few positive ones, which follow.

    With s = sigmoid(x) and the negative side's loss s^g softplus(x), the derivative is
    s^g (g (1 - s) softplus(x) + s); the positive side is the same at -x with the sign turned.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        positive_weight: Tensor,
        negative_weight: float,
        gamma: float,
        scale: Tensor,
    ) -> Tensor:
        sums = torch.zeros(len(logits))
        # fp16 cannot hold the gradient of an easy negative before GradScaler's factor arrives in `backward`
        kept = torch.float32 if logits.dtype == torch.float16 else logits.dtype
        grad = torch.empty_like(logits, dtype=kept, memory_format=torch.contiguous_format)
        factors = (scale * negative_weight).tolist()
        for image, x, label, gradient in blocks(logits, labels, grad):
            weight, log_rest, slope = _negatives(x.float(), gamma)
            if (label != -1).any():  # in most blocks all is background
                positive, ignored = torch.nonzero(label >= 0).squeeze(1), torch.nonzero(label < -1).squeeze(1)
                log_rest[positive, label[positive]] = 0.0
                weight[ignored] = log_rest[ignored] = slope[ignored] = 0.0
            sums[image] -= torch.dot(weight.flatten(), log_rest.flatten()) * factors[image]
            torch.mul(slope, factors[image], out=gradient)
        images, anchors = torch.nonzero(labels >= 0, as_tuple=True)
        classes = labels[images, anchors]
        entry = (images, anchors, classes)
        weight, log_rest, slope = _negatives(-logits[entry].float(), gamma)
        weights = positive_weight[classes] * scale[images]
        sums.index_add_(0, images, -weights * weight * log_rest)
        grad[entry] = (-weights * slope).to(grad.dtype)
        ctx.grad, ctx.dtype = grad, logits.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        return _kept_gradient(ctx, grad_sums), None, None, None, None, None


def _negatives(x: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """The two factors of a negative's loss at each logit, s^g and -softplus(x), and the slope of minus their product.

    softplus(x) = -log(1 - s) takes half the time of torch's softplus, and keeps its digits up to SURE.
    """
    s = torch.sigmoid(x)
    rest = s.neg()
    if x.numel() and x.amax() <= SURE:  # which NaN is not
        log_rest = torch.log1p(rest)
    else:
        log_rest = F.softplus(x).neg_()
    rest.add_(1)
    weight = power(s, gamma)
    slope = s.addcmul_(log_rest, rest, value=-gamma).mul_(weight)
    return weight, log_rest, slope
