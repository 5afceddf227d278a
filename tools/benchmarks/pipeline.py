"""What happens before and after the network: loading pictures, scoring results."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools.coco import COCO
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from detector.datasets.coco import CocoDataset, read_coco
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.evaluation.coco_metrics import CocoResults, evaluate
from detector.structures import Batch, Categories, GroundTruth
from tools.benchmarks.measure import Measured, interleaved, noise


def scoring(images: int, *, repeats: int) -> dict[str, Any]:
    """COCO's metrics of `images` pictures with 100 detections each, 80 classes and objects as crowded as COCO's, by both engines.

    Raises:
        AssertionError: the numbers differ in a single bit.
    """
    truth, results = _results(images)
    timed = {"ours": Measured(), "again": Measured(), "peer": Measured()}
    found = {}
    for name, engine, count in (
        ("ours", "hotcoco", repeats),
        ("peer", "pycocotools", 1),
        ("again", "hotcoco", repeats),
    ):
        for _ in range(count):
            begun = time.perf_counter()
            found[name] = evaluate(truth, results, engine=engine, max_dets=(1, 10, 100))  # type: ignore[arg-type]
            timed[name].seconds.append(time.perf_counter() - begun)
    assert found["ours"].to_json() == found["peer"].to_json(), "the engines differ"
    return {
        "noise": noise(timed, "ours"), "ratio": timed["peer"].median / timed["ours"].median,
        **{name: {"median_ms": timed[name].median * 1e3, "spread": timed[name].spread, "seconds": timed[name].seconds}
           for name in ("ours", "peer")},
    }  # fmt: skip


def _results(images: int) -> tuple[GroundTruth, CocoResults]:
    rng = np.random.default_rng(0)
    per_image = rng.poisson(7.3, images)  # COCO's val: 36,781 objects in 5,000 pictures
    owner = np.repeat(np.arange(images), per_image)
    count = len(owner)
    size = np.exp(rng.uniform(2, 5.5, (count, 2)))
    boxes = np.concatenate([rng.uniform(0, 400, (count, 2)), size], axis=1)
    classes = rng.integers(0, 80, count)
    truth = GroundTruth(
        Categories(tuple(range(1, 81)), tuple(f"class {k}" for k in range(80))), np.arange(images), owner, classes + 1,
        boxes, boxes[:, 2] * boxes[:, 3], rng.random(count) < 0.01,
    )  # fmt: skip
    found = np.repeat(np.arange(images), 100)
    # a third of the detections near an object of their picture, the others anywhere
    first = np.cumsum(per_image) - per_image
    near = first[found] + (rng.random(len(found)) * np.maximum(1, per_image[found])).astype(int)
    near = np.minimum(near, count - 1)
    shaken = boxes[near] * rng.normal(1, 0.08, (len(found), 4))
    anywhere = np.concatenate(
        [rng.uniform(0, 400, (len(found), 2)), np.exp(rng.uniform(2, 5.5, (len(found), 2)))], axis=1
    )
    close = (rng.random(len(found)) < 0.33) & (per_image[found] > 0)
    kinds = np.where(close & (rng.random(len(found)) < 0.8), classes[near], rng.integers(0, 80, len(found)))
    detections = np.where(close[:, None], np.abs(shaken), anywhere)
    return truth, CocoResults(found.astype(np.int64), kinds.astype(np.int64) + 1, detections, rng.random(len(found)))


def opening(images: int, *, repeats: int) -> dict[str, Any]:
    """An annotation file of `images` pictures, 7.3 objects each with outlines, made ready for use: read, checked and indexed by
    ours, read and indexed by pycocotools.

    Raises:
        AssertionError: they do not find the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        annotations = Path(folder) / "annotations.json"
        annotations.write_text(json.dumps(_annotations(images)))

        def read_ours() -> CocoDataset:
            return read_coco(annotations, None, progress=False)

        def read_theirs() -> Any:
            with contextlib.redirect_stdout(io.StringIO()):
                return COCO(str(annotations))

        ours, theirs = read_ours(), read_theirs()
        boxes = {(a["image_id"], a["category_id"], *a["bbox"]) for a in theirs.anns.values()}
        owner = np.repeat(ours.image_ids, np.diff(ours.starts)).tolist()
        classes = np.array(ours.categories.ids)[ours.labels].tolist()
        assert {(i, c, *b) for i, c, b in zip(owner, classes, ours.xywh.tolist(), strict=True)} == boxes, "they differ"
        del ours, theirs, boxes, owner, classes
        timed = interleaved(
            {"ours": read_ours, "peer": read_theirs}, repeats=repeats, warmup=0, device=torch.device("cpu")
        )
        size = annotations.stat().st_size
    return {
        "noise": noise(timed, "ours"), "ratio": timed["peer"].median / timed["ours"].median, "file_mb": size / 1e6,
        **{name: {"median_ms": timed[name].median * 1e3, "spread": timed[name].spread, "seconds": timed[name].seconds,
                  "peak_mb": timed[name].peak_bytes / 1e6}
           for name in ("ours", "peer")},
    }  # fmt: skip


