"""Benchmarks of what happens before and after the network: loading images, opening annotations, scoring detections."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from detector.config import Engine
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.opening import read_coco
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.evaluation.coco_metrics import evaluate
from detector.evaluation.coco_results import CocoResults
from detector.structures import Batch, Categories, GroundTruth
from tools.benchmarks.measure import Timings, interleaved
from tools.benchmarks.rows import Options, Row, figures


def scoring(images: int, *, repeats: int) -> dict[str, Any]:
    """Time COCO's metrics by hotcoco ("ours") and pycocotools, for images with 100 detections each, 80 classes and as
    many objects as in COCO.

    Raises:
        AssertionError: a metric differs in a single bit.
    """
    ground_truth, results = _results(images)
    timings = {"ours": Timings(), "again": Timings(), "peer": Timings()}
    metrics = {}
    series: tuple[tuple[str, Engine, int], ...] = (
        ("ours", "hotcoco", repeats), ("peer", "pycocotools", 1), ("again", "hotcoco", repeats),
    )  # fmt: skip
    for name, engine, count in series:
        for _ in range(count):
            started = time.perf_counter()
            metrics[name] = evaluate(ground_truth, results, engine=engine, max_dets=(1, 10, 100))
            timings[name].seconds.append(time.perf_counter() - started)
    assert metrics["ours"].to_json() == metrics["peer"].to_json(), "the engines differ"
    return figures(timings)


def _results(images: int) -> tuple[GroundTruth, CocoResults]:
    rng = np.random.default_rng(0)
    per_image = rng.poisson(7.3, images)  # COCO val2017: 36,781 objects in 5,000 images
    owner = np.repeat(np.arange(images), per_image)
    count = len(owner)
    size = np.exp(rng.uniform(2, 5.5, (count, 2)))
    boxes = np.concatenate([rng.uniform(0, 400, (count, 2)), size], axis=1)
    classes = rng.integers(0, 80, count)
    ground_truth = GroundTruth(
        Categories(tuple(range(1, 81)), tuple(f"class {k}" for k in range(80))), np.arange(images), owner, classes + 1,
        boxes, boxes[:, 2] * boxes[:, 3], rng.random(count) < 0.01,
    )  # fmt: skip
    image_ids = np.repeat(np.arange(images), 100)
    # a third of the detections are near an object of their image, the others anywhere
    first = np.cumsum(per_image) - per_image
    near = first[image_ids] + (rng.random(len(image_ids)) * np.maximum(1, per_image[image_ids])).astype(int)
    near = np.minimum(near, count - 1)
    count = len(image_ids)
    jittered = boxes[near] * rng.normal(1, 0.08, (count, 4))
    anywhere = np.concatenate([rng.uniform(0, 400, (count, 2)), np.exp(rng.uniform(2, 5.5, (count, 2)))], axis=1)
    close = (rng.random(count) < 0.33) & (per_image[image_ids] > 0)
    labels = np.where(close & (rng.random(count) < 0.8), classes[near], rng.integers(0, 80, count))
    detections = np.where(close[:, None], np.abs(jittered), anywhere)
    return ground_truth, CocoResults(
        image_ids.astype(np.int64), labels.astype(np.int64) + 1, detections, rng.random(count)
    )


def opening(images: int, *, repeats: int) -> dict[str, Any]:
    """Time opening an annotation file with 7.3 objects and their outlines per image: read, validated and indexed by
    ours, read and indexed by pycocotools.

    Raises:
        AssertionError: the annotations differ.
    """
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "annotations.json"
        annotations.write_text(json.dumps(_annotations(images)))

        def read_ours() -> CocoDataset:
            return read_coco(annotations, None, progress=False)

        def read_peer() -> Any:
            with contextlib.redirect_stdout(io.StringIO()):
                return COCO(str(annotations))

        ours, peer = read_ours(), read_peer()
        expected = {(a["image_id"], a["category_id"], *a["bbox"]) for a in peer.anns.values()}
        image_ids = np.repeat(ours.image_ids, np.diff(ours.starts)).tolist()
        category_ids = np.array(ours.categories.ids)[ours.labels].tolist()
        boxes = ours.xywh.tolist()
        assert {(i, c, *b) for i, c, b in zip(image_ids, category_ids, boxes, strict=True)} == expected, "they differ"
        del ours, peer, expected, image_ids, category_ids, boxes
        timings = interleaved(
            {"ours": read_ours, "peer": read_peer}, repeats=repeats, warmup=0, device=torch.device("cpu")
        )
        size = annotations.stat().st_size
    return {"file_mb": size / 1e6, **figures(timings)}


def _annotations(images: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(images), rng.poisson(7.3, images)).tolist()
    boxes = np.concatenate([rng.uniform(0, 400, (len(owner), 2)), rng.uniform(5, 80, (len(owner), 2))], axis=1)
    outlines = rng.uniform(0, 400, (len(owner), 48)).round(2).tolist()  # COCO's median is about 24 points
    return {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "width": 640, "height": 480} for i in range(images)],
        "annotations": [
            {
                "id": k + 1, "image_id": i, "category_id": k % 80 + 1, "bbox": box, "area": box[2] * box[3],
                "iscrowd": 0, "segmentation": [outline],
            }
            for k, (i, box, outline) in enumerate(zip(owner, boxes.round(2).tolist(), outlines, strict=True))
        ],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, 81)],
    }  # fmt: skip


def loading(
    size: tuple[int, int],
    *,
    workers: int,
    batch: int,
    repeats: int,
    stored: tuple[int, int] = (480, 640),
    images: int | None = None,
) -> dict[str, Any]:
    """Time JPEG files, flipped at random and resized to `size`, to batches, once the workers are busy; ours also in an
    epoch with cached images (`data.cache_gb`).

    Args:
        size: height and width of the network input.
        workers: loader processes.
        batch: images per batch.
        repeats: rounds.
        stored: height and width of the files.
        images: number of files; None: enough for the measurement.
    """
    with tempfile.TemporaryDirectory() as folder:
        count = images or (256 if stored[0] * stored[1] < 1e6 else 6 * batch)
        annotations = write_images(Path(folder), count, stored)
        timings = {name: Timings() for name in ("ours", "peer", "cached", "again")}
        for _ in range(repeats):
            for name in timings:
                if name == "peer":
                    seconds = _peer_seconds(annotations, size, workers, batch)
                else:
                    seconds = _our_seconds(annotations, size, workers, batch, cached=name == "cached")
                timings[name].seconds.append(seconds)
    return figures(timings, images=1)


def write_images(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """Write JPEG files of smooth noise with seven objects each; returns their COCO file."""
    height, width = size
    rng = np.random.default_rng(0)
    images, objects = [], []
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)).resize(
            (width, height), Image.Resampling.BICUBIC
        )
        noisy = np.asarray(coarse).astype(np.int16) + rng.integers(-12, 13, (height, width, 3))
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.jpg", quality=90)
        images.append({"id": i + 1, "file_name": f"{i}.jpg", "width": width, "height": height})
        for j in range(7):
            x, y = rng.uniform(0, 500), rng.uniform(0, 380)
            objects.append(
                {
                    "id": 7 * i + j + 1,
                    "image_id": i + 1,
                    "category_id": 1,
                    "bbox": [x, y, 90, 70],
                    "area": 6300.0,
                    "iscrowd": 0,
                }
            )
    path = folder / "annotations.json"
    path.write_text(json.dumps({"images": images, "annotations": objects, "categories": [{"id": 1, "name": "thing"}]}))
    return path


def _our_seconds(annotations: Path, size: tuple[int, int], workers: int, batch: int, *, cached: bool) -> float:
    """Seconds per image, without the first batches; with `cached`, of the second epoch only."""
    loader, steps_per_epoch = our_loader(annotations, size, workers, batch, cached=cached)
    return _seconds(loader, skip=2 * workers + cached * steps_per_epoch, batch=batch)


def our_loader(
    annotations: Path, size: tuple[int, int], workers: int, batch: int, *, cached: bool = False, epochs: int = 2
) -> tuple[Iterable[Batch], int]:
    """Build the loader of a training with some epochs, two more steps per worker and one more.

    Returns:
        The loader, and the steps per epoch.
    """
    coco = read_coco(annotations, annotations.parent, verify="none", progress=False)
    planner = StepPlanner(
        coco.sizes,
        batch,
        min_sizes=[min(size)],
        max_size=max(size),
        pad="batch_max_32",
        aspect_ratio_grouping=True,
        seed=0,
    )
    dataset = DetectionDataset(coco, max_size=max(size), hflip=0.5, scaled_decode=True)
    if cached:
        dataset.enable_cache(10**10, min_sizes=[min(size)])
    sampler = TrainSampler(planner, 0, epochs * planner.steps_per_epoch + 2 * workers + 1)
    loader = build_loader(dataset, sampler, num_workers=workers, pin_memory=torch.cuda.is_available())
    return loader, planner.steps_per_epoch


class _Reference(Dataset[tuple[Tensor, Any]]):
    """Images as torchvision's reference scripts read them, resized as torchvision's model does."""

    def __init__(self, annotations: Path, size: tuple[int, int]) -> None:
        content = json.loads(annotations.read_text())
        self.paths = [annotations.parent / image["file_name"] for image in content["images"]] * 2
        self.transforms = v2.Compose(
            [v2.PILToTensor(), v2.RandomHorizontalFlip(0.5), v2.ToDtype(torch.float32, scale=True), v2.Resize(size)]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, Any]:
        with Image.open(self.paths[index]) as image:
            return self.transforms(image.convert("RGB")), {}


def _peer_seconds(annotations: Path, size: tuple[int, int], workers: int, batch: int) -> float:
    loader = DataLoader(_Reference(annotations, size), batch, shuffle=True, num_workers=workers, collate_fn=_batched)
    return _seconds(loader, skip=2 * workers, batch=batch)


def _batched(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def _seconds(loader: Any, *, skip: int, batch: int) -> float:
    """Seconds per image of the batches after the first `skip` + 1."""
    started, batches = 0.0, 0
    for i, _ in enumerate(loader):
        if i == skip:
            started = time.perf_counter()
        batches += i > skip
    return (time.perf_counter() - started) / (batches * batch)


def eval_case(options: Options) -> list[Row]:
    """COCO's metrics by hotcoco and by pycocotools."""
    title = f"{options.images} images, {100 * options.images} detections"
    return [{"case": "eval", "row": title, **scoring(options.images, repeats=options.repeats)}]


def open_case(options: Options) -> list[Row]:
    """An annotation file opened by ours and by pycocotools."""
    row = opening(options.images, repeats=options.repeats)
    return [{"case": "open", "row": f"{options.images} images, {row['file_mb']:.0f} MB", **row}]


def loader_case(options: Options) -> list[Row]:
    """JPEG files to batches by ours and by torchvision's reference pipeline."""
    row = loading(
        options.size, workers=options.workers, batch=options.batch, repeats=options.repeats, stored=options.image_size
    )
    title = "{} workers, from {} x {}".format(options.workers, *options.image_size)
    return [{"case": "loader", "row": title, **options.workload, **row}]
