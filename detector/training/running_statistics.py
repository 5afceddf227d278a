"""The running statistics of batch norms, which a forward pass changes, and putting them back."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def running_statistics(module: nn.Module) -> list[Tensor]:
    """The buffers that a forward pass changes: those of batch norms in training mode."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    return [buffer for norm in norms for buffer in norm.buffers()]


class BuffersBefore:
    """A copy of buffers, to put them back: 0.2 MB for a ResNet-50's running statistics.

    Args:
        buffers: what will change.
    """

    def __init__(self, buffers: Sequence[Tensor]) -> None:
        self.groups = [[b for b in buffers if b.dtype == dtype] for dtype in {b.dtype for b in buffers}]
        self.before = [_flat(group) for group in self.groups]

    @torch.no_grad()
    def restore(self, *, unless: Tensor) -> None:
        """Copy the buffers back unless the condition () is True. Not a sync point."""
        if unless.device.type == "cpu" and bool(unless):
            return
        for group, before in zip(self.groups, self.before, strict=True):
            kept = torch.split(torch.where(unless, _flat(group), before), [b.numel() for b in group])
            torch._foreach_copy_(group, [part.view_as(b) for part, b in zip(kept, group, strict=True)])


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


@contextlib.contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Restore a module's buffers, such as running statistics, at the end of the block."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    yield
    for name, buffer in module.named_buffers():
        buffer.copy_(before[name])
