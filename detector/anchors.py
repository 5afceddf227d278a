"""Dense anchors (Lin et al. 2017, section 4), and the best IoU that they reach with given boxes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from detector.config import AnchorRounding, AnchorSpacing

STRIDES = (8, 16, 32, 64, 128)
"""Strides of the levels P3..P7 in pixels."""


class AnchorGenerator(nn.Module):
    """The anchors of every cell of every level, cached per image size.

    This module has no parameters. The order is: levels, then cells row by row, then a = ratio * num_sizes + size.

    Args:
        sizes: per level, the side in pixels of a square anchor, or several sides.
        octave_scales: factors by which each size is multiplied.
        ratios: height / width, at equal area.
        spacing: distance between neighbouring cells: "fixed" is the level's stride, "grid" padded size // feature map
            size.
        center_offset: centre of a cell's anchors, in strides from the cell's corner.
        rounding: "integer" rounds the corners relative to the centre, as torchvision does.
        strides: per level, image size over feature map size.
    """

    def __init__(
        self,
        sizes: Sequence[float | Sequence[float]],
        octave_scales: Sequence[float],
        *,
        ratios: Sequence[float],
        spacing: AnchorSpacing,
        center_offset: float,
        rounding: AnchorRounding,
        strides: Sequence[int] = STRIDES,
    ) -> None:
        super().__init__()
        self.strides = tuple(strides)
        self.spacing = spacing
        self.center_offset = center_offset
        self.cells = [_cell_anchors(s, octave_scales, ratios, rounding) for s in sizes]
        self._cache: dict[tuple[object, ...], Tensor] = {}

    @property
    def num_per_cell(self) -> int:
        """Number of anchors per cell."""
        return len(self.cells[0])

    def forward(self, image_size: tuple[int, int], grids: Sequence[tuple[int, int]], device: torch.device) -> Tensor:
        """Return the anchors of an image size.

        Args:
            image_size: padded height and width in pixels.
            grids: height and width of each level in cells.
            device: where the anchors are needed.

        Returns:
            (A, 4) float32 xyxy, all levels.
        """
        key = (image_size, tuple(grids), device)
        if key not in self._cache:
            if len(self._cache) >= 64:  # bounds the memory for batches of many sizes
                self._cache.clear()
            levels = [self._level(level, image_size, grid) for level, grid in enumerate(grids)]
            self._cache[key] = torch.cat(levels).to(device)
        return self._cache[key]

    def clear_cache(self) -> None:
        """Empty the cache."""
        self._cache = {}

    def level_strides(self, level: int, image_size: tuple[int, int], grid: tuple[int, int]) -> tuple[float, float]:
        """Vertical and horizontal distance between neighbouring cells of a level, in pixels."""
        if self.spacing == "grid":
            return float(image_size[0] // grid[0]), float(image_size[1] // grid[1])
        return float(self.strides[level]), float(self.strides[level])

    def _level(self, level: int, image_size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
        stride_y, stride_x = self.level_strides(level, image_size, grid)
        y = (torch.arange(grid[0], dtype=torch.float32) + self.center_offset) * stride_y
        x = (torch.arange(grid[1], dtype=torch.float32) + self.center_offset) * stride_x
        yy, xx = torch.meshgrid(y, x, indexing="ij")
        centers = torch.stack([xx, yy, xx, yy], dim=-1).reshape(-1, 1, 4)
        return (centers + self.cells[level]).reshape(-1, 4)


def _cell_anchors(
    sizes: float | Sequence[float], octave_scales: Sequence[float], ratios: Sequence[float], rounding: AnchorRounding
) -> Tensor:
    """(ratios * sizes * scales, 4) anchors centred at the origin."""
    base = (sizes,) if isinstance(sizes, (int, float)) else tuple(sizes)
    sides = torch.tensor([s * scale for s in base for scale in octave_scales], dtype=torch.float32)
    stretch = torch.tensor(ratios, dtype=torch.float32).sqrt()
    height = (stretch[:, None] * sides[None, :]).flatten()
    width = ((1 / stretch)[:, None] * sides[None, :]).flatten()
    corners = torch.stack([-width, -height, width, height], dim=1) / 2
    return corners.round() if rounding == "integer" else corners


def pyramid_grids(image_size: tuple[int, int], strides: Sequence[int] = STRIDES) -> list[tuple[int, int]]:
    """Return the height and width of each level in cells, for a padded image size."""
    height, width = image_size
    return [(-(-height // stride), -(-width // stride)) for stride in strides]


def best_anchor_iou(generator: AnchorGenerator, boxes: Tensor, image_size: tuple[int, int]) -> Tensor:
    """Compute the highest IoU that any anchor has with each box, without building the anchors.

    Of all anchors of one shape and level, the one whose centre is nearest to the box's along both axes has the highest
    IoU. So 5 levels x 9 shapes are compared per box, instead of 100,000 anchors.

    Args:
        generator: of the anchors.
        boxes: (N, 4) xyxy in pixels of the network input.
        image_size: padded height and width of the network input.

    Returns:
        (N,) intersection over union.
    """
    best = boxes.new_zeros(len(boxes))
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    center_x, center_y = ((boxes[:, 2:] + boxes[:, :2]) / 2).unbind(1)
    for level, grid in enumerate(pyramid_grids(image_size, generator.strides)):
        stride_y, stride_x = generator.level_strides(level, image_size, grid)
        off_x = _distance_to_grid(center_x, stride_x, generator.center_offset, grid[1])
        off_y = _distance_to_grid(center_y, stride_y, generator.center_offset, grid[0])
        for anchor in generator.cells[level]:
            anchor_w, anchor_h = anchor[2] - anchor[0], anchor[3] - anchor[1]
            overlap_x = (torch.minimum((anchor_w + width) / 2 - off_x, torch.minimum(anchor_w, width))).clamp(min=0)
            overlap_y = (torch.minimum((anchor_h + height) / 2 - off_y, torch.minimum(anchor_h, height))).clamp(min=0)
            inter = overlap_x * overlap_y
            best = torch.maximum(best, inter / (width * height + anchor_w * anchor_h - inter))
    return best


def _distance_to_grid(center: Tensor, stride: float, offset: float, cells: int) -> Tensor:
    """Distance of each coordinate to the nearest cell centre along one axis, in pixels."""
    nearest = (center / stride - offset).round().clamp(0, cells - 1)
    return ((nearest + offset) * stride - center).abs()
