"""COCO annotation files and results files."""

from __future__ import annotations

import contextlib
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detector.dataset_tools.stratify import split_file, write_folds
from detector.datasets.coco import CocoDataset
from detector.datasets.opening import read_coco
from detector.evaluation.coco_metrics import evaluate
from detector.evaluation.coco_results import CocoResults
from detector.evaluation.results_file import load_results
from detector.structures import Categories
from tests.fuzz.mutations import ODD_NUMBERS, ODD_TEXTS, encoded, json_text, mutate, mutate_bytes, odd_value
from tests.fuzz.server import is_harmless

MODULES = (
    "detector.json_text", "detector.datasets.coco_json", "detector.datasets.json_columns",
    "detector.datasets.segmentation", "detector.datasets.inspection", "detector.datasets.file_checks",
    "detector.datasets.box_checks", "detector.datasets.opening", "detector.datasets.problems",
    "detector.datasets.missing_paths", "detector.evaluation.coco_results", "detector.dataset_tools.stratify",
)  # fmt: skip
REGRESSIONS: tuple[str, ...] = ()

NAMES = ("cat", "dog", "traffic light", "Fuß", "猫", "a/b")
TOKENS = (b"{", b"}", b"[", b"]", b",", b":", b'"', b"null", b"1e999", b"NaN", b"\\ud800", b"\x00", b'"id":', b"-")


