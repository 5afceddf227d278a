"""Losses summed over all anchors of a dense head, from class labels instead of one-hot targets.

The sigmoid focal loss has a CPU path of its own that computes loss and gradient in one pass. Every other loss is a
function of a block of anchors. On a CPU, a block fits into the cache, and its gradient is computed right after its
loss, so memory holds one buffer of the size of the logits, whatever a loss saves for its backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from detector.losses.focal import power, resolve_negative_weight

CHUNK = 1 << 17
"""Logits per block on a CPU: half a MiB of fp32, which stays in the cache between the dozen passes over it."""

LOG1P_MAX_LOGIT = 4.0
"""The largest logit x for which log1p(-sigmoid(x)) equals -softplus(x) to a relative error of 1e-6."""

AnchorLoss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps (n, C) fp32 logits, (n,) labels from -1 on (background) and (n,) qualities to (n,) losses of anchors."""


def dense_loss(
    loss: AnchorLoss, logits: Tensor, labels: Tensor, quality: Tensor | None = None, weights: Tensor | None = None
) -> Tensor:
    """Sum a loss over the anchors of each image.

    Args:
        loss: the loss of every anchor of a block.
        logits: (B, A, C), any floating type; losses are computed in fp32.
        labels: (B, A) int64: a class from 0 on, -1 for background, below -1 for ignored anchors, which have no loss.
        quality: (B, A) quality of each anchor's box, an input of `loss`; zeros if not given.
        weights: (B, A) fp32 factor of each anchor's loss, a constant without a gradient; None means 1.

    Returns:
        (B,) fp32. On a CPU it can be differentiated only once.
    """
    others = _per_anchor_inputs(labels, quality, weights)
    if logits.device.type == "cpu" and logits.requires_grad and not torch.compiler.is_compiling():
        sums: Tensor = _ChunkedLoss.apply(logits, loss, others)
        return sums
    if torch.compiler.is_compiling():  # intermediate results are fused away, so all images can be one block
        flat = _masked_losses(loss, logits.flatten(0, 1).float(), *[t.flatten() for t in others])
        return flat.view(labels.shape).sum(dim=1)
    images = [_masked_losses(loss, x.float(), *rows).sum() for x, *rows in zip(logits, *others, strict=True)]
    return torch.stack(images) if images else logits.new_zeros(0, dtype=torch.float32)


def anchor_losses(loss: AnchorLoss, logits: Tensor, labels: Tensor, quality: Tensor | None = None) -> Tensor:
    """Return every anchor's loss, (B, A) fp32, 0 where ignored, without a gradient; arguments as in `dense_loss`."""
    losses = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    with torch.no_grad():
        for _, x, *rows, out in blocks(logits, *_per_anchor_inputs(labels, quality, None), losses):
            out.copy_(_masked_losses(loss, x.float(), *rows))
    return losses


def blocks(logits: Tensor, labels: Tensor, *others: Tensor) -> Iterator[tuple[Any, ...]]:
    """Split (B, A, C) logits and tensors (B, A, ...) into images and, on a CPU, blocks of CHUNK logits.

    Yields the index of the image and the block of each tensor, a view.
    """
    rows = CHUNK // logits.shape[-1] if logits.device.type == "cpu" else labels.shape[1]
    for image in range(len(logits)):
        parts = (torch.split(t[image], max(1, rows)) for t in (logits, labels, *others))
        yield from ((image, *part) for part in zip(*parts, strict=True))


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Expand labels (n,) to booleans (n, K), all False for a negative label."""
    return labels[..., None] == torch.arange(num_classes, device=labels.device)


def _per_anchor_inputs(labels: Tensor, quality: Tensor | None, weights: Tensor | None) -> tuple[Tensor, ...]:
    """Return what `_masked_losses` takes after the loss and the logits, (B, A) each."""
    quality = torch.zeros(labels.shape, device=labels.device) if quality is None else quality
    return (labels, quality) if weights is None else (labels, quality, weights.detach())


def _masked_losses(loss: AnchorLoss, x: Tensor, label: Tensor, quality: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the losses (n,) of a block of anchors, with neither loss nor gradient for ignored ones."""
    valid = label >= -1
    x = torch.where(valid[:, None], x, 0.0)
    losses = loss(x, label.clamp(min=-1), quality)
    return torch.where(valid, losses if weight is None else losses * weight, 0.0)


