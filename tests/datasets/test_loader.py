"""From sample keys to batches: mirroring, padding, fillers, and batches that do not depend on the workers."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from detector.datasets.augment import Augmentation
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, Sample, build_loader, collate, to_device, unreadable_images
from detector.datasets.objects import NO_OBJECTS
from detector.datasets.opening import read_coco
from detector.datasets.sampling import SampleKey, StepPlanner, TrainSampler
from detector.datasets.worker_process import send
from detector.datasets.workers import end_workers
from detector.errors import ImageError
from detector.structures import Batch, Targets
from tests.tiny import REPO, images_of, write_coco


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    annotations = write_coco(tmp_path_factory.mktemp("loader") / "train.json", 11, seed=1)
    return opened(annotations)


def opened(annotations: Path) -> CocoDataset:
    return read_coco(annotations, images_of(annotations), verify="none", progress=False)


def key(index: int = 0, **changes: Any) -> SampleKey:
    values: dict[str, Any] = {"epoch": 0, "index": index, "min_size": 64, "canvas": (128, 128)}
    return SampleKey(**(values | changes))


def tensors(batch: Batch) -> list[Tensor]:
    targets = [t for t in batch.targets if t is not None]
    return [batch.images, *targets, batch.image_ids, batch.image_sizes, batch.original_sizes, batch.index]


def run_of(coco: CocoDataset, *, workers: int, start: int = 0) -> list[Batch]:
    planner = StepPlanner(
        coco.sizes, 4, min_sizes=(48, 64), max_size=96, pad="batch_max_32", aspect_ratio_grouping=True, seed=5
    )
    steps = ({"HorizontalFlip": {"p": 0.5}}, {"Affine": {"translate_px": [-9, 9]}}, {"GaussNoise": {"p": 0.5}})
    dataset = DetectionDataset(
        coco, max_size=96, hflip=0.5, augmentation=Augmentation(steps, min_visibility=0.1), seed=5
    )
    return list(build_loader(dataset, TrainSampler(planner, start, 6, micro_batch=3), num_workers=workers))


def assert_equal(some: list[Batch], others: list[Batch]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        for a, b in zip(tensors(one), tensors(other), strict=True):
            assert torch.equal(a, b)


def test_a_batch_that_a_worker_sends_arrives_unchanged_and_uses_no_shared_tensors(coco: CocoDataset) -> None:
    """torch would share every tensor through a file in /dev/shm, which is small in containers."""
    dataset = DetectionDataset(coco, max_size=96)
    samples = [dataset[key(0)], dataset[key(1)]]
    sent = send(samples, collate=collate)
    if sys.platform == "linux":
        assert not isinstance(sent, Batch)
        received = pickle.loads(reduction.ForkingPickler.dumps(sent))
        assert isinstance(received, Batch)
        assert not received.images.is_shared()  # type: ignore[no-untyped-call]
    else:
        received = sent
    assert_equal([received], [collate(samples)])
    assert received.images.is_contiguous(memory_format=torch.channels_last)
    assert isinstance(received.targets, Targets)


def test_the_number_of_workers_does_not_change_a_batch(coco: CocoDataset) -> None:
    alone = run_of(coco, workers=0)
    assert len({tuple(batch.images.shape) for batch in alone}) > 1, "the test needs varying scales"
    torch.manual_seed(3)  # nor does the state of global random generators
    np.random.seed(4)
    assert_equal(run_of(coco, workers=1), alone)
    assert_equal(run_of(coco, workers=4), alone)


def test_batches_from_a_later_step_are_those_of_the_whole_run(coco: CocoDataset) -> None:
    whole = run_of(coco, workers=0)
    late = run_of(coco, workers=0, start=4)
    assert_equal(late, whole[-len(late) :])


def test_an_image_looks_different_in_every_epoch_and_for_every_seed(coco: CocoDataset) -> None:
    augmentation = Augmentation(({"RandomBrightnessContrast": {"p": 1.0}},), min_visibility=0.1)
    views = {
        DetectionDataset(coco, max_size=96, augmentation=augmentation, seed=seed)[key(epoch=epoch)].image.tobytes()
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(views) == 9


def test_mirroring_is_a_fair_coin_independent_of_the_augmentation(coco: CocoDataset) -> None:
    """`data.hflip` and a HorizontalFlip of the pipeline must not agree, or no image is ever mirrored."""
    once = Augmentation(({"HorizontalFlip": {"p": 0.5}},), min_visibility=0.0)
    plain = DetectionDataset(coco, max_size=96)[key()].image
    by_hflip = DetectionDataset(coco, max_size=96, hflip=0.5)
    by_pipeline = DetectionDataset(coco, max_size=96, augmentation=once)
    counts = np.zeros((2, 2), int)
    for epoch in range(200):
        mirrored = [not np.array_equal(d[key(epoch=epoch)].image, plain) for d in (by_hflip, by_pipeline)]
        counts[int(mirrored[0]), int(mirrored[1])] += 1
    assert np.abs(counts - 50).max() < 28, counts  # 4.5 standard deviations


def test_a_mirrored_image_has_mirrored_boxes(coco: CocoDataset) -> None:
    plain, mirrored = (DetectionDataset(coco, max_size=96, hflip=p)[key()] for p in (0.0, 1.0))
    width = plain.image.shape[1]
    assert np.array_equal(mirrored.image, plain.image[:, ::-1])
    assert np.array_equal(mirrored.objects.boxes[:, [0, 2]], width - plain.objects.boxes[:, [2, 0]])
    assert np.array_equal(mirrored.objects.labels, plain.objects.labels)


def test_boxes_and_ignore_regions_are_scaled_with_their_image(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "set.json", 1, seed=0, sizes=[(100, 200)])
    content = json.loads(annotations.read_text())
    content["annotations"] = [
        {"id": 1, "image_id": 10, "category_id": 7, "bbox": [20, 10, 40, 30], "area": 1200, "iscrowd": 0},
        {"id": 2, "image_id": 10, "category_id": 3, "bbox": [100, 50, 100, 50], "area": 5000, "iscrowd": 1},
    ]
    annotations.write_text(json.dumps(content))
    sample = DetectionDataset(opened(annotations), max_size=100)[key(min_size=64)]
    assert sample.image.shape == (50, 100, 3), "the long side decides"
    assert sample.original_size == (100, 200)
    assert sample.objects.boxes.tolist() == [[10, 5, 30, 20]]
    assert sample.objects.ignore_boxes.tolist() == [[50, 25, 100, 50]]


def test_an_image_that_augmentation_made_too_large_for_its_step_is_shrunk_to_fit(coco: CocoDataset) -> None:
    transpose = Augmentation(({"Transpose": {"p": 1.0}},), min_visibility=0.0)
    dataset = DetectionDataset(coco, max_size=96, augmentation=transpose)
    sample = dataset[key(canvas=(64, 96))]  # image 0 is landscape and becomes portrait
    assert sample.image.shape[0] <= 64
    assert sample.image.shape[1] <= 96
    assert (sample.objects.boxes[:, 2:] <= [sample.image.shape[1] + 1e-3, sample.image.shape[0] + 1e-3]).all()


def sample(height: int, width: int, num_objects: int, num_ignored: int = 0) -> Sample:
    rng = np.random.default_rng(num_objects)
    objects = NO_OBJECTS._replace(
        boxes=rng.random((num_objects, 4), np.float32),
        labels=np.arange(num_objects),
        ignore_boxes=rng.random((num_ignored, 4), np.float32) + 1,
    )
    image = rng.integers(1, 255, (height, width, 3), dtype=np.uint8)
    return Sample(image, (height, width), objects, 10 + num_objects, (height * 2, width * 2), key(num_objects))


def test_images_are_padded_with_zeros_at_the_right_and_bottom() -> None:
    samples = [sample(100, 128, 2, 1), sample(128, 60, 0), sample(3, 5, 4)]
    batch = collate(samples)
    assert batch.images.shape == (3, 3, 128, 128)
    assert batch.images.dtype == torch.uint8
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    for image, s in zip(batch.images, samples, strict=True):
        height, width = s.image.shape[:2]
        assert np.array_equal(image[:, :height, :width].permute(1, 2, 0).numpy(), s.image)
        assert int(image.long().sum()) == int(s.image.astype(int).sum())
    assert batch.image_sizes.tolist() == [[100, 128], [128, 60], [3, 5]]
    assert batch.original_sizes.tolist() == [[200, 256], [256, 120], [6, 10]]
    assert batch.image_ids.tolist() == [12, 10, 14]
    assert batch.index.tolist() == [2, 0, 4]


@pytest.mark.parametrize(("fullest", "length"), [(1, 8), (8, 8), (9, 16), (100, 128)])
def test_targets_are_padded_to_a_power_of_two_that_fits_the_image_with_most_objects(fullest: int, length: int) -> None:
    targets = collate([sample(10, 10, 0), sample(10, 10, fullest)]).targets
    assert targets.labels.tolist() == [[-1] * length, [*range(fullest), *[-1] * (length - fullest)]]


def test_the_padding_of_targets_is_no_object() -> None:
    samples = [sample(10, 10, 2, 1), sample(10, 10, 0), sample(10, 10, 4)]
    targets = collate(samples).targets
    assert targets.boxes.shape == (3, 8, 4)
    assert targets.labels.tolist() == [[0, 1, *[-1] * 6], [-1] * 8, [0, 1, 2, 3, *[-1] * 4]]
    assert (targets.boxes.dtype, targets.labels.dtype) == (torch.float32, torch.int64)
    assert targets.ignore_boxes.shape == (3, 8, 4)
    for i, s in enumerate(samples):
        assert np.array_equal(targets.boxes[i, : len(s.objects.boxes)].numpy(), s.objects.boxes)
        assert not targets.boxes[i, len(s.objects.boxes) :].any()
        assert not targets.ignore_boxes[i, len(s.objects.ignore_boxes) :].any()


def test_a_batch_without_objects_has_empty_targets() -> None:
    targets = collate([sample(10, 10, 0)]).targets
    assert [None if t is None else tuple(t.shape) for t in targets] == [(1, 0, 4), (1, 0), (1, 0, 4), None, None]


def test_a_filler_is_black_and_ignored_everywhere(coco: CocoDataset) -> None:
    batch = collate([DetectionDataset(coco, max_size=96)[key(-1)]])
    assert batch.images.shape == (1, 3, 128, 128)
    assert not batch.images.any()
    assert batch.index.tolist() == batch.image_ids.tolist() == [-1]
    assert (batch.targets.labels >= 0).sum() == 0
    x1, y1, x2, y2 = batch.targets.ignore_boxes[0, 0].tolist()
    assert x1 < -1e4
    assert y1 < -1e4
    assert x2 > 1e4
    assert y2 > 1e4


@pytest.mark.parametrize("damage", ["removed", "cut", "text"])
def test_an_image_that_can_no_longer_be_read_is_named_or_replaced_by_a_filler(
    damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = write_coco(tmp_path / "set.json", 2, seed=0)
    coco = opened(annotations)
    path = Path(coco.describe(1))
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:200] if damage == "cut" else b"<html>not found</html>")
    failing = DetectionDataset(coco, max_size=96)
    with pytest.raises((ImageError, OSError), match=r"0020\.png"):
        failing[key(1)]
    assert failing[key(0)].image_id == 10
    skipping = DetectionDataset(coco, max_size=96, skip_unreadable=True)
    for _ in range(2):
        replaced = skipping[key(1)]
        assert replaced.image_id == -1
        assert unreadable_images(collate([skipping[key(0)], replaced, skipping[key(-1)]])) == [1]
    assert capsys.readouterr().err.count("0020.png") == 1, "one warning"


def test_an_error_in_a_worker_keeps_its_kind_and_names_the_file(tmp_path: Path) -> None:
    coco = opened(write_coco(tmp_path / "set.json", 2, seed=0))
    Path(coco.describe(1)).write_bytes(b"")
    loader = build_loader(DetectionDataset(coco, max_size=96), [[key(0)], [key(1)]], num_workers=1)
    with pytest.raises(ImageError, match=r"0020\.png"):
        list(loader)
    end_workers()  # else the error, which keeps the loader alive, makes a later garbage collection wait for it


FAILS_WITH_A_LIVING_LOADER = """
import sys
from pathlib import Path
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.opening import read_coco
from detector.datasets.sampling import SampleKey
coco = read_coco(Path(sys.argv[1]), Path(sys.argv[2]), verify="none", progress=False)
keys = [[SampleKey(0, 0, 64, (128, 128))]] * 50
batches = iter(build_loader(DetectionDataset(coco, max_size=96), keys, num_workers=2))
next(batches)
raise RuntimeError("something else went wrong")
"""


def test_a_process_that_fails_while_workers_run_ends(coco: CocoDataset) -> None:
    """The workers ignore SIGTERM, by which Python would end them before it ends itself."""
    images = str(images_of(coco.annotations))
    command = [sys.executable, "-c", FAILS_WITH_A_LIVING_LOADER, str(coco.annotations), images]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=REPO)
    assert done.returncode == 1
    assert "something else went wrong" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's account of private memory")
def test_the_memory_of_workers_does_not_grow_while_they_read_a_large_dataset(tmp_path: Path) -> None:
    """Python objects would be copied into every worker when they are accessed: with these 400,000 annotations as dicts,
    each worker grew by 35 MB; with arrays, by 0.2."""
    annotations = write_coco(tmp_path / "large.json", 1, seed=0, sizes=((64, 64),))
    content = json.loads(annotations.read_text())
    image = images_of(annotations) / content["images"][0]["file_name"]
    box = {"category_id": 7, "bbox": [1, 1, 20, 20], "area": 400, "iscrowd": 0}
    content["images"], content["annotations"] = [], []
    for i in range(20_000):
        (images_of(annotations) / f"{i}.png").hardlink_to(image)
        content["images"].append({"id": i, "file_name": f"{i}.png", "width": 64, "height": 64})
        content["annotations"] += [{**box, "id": 20 * i + k, "image_id": i} for k in range(20)]
    annotations.write_text(json.dumps(content))
    # In another process: where this one writes to memory that it shares with a worker, the worker keeps the only copy
    # of the old content, which looks as if it had grown.
    command = [sys.executable, "-c", WATCHES_ITS_WORKERS, str(annotations), str(images_of(annotations))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=REPO, check=True)
    grown = json.loads(done.stdout)
    assert len(grown) == 2
    assert max(grown) < 5e6, grown


WATCHES_ITS_WORKERS = """
import json, multiprocessing, sys
from pathlib import Path
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.opening import read_coco
from detector.datasets.sampling import SampleKey

