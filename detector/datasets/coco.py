"""An opened dataset: images and annotations in packed arrays, in COCO's terms."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from detector.datasets.box_checks import training_boxes
from detector.datasets.ids import FileIds
from detector.datasets.images import decode_at_least
from detector.datasets.objects import Objects
from detector.datasets.problems import Finding, from_json, wrap
from detector.datasets.store import ImageStore
from detector.structures import Categories, GroundTruth
from detector.text import cut

TRAINABLE, CROWD, IGNORE = 1, 2, 4  # bits of `CocoDataset.flags`


class AllBoxes(NamedTuple):
    """All training boxes of a dataset."""

    boxes: NDArray[np.float32]
    """(T, 4) as in `Objects`."""
    image_index: NDArray[np.int64]
    """(T,) position of the image in the dataset."""
    labels: NDArray[np.int64]
    """(T,)"""


@dataclass(frozen=True, eq=False, repr=False)
class CocoDataset:
    """An opened dataset of N images and G annotations; see `opening.read_coco` and `inspection.inspect_tables`.

    Everything is packed in arrays: a Python object per annotation would be copied into every loader worker as soon as
    its reference count changes, and memory would grow with workers and time.
    """

    annotations: Path
    """The annotation file, or another name of the source."""
    store: ImageStore | None
    """The image files; None for a dataset that was opened without images."""
    categories: Categories
    """Label k's name, and its category id in this source."""
    apply_exif: bool
    """Whether images are rotated by their EXIF orientation."""
    overrides_exif: bool
    """Whether images have EXIF orientations that are not applied."""
    image_ids: NDArray[np.int64]
    """(N,)"""
    sizes: NDArray[np.int32]
    """(N, 2) height and width as decoded with `apply_exif`; 0 where unknown (only without images)."""
    num_objects: NDArray[np.int64]
    """(N,) training boxes per image, without crowd and ignore regions."""
    names: bytes
    """The N file names, concatenated."""
    name_ends: NDArray[np.int64]
    """(N,)"""
    starts: NDArray[np.int64]
    """(N + 1,) annotations of image i are `starts[i]:starts[i + 1]`."""
    xywh: NDArray[np.float64]
    """(G, 4) as published; finite and of positive size."""
    labels: NDArray[np.int32]
    """(G,)"""
    areas: NDArray[np.float64]
    """(G,) as published; width times height where the source has none."""
    flags: NDArray[np.uint8]
    """(G,) bits: TRAINABLE (part of the box is in the image), CROWD, IGNORE."""
    extras: Mapping[str, NDArray[np.generic]]
    """Further columns of G rows by name; see `Objects.extras`."""
    class_mask: NDArray[np.bool_] | None
    """(N, K) the classes annotated in each image; None means all."""
    packed_findings: bytes
    file_ids: FileIds
    """The ids of images and categories as the source writes them."""
    notes: tuple[str, ...]
    """Lines of the summary that are known only when the dataset is opened."""

    def __len__(self) -> int:
        return len(self.image_ids)

    def __repr__(self) -> str:
        return f"CocoDataset({str(self.annotations)!r}, {len(self):,} images, {len(self.categories)} classes)"

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Everything found wrong when the dataset was opened; unpacked at each call, because it can be large."""
        return from_json(zlib.decompress(self.packed_findings).decode())

    def file_name(self, i: int) -> str:
        """Return the name of image i in the store."""
        i = range(len(self))[i]
        start = self.name_ends[i - 1] if i else 0
        return self.names[start : self.name_ends[i]].decode("utf-8", "surrogatepass")

    def describe(self, i: int) -> str:
        """Name the file of image i for messages: its path, where the store is a folder."""
        return self.image_store.describe(self.file_name(i))

    def decode(self, i: int) -> NDArray[np.uint8]:
        """Decode image i to (H, W, 3) uint8 RGB.

        Raises:
            ImageError: the file is missing or unusable.
            ValueError: the dataset was opened without images.
        """
        return decode_at_least(self.image_store, self.file_name(i), apply_exif=self.apply_exif)[0]

    @property
    def image_store(self) -> ImageStore:
        """The store. Raises ValueError for a dataset that was opened without images."""
        if self.store is None:
            raise ValueError(f"{self.annotations} was opened without an image folder, so it has no image files")
        return self.store

    def objects(self, i: int) -> Objects:
        """Return the ground truth of image i for training."""
        i = range(len(self))[i]
        part = slice(self.starts[i], self.starts[i + 1])
        flags = self.flags[part]
        boxes = training_boxes(self.xywh[part], np.broadcast_to(self.sizes[i], (len(flags), 2)))
        trainable = flags == TRAINABLE
        ignored = (flags > TRAINABLE) & (flags & TRAINABLE > 0)
        return Objects(
            boxes[trainable],
            self.labels[part][trainable].astype(np.int64),
            boxes[ignored],
            {name: column[part][trainable] for name, column in self.extras.items()},
            None if self.class_mask is None else self.class_mask[i],
        )

    def boxes(self) -> AllBoxes:
        """Return all training boxes, image by image."""
        trainable = self.flags == TRAINABLE
        index = np.repeat(np.arange(len(self)), np.diff(self.starts))[trainable]
        return AllBoxes(
            training_boxes(self.xywh[trainable], self.sizes[index]), index, self.labels[trainable].astype(np.int64)
        )

    def fingerprint(self) -> str:
        """Return a hash of the images and annotations: their ids, sizes, boxes, classes and order."""
        digest = hashlib.sha256(self.names)
        arrays = [self.image_ids, self.sizes, self.starts, self.xywh, self.labels, self.flags]
        arrays += [self.extras[name] for name in sorted(self.extras)]
        arrays += [] if self.class_mask is None else [self.class_mask]
        for array in arrays:
            digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()

    def ground_truth(self) -> GroundTruth:
        """Return the ground truth for evaluation: boxes as published, unclipped, of the images in the dataset.

        `ignore` is not part of it: pycocotools uses `iscrowd` alone, too.
        """
        return GroundTruth(
            categories=self.categories,
            image_ids=self.image_ids,
            ann_image_ids=np.repeat(self.image_ids, np.diff(self.starts)),
            ann_category_ids=np.array(self.categories.ids, np.int64)[self.labels],
            boxes=self.xywh,
            areas=self.areas,
            iscrowd=self.flags & CROWD > 0,
        )

    def summary(self) -> str:
        """Describe the dataset, and what was done to it when it was opened, in a few lines."""
        per_class = np.bincount(self.labels[self.flags == TRAINABLE], minlength=len(self.categories))
        order = np.argsort(-per_class, kind="stable")
        used = [f"{self.categories.names[k]} {per_class[k]:,}" for k in order if per_class[k]]
        unused = [self.categories.names[k] for k in order if not per_class[k]]
        crowd = int(np.count_nonzero(self.flags & CROWD))
        ignored = int(np.count_nonzero(self.flags & (CROWD | IGNORE) == IGNORE))
        lines = [
            ("images", f"{len(self):,}, of which {int(np.count_nonzero(self.num_objects == 0)):,} without objects"),
            ("objects", f"{int(per_class.sum()):,} of {len(used)} classes ({len(self.categories)} declared)"),
            ("classes", cut(used, 12) or "none has objects"),
            ("unused classes", cut(unused, 12)),
            ("ignore regions", f"{crowd:,} crowd, {ignored:,} marked ignore" if crowd or ignored else ""),
            *(tuple(note.split(": ", 1)) for note in self.notes),
        ]
        lines = [line for line in lines if line[1]]
        titles = [name if k == 0 or lines[k - 1][0] != name else "" for k, (name, _) in enumerate(lines)]
        rows = [wrap(f"  {name:<16}{text}", "", " " * 18) for name, (_, text) in zip(titles, lines, strict=True)]
        return "\n".join([str(self.annotations), *rows])
