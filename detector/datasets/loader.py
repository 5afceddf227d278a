"""From sample keys to batches: read, augment, resize, mirror, pad; in worker processes."""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detector.config import Resize
from detector.datasets.augment import Augmentation
from detector.datasets.cache import ImageCache
from detector.datasets.coco import CocoDataset
from detector.datasets.images import decode_at_least, file_system_error, reduced_size
from detector.datasets.objects import NO_OBJECTS, Objects
from detector.datasets.sampling import SampleKey
from detector.datasets.transforms import (
    View,
    fit_inside,
    mirror_randomly,
    resize_batch,
    resize_image,
    resize_view,
    resized_size,
)
from detector.datasets.worker_process import IDLE, WorkerNote, new_zeros, send, start_worker, worker_notes
from detector.datasets.workers import CHECK_SECONDS, WorkerLoader
from detector.errors import ImageError
from detector.structures import Batch, Targets, Unresized

IGNORE_EVERYWHERE = np.array([[-1e6, -1e6, 1e6, 1e6]], dtype=np.float32)
"""An ignore box that covers every anchor, so that its image contributes nothing to the loss."""

DECODED_SIZE = 0
"""The cache's key for images of their original size; the other keys are short sides."""

RETRY_PAUSES = (0.5, 2.0)
"""Seconds between the tries to read an image whose file system fails, for a network that is away for a moment."""

MAX_RETRIES_IN_VAIN = 8
"""After as many images that could not be read at any try, a process no longer pauses."""

_LASTING_ERRORS = (errno.EISDIR, errno.EINVAL, errno.ELOOP, errno.ENAMETOOLONG)

MIRRORING, COMPOSING = 1, 2**31
"""Ends of the seeds of mirroring and composing; that of augmentation ends with the number of the copy, if any."""

Compose = Callable[[Callable[[int], View], int, np.random.Generator], View]
"""Makes a training image of several: called with a function that reads the image at an index, the sample's own index,
and a random generator."""


class Sample(NamedTuple):
    """One image, complete but for padding (and, where `size` is not the image's, for resizing)."""

    image: NDArray[np.uint8]  # (h, w, 3) RGB
    size: tuple[int, int]
    """Height and width for the network; `objects` are in its pixels."""
    objects: Objects
    image_id: int
    original_size: tuple[int, int]
    key: SampleKey


class UnreadableImage(Exception):  # noqa: N818 (it is no error where unreadable images are skipped)
    """An image that is skipped because it cannot be read.

    Args:
        index: its position in the dataset.
    """

    def __init__(self, index: int) -> None:
        super().__init__(f"image {index} cannot be read")
        self.index = index