def _annotations(images: int) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    owner = np.repeat(np.arange(images), rng.poisson(7.3, images)).tolist()
    boxes = np.concatenate([rng.uniform(0, 400, (len(owner), 2)), rng.uniform(5, 80, (len(owner), 2))], axis=1)
    outlines = rng.uniform(0, 400, (len(owner), 48)).round(2).tolist()  # COCO's median is about 24 corners
    return {
        "images": [{"id": i, "file_name": f"{i:012}.jpg", "width": 640, "height": 480} for i in range(images)],
        "annotations": [
            {
                "id": k + 1, "image_id": i, "category_id": k % 80 + 1, "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                "segmentation": [outline],
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
    pictures: int | None = None,
) -> dict[str, Any]:
    """JPEG files, mirrored by chance and resized to `size`, as batches; images a second once the workers run. Also ours of
    an epoch whose pictures are kept (`data.cache_gb`)."""
    with tempfile.TemporaryDirectory() as folder:
        count = pictures or (256 if stored[0] * stored[1] < 1e6 else 6 * batch)
        annotations = write_pictures(Path(folder), count, stored)
        timed = {name: Measured() for name in ("ours", "peer", "kept", "again")}
        for _ in range(repeats):
            for name in timed:
                if name == "peer":
                    seconds = _their_seconds(annotations, size, workers, batch)
                else:
                    seconds = _our_seconds(annotations, size, workers, batch, keep=name == "kept")
                timed[name].seconds.append(seconds)
    figures: dict[str, Any] = {
        name: {
            "median_ms": one.median * 1e3,
            "spread": one.spread,
            "images_per_second": 1 / one.median,
            "seconds": one.seconds,
        }
        for name, one in timed.items()
        if name != "again"
    }
    return {"noise": noise(timed, "ours"), "ratio": timed["peer"].median / timed["ours"].median, **figures}


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> Path:
    """JPEG files of soft noise, seven objects each, and their COCO file."""
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


def _our_seconds(annotations: Path, size: tuple[int, int], workers: int, batch: int, *, keep: bool) -> float:
    """A picture's share, from the end of the first batches to that of the last; of the second epoch alone with `keep`."""
    loader, steps_per_epoch = our_loader(annotations, size, workers, batch, keep=keep)
    return _seconds(loader, skip=2 * workers + keep * steps_per_epoch, batch=batch)


def our_loader(
    annotations: Path, size: tuple[int, int], workers: int, batch: int, *, keep: bool = False, epochs: int = 2
) -> tuple[DataLoader[Batch], int]:
    """As training reads, some epochs, two steps a worker and one more; and the steps of an epoch."""
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
    if keep:
        dataset.keep_pictures(10**10, min_sizes=[min(size)])
    sampler = TrainSampler(planner, 0, epochs * planner.steps_per_epoch + 2 * workers + 1)
    loader = build_loader(dataset, sampler, num_workers=workers, pin_memory=torch.cuda.is_available())
    return loader, planner.steps_per_epoch


class _Reference(Dataset[tuple[Tensor, Any]]):
    """As torchvision's reference scripts read, and then resized as their model does it."""

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


def _their_seconds(annotations: Path, size: tuple[int, int], workers: int, batch: int) -> float:
    loader = DataLoader(_Reference(annotations, size), batch, shuffle=True, num_workers=workers, collate_fn=_batched)
    return _seconds(loader, skip=2 * workers, batch=batch)


def _batched(samples: list[tuple[Tensor, Any]]) -> tuple[Tensor, list[Any]]:
    return torch.stack([image for image, _ in samples]), [target for _, target in samples]


def _seconds(loader: Any, *, skip: int, batch: int) -> float:
    begun, done = 0.0, 0
    for i, _ in enumerate(loader):
        if i == skip:
            begun = time.perf_counter()
        done += i > skip
    return (time.perf_counter() - begun) / (done * batch)