def prepare(folder: Path) -> None:
    """Write five small images, one of them damaged."""
    (folder / "images").mkdir()
    for k, size in enumerate(((64, 48), (48, 64), (30, 30), (8, 5))):
        Image.fromarray(np.full((size[1], size[0], 3), 40 * k, np.uint8)).save(folder / "images" / f"{k}.png")
    (folder / "images" / "4.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    Image.new("RGB", (64, 48)).save(folder / "images" / "5.jpg", exif=exif)
    Image.fromarray(np.full((48, 64), 500, np.uint16)).save(folder / "images" / "6.png")
    Image.new("P", (64, 48)).save(folder / "images" / "7.png")


def _annotation(rng: random.Random, number: int, image: dict[str, Any], categories: list[Any]) -> dict[str, Any]:
    x, y, w, h = rng.uniform(0, 20), rng.uniform(0, 20), rng.uniform(1, 20), rng.uniform(1, 20)
    box = [x, y, w, h] if rng.random() < 0.7 else [round(v) for v in (x, y, w, h)]
    entry: dict[str, Any] = {"id": number, "image_id": image["id"], "category_id": rng.choice(categories)["id"]}
    form = rng.random()
    if form < 0.85:
        entry["bbox"] = box
    if form < 0.3:
        entry["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    elif form > 0.85:
        width, height = image["width"], image["height"]
        counts: Any = [width * height // 3, width * height // 5]
        counts.append(width * height - sum(counts))
        counts = counts if form < 0.95 else rng.choice(["0`1", "PPYo0", "1" * 40, "\x1b"])
        entry["segmentation"] = {"size": [height, width], "counts": counts}
    for key, value in (("area", w * h), ("iscrowd", int(rng.random() < 0.1)), ("ignore", 0)):
        if rng.random() < 0.7:
            entry[key] = value
    return entry


def _coco(rng: random.Random) -> dict[str, Any]:
    sizes = [(64, 48), (48, 64), (30, 30), (8, 5), (10, 10), rng.choice([(64, 48), (48, 64)]), (64, 48), (64, 48)]
    chosen = rng.sample(range(len(sizes)), rng.choice([1, 3, 4, 8]))
    images = [
        {"id": rng.choice([k, k * 7, 10**6 + k]), "width": sizes[k][0], "height": sizes[k][1],
         "file_name": "5.jpg" if k == 5 else f"{k}.png"}
        for k in (chosen if rng.random() < 0.7 else [k for k in chosen if k != 4] or [0])
    ]  # fmt: skip
    categories = [{"id": 3 * k, "name": name, "supercategory": ""} for k, name in enumerate(NAMES[: rng.randint(1, 6)])]
    annotations = [_annotation(rng, k, rng.choice(images), categories) for k in range(rng.choice([0, 1, 5, 30]))]
    content: dict[str, Any] = {"images": images, "annotations": annotations, "categories": categories}
    if rng.random() < 0.3:
        content["info"], content["licenses"] = {"year": 2017}, [{"id": 1, "name": "x"}]
    items = list(content.items())
    rng.shuffle(items)
    return dict(items)


def _change_boxes(rng: random.Random, content: dict[str, Any]) -> None:
    """Sometimes, boxes or sizes as other programs write them."""
    kind = rng.randrange(14)
    for annotation in content["annotations"]:
        x, y, w, h = annotation.get("bbox") or [1, 1, 2, 2]
        changed = {
            0: [x / 100, y / 100, w / 100, h / 100], 1: [x, y, x + w, y + h], 2: [x + w / 2, y + h / 2, w, h],
            3: [x + 40, y + 30, w, h], 4: [x + 1000, y, w, h], 5: [x, y, 0, h], 6: [x, y, -w, h], 7: [y, x, h, w],
        }.get(kind)  # fmt: skip
        if changed is not None and rng.random() < 0.8:
            annotation["bbox"] = changed
    if kind == 8:
        for image in content["images"]:
            image["width"], image["height"] = image["height"], image["width"]


FIELDS = {
    "images": ("id", "file_name", "file_name", "width", "height"),
    "annotations": ("id", "image_id", "category_id", "bbox", "bbox", "segmentation", "area", "iscrowd", "ignore"),
    "categories": ("id", "name", "supercategory"),
}


def _change_field(rng: random.Random, content: dict[str, Any]) -> None:
    """Give one entry an odd or another entry's value."""
    kind = rng.choice(list(FIELDS))
    if not content[kind]:
        return
    entry, key = rng.choice(content[kind]), rng.choice(FIELDS[kind])
    value = rng.choice([odd_value(rng), rng.choice(content[kind]).get(key), rng.choice(ODD_TEXTS), str(entry.get(key))])
    if key == "bbox" and rng.random() < 0.7:
        value = [rng.choice([1, 5.5, *ODD_NUMBERS, "3"]) for _ in range(rng.choice([3, 4, 4, 4, 5]))]
    if key == "segmentation" and rng.random() < 0.7:
        entry.pop("bbox", None)
        numbers = [rng.choice([1, 20, *ODD_NUMBERS]) for _ in range(rng.choice([4, 6, 7, 8]))]
        masks = {"size": [20, 10], "counts": rng.choice([[200], [0, 200], [7, 3, 190], [3, 20, 177], "0d6", "T6", "7"])}
        value = rng.choice([[numbers], [numbers, [1, 2, 3, 4, 5, 6]], [], masks, {**masks, "size": numbers[:2]}])
    entry[key] = value


def _other_format(rng: random.Random, content: dict[str, Any]) -> Any:
    """A file of another kind than COCO's detection files."""
    return rng.choice([
        {"shapes": [], "imagePath": "a.png"}, {"_via_settings": {}}, {"a": {"regions": []}},
        {"type": "FeatureCollection"}, b"version https://git-lfs.github.com/spec/v1", b"<annotation/>", b"", b" \n",
        {**content, "annotations": [{"id": 1, "segments_info": []}]}, {"images": content["images"]}, [],
        {"images": [], "annotations": [{"caption": "x"}]}, content["annotations"], "x", 7,
        [{"image_id": 1, "score": 0.5}],
        {k: content[k] for k in ("images", "categories")}, {**content, "images": []}, {**content, "categories": []},
    ])  # fmt: skip


def _results(rng: random.Random, content: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "image_id": rng.choice(content["images"])["id"], "category_id": rng.choice(content["categories"])["id"],
            "bbox": [rng.uniform(0, 20) for _ in range(4)], "score": rng.random(),
        }
        for _ in range(rng.choice([0, 1, 20]))
    ]  # fmt: skip


def make(rng: random.Random, folder: Path) -> Path:
    """An annotation file, or a valid one and a results file, and how to use it."""
    content = _coco(rng)
    classes = [category["name"] for category in content["categories"]]
    mode = rng.choice(["read"] * 7 + ["results"] * 2 + ["split", "folds"])
    if mode != "results":
        _change_boxes(rng, content)
        for _ in range(rng.choice([0, 0, 1, 2])):
            _change_field(rng, content)
        if rng.random() < 0.15:
            rng.choice(content["images"])["file_name"] = rng.choice(
                [*ODD_TEXTS, "A.png", "images/0.png", "0.jpg", "9.png"]
            )
    target: Any = _results(rng, content) if mode == "results" else content
    if rng.random() < 0.08:
        target = _other_format(rng, content)
    if isinstance(target, bytes):
        data = target
    else:
        changed = mutate(rng, target, rng.choice([0, 1, 1, 1, 2, 3, 10]))
        data = encoded(rng, json_text(rng, changed))
    if rng.random() < 0.2:
        data = mutate_bytes(rng, data, tokens=TOKENS)
    (folder / "file.json").write_bytes(data)
    (folder / "valid.json").write_text(json.dumps(content))
    options = {
        "mode": mode, "verify": rng.choice(["auto", "none", "header"]), "on_error": rng.choice(["fail", "skip"]),
        "exif": rng.choice(["auto", "auto", "auto", "apply", "ignore"]),
        "images": rng.choice([None, None, *["images"] * 7, "imagse", "", "images/0.png"]),
        "classes": classes if rng.random() < 0.3 else None,
    }  # fmt: skip
    (folder / "options.json").write_text(json.dumps(options))
    return folder / ("file.json" if rng.random() < 0.98 else "flie.json")


def use(path: Path) -> str:
    """Open the file as a dataset and evaluate on it; or score it, or split it."""
    options: dict[str, Any] = json.loads((path.parent / "options.json").read_text())
    mode = options["mode"]
    if mode == "results":
        truth = read_coco(path.parent / "valid.json", None, progress=False, on_error="skip").ground_truth()
        evaluate(truth, load_results(path, truth))
    elif mode == "split":
        split_file(path, {"val": 0.3}, output_dir=path.parent / "parts")
    elif mode == "folds":
        write_folds(path, 2, output_dir=path.parent / "parts")
    else:
        classes = options["classes"]
        errors = io.StringIO()
        with contextlib.redirect_stderr(errors):
            dataset = read_coco(
                path,
                None if options["images"] is None else path.parent.parent / "shared" / options["images"],
                verify=options["verify"],
                on_error=options["on_error"],
                exif=options["exif"],
                categories=None if classes is None else Categories(tuple(range(len(classes))), tuple(classes)),
                problems_file=path.parent / "problems.tsv",
            )
        _check(dataset, errors.getvalue(), path.parent / "problems.tsv")
    return "read"


def _check(dataset: CocoDataset, printed: str, problems: Path) -> None:
    """What is left is consistent, and what is shown is harmless."""
    for text in (dataset.summary(), printed, problems.read_text() if problems.exists() else ""):
        assert is_harmless(text), ascii(text)
    boxes = dataset.boxes()
    assert np.isfinite(boxes.boxes).all()
    assert ((boxes.labels >= 0) & (boxes.labels < len(dataset.categories))).all()
    for i in range(len(dataset)):
        assert len(dataset.objects(i).boxes) == dataset.num_objects[i]
        dataset.file_name(i)
    dataset.fingerprint()
    truth = dataset.ground_truth()
    metrics = evaluate(truth, CocoResults.concatenate([]))
    assert len(metrics.per_class) == len(dataset.categories)