class DetectionDataset(Dataset[Sample]):
    """Images and objects, resized for the network.

    Args:
        coco: the dataset.
        max_size: bound of the long side in pixels.
        resize: how images are resized; "float_bilinear" leaves it to the device.
        hflip: probability of mirroring.
        compose: makes a training image of several images; None: of one.
        augmentation: applied before resizing; None in evaluation.
        seed: of the run.
        skip_unreadable: whether an image that can no longer be read is replaced by a filler, with a warning, or raises.
        scaled_decode: whether large JPEG files are decoded at 1/2, 1/4 or 1/8 of their size where that is enough.
    """

    def __init__(
        self,
        coco: CocoDataset,
        *,
        max_size: int,
        resize: Resize = "area",
        hflip: float = 0.0,
        compose: Compose | None = None,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        skip_unreadable: bool = False,
        scaled_decode: bool = False,
    ) -> None:
        self.coco = coco
        self.max_size = max_size
        self.resize: Resize = resize
        self.hflip = hflip
        self.compose = compose
        self.augmentation = augmentation
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.cache: ImageCache | None = None
        self.caches_decoded = False
        """Whether the cache contains images of their original size."""
        self.resizes_on_reading = compose is None and augmentation is None and resize != "float_bilinear"
        """Whether an image is resized before anything else, so that nothing but the resized image is needed."""
        self.decodes_scaled = scaled_decode and self.resizes_on_reading and resize == "area"
        self.note: WorkerNote | None = None
        """Where a worker notes what it is reading."""
        self._warned: set[int] = set()
        self._retries_in_vain = 0

    def __len__(self) -> int:
        return len(self.coco)

    def __getitem__(self, key: SampleKey) -> Sample:
        if key.index < 0:
            return _filler(key)
        self._write_note(key.index)
        sample = self._sample(key)
        self._write_note(IDLE)
        return sample

    def _write_note(self, index: int) -> None:
        if self.note is not None:
            self.note.write(index)

    def _sample(self, key: SampleKey) -> Sample:
        try:
            if self.compose is None:
                view = self._read(key.index, key)
            else:
                view = self.compose(partial(self._read, key=key), key.index, self._rng(key, COMPOSING))
        except UnreadableImage as unreadable:
            return _filler(key._replace(index=_encode_unreadable(unreadable.index)))
        original_size = view.size
        if self.augmentation is not None:
            view = self.augmentation(view, self._rng(key), name=self.coco.describe(key.index))
        view = resize_view(view, self._size(view.size, key), self.resize)
        if self.hflip:
            view = mirror_randomly(view, self._rng(key, MIRRORING), probability=self.hflip)
        return Sample(*view, int(self.coco.image_ids[key.index]), original_size, key)

    def _rng(self, key: SampleKey, *stream: int) -> np.random.Generator:
        """Return a random generator for one sample; the streams are independent of each other."""
        copy = [1 + key.copy] if key.copy else []
        return np.random.default_rng([self.seed, key.epoch, key.index, *copy, *stream])

    def _read(self, index: int, key: SampleKey) -> View:
        """Read an image with its objects, from the cache or the store."""
        self._write_note(index)
        image, size = self._cached(index, key)
        if image is None:
            try:
                image, size = self._decode_patiently(index, key)
            except (ImageError, OSError) as error:
                if not self.skip_unreadable:
                    raise
                if index not in self._warned:
                    self._warned.add(index)
                    print(f"warning: {error}; skipped (data.on_error is skip)", file=sys.stderr, flush=True)
                raise UnreadableImage(index) from error
            if self.cache is not None and size == tuple(self.coco.sizes[index]):
                self.cache.put(index, self._cache_key(key), image)
        return View(image, size, self.coco.objects(index))

    def _decode_patiently(self, index: int, key: SampleKey) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """Call `_decode`, again after a pause where the file system failed; a damaged image fails at once."""
        patient = index not in self._warned and self._retries_in_vain < MAX_RETRIES_IN_VAIN
        for pause in RETRY_PAUSES if patient else ():
            try:
                return self._decode(index, key)
            except (ImageError, OSError) as error:
                failure = file_system_error(error)
                if failure is None or failure.errno in _LASTING_ERRORS:
                    raise
            time.sleep(pause)
        self._retries_in_vain += patient
        decoded = self._decode(index, key)
        self._retries_in_vain -= patient
        return decoded

    def _decode(self, index: int, key: SampleKey) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """Decode an image, and resize it where nothing comes before that; return it and its original size."""
        image, size = decode_at_least(
            self.coco.image_store,
            self.coco.file_name(index),
            apply_exif=self.coco.apply_exif,
            needed_size=partial(self._size, key=key) if self.decodes_scaled else None,
        )
        if self.resizes_on_reading and not self.caches_decoded:
            image = resize_image(image, self._size(size, key), self.resize)
        return image, size

    def _cached(self, index: int, key: SampleKey) -> tuple[NDArray[np.uint8] | None, tuple[int, int]]:
        """Return what `_decode` returned before, or None in place of the image."""
        height, width = self.coco.sizes[index].tolist()
        size = height, width
        if self.cache is None:
            return None, size
        if self.caches_decoded and self.decodes_scaled and reduced_size(size, self._size(size, key)) != size:
            return None, size  # its pixels differ slightly from those of a scaled decoding
        return self.cache.get(index, self._cache_key(key)), size

    def _cache_key(self, key: SampleKey) -> int:
        return DECODED_SIZE if self.caches_decoded else key.min_size

    def _size(self, size: tuple[int, int], key: SampleKey) -> tuple[int, int]:
        resized = resized_size(size, min_size=key.min_size, max_size=self.max_size, resize=self.resize)
        return fit_inside(resized, key.canvas)

    def enable_cache(
        self, limit: int, *, min_sizes: Sequence[int], folder: Path | None = None, shared: str | None = None
    ) -> ImageCache:
        """Cache images from now on, for steps of these short sides.

        Images are cached resized; decoded, if anything comes before resizing or if that takes less room than all sizes.

        Args:
            limit: of the cache in bytes.
            min_sizes: the short sides.
            folder, shared: see `ImageCache`.

        Raises:
            OSError: the disk is too full.
        """
        sizes = {}
        for side in dict.fromkeys(min_sizes):
            resized = [
                resized_size((h, w), min_size=side, max_size=self.max_size, resize=self.resize)
                for h, w in self.coco.sizes.tolist()
            ]
            sizes[side] = np.array(resized, np.int64).reshape(-1, 2)
        decoded = self.coco.sizes.astype(np.int64)
        area_of_all_sizes = sum(int(s.prod(axis=1).sum()) for s in sizes.values())
        self.caches_decoded = not self.resizes_on_reading or int(decoded.prod(axis=1).sum()) < area_of_all_sizes
        if self.caches_decoded:
            sizes = {DECODED_SIZE: decoded}
        self.cache = ImageCache(sizes, limit, folder=folder, shared=shared)
        return self.cache


def _filler(key: SampleKey) -> Sample:
    """Return a black image that is ignored everywhere."""
    objects = NO_OBJECTS._replace(ignore_boxes=IGNORE_EVERYWHERE)
    return Sample(np.zeros((1, 1, 3), np.uint8), (1, 1), objects, -1, (1, 1), key)


