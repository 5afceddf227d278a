"""From keys to batches: decode, augment, resize, mirror, pad; in worker processes."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import signal
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from detector.datasets.augment import Augmentation
from detector.datasets.cache import PictureCache
from detector.datasets.coco import CocoDataset, Objects
from detector.datasets.images import decode_at_least, part_of
from detector.datasets.sampling import SampleKey
from detector.datasets.transforms import (
    Resize,
    fit_inside,
    mirror,
    resize_batch,
    resize_picture,
    resized_size,
    scale_objects,
)
from detector.errors import ImageError
from detector.structures import Batch, Targets, Unresized

EVERYWHERE = np.array([[-1e6, -1e6, 1e6, 1e6]], dtype=np.float32)
"""An ignore box that takes in every anchor: its picture teaches nothing."""

EMPTY = Objects(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros((0, 4), np.float32))

AS_READ = 0
"""What a cache calls the size that pictures have of themselves; the others are short sides."""


class Sample(NamedTuple):
    """One picture, ready but for padding (and, where `size` is not the image's, for resizing)."""

    image: NDArray[np.uint8]  # (h, w, 3) RGB
    size: tuple[int, int]
    """Height and width for the network; `objects` are in its pixels."""
    objects: Objects
    image_id: int
    original_size: tuple[int, int]
    key: SampleKey


class DetectionDataset(Dataset[Sample]):
    """Pictures and objects at the size the network wants them.

    Args:
        coco: the annotations.
        max_size: bound of the long side in pixels.
        resize: how pictures get their size; "float_bilinear" leaves it to the device.
        hflip: chance of mirroring.
        augmentation: applied to the picture as read, before resizing; None in evaluation.
        seed: of the run.
        skip_unreadable: give a filler for a picture that can no longer be read, with a warning, instead of failing.
        scaled_decode: read large JPEG files at a half, a quarter or an eighth of their size where that is enough.
    """

    def __init__(
        self,
        coco: CocoDataset,
        *,
        max_size: int,
        resize: Resize = "area",
        hflip: float = 0.0,
        augmentation: Augmentation | None = None,
        seed: int = 0,
        skip_unreadable: bool = False,
        scaled_decode: bool = False,
    ) -> None:
        self.coco = coco
        self.max_size = max_size
        self.resize: Resize = resize
        self.hflip = hflip
        self.augmentation = augmentation
        self.seed = seed
        self.skip_unreadable = skip_unreadable
        self.scaled_decode = scaled_decode
        self.cache: PictureCache | None = None
        self.keeps_whole = False
        self._told: set[int] = set()

    def __len__(self) -> int:
        return len(self.coco)

    def __getitem__(self, key: SampleKey) -> Sample:
        if key.index < 0:
            return _filler(key, index=-1)
        kept = self._kept(key)
        if kept is not None:
            image, before = kept
        else:
            try:
                image, before = self._read(key)
            except (ImageError, OSError) as error:
                if not self.skip_unreadable:
                    raise
                if key.index not in self._told:
                    self._told.add(key.index)
                    print(f"warning: {error}; it is left out (data.on_error is skip)", file=sys.stderr, flush=True)
                return _filler(key, index=unreadable(key.index))
            self._keep(key, image, before)
        original_size = before
        objects = self.coco.objects(key.index)
        seed = [self.seed, key.epoch, key.index, *[1 + key.copy] * (key.copy > 0)]
        if self.augmentation is not None:
            image, objects = self.augmentation(image, objects, seed=seed, name=str(self.coco.path(key.index)))
            before = (image.shape[0], image.shape[1])
        size = self._size(before, key)
        objects = scale_objects(objects, before, size)
        if self.resize != "float_bilinear":
            image = resize_picture(image, size, self.resize)
        # its own stream (the trailing 1), so that mirroring is independent of the augmentation's draws
        if self.hflip and np.random.default_rng([*seed, 1]).random() < self.hflip:
            image, objects = mirror(image, objects, width=size[1])
        return Sample(image, size, objects, int(self.coco.image_ids[key.index]), original_size, key)

    def _read(self, key: SampleKey) -> tuple[NDArray[np.uint8], tuple[int, int]]:
        """A picture as it is kept, or would be: as read or, where nothing comes before that, at its size for the network; and
        its whole size."""
        coarse = partial(self._size, key=key) if self.decodes_coarsely else None
        image, whole = decode_at_least(self.coco.path(key.index), apply_exif=self.coco.apply_exif, enough=coarse)
        if self.resizes_first and not self.keeps_whole:
            image = resize_picture(image, self._size(whole, key), self.resize)
        return image, whole

    def _kept(self, key: SampleKey) -> tuple[NDArray[np.uint8], tuple[int, int]] | None:
        """The same from the cache, if there is one and it is there."""
        if self.cache is None:
            return None
        height, width = self.coco.sizes[key.index].tolist()
        whole = height, width
        if self.keeps_whole and self.decodes_coarsely and part_of(whole, self._size(whole, key)) != whole:
            return None  # read at a part of its size, it looks a little otherwise
        image = self.cache.get(key.index, AS_READ if self.keeps_whole else key.min_size)
        return (image, whole) if image is not None else None

    def _keep(self, key: SampleKey, image: NDArray[np.uint8], whole: tuple[int, int]) -> None:
        if self.cache is not None and whole == tuple(self.coco.sizes[key.index]):
            self.cache.put(key.index, AS_READ if self.keeps_whole else key.min_size, image)

    def _size(self, size: tuple[int, int], key: SampleKey) -> tuple[int, int]:
        resized = resized_size(size, min_size=key.min_size, max_size=self.max_size, resize=self.resize)
        return fit_inside(resized, key.canvas)

    @property
    def resizes_first(self) -> bool:
        """Whether pictures are resized as soon as they are read, so that this is all there is to read of them."""
        return self.augmentation is None and self.resize != "float_bilinear"

    @property
    def decodes_coarsely(self) -> bool:
        """Whether a picture may be read at a part of its size."""
        return self.scaled_decode and self.resizes_first and self.resize == "area"

    def keep_pictures(
        self, limit: int, *, min_sizes: Sequence[int], folder: Path | None = None, shared: str | None = None
    ) -> PictureCache:
        """From now on keep what is read (`datasets.cache`), at most `limit` bytes, for steps of these short sides: resized, or
        whole, if something comes before resizing or that is less than the picture at all its sizes.

        Raises:
            OSError: the disk has no room.
        """
        sizes = {}
        for side in dict.fromkeys(min_sizes):
            resized = [
                resized_size((h, w), min_size=side, max_size=self.max_size, resize=self.resize)
                for h, w in self.coco.sizes.tolist()
            ]
            sizes[side] = np.array(resized, np.int64).reshape(-1, 2)
        whole = self.coco.sizes.astype(np.int64)
        of_all_sizes = sum(int(s.prod(axis=1).sum()) for s in sizes.values())
        self.keeps_whole = not self.resizes_first or int(whole.prod(axis=1).sum()) < of_all_sizes
        self.cache = PictureCache({AS_READ: whole} if self.keeps_whole else sizes, limit, folder=folder, shared=shared)
        return self.cache


def _filler(key: SampleKey, *, index: int) -> Sample:
    pixel = np.zeros((1, 1, 3), np.uint8)
    return Sample(pixel, (1, 1), EMPTY._replace(ignore_boxes=EVERYWHERE), -1, (1, 1), key._replace(index=index))


def unreadable(index: int) -> int:
    """What stands in `Batch.index` for a picture that could not be read; its own inverse."""
    return -2 - index


def too_many_unreadable(count: int, total: int) -> bool:
    """Whether so many pictures of a set are no accident: more than a twentieth (and 5, and all but one of a tiny set)."""
    return count > min(total - 1, max(5, total // 20))


def collate(samples: Sequence[Sample]) -> Batch:
    """Pad samples of one step into a batch."""
    canvas = samples[0].key.canvas
    sizes = [(s.image.shape[0], s.image.shape[1]) for s in samples]
    unresized = None
    if any(s.size != size for s, size in zip(samples, sizes, strict=True)):
        unresized = Unresized(sizes, [s.size for s in samples], canvas)
        canvas = (max(h for h, _ in sizes), max(w for _, w in sizes))
    # channels last in memory, as the pictures come and as the network wants them
    images = _zeros((len(samples), *canvas, 3))
    for image, sample in zip(images.numpy(), samples, strict=True):
        image[: sample.image.shape[0], : sample.image.shape[1]] = sample.image
    objects = [sample.objects for sample in samples]
    targets = Targets(
        _pad([o.boxes for o in objects], 0.0),
        _pad([o.labels for o in objects], -1),
        _pad([o.ignore_boxes for o in objects], 0.0),
    )
    return Batch(
        images=images.permute(0, 3, 1, 2),
        targets=targets,
        image_ids=torch.tensor([s.image_id for s in samples]),
        image_sizes=torch.tensor([s.size for s in samples]),
        original_sizes=torch.tensor([s.original_size for s in samples]),
        index=torch.tensor([s.key.index for s in samples]),
        unresized=unresized,
    )


def _zeros(shape: tuple[int, ...]) -> Tensor:
    """uint8; in a worker where the main process will read it, which spares it a copy."""
    if torch.utils.data.get_worker_info() is None:
        return torch.zeros(shape, dtype=torch.uint8)
    memory = torch.UntypedStorage._new_shared(math.prod(shape))  # type: ignore[no-untyped-call]
    return torch.tensor([], dtype=torch.uint8).set_(memory).view(shape)


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device, asynchronously where it is pinned, and do there what the loader left undone."""
    images = batch.images.to(device, non_blocking=True)
    return Batch(
        resize_batch(images, batch.unresized) if batch.unresized is not None else images,
        Targets(*(t.to(device, non_blocking=True) for t in batch.targets)),
        image_ids=batch.image_ids.to(device, non_blocking=True),
        image_sizes=batch.image_sizes.to(device, non_blocking=True),
        original_sizes=batch.original_sizes.to(device, non_blocking=True),
        index=batch.index.to(device, non_blocking=True),
    )


def _pad(arrays: Sequence[NDArray[np.generic]], value: float) -> Tensor:
    """Rows for the longest, and more."""
    length = padded_rows(max(len(a) for a in arrays))
    padded = np.full((len(arrays), length, *arrays[0].shape[1:]), value, dtype=arrays[0].dtype)
    for row, array in zip(padded, arrays, strict=True):
        row[: len(array)] = array
    return torch.from_numpy(padded)


def padded_rows(longest: int) -> int:
    """Rows of padded targets: a power of two, at least 8, so that there are few lengths; matching may be compiled for each."""
    return max(8, 1 << (longest - 1).bit_length()) if longest else 0


def build_loader(
    dataset: DetectionDataset, batches: Iterable[list[SampleKey]], *, num_workers: int, pin_memory: bool = False
) -> DataLoader[Batch]:
    """A loader that gives one `Batch` per list of keys."""
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)
    return DataLoader(
        dataset,  # type: ignore[arg-type]  # torch's types know no collate function that changes the type
        batch_sampler=batches,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    """One of several, so one thread each. Signals are the main process's affair, which needs the last batches to end
    well; it tells its workers to leave, and they leave by themselves when it is gone."""
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers() -> None:
    """At exit multiprocessing sends SIGTERM to workers that an error left behind, and waits for them for ever, because
    they ignore it; atexit runs this before."""
    left = [process for process in multiprocessing.active_children() if process.daemon]
    if left:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call their end a failure
    for process in left:
        process.kill()
        process.join()
