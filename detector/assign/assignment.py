"""What an assigner is and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from detector.structures import HeadOutputs, Targets

BACKGROUND = -1
IGNORED = -2


class Assignment(NamedTuple):
    """The assignment of the anchors of a batch to ground-truth objects, background or neither."""

    matched: Tensor
    """(B, A) int64: the object (position in `Targets.boxes`), BACKGROUND or IGNORED."""
    num_pos: Tensor
    """(B,) int64: positive anchors per image."""
    target_scores: Tensor | None = None
    """(B, A) float32 in 0..1: the soft class target of each positive anchor, 0 elsewhere; None means 1. Class
    losses with soft targets (quality_focal, varifocal) use them, and are then normalized by their sum rather than by
    the number of positive anchors (Feng et al. 2021, "TOOD", section 3.2)."""
    box_weights: Tensor | None = None
    """(B, A) float32: the factor of each positive anchor's box loss, 0 elsewhere; None means 1. The box loss is then
    normalized by their sum (Tian et al. 2019, "FCOS", with centerness as the factor)."""


class Assigner(Protocol):
    """Assigns anchors to objects. Implement it as a small class or a frozen dataclass; nothing needs to be
    registered."""

    needs_outputs: bool
    """Whether `outputs` must be given. If not, a training step assigns all micro-batches ahead of the network."""

    def __call__(
        self,
        anchors: Tensor,
        targets: Targets,
        *,
        grids: Sequence[tuple[int, int]] | None = None,
        outputs: HeadOutputs | None = None,
    ) -> Assignment:
        """Assign anchors (A, 4) to the objects of a batch.

        Args:
            anchors: (A, 4) xyxy, all levels.
            targets: padded as in `Targets`; padding is never assigned.
            grids: height and width in cells of each level, if the anchors are those of a pyramid.
            outputs: of the network for the same batch, without a gradient; only where `needs_outputs`.
        """