def _encode_unreadable(index: int) -> int:
    """Return the index of a filler that replaces an unreadable image; its own inverse."""
    return -2 - index


def unreadable_images(batch: Batch) -> list[int]:
    """Return the positions in the dataset of images that could not be read."""
    return [_encode_unreadable(index) for index in batch.index.tolist() if index < -1]


def too_many_unreadable(count: int, total: int) -> bool:
    """Whether more images than a few are unreadable: more than a twentieth (and than 5, or all but one)."""
    return count > min(total - 1, max(5, total // 20))


def collate(samples: Sequence[Sample], zeros: Callable[[tuple[int, ...]], NDArray[np.uint8]] = new_zeros) -> Batch:
    """Pad samples of one step into a batch, whose images are in the memory that `zeros` returns."""
    canvas = samples[0].key.canvas
    sizes = [(s.image.shape[0], s.image.shape[1]) for s in samples]
    unresized = None
    if any(s.size != size for s, size in zip(samples, sizes, strict=True)):
        unresized = Unresized(sizes, [s.size for s in samples], canvas)
        canvas = (max(h for h, _ in sizes), max(w for _, w in sizes))
    # channels last in memory, as in the decoded images and as the network wants them
    images = zeros((len(samples), *canvas, 3))
    for image, sample in zip(images, samples, strict=True):
        image[: sample.image.shape[0], : sample.image.shape[1]] = sample.image
    return Batch(
        images=torch.from_numpy(images).permute(0, 3, 1, 2),
        targets=_collate_objects([sample.objects for sample in samples]),
        image_ids=torch.tensor([s.image_id for s in samples]),
        image_sizes=torch.tensor([s.size for s in samples]),
        original_sizes=torch.tensor([s.original_size for s in samples]),
        index=torch.tensor([s.key.index for s in samples]),
        unresized=unresized,
    )


def _collate_objects(objects: Sequence[Objects]) -> Targets:
    """Pad the objects of a batch; weights and class mask are present where any image has them."""
    weights = class_mask = None
    if any("weights" in o.extras for o in objects):
        weights = _pad([o.extras.get("weights", np.ones(len(o.boxes))).astype(np.float32) for o in objects], 0.0)
    masks = [o.class_mask for o in objects]
    if any(mask is not None for mask in masks):
        everything = np.ones_like(next(mask for mask in masks if mask is not None))
        class_mask = torch.from_numpy(np.stack([everything if mask is None else mask for mask in masks]))
    return Targets(
        _pad([o.boxes for o in objects], 0.0),
        _pad([o.labels for o in objects], -1),
        _pad([o.ignore_boxes for o in objects], 0.0),
        weights,
        class_mask,
    )


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device, asynchronously where it is pinned, and resize it there where the loader did not."""
    images = batch.images.to(device, non_blocking=True)
    return Batch(
        resize_batch(images, batch.unresized) if batch.unresized is not None else images,
        batch.targets.to(device, non_blocking=True),
        image_ids=batch.image_ids.to(device, non_blocking=True),
        image_sizes=batch.image_sizes.to(device, non_blocking=True),
        original_sizes=batch.original_sizes.to(device, non_blocking=True),
        index=batch.index.to(device, non_blocking=True),
    )


def _pad(arrays: Sequence[NDArray[np.generic]], value: float) -> Tensor:
    """Stack arrays of different lengths, padded with a value."""
    length = padded_rows(max(len(a) for a in arrays))
    padded = np.full((len(arrays), length, *arrays[0].shape[1:]), value, dtype=arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)


def padded_rows(longest: int) -> int:
    """Return the rows of padded targets: a power of two from 8 on, because matching may be compiled for each number."""
    return max(8, 1 << (longest - 1).bit_length()) if longest else 0


def build_loader(
    dataset: DetectionDataset,
    batches: Iterable[list[SampleKey]],
    *,
    num_workers: int,
    pin_memory: bool = False,
    worker_timeout: float = 300.0,
) -> Iterable[Batch]:
    """Build a loader that yields one `Batch` per list of keys.

    Args:
        dataset: the samples.
        batches: lists of keys.
        num_workers: processes that read ahead; 0: none, batches are read when they are asked for.
        pin_memory: whether batches are in pinned memory.
        worker_timeout: seconds that a worker may take to read one image.

    Raises:
        WorkerError: on iteration, a worker cannot be started, died or hangs.
    """
    if not num_workers:
        return DataLoader(dataset, batch_sampler=batches, collate_fn=collate, pin_memory=pin_memory)
    notes = worker_notes(num_workers)
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=partial(send, collate=collate),
        pin_memory=pin_memory,
        worker_init_fn=partial(start_worker, notes=notes),
        timeout=CHECK_SECONDS,
    )
    return WorkerLoader(loader, notes, describe=dataset.coco.describe, timeout=worker_timeout)