class _ChunkedLoss(torch.autograd.Function):
    """Computes loss and gradient block by block."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, loss: AnchorLoss, others: tuple[Tensor, ...]) -> Tensor:
        sums, grad = torch.zeros(len(logits)), _gradient_buffer(ctx, logits)
        for image, x, *rows, out in blocks(logits, *others, grad):
            leaf = x.float().detach().requires_grad_()
            with torch.enable_grad():
                total = _masked_losses(loss, leaf, *rows).sum()
            out.copy_(torch.autograd.grad(total, leaf)[0])
            sums[image] += total.detach()
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        return _take_gradient(ctx, grad_sums), None, None


def _gradient_buffer(ctx: Any, logits: Tensor) -> Tensor:
    """Allocate the gradient of the sums with respect to the logits, and keep it for `_take_gradient`."""
    # fp16 cannot hold the gradient of an easy negative before GradScaler's factor arrives in `backward`
    dtype = torch.float32 if logits.dtype == torch.float16 else logits.dtype
    ctx.dtype, ctx.grad = logits.dtype, torch.empty_like(logits, dtype=dtype, memory_format=torch.contiguous_format)
    grad: Tensor = ctx.grad
    return grad


def _take_gradient(ctx: Any, grad_sums: Tensor) -> Tensor:
    """Multiply the kept gradient in place by the incoming one, (B,), and release it."""
    if ctx.grad is None:
        raise RuntimeError("a dense loss keeps one gradient buffer and can be differentiated once, got twice")
    grad, ctx.grad = ctx.grad, None
    if not (grad_sums == 1).all():
        grad.mul_(grad_sums[:, None, None])
    result: Tensor = grad.to(ctx.dtype)
    return result


def dense_focal_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    alpha: float | Tensor | None = 0.25,
    gamma: float = 2.0,
    negative_weight: float | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """Sum the sigmoid focal loss over the anchors of each image without building one-hot targets.

    Args:
        logits: (B, A, K), any floating type; sums are fp32.
        labels: (B, A) int64: a class 0..K-1, -1 for background (negative for every class), below -1 for ignored
            anchors, which have no loss.
        alpha: weight of positives, a number or (K,) one per class, as in `sigmoid_focal_loss`.
        gamma: focusing parameter, at least 0.
        negative_weight: weight of negatives, if not the one that follows from `alpha`.
        scale: (B,) factor of each image's sum, cheaper here than afterwards; None means 1.

    Returns:
        (B,) fp32. On a CPU the gradient is computed along with the loss, in chunks, in one buffer of the logits' size;
        it can be taken once and not differentiated again.

    Example:
        >>> logits, labels = torch.zeros(1, 3, 2), torch.tensor([[0, -1, -2]])
        >>> dense_focal_loss(logits, labels)  # one positive and three negative entries; the last anchor is ignored
        tensor([0.4332])
    """
    num_classes = logits.shape[-1]
    scalar = 1.0 if alpha is None else alpha
    positive = scalar if isinstance(scalar, Tensor) else torch.full((), scalar, device=logits.device)
    negative_weight = resolve_negative_weight(alpha, negative_weight)
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
    """Compute `dense_focal_loss` in operations that a compiler fuses on a GPU."""
    positive = one_hot(labels, logits.shape[-1])
    x = logits.float()
    signed = torch.where(positive, -x, x)  # both sides are the same function of -x_t, the logit of the wrong answer
    weight = torch.where(positive, positive_weight, negative_weight)
    loss = power(torch.sigmoid(signed), gamma) * F.softplus(signed) * weight
    return torch.where((labels >= -1)[..., None], loss, 0.0).sum(dim=(1, 2))


class _ChunkedFocalLoss(torch.autograd.Function):
    """Computes loss and gradient in one pass: every entry as a negative, then the few positive ones.

    With s = sigmoid(x) and a negative's loss s^g softplus(x), the derivative is s^g (g (1 - s) softplus(x) + s); a
    positive has the loss of a negative at -x, and the derivative with the opposite sign.
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
        sums, grad = torch.zeros(len(logits)), _gradient_buffer(ctx, logits)
        factors = (scale * negative_weight).tolist()
        for image, x, label, out in blocks(logits, labels, grad):
            weight, log_rest, slope = _negative_loss_terms(x.float(), gamma)
            if (label != -1).any():  # most blocks are all background
                positive, ignored = torch.nonzero(label >= 0).squeeze(1), torch.nonzero(label < -1).squeeze(1)
                log_rest[positive, label[positive]] = 0.0
                weight[ignored] = log_rest[ignored] = slope[ignored] = 0.0
            sums[image] -= torch.dot(weight.flatten(), log_rest.flatten()) * factors[image]
            torch.mul(slope, factors[image], out=out)
        images, anchors = torch.nonzero(labels >= 0, as_tuple=True)
        classes = labels[images, anchors]
        entry = (images, anchors, classes)
        weight, log_rest, slope = _negative_loss_terms(-logits[entry].float(), gamma)
        weights = positive_weight[classes] * scale[images]
        sums.index_add_(0, images, -weights * weight * log_rest)
        grad[entry] = (-weights * slope).to(grad.dtype)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        return _take_gradient(ctx, grad_sums), None, None, None, None, None


def _negative_loss_terms(x: Tensor, gamma: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the factors s^g and -softplus(x) of a negative's loss at each logit x, and the derivative of the loss.

    -softplus(x) = log1p(-s) takes half the time of torch's softplus and keeps its digits up to LOG1P_MAX_LOGIT.
    """
    s = torch.sigmoid(x)
    rest = s.neg()
    if x.numel() and x.amax() <= LOG1P_MAX_LOGIT:  # False for NaN
        log_rest = torch.log1p(rest)
    else:
        log_rest = F.softplus(x).neg_()
    rest.add_(1)
    weight = power(s, gamma)
    slope = s.addcmul_(log_rest, rest, value=-gamma).mul_(weight)
    return weight, log_rest, slope
