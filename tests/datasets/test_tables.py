"""Datasets from columns, without any annotation file: read and checked like COCO files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.datasets.coco import CocoDataset
from detector.datasets.inspection import Inspection, inspect_tables
from detector.datasets.loader import DetectionDataset, collate
from detector.datasets.opening import read_coco
from detector.datasets.sampling import SampleKey
from detector.datasets.store import FolderStore
from detector.datasets.tables import NO_ID, AnnotationTable, ImageTable
from detector.structures import Categories
from tests.tiny import images_of, write_coco


def columns_of(annotations: Path) -> tuple[ImageTable, AnnotationTable, Categories]:
    """The second source: the columns as a database would deliver them."""
    content = json.loads(annotations.read_text())
    images, objects = content["images"], content["annotations"]
    categories = sorted((c["id"], c["name"]) for c in content["categories"])
    return (
        ImageTable(
            np.array([i["id"] for i in images]),
            [i["file_name"] for i in images],
            np.array([[i["height"], i["width"]] for i in images], np.int32),
        ),
        table(
            image_ids=np.array([a["image_id"] for a in objects]),
            category_ids=np.array([a["category_id"] for a in objects]),
            xywh=np.array([a["bbox"] for a in objects], np.float64),
        ),
        Categories(tuple(i for i, _ in categories), tuple(name for _, name in categories)),
    )


def table(**columns: Any) -> AnnotationTable:
    """Fill in what a source may lack."""
    n = len(columns["image_ids"])
    defaults = {
        "areas": np.full(n, np.nan), "crowd": np.zeros(n, bool), "ignore": np.zeros(n, bool), "ids": np.full(n, NO_ID),
        "positions": np.arange(n),
    }  # fmt: skip
    return AnnotationTable(**(defaults | columns))


def opened(inspection: Inspection) -> CocoDataset:
    assert inspection.dataset is not None
    return inspection.dataset


def kinds(inspection: Inspection) -> dict[str, int]:
    return {finding.kind: len(finding.problems) for finding in inspection.findings}


def test_empty_tables_have_no_usable_image() -> None:
    images = ImageTable(np.zeros(0, np.int64), [], np.zeros((0, 2), np.int32))
    nothing = np.zeros(0, np.int64)
    annotations = table(image_ids=nothing, category_ids=nothing, xywh=np.zeros((0, 4)))
    inspection = inspect_tables(Path("table"), images, annotations, Categories((1,), ("a",)), store=None)
    assert inspection.dataset is None
    assert kinds(inspection) == {"no usable image": 1}


def test_a_dataset_from_columns_equals_that_of_the_file_with_the_same_content(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "train.json", 7, seed=1)
    images, objects, categories = columns_of(annotations)
    store = FolderStore(images_of(annotations))
    data = opened(inspect_tables(Path("database"), images, objects, categories, store=store))
    expected = read_coco(annotations, store, progress=False)
    assert data.fingerprint() == expected.fingerprint()
    assert data.categories == expected.categories
    np.testing.assert_array_equal(data.areas, expected.areas)
    np.testing.assert_array_equal(data.decode(3), expected.decode(3))
    assert data.summary().splitlines()[1:] == expected.summary().splitlines()[1:]


def test_columns_are_checked_like_a_file(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "train.json", 5, seed=1)
    images, objects, categories = columns_of(annotations)
    image_ids, category_ids, xywh = objects.image_ids.copy(), objects.category_ids.copy(), objects.xywh.copy()
    image_ids[0], category_ids[1], xywh[2, 2] = 999, 4, -1
    images.ids[4] = images.ids[3]
    ids = np.arange(len(image_ids))
    ids[4] = ids[3]
    broken = table(image_ids=image_ids, category_ids=category_ids, xywh=xywh, ids=ids)
    lost = int((image_ids == 50).sum())
    inspection = inspect_tables(Path("database"), images, broken, categories, store=None)
    assert kinds(inspection) == {
        "duplicate image id": 1, "orphan annotation": 1 + lost, "unknown category": 1, "duplicate annotation id": 1,
        "box of zero size": 1,
    }  # fmt: skip
    assert len(opened(inspection)) == 4


def test_extra_columns_follow_their_annotations_into_the_targets(tmp_path: Path) -> None:
    """An annotation id and a weight, whatever order the annotations are packed in and whichever are left out."""
    annotations = write_coco(tmp_path / "train.json", 6, seed=1)
    images, objects, categories = columns_of(annotations)
    order = np.random.default_rng(0).permutation(len(objects))
    objects = objects.take(order)
    image_ids = objects.image_ids.copy()
    image_ids[3] = 999
    weights = objects.xywh[:, 0] + 1
    mixed = table(
        image_ids=image_ids, category_ids=objects.category_ids, xywh=objects.xywh, ids=order,
        extras={"weights": weights, "annotation_ids": order},
    )  # fmt: skip
    data = opened(
        inspect_tables(Path("database"), images, mixed, categories, store=FolderStore(images_of(annotations)))
    )
    dataset = DetectionDataset(data, max_size=128)
    seen = []
    for i in range(len(data)):
        sample = dataset[SampleKey(0, i, 100, (128, 128))]
        np.testing.assert_array_equal(sample.objects.extras["weights"], data.objects(i).boxes[:, 0] + 1)
        seen += sample.objects.extras["annotation_ids"].tolist()
        targets = collate([sample]).targets
        assert targets.weights is not None
        assert targets.weights[0, : data.num_objects[i]].tolist() == (data.objects(i).boxes[:, 0] + 1).tolist()
    assert sorted(seen) == sorted(np.delete(order, 3).tolist())


def test_a_class_mask_follows_its_images_and_the_classes_of_training(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "train.json", 4, seed=1)
    images, objects, categories = columns_of(annotations)
    images.class_mask = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]], bool)
    images.names[1] = "absent.png"
    training = Categories((1, 2, 3), (categories.names[2], categories.names[0], categories.names[1]))
    store = FolderStore(images_of(annotations))
    data = opened(
        inspect_tables(Path("database"), images, objects, categories, store=store, training_categories=training)
    )
    assert data.class_mask is not None
    assert data.class_mask.tolist() == [[False, True, False], [True, False, False], [False, True, True]]
    assert data.objects(2).class_mask is not None


def test_extra_columns_are_part_of_the_fingerprint(tmp_path: Path) -> None:
    annotations = write_coco(tmp_path / "train.json", 3, seed=1)
    prints = set()
    for weight in (None, 1.0, 2.0):
        images, objects, categories = columns_of(annotations)
        extras = {} if weight is None else {"weights": np.full(len(objects), weight)}
        weighted = table(
            image_ids=objects.image_ids, category_ids=objects.category_ids, xywh=objects.xywh, extras=extras
        )
        prints.add(opened(inspect_tables(Path("database"), images, weighted, categories, store=None)).fingerprint())
    assert len(prints) == 3


def test_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="ImageTable must have E ids, E names and sizes"):
        ImageTable(np.zeros(2, np.int64), ["a"], np.zeros((2, 2), np.int32))
    with pytest.raises(ValueError, match=r"as many rows as its image_ids, 2.*'category_ids': 3"):
        table(image_ids=np.zeros(2, np.int64), category_ids=np.zeros(3, np.int64), xywh=np.zeros((2, 4)))
    with pytest.raises(ValueError, match=r"xywh must be \(2, 4\)"):
        table(image_ids=np.zeros(2, np.int64), category_ids=np.zeros(2, np.int64), xywh=np.zeros((2, 5)))
    with pytest.raises(ValueError, match="'weights': 1"):
        table(image_ids=np.zeros(2, np.int64), category_ids=np.zeros(2, np.int64), xywh=np.zeros((2, 4)),
              extras={"weights": np.zeros(1)})  # fmt: skip
