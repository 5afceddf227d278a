"""Image stores: a folder, and a second one in a zip file, from which every image is decoded to the same pixels."""

from __future__ import annotations

import io
import tracemalloc
import zipfile
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image

from detector.datasets import image_check
from detector.datasets.image_check import BAD, GOOD, MISSING, check_images
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.opening import read_coco
from detector.datasets.sampling import StepPlanner, TrainSampler, eval_batches
from detector.datasets.store import FileStat, FolderStore
from detector.errors import DatasetError, ImageError
from detector.structures import Batch
from tests.tiny import images_of, write_coco


class ZipStore:
    """Images in a zip file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = str(path.resolve())

    def stat(self, name: str) -> FileStat:
        with zipfile.ZipFile(self.path) as archive:
            try:
                info = archive.getinfo(name)
            except KeyError:
                raise FileNotFoundError(name) from None
        return FileStat(info.file_size, info.CRC)

    def open(self, name: str) -> BinaryIO:
        self.stat(name)
        with zipfile.ZipFile(self.path) as archive:
            return io.BytesIO(archive.read(name))

    def describe(self, name: str) -> str:
        return f"{self.path}:{name}"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def zipped(folder: Path) -> ZipStore:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, file.name)
    return ZipStore(path)


def batches(annotations: Path, store: FolderStore | ZipStore, workers: int) -> list[Batch]:
    coco = read_coco(annotations, store, progress=False)
    planner = StepPlanner(
        coco.sizes, 4, min_sizes=(40, 64), max_size=96, pad="batch_max_32", aspect_ratio_grouping=True, seed=5
    )
    training = DetectionDataset(coco, max_size=96, hflip=0.5, scaled_decode=True)
    keys = eval_batches(coco.sizes, 4, min_size=64, max_size=96, pad="batch_max_32")
    return [
        *build_loader(training, TrainSampler(planner, 0, 2 * planner.steps_per_epoch), num_workers=workers),
        *build_loader(DetectionDataset(coco, max_size=96), keys, num_workers=workers),
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_training_and_evaluation_read_the_same_batches_from_a_zip_file_as_from_a_folder(
    tmp_path: Path, suffix: str, workers: int
) -> None:
    annotations = write_coco(tmp_path / "train.json", 9, seed=1, suffix=suffix, sizes=[(96, 128), (160, 160)])
    folder = FolderStore(images_of(annotations))
    expected, actual = (batches(annotations, store, workers) for store in (folder, zipped(folder.root)))
    for one, other in zip(expected, actual, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.targets.boxes, other.targets.boxes)
        assert torch.equal(one.image_ids, other.image_ids)


def test_the_check_of_a_zip_file_finds_and_remembers_the_same_as_that_of_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = FolderStore(tmp_path / "images")
    folder.root.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)).save(folder.root / "good.png")
    (folder.root / "cut.png").write_bytes((folder.root / "good.png").read_bytes()[:2000])
    (folder.root / "text.png").write_text("hello")
    store = zipped(folder.root)
    names, which = ["good.png", "cut.png", "text.png", "absent.png"], np.ones(4, bool)
    for decode in (False, True):
        facts = [check_images(s, names, which, decode=decode, progress=False) for s in (folder, store)]
        for one, other in zip(*facts, strict=True):
            if isinstance(one, np.ndarray):
                np.testing.assert_array_equal(one, other)
        assert facts[0].status.tolist() == [GOOD, BAD if decode else GOOD, BAD, MISSING]
        assert {i: reason for i, reason in facts[0].reasons.items() if i != 3} == {
            i: reason for i, reason in facts[1].reasons.items() if i != 3
        }
    monkeypatch.setattr(image_check, "open_image", lambda *_: pytest.fail("a good file was opened again"))
    check_images(store, names[:1], which[:1], decode=True, progress=False)


def test_errors_name_the_file_as_its_store_describes_it(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "train.json", 2, seed=1)
    (images_of(annotations) / "0020.png").unlink()
    store = zipped(images_of(annotations))
    with pytest.raises(DatasetError, match=r"no such file:\s+\S*train\.zip:0020\.png"):
        read_coco(annotations, store, progress=False)
    coco = read_coco(annotations, store, verify="none", progress=False)
    with pytest.raises(ImageError, match=r"train\.zip:0020\.png: no such file"):
        coco.decode(1)


def test_the_header_check_of_a_folder_does_not_read_whole_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (600, 800, 3), np.uint8)
    names = ["a.bmp", "a.png", "a.jpg", "a.tif", "a.gif"]
    for name in names:
        Image.fromarray(pixels).save(tmp_path / name)
    count = 0

    class CountingFile(io.FileIO):
        def readinto(self, buffer: memoryview) -> int | None:  # type: ignore[override]
            nonlocal count
            done = super().readinto(buffer)
            count += done or 0
            return done

    def open_counting(self: FolderStore, name: str) -> BinaryIO:
        return io.BufferedReader(CountingFile(self.root / name))

    monkeypatch.setattr(FolderStore, "open", open_counting)
    for name in names:
        count = 0
        facts = check_images(FolderStore(tmp_path), [name], np.ones(1, bool), decode=False, progress=False)
        assert facts.sizes.tolist() == [[600, 800]]
        assert 0 < count <= 2**16 < (tmp_path / name).stat().st_size, name


def test_a_read_of_more_than_there_is_takes_no_memory_for_it(tmp_path: Path) -> None:
    """Decoders ask for as many bytes as a damaged file states."""
    (tmp_path / "a").write_bytes(bytes(range(256)) * 100)
    with FolderStore(tmp_path).open("a") as file:
        tracemalloc.start()
        assert file.read(2**31) == bytes(range(256)) * 100
        file.seek(25_000)
        assert len(file.read(2**40)) == 600
        assert file.read(2**40) == file.read() == b""
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 200_000
