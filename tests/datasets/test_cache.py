"""The image cache: it returns the same images, is shared between processes, and keeps to its limit."""

from __future__ import annotations

import fcntl
import os
from multiprocessing.context import ForkProcess, SpawnProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.datasets.augment import Augmentation
from detector.datasets.cache import ImageCache
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.opening import read_coco
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.structures import Batch
from tests.tiny import images_of, write_coco

PLENTY = 10**8
FLIP = Augmentation(({"HorizontalFlip": {"p": 0.5}},), min_visibility=0.1)


@pytest.fixture
def coco(tmp_path: Path) -> CocoDataset:
    annotations = write_coco(tmp_path / "train.json", 11, seed=1)
    return read_coco(annotations, images_of(annotations), verify="none", progress=False)


def epochs(
    coco: CocoDataset,
    *,
    limit: int,
    workers: int = 0,
    folder: Path | None = None,
    min_sizes: tuple[int, ...] = (48, 64),
    **settings: Any,
) -> list[Batch]:
    planner = StepPlanner(
        coco.sizes, 4, min_sizes=min_sizes, max_size=96, pad="batch_max_32", aspect_ratio_grouping=True, seed=5
    )
    dataset = DetectionDataset(coco, max_size=96, hflip=0.5, seed=5, **settings)
    if limit:
        dataset.enable_cache(limit, min_sizes=min_sizes, folder=folder)
    return list(build_loader(dataset, TrainSampler(planner, 0, 4 * planner.steps_per_epoch), num_workers=workers))


def assert_same(actual: list[Batch], expected: list[Batch]) -> None:
    assert len(actual) == len(expected) == 12
    for one, other in zip(actual, expected, strict=True):
        assert one.images.equal(other.images)
        for a, b in zip(one.targets[:3], other.targets[:3], strict=True):
            assert a is not None
            assert b is not None
            assert a.equal(b)
        assert one.original_sizes.equal(other.original_sizes)


@pytest.mark.parametrize(
    "settings",
    [{}, {"augmentation": FLIP}, {"resize": "float_bilinear"}],
    ids=["resized", "augmented", "on the device"],
)
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("limit", [1, 60_000, PLENTY])
def test_cached_images_equal_those_read_again(
    coco: CocoDataset, settings: dict[str, Any], workers: int, limit: int
) -> None:
    assert_same(epochs(coco, limit=limit, workers=workers, **settings), epochs(coco, limit=0, **settings))


@pytest.mark.parametrize("on_disk", [False, True])
def test_after_an_epoch_no_file_is_read(coco: CocoDataset, tmp_path: Path, on_disk: bool) -> None:
    dataset = DetectionDataset(coco, max_size=96)
    planner = StepPlanner(
        coco.sizes, 4, min_sizes=(64,), max_size=96, pad="batch_max_32", aspect_ratio_grouping=True, seed=5
    )
    cache = dataset.enable_cache(PLENTY, min_sizes=(64,), folder=tmp_path if on_disk else None)
    assert cache.num_cached == cache.num_images == 11
    batches = iter(build_loader(dataset, TrainSampler(planner, 0, 6), num_workers=0))
    before = [next(batches) for _ in range(3)]
    for file in images_of(coco.annotations).iterdir():
        file.unlink()
    after = list(batches)
    assert sorted(i for b in before for i in b.image_ids.tolist()) == sorted(
        i for b in after for i in b.image_ids.tolist()
    )
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["train.json"], "the cache has no name"


def test_an_image_of_another_size_than_declared_is_not_cached() -> None:
    cache = ImageCache({0: np.array([[4, 6], [5, 5]])}, 1000)
    cache.put(0, 0, np.full((6, 4, 3), 7, np.uint8))
    assert cache.get(0, 0) is None
    cache.put(0, 0, np.full((4, 6, 3), 7, np.uint8))
    cached = cache.get(0, 0)
    assert cached is not None
    cached[:] = 0  # a copy, so the cache does not change
    assert np.array_equal(cache.get(0, 0), np.full((4, 6, 3), 7))  # type: ignore[arg-type]
    assert cache.get(1, 0) is None


