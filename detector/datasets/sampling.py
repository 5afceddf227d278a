"""Which images make up which step: pure functions of (seed, epoch), so that resuming needs no replay.

Neither the number of workers, of processes or of micro-batches, nor an interruption, changes what a step sees.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from detector.config import Pad, Resize
from detector.datasets.transforms import padded_size, resized_size


class SampleKey(NamedTuple):
    """Everything that determines a sample, besides the dataset and the seed."""

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
    """Position in the dataset; -1 for a filler: an empty image that contributes nothing."""
    min_size: int
    canvas: tuple[int, int]
    """Padded height and width of the whole step."""
    copy: int = 0
    """How often the image was used before in this epoch; each copy is augmented differently."""


class StepPlanner:
    """Distributes the images of every epoch over its steps.

    Args:
        sizes: (N, 2) height and width of the images.
        batch_size: images of a step over all processes.
        min_sizes: short sides, one of which is drawn for each step.
        max_size: bound of the long side.
        pad: how the canvas is rounded.
        resize: how images are resized.
        aspect_ratio_grouping: whether steps are all landscape or all portrait (as far as the numbers allow).
        seed: of the run.
        factors: (N,) average number of times that each image is used per epoch; None: once each.
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
        self.images_per_epoch = len(sizes) if factors is None else round(float(factors.sum()))
        self.steps_per_epoch = -(-self.images_per_epoch // batch_size)

    def epoch(self, epoch: int) -> list[NDArray[np.int64]]:
        """Return the images of each step of an epoch, including a partial one; the second copy of image i is i + N."""
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
        """Return the samples of the first steps of the run, at most one epoch."""
        return [self.keys(0, step, indices) for step, indices in enumerate(self.epoch(0)[:count])]

    def largest_canvas(self) -> tuple[int, int]:
        """Return the padded height and width that no step exceeds; the leftovers of an epoch may combine all shapes."""
        resized = [
            resized_size((int(h), int(w)), min_size=max(self.min_sizes), max_size=self.max_size, resize=self.resize)
            for h, w in np.unique(self.sizes, axis=0)
        ]
        return padded_size((max(h for h, _ in resized), max(w for _, w in resized)), self.pad)

    def _entries(self, epoch: int) -> NDArray[np.int64]:
        """Return the images of an epoch with their repetitions, in order.

        With factors, by systematic sampling: image i owns an interval of its factor's length on a line, and every
        integer, shifted by a fraction drawn for the epoch, selects the image whose interval contains it. So every epoch
        has the same length, and no image is used more than once too often or too rarely.
        """
        count = len(self.sizes)
        if self.factors is None:
            return np.arange(count)
        ends = np.cumsum(self.factors) * (self.images_per_epoch / self.factors.sum())
        shift = np.random.default_rng([self.seed, epoch, 1]).random()
        picked = np.searchsorted(ends, np.arange(self.images_per_epoch) + shift, side="right").clip(max=count - 1)
        copies = np.arange(len(picked)) - np.searchsorted(picked, picked)
        entries: NDArray[np.int64] = picked + count * copies
        return entries

    def keys(self, epoch: int, step: int, indices: NDArray[np.int64]) -> list[SampleKey]:
        """Return the samples of one step, all with the same scale and canvas."""
        rng = np.random.default_rng([self.seed, epoch, step])
        min_size = int(rng.choice(self.min_sizes))
        resized = [
            resized_size((int(h), int(w)), min_size=min_size, max_size=self.max_size, resize=self.resize)
            for h, w in self.sizes[indices % len(self.sizes)]
        ]
        canvas = padded_size((max(h for h, _ in resized), max(w for _, w in resized)), self.pad)
        copies, images = np.divmod(indices, len(self.sizes))
        return [
            SampleKey(epoch, int(index), min_size, canvas, int(copy))
            for index, copy in zip(images, copies, strict=True)
        ]


def repeat_factors(
    images: NDArray[np.integer], labels: NDArray[np.integer], num_images: int, *, threshold: float
) -> NDArray[np.float64]:
    """Return the number of times that each image is used per epoch by repeat factor sampling.

    It is the largest max(1, sqrt(threshold / f)) of the image's classes, f being the share of images with that class
    (Gupta et al. 2019, "LVIS", section 4, "Repeat factor sampling").

    Args:
        images, labels: (M,) image index and label of each object.
        num_images: in the dataset; those without objects are used once.
        threshold: share of images below which a class is rare.

    Returns:
        (num_images,).
    """
    pairs = np.unique(np.stack([images, labels], axis=1), axis=0)
    share = np.bincount(pairs[:, 1]) / num_images
    factors = np.ones(num_images)
    np.maximum.at(factors, pairs[:, 0], np.sqrt(threshold / share[pairs[:, 1]]))
    return factors


def balanced_factors(images: NDArray[np.integer], labels: NDArray[np.integer], num_images: int) -> NDArray[np.float64]:
    """Return the number of times that each image is used per epoch, (num_images,), by class-balanced sampling.

    Every class that has objects is drawn equally often, and then each of its images equally often; images without
    objects keep their share. Arguments as in `repeat_factors`.
    """
    pairs = np.unique(np.stack([images, labels], axis=1), axis=0)
    of_class = np.bincount(pairs[:, 1])
    num_classes = int((of_class > 0).sum())
    with_objects = len(np.unique(pairs[:, 0]))
    factors = np.ones(num_images)
    factors[pairs[:, 0]] = 0
    np.add.at(factors, pairs[:, 0], with_objects / num_classes / of_class[pairs[:, 1]] if num_classes else 0)
    return factors


class TrainSampler(Sampler[list[SampleKey]]):
    """One process's micro-batches from a given step to the end of the run.

    A step's images are distributed round-robin over the processes, then cut into micro-batches. Every process gets the
    same number of micro-batches, with fillers where there are too few images.

    Args:
        planner: of the run.
        start_step: number of steps already done.
        total_steps: of the run.
        micro_batch: images per forward pass; None: all of the process's images of a step.
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
        """Return the number of forward passes per process for a step of `num_images`."""
        share = -(-num_images // self.world_size)
        return -(-share // (self.micro_batch or share))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        steps_per_epoch = self.planner.steps_per_epoch
        batches: list[NDArray[np.int64]] = []
        for step in range(self.start_step, self.total_steps):
            epoch, within = divmod(step, steps_per_epoch)
            if within == 0 or not batches:
                batches = self.planner.epoch(epoch)
            yield from self._micro_batches(self.planner.keys(epoch, within, batches[within]), self.rank)

    def whole_step(self, step: int) -> list[list[SampleKey]]:
        """Return the micro-batches of all processes of one step of the run."""
        epoch, within = divmod(step, self.planner.steps_per_epoch)
        keys = self.planner.keys(epoch, within, self.planner.epoch(epoch)[within])
        return [part for rank in range(self.world_size) for part in self._micro_batches(keys, rank)]

    def _micro_batches(self, keys: list[SampleKey], rank: int) -> Iterator[list[SampleKey]]:
        """Yield the micro-batches of one process of a step with these samples."""
        filler = keys[0]._replace(index=-1)
        own = keys[rank :: self.world_size]
        count = self.num_micro_batches(len(keys))
        for part in np.array_split(np.arange(len(own)), count):
            yield [own[i] for i in part] or [filler]


def eval_batches(
    sizes: NDArray[np.integer], batch_size: int, *, min_size: int, max_size: int, pad: Pad, resize: Resize = "area"
) -> list[list[SampleKey]]:
    """Return the keys of all images, in batches of equal padded shape.

    An image is padded as if it were alone, so that its detections do not depend on the other images of the batch:
    evaluation with any batch size, and prediction of single files, agree.
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