def private_bytes(pid):  # memory that is not shared with other processes
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))

coco = read_coco(Path(sys.argv[1]), Path(sys.argv[2]), verify="none", progress=False)
batches = [[SampleKey(0, j, 64, (64, 64)) for j in range(i, i + 4)] for i in range(0, len(coco), 4)]
grown, before = [], {}
for number, _ in enumerate(build_loader(DetectionDataset(coco, max_size=64), batches, num_workers=2)):
    if number in (250, len(batches) - 50):  # once everything has run once, and near the end
        now = {p.pid: private_bytes(p.pid) for p in multiprocessing.active_children()}
        grown = [now[pid] - before.get(pid, 0) for pid in now]
        before = now
print(json.dumps(grown))
"""


def test_a_batch_survives_pickling_and_moving(coco: CocoDataset) -> None:
    (batch,) = build_loader(DetectionDataset(coco, max_size=96), [[key(0), key(1)]], num_workers=0)
    for copy in (pickle.loads(pickle.dumps(batch)), to_device(batch, torch.device("cpu"))):
        assert isinstance(copy, Batch)
        assert isinstance(copy.targets, Targets)
        assert_equal([copy], [batch])


def test_copies_of_an_image_are_augmented_differently(coco: CocoDataset) -> None:
    augmentation = Augmentation(({"RandomBrightnessContrast": {"p": 1.0}},), min_visibility=0.3)
    dataset = DetectionDataset(coco, max_size=96, augmentation=augmentation)
    seen = [dataset[key(copy=copy)].image.tobytes() for copy in (0, 1, 2, 0, 1)]
    assert len(set(seen)) == 3
    assert seen[:2] == seen[3:]
    mirrored = DetectionDataset(coco, max_size=96, hflip=0.5)
    assert len({mirrored[key(copy=copy)].image.tobytes() for copy in range(12)}) == 2


def test_images_resized_on_the_device_agree_with_those_resized_by_the_loader(coco: CocoDataset) -> None:
    """The same boxes, sizes, canvas and mirroring; pixels differ by as much as the two implementations."""
    keys = [[key(0), key(1), key(-1)]]
    for hflip in (0.0, 1.0):
        left = DetectionDataset(coco, max_size=96, resize="float_bilinear", hflip=hflip)
        (unresized,) = build_loader(left, keys, num_workers=0)
        assert unresized.images.dtype == torch.uint8
        assert unresized.unresized is not None
        batch = to_device(unresized, torch.device("cpu"))
        assert batch.unresized is None
        (expected,) = build_loader(
            DetectionDataset(coco, max_size=96, resize="cv2_bilinear", hflip=hflip), keys, num_workers=0
        )
        assert batch.images.shape == expected.images.shape
        assert batch.images.dtype == torch.float32
        assert (batch.images - expected.images).abs().max() <= 1.5
        assert_equal([batch._replace(images=expected.images)], [expected])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinning needs CUDA")
def test_every_tensor_of_a_batch_is_pinned(coco: CocoDataset) -> None:
    loader = build_loader(DetectionDataset(coco, max_size=96), [[key(0)]], num_workers=1, pin_memory=True)
    (batch,) = loader
    assert isinstance(batch, Batch)
    assert all(t.is_pinned() for t in tensors(batch) if t.numel())