@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8),
    limit=st.integers(0, 900),
    scales=st.integers(1, 3),
)
def test_every_image_that_fits_has_its_own_place(sizes: list[tuple[int, int]], limit: int, scales: int) -> None:
    """The first image at every size; then the next."""
    per_scale = {scale: np.array(sizes) + scale for scale in range(scales)}
    cache = ImageCache(per_scale, limit)
    assert cache.num_bytes <= limit
    images = {
        (i, scale): np.random.default_rng([i, scale]).integers(0, 256, (*per_scale[scale][i], 3), np.uint8)
        for i in range(len(sizes))
        for scale in per_scale
    }
    for (i, scale), image in images.items():
        cache.put(i, scale, image)
    for (i, scale), image in images.items():
        cached = cache.get(i, scale)
        assert (cached is not None) == (i < cache.num_cached)
        assert cached is None or np.array_equal(cached, image)


@pytest.mark.parametrize("method", [ForkProcess, SpawnProcess])
def test_images_stored_by_another_process_are_found(method: type[ForkProcess | SpawnProcess]) -> None:
    cache = ImageCache({0: np.array([[4, 6], [5, 5]])}, 1000)
    process = method(target=cache.put, args=(1, 0, np.full((5, 5, 3), 9, np.uint8)))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert np.array_equal(cache.get(1, 0), np.full((5, 5, 3), 9))  # type: ignore[arg-type]
    assert cache.get(0, 0) is None


def test_another_process_of_the_machine_opens_the_same_cache_by_its_path() -> None:
    sizes = {0: np.array([[4, 6], [5, 5]])}
    cache = ImageCache(sizes, 1000)
    other = ImageCache(sizes, 1000, shared=cache.path)
    other.put(1, 0, np.full((5, 5, 3), 9, np.uint8))
    assert np.array_equal(cache.get(1, 0), np.full((5, 5, 3), 9))  # type: ignore[arg-type]


def test_decoded_images_are_cached_where_they_take_less_room_than_all_resized_ones(coco: CocoDataset) -> None:
    """So multi-scale training finds an image in the second epoch, whatever size it is needed at then."""
    dataset = DetectionDataset(coco, max_size=96)
    dataset.enable_cache(PLENTY, min_sizes=(32, 40))
    assert not dataset.caches_decoded
    dataset.enable_cache(PLENTY, min_sizes=(48, 56, 64))
    assert dataset.caches_decoded


@pytest.mark.parametrize("limit", [300_000, PLENTY])
def test_cached_images_equal_those_of_scaled_decoding(tmp_path: Path, limit: int) -> None:
    """At the small scale they are decoded at half their size, at the large ones whole."""
    annotations = write_coco(tmp_path / "train.json", 12, seed=1, sizes=[(96, 128), (160, 160)], suffix=".jpg")
    coco = read_coco(annotations, images_of(annotations), verify="none", progress=False)
    for min_sizes in ((40,), (40, 80, 90, 96)):
        plain = epochs(coco, limit=0, min_sizes=min_sizes, scaled_decode=True)
        assert_same(epochs(coco, limit=limit, min_sizes=min_sizes, scaled_decode=True), plain)
        whole = epochs(coco, limit=0, min_sizes=min_sizes)
        assert any(not a.images.equal(b.images) for a, b in zip(plain, whole, strict=True)), (
            "no image was decoded at a smaller size"
        )


def test_a_disk_without_locks_is_an_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with the first image, which would then be skipped as unreadable."""

    def refuse(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with pytest.raises(OSError, match="not implemented"):
        ImageCache({0: np.array([[4, 6]])}, 1000, folder=tmp_path)


def test_a_full_disk_is_an_error_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        ImageCache({0: np.array([[4, 6]])}, 1000, folder=tmp_path)
