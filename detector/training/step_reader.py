"""The micro-batches of every step of this process, on its device."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from detector import distributed
from detector.config import Config
from detector.datasets.augment import Augmentation, extreme_sizes
from detector.datasets.class_statistics import sampling_factors
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, build_loader, to_device, too_many_unreadable, unreadable_images
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.errors import DatasetError
from detector.evaluation.evaluate import too_many_missing
from detector.structures import Batch


class StepReader:
    """Reads the steps of a run in order. One pool of workers reads ahead across epochs and evaluations.

    Args:
        dataset: the training set as the network sees it.
        sampler: the samples of every remaining step.
        num_workers: loader processes.
        worker_timeout: seconds that one may take to read one image.
        device: where batches go.
    """

    def __init__(
        self,
        dataset: DetectionDataset,
        sampler: TrainSampler,
        *,
        num_workers: int,
        worker_timeout: float = 300.0,
        device: torch.device,
    ) -> None:
        self.dataset = dataset
        self.coco = dataset.coco
        self.sampler = sampler
        self.device = device
        self.unreadable: set[int] = set()
        """Images of this epoch that this process could not read."""
        self.wait = 0.0
        """Seconds that the last step waited for its data."""
        self._batches = iter(
            build_loader(
                dataset, sampler, num_workers=num_workers, pin_memory=device.type == "cuda",
                worker_timeout=worker_timeout,
            )
        )  # fmt: skip

    def steps(self, epoch: int, *, first: int) -> Iterator[list[Batch]]:
        """Yield the micro-batches of the steps of an epoch from step `first` of the run on."""
        planner = self.sampler.planner
        plan = planner.epoch(epoch)
        self.unreadable = set()
        for within in range(first - epoch * planner.steps_per_epoch, planner.steps_per_epoch):
            started = time.monotonic()
            distributed.note(f"reading the images of step {epoch * planner.steps_per_epoch + within + 1}")
            loaded = [next(self._batches) for _ in range(self.sampler.num_micro_batches(len(plan[within])))]
            self.unreadable |= {i for b in loaded for i in unreadable_images(b)}
            micro_batches = [to_device(b, self.device) for b in loaded]
            self.wait = time.monotonic() - started
            distributed.note(f"in step {epoch * planner.steps_per_epoch + within + 1}")
            yield micro_batches

    def require_readable(self, count: int) -> None:
        """Check that not too many images of this epoch became unreadable.

        Args:
            count: the sum of what all processes counted.

        Raises:
            DatasetError: too many. The run is not saved: its last steps saw too few images.
        """
        if not too_many_unreadable(count, len(self.coco)):
            return
        indices = sorted(set().union(*distributed.gather(self.unreadable)))  # several processes may count one image
        if too_many_unreadable(len(indices), len(self.coco)):
            raise DatasetError(f"{too_many_missing(self.coco, indices)}; then continue with --resume auto")


def build_planner(config: Config, train_set: CocoDataset) -> StepPlanner:
    """Build the planner of the run's steps."""
    return StepPlanner(
        train_set.sizes,
        config.train.batch_size,
        min_sizes=config.data.train_sizes,
        max_size=config.data.max_size,
        pad=config.model.pad,
        resize=config.model.compat.resize,
        aspect_ratio_grouping=config.data.aspect_ratio_grouping,
        seed=config.train.seed,
        factors=sampling_factors(config.data, train_set),
    )


def build_training_data(train_set: CocoDataset, config: Config) -> DetectionDataset:
    """Build the training set as the network sees it: augmented, resized, mirrored."""
    augmentation = None
    if config.data.augment:
        augmentation = Augmentation(
            config.data.augment,
            min_visibility=config.data.augment_min_visibility,
            sizes=extreme_sizes(train_set.sizes),
        )
    return DetectionDataset(
        train_set,
        max_size=config.data.max_size,
        resize=config.model.compat.resize,
        hflip=config.data.hflip,
        augmentation=augmentation,
        seed=config.train.seed,
        skip_unreadable=config.data.on_error == "skip",
        scaled_decode=config.data.scaled_decode,
    )
