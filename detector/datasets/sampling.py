"""Which images make up which step: pure functions of (seed, epoch), so that resuming needs no replay.

Neither the number of workers, of processes or of micro-batches, nor an interruption, changes what a step sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from detector.datasets.transforms import Pad, Resize, padded_size, resized_size


class SampleKey(NamedTuple):
    """All that decides what a sample looks like, besides the dataset and the seed."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody looks for here
    """Position in the dataset; -1 for a filler: an empty picture that counts for nothing."""
    min_size: int
    canvas: tuple[int, int]
    """Padded height and width of the whole step."""


class StepPlanner:
    """Composes the steps of every epoch.

    Args:
        sizes: (N, 2) height and width of the images.
        batch_size: images of a step over all processes.
        min_sizes: short sides, one of which is drawn for each step.
        max_size: bound of the long side.
        pad: how the canvas is rounded.
        resize: how pictures get their size.
        aspect_ratio_grouping: whether steps are all landscape or all portrait (as far as the numbers allow).
        seed: of the run.
    """

    def __init__(
        self,
        sizes: NDArray[np.integer],
        batch_size: int,
        *,
        min_sizes: Sequence[int],
        max_size: int,
        pad: Pad,
        aspect_ratio_grouping: bool,
        seed: int,
        resize: Resize = "area",
    ) -> None:
        self.sizes = sizes
        self.batch_size = batch_size
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.pad: Pad = pad
        self.resize: Resize = resize
        self.portrait = (sizes[:, 0] > sizes[:, 1]) if aspect_ratio_grouping else np.zeros(len(sizes), dtype=bool)
        self.seed = seed
        self.steps_per_epoch = -(-len(sizes) // batch_size)

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The images of each step of an epoch; every image once, the last partial batch kept."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.sizes))
        batches: list[NDArray[np.int64]] = []
        rest = []
        for group in (order[self.portrait[order]], order[~self.portrait[order]]):
            full = len(group) // self.batch_size * self.batch_size
            batches.extend(group[:full].reshape(-1, self.batch_size))
            rest.append(group[full:])
        leftover = np.concatenate(rest)
        batches.extend(leftover[i : i + self.batch_size] for i in range(0, len(leftover), self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]

    def keys(self, epoch: int, step: int, indices: NDArray[np.int64]) -> list[SampleKey]:
        """The samples of one step; scale and canvas are those of the whole step."""
        rng = np.random.default_rng([self.seed, epoch, step])
        min_size = int(rng.choice(self.min_sizes))
        resized = [
            resized_size((int(h), int(w)), min_size=min_size, max_size=self.max_size, resize=self.resize)
            for h, w in self.sizes[indices]
        ]
        canvas = padded_size((max(h for h, _ in resized), max(w for _, w in resized)), self.pad)
        return [SampleKey(epoch, int(index), min_size, canvas) for index in indices]


class TrainSampler(Sampler[list[SampleKey]]):
    """One process's micro-batches from a given step to the end of the run.

    A step's images are dealt out to the processes in turn, then cut into micro-batches. Every process gets the same
    number of micro-batches, filled up with fillers where the images do not go round.

    Args:
        planner: of the run.
        start_step: steps already done.
        total_steps: of the run.
        micro_batch: images of a forward pass; None: the process's whole share.
        rank, world_size: of the process.
    """

    def __init__(
        self,
        planner: StepPlanner,
        start_step: int,
        total_steps: int,
        *,
        micro_batch: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.planner = planner
        self.start_step = start_step
        self.total_steps = total_steps
        self.micro_batch = micro_batch
        self.rank = rank
        self.world_size = world_size

    def num_micro_batches(self, num_images: int) -> int:
        """Forward passes per process for a step of so many images."""
        share = -(-num_images // self.world_size)
        return -(-share // (self.micro_batch or share))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        steps_per_epoch = self.planner.steps_per_epoch
        batches: list[NDArray[np.int64]] = []
        for step in range(self.start_step, self.total_steps):
            epoch, within = divmod(step, steps_per_epoch)
            if within == 0 or not batches:
                batches = self.planner.epoch(epoch)
            keys = self.planner.keys(epoch, within, batches[within])
            filler = keys[0]._replace(index=-1)
            mine = keys[self.rank :: self.world_size]
            count = self.num_micro_batches(len(keys))
            for part in np.array_split(np.arange(len(mine)), count):
                yield [mine[i] for i in part] or [filler]


def eval_batches(
    sizes: NDArray[np.integer], batch_size: int, *, min_size: int, max_size: int, pad: Pad, resize: Resize = "area"
) -> list[list[SampleKey]]:
    """All images, in batches of equal padded shape.

    An image is padded as if it were alone, so what is found in it does not depend on its neighbours: evaluation with
    any batch size, and prediction of single files, agree.
    """
    by_canvas: dict[tuple[int, int], list[SampleKey]] = {}
    for index, (height, width) in enumerate(sizes):
        size = resized_size((int(height), int(width)), min_size=min_size, max_size=max_size, resize=resize)
        canvas = padded_size(size, pad)
        by_canvas.setdefault(canvas, []).append(SampleKey(0, index, min_size, canvas))
    return [
        keys[start : start + batch_size]
        for _, keys in sorted(by_canvas.items())
        for start in range(0, len(keys), batch_size)
    ]
