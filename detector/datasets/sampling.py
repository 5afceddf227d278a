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
    copy: int = 0
    """How often the picture came before in this epoch; another copy is augmented otherwise."""


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
        factors: (N,) how often each picture comes in an epoch, on average over the epochs; None: once.
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
        factors: NDArray[np.float64] | None = None,
    ) -> None:
        self.sizes = sizes
        self.batch_size = batch_size
        self.min_sizes = tuple(min_sizes)
        self.max_size = max_size
        self.pad: Pad = pad
        self.resize: Resize = resize
        self.portrait = (sizes[:, 0] > sizes[:, 1]) if aspect_ratio_grouping else np.zeros(len(sizes), dtype=bool)
        self.seed = seed
        self.factors = factors
        self.pictures_per_epoch = len(sizes) if factors is None else round(float(factors.sum()))
        self.steps_per_epoch = -(-self.pictures_per_epoch // batch_size)

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """The pictures of each step of an epoch, the last partial batch kept; the second copy of picture i is i + N."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(self._entries(epoch))
        batches: list[NDArray[np.int64]] = []
        rest = []
        portrait = self.portrait[order % len(self.sizes)]
        for group in (order[portrait], order[~portrait]):
            full = len(group) // self.batch_size * self.batch_size
            batches.extend(group[:full].reshape(-1, self.batch_size))
            rest.append(group[full:])
        leftover = np.concatenate(rest)
        batches.extend(leftover[i : i + self.batch_size] for i in range(0, len(leftover), self.batch_size))
        return [batches[i] for i in rng.permutation(len(batches))]

    def first_steps(self, count: int) -> list[list[SampleKey]]:
        """The samples of the first steps of the run, at most an epoch's."""
        return [self.keys(0, step, indices) for step, indices in enumerate(self.epoch(0)[:count])]

    def largest_canvas(self) -> tuple[int, int]:
        """Padded height and width that no step exceeds: pictures of all shapes may meet where an epoch's rest is collected."""
        resized = [
            resized_size((int(h), int(w)), min_size=max(self.min_sizes), max_size=self.max_size, resize=self.resize)
            for h, w in np.unique(self.sizes, axis=0)
        ]
        return padded_size((max(h for h, _ in resized), max(w for _, w in resized)), self.pad)

    def _entries(self, epoch: int) -> NDArray[np.int64]:
        """Every picture as often as it is its turn, in order.

        With factors, by systematic sampling: picture i owns a stretch of its factor's length on a line, and every whole
        number, shifted by a fraction drawn for the epoch, takes the picture it falls on. So an epoch always has the same
        length, and no picture comes more than once too often or too seldom.
        """
        count = len(self.sizes)
        if self.factors is None:
            return np.arange(count)
        ends = np.cumsum(self.factors) * (self.pictures_per_epoch / self.factors.sum())
        shift = np.random.default_rng([self.seed, epoch, 1]).random()
        picked = np.searchsorted(ends, np.arange(self.pictures_per_epoch) + shift, side="right").clip(max=count - 1)
        copies = np.arange(len(picked)) - np.searchsorted(picked, picked)
        entries: NDArray[np.int64] = picked + count * copies
        return entries

    def keys(self, epoch: int, step: int, indices: NDArray[np.int64]) -> list[SampleKey]:
        """The samples of one step; scale and canvas are those of the whole step."""
        rng = np.random.default_rng([self.seed, epoch, step])
        min_size = int(rng.choice(self.min_sizes))
        resized = [
            resized_size((int(h), int(w)), min_size=min_size, max_size=self.max_size, resize=self.resize)
            for h, w in self.sizes[indices % len(self.sizes)]
        ]
        canvas = padded_size((max(h for h, _ in resized), max(w for _, w in resized)), self.pad)
        copies, pictures = np.divmod(indices, len(self.sizes))
        return [
            SampleKey(epoch, int(index), min_size, canvas, int(copy))
            for index, copy in zip(pictures, copies, strict=True)
        ]


def repeat_factors(
    pictures: NDArray[np.integer], labels: NDArray[np.integer], num_pictures: int, *, threshold: float
) -> NDArray[np.float64]:
    """How often each picture comes in an epoch: the largest of its classes' max(1, sqrt(threshold / f)), f being the share
    of pictures with that class (Gupta et al. 2019, "LVIS", section 4, "Repeat factor sampling").

    Args:
        pictures, labels: (M,) of each object.
        num_pictures: in all; those without objects come once.
        threshold: share of pictures below which a class is rare.

    Returns:
        (num_pictures,).
    """
    pairs = np.unique(np.stack([pictures, labels], axis=1), axis=0)
    share = np.bincount(pairs[:, 1]) / num_pictures
    factors = np.ones(num_pictures)
    np.maximum.at(factors, pairs[:, 0], np.sqrt(threshold / share[pairs[:, 1]]))
    return factors


def balanced_factors(
    pictures: NDArray[np.integer], labels: NDArray[np.integer], num_pictures: int
) -> NDArray[np.float64]:
    """How often each picture comes in an epoch of as many pictures as there are, if every class that occurs is asked for
    equally often and each of its pictures then answers equally often. Arguments as in `repeat_factors`.

    Pictures without objects keep their share.
    """
    pairs = np.unique(np.stack([pictures, labels], axis=1), axis=0)
    of_class = np.bincount(pairs[:, 1])
    num_classes = int((of_class > 0).sum())
    with_objects = len(np.unique(pairs[:, 0]))
    factors = np.ones(num_pictures)
    factors[pairs[:, 0]] = 0
    np.add.at(factors, pairs[:, 0], with_objects / num_classes / of_class[pairs[:, 1]] if num_classes else 0)
    return factors


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
