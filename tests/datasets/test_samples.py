"""What travels with the boxes of a sample, and samples composed of several images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from detector.datasets.augment import Augmentation
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, collate, to_device, unreadable_images
from detector.datasets.objects import Objects
from detector.datasets.opening import read_coco
from detector.datasets.sampling import SampleKey
from detector.datasets.transforms import View
from tests.tiny import images_of, write_coco


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return opened(write_coco(tmp_path_factory.mktemp("samples") / "train.json", 11, seed=1))


def opened(annotations: Path) -> CocoDataset:
    return read_coco(annotations, images_of(annotations), verify="none", progress=False)


def key(index: int = 0, **changes: Any) -> SampleKey:
    values: dict[str, Any] = {"epoch": 0, "index": index, "min_size": 64, "canvas": (128, 128)}
    return SampleKey(**(values | changes))


def with_columns(coco: CocoDataset, **columns: np.ndarray) -> CocoDataset:
    """The same dataset with further columns of one row per annotation."""
    return dataclasses.replace(coco, extras=columns)


def test_a_column_named_weights_arrives_in_the_targets(coco: CocoDataset) -> None:
    weights = 1 + np.arange(len(coco.xywh)) / 8
    dataset = DetectionDataset(with_columns(coco, weights=weights, ids=np.arange(len(weights))), max_size=96, hflip=0.5)
    keys = [key(0), key(1), key(-1)]
    targets = to_device(collate([dataset[k] for k in keys]), torch.device("cpu")).targets
    assert targets.weights is not None
    assert targets.weights.dtype == torch.float32
    assert targets.weights.shape == targets.labels.shape
    for i in (0, 1):
        expected = weights[coco.starts[i] : coco.starts[i + 1]]
        assert targets.weights[i].tolist() == [*expected, *[0.0] * (targets.labels.shape[1] - len(expected))]
    assert not targets.weights[2].any(), "a filler has no objects"
    plain = collate([DetectionDataset(coco, max_size=96, hflip=0.5)[k] for k in keys]).targets
    assert plain.weights is plain.class_mask is None
    assert torch.equal(targets.boxes, plain.boxes)


def test_weights_stay_with_their_objects_through_augmentation(coco: CocoDataset) -> None:
    """The weight of each object is its label + 1, so that it can be recognized after a crop dropped some of them."""
    weighted = with_columns(coco, weights=coco.labels + 1.0)
    crop = Augmentation(({"RandomCrop": {"height": 60, "width": 60}},), min_visibility=0.3)
    dataset = DetectionDataset(weighted, max_size=96, augmentation=crop, hflip=0.5)
    counts = set()
    for index in range(len(coco)):
        targets = collate([dataset[key(index)]]).targets
        assert targets.weights is not None
        present = targets.labels >= 0
        assert torch.equal(targets.weights[present], targets.labels[present] + 1.0)
        counts.add(int(present.sum()) < coco.num_objects[index])
    assert counts == {True, False}, "some crops drop objects and some do not"


def test_the_class_mask_of_an_image_arrives_in_the_targets(coco: CocoDataset) -> None:
    mask = np.random.default_rng(0).random((len(coco), 3)) < 0.5
    dataset = DetectionDataset(dataclasses.replace(coco, class_mask=mask), max_size=96)
    targets = collate([dataset[key(2)], dataset[key(-1)], dataset[key(0)]]).targets
    assert targets.class_mask is not None
    assert targets.class_mask.tolist() == [mask[2].tolist(), [True] * 3, mask[0].tolist()]


def side_by_side(read: Callable[[int], View], index: int, rng: np.random.Generator) -> View:
    """Compose an image and a random other one: the second user of `compose`."""
    left, right = read(index), read(int(rng.integers(11)))
    height, offset = max(left.size[0], right.size[0]), left.size[1]
    image = np.zeros((height, offset + right.size[1], 3), np.uint8)
    image[: left.size[0], :offset], image[: right.size[0], offset:] = left.image, right.image
    moved = right.objects.boxes + np.array([offset, 0, offset, 0], np.float32)
    boxes, labels = (
        np.concatenate([left.objects.boxes, moved]),
        np.concatenate([left.objects.labels, right.objects.labels]),
    )
    return View(image, (height, offset + right.size[1]), Objects(boxes, labels, left.objects.ignore_boxes))


def test_a_training_image_can_be_composed_of_several(coco: CocoDataset) -> None:
    dataset = DetectionDataset(coco, max_size=96, compose=side_by_side, scaled_decode=True, seed=3)
    cached = DetectionDataset(coco, max_size=96, compose=side_by_side, seed=3)
    cached.enable_cache(10**8, min_sizes=[64])
    partners = set()
    for epoch in range(4):
        sample = dataset[key(2, epoch=epoch)]
        again = [copy[key(2, epoch=epoch)] for copy in (dataset, cached, cached)]
        assert all(np.array_equal(sample.image, other.image) for other in again)
        assert sample.original_size[1] > 100, "two images wide"
        assert sample.objects.labels[: coco.num_objects[2]].tolist() == coco.objects(2).labels.tolist()
        assert len(sample.objects.boxes) > coco.num_objects[2]
        assert (sample.objects.boxes[:, 2] <= sample.size[1] + 1e-3).all()
        partners.add(sample.image.tobytes())
    assert len(partners) > 1


def test_an_unreadable_partner_of_a_composed_image_is_the_one_reported(tmp_path: Path) -> None:
    coco = opened(write_coco(tmp_path / "set.json", 2, seed=0))
    Path(coco.describe(1)).unlink()

    def partner_first(read: Callable[[int], View], index: int, rng: np.random.Generator) -> View:
        read(1)
        return read(index)

    dataset = DetectionDataset(coco, max_size=96, skip_unreadable=True, compose=partner_first)
    assert unreadable_images(collate([dataset[key(0)]])) == [1]
