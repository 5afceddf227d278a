"""Reading COCO files: real and messy datasets equal what pycocotools reads, and pack into arrays."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO

from detector.datasets.opening import read_coco
from detector.errors import DatasetError
from detector.structures import Categories
from tests.datasets.coco_files import Make, altered, is_readable, kinds, minimal, with_annotation


def test_a_file_without_annotations_opens_with_every_image_kept(make: Make) -> None:
    content = minimal() | {"annotations": []}
    data = read_coco(*make(content), progress=False)
    assert len(data) == 2
    assert data.num_objects.tolist() == [0, 0]
    for i in range(2):
        objects = data.objects(i)
        assert objects.boxes.shape == objects.ignore_boxes.shape == (0, 4)
        assert objects.labels.shape == (0,)
    truth = data.ground_truth()
    assert truth.boxes.shape == (0, 4)
    assert truth.image_ids.tolist() == [5, 0]
    assert data.boxes().boxes.shape == (0, 4)
    is_readable(data.summary())


def test_a_file_without_images_is_refused(make: Make) -> None:
    for on_error in ("fail", "skip"):
        with pytest.raises(DatasetError, match="none of its 0 images can be used"):
            read_coco(*make(minimal() | {"images": [], "annotations": []}), on_error=on_error, progress=False)


def test_the_minimal_file_is_read_completely(make: Make) -> None:
    data = read_coco(*make(minimal()), progress=False)
    assert data.findings == ()
    assert data.categories == Categories((0, 3, 7), ("cat", "unused", "dog"))
    assert [data.file_name(i) for i in range(2)] == ["a.jpg", "sub/b.png"]
    assert data.file_name(-1) == "sub/b.png"
    assert Path(data.describe(1)).is_file()
    assert data.sizes.tolist() == [[20, 30], [20, 30]]
    first, second = data.objects(0), data.objects(1)
    np.testing.assert_array_equal(first.boxes, np.array([[0.5, 0.5, 30, 20]], np.float32))
    assert second.boxes.dtype == np.float32
    assert second.labels.tolist() == [2, 0]
    assert second.labels.dtype == np.int64
    with pytest.raises(IndexError):
        data.objects(2)
    truth = data.ground_truth()
    assert truth.ann_image_ids.tolist() == [5, 0, 0]
    assert truth.ann_category_ids.tolist() == [0, 7, 0]
    assert truth.areas.tolist() == [29.5 * 19.5, 12, 30]
    every = data.boxes()
    assert every.image_index.tolist() == [0, 1, 1]
    assert every.labels.tolist() == [0, 2, 0]


CLEAN = [
    ("bccd", "train", 205, 2804, 3),
    ("bccd", "val", 87, 1137, 3),
    ("bccd", "test", 72, 945, 3),
    ("coco_permissive", "train", 85, 774, 80),
    ("coco_permissive", "val", 68, 574, 80),
    ("deeppcb", "train", 517, 3539, 6),
    ("deeppcb", "val", 210, 1323, 6),
    ("symbols54", "train", 663, 6892, 54),
    ("symbols54", "val", 118, 1069, 54),
    ("symbols54", "test", 45, 358, 54),
]


@pytest.mark.parametrize(("name", "split", "images", "boxes", "classes"), CLEAN)
def test_clean_datasets_open_and_equal_what_pycocotools_reads(
    shared: Path, capsys: pytest.CaptureFixture[str], name: str, split: str, images: int, boxes: int, classes: int
) -> None:
    root = shared / "datasets" / name
    data = read_coco(root / "annotations" / f"{split}.json", root / "images", verify="header", progress=False)
    assert data.findings == ()
    assert (len(data), len(data.ground_truth().boxes), len(data.categories)) == (images, boxes, classes)
    truth = data.ground_truth()
    oracle = COCO(str(root / "annotations" / f"{split}.json"))
    assert sorted(oracle.getImgIds()) == sorted(truth.image_ids.tolist())
    assert sorted(oracle.getCatIds()) == list(truth.categories.ids)
    for i, image_id in enumerate(truth.image_ids.tolist()):
        here = truth.ann_image_ids == image_id
        expected = oracle.imgToAnns[image_id]
        np.testing.assert_array_equal(truth.boxes[here], np.array([a["bbox"] for a in expected]).reshape(-1, 4))
        np.testing.assert_array_equal(truth.areas[here], [a["area"] for a in expected])
        np.testing.assert_array_equal(truth.ann_category_ids[here], [a["category_id"] for a in expected])
        np.testing.assert_array_equal(truth.iscrowd[here], [a["iscrowd"] for a in expected])
        entry = oracle.imgs[image_id]
        assert (data.file_name(i), *data.sizes[i].tolist()) == (entry["file_name"], entry["height"], entry["width"])
        objects = data.objects(i)
        assert len(objects.boxes) == data.num_objects[i] == sum(not a["iscrowd"] for a in expected)
        assert len(objects.ignore_boxes) == sum(a["iscrowd"] for a in expected)


def test_the_evaluation_reference_opens_without_its_images(shared: Path) -> None:
    path = shared / "datasets" / "coco_eval_reference" / "annotations" / "instances_val2014_100.json"
    data = read_coco(path, None, progress=False)
    assert (len(data), len(data.ground_truth().boxes), int(data.ground_truth().iscrowd.sum())) == (100, 839, 9)
    assert data.findings == ()
    for use in (data.describe, data.decode):
        with pytest.raises(ValueError, match="without an image folder"):
            use(0)


MESSY: list[tuple[str, str, dict[str, int], int]] = [
    ("messy_coad", "train", {"missing image": 1, "box partly outside": 200, "unused category": 1}, 368),
    (
        "messy_mix",
        "train",
        {
            "missing image": 30,
            "duplicate annotation id": 2,  # two ids, each used twice
            "box of zero size": 1,
            "box outside image": 8,  # 53 boxes leave their image
            "box partly outside": 45,
            "duplicate file name": 2,
            "unused category": 1,
        },
        66,
    ),
    (
        "messy_taco_json",
        "train",
        {"no usable image": 1, "missing image": 3831, "box not finite": 15, "outside": 27},
        0,
    ),
    (
        "messy_taco_json",
        "val",
        {"no usable image": 1, "missing image": 1500, "duplicate annotation id": 2, "box partly outside": 7},
        0,
    ),
]


@pytest.mark.parametrize(("name", "split", "expected", "usable"), MESSY)
def test_messy_datasets_are_refused_with_every_problem_and_open_with_on_error_skip(
    shared: Path, tmp_path: Path, name: str, split: str, expected: dict[str, int], usable: int
) -> None:
    root = shared / "datasets" / name
    files = root / "annotations" / f"{split}.json", root / "images"
    listed = tmp_path / "new" / "problems.tsv"
    with pytest.raises(DatasetError) as refusal:
        read_coco(*files, progress=False, problems_file=listed)
    text = str(refusal.value)
    is_readable(text)
    rows = [line.split("\t") for line in listed.read_text().splitlines()]
    counts: dict[str, int] = {}
    for kind, where, detail, action in rows:
        assert where
        assert detail
        assert action
        kind = "outside" if "outside" in kind and "outside" in expected else kind
        counts[kind] = counts.get(kind, 0) + 1
    assert counts == expected
    assert f"{listed} ({len(rows):,} lines)" in text
    for kind, n in expected.items():
        assert kind in ("outside", "no usable image") or re.search(rf"{n:,}  {kind} ", text), kind
    if not usable:
        assert "none of its" in text
        with pytest.raises(DatasetError, match="none of its"):
            read_coco(*files, progress=False, on_error="skip")
        return
    assert f"data.on_error=skip, which uses {usable} of" in text.replace("\n    ", " ")
    data = read_coco(*files, progress=False, on_error="skip")
    assert kinds(data) == expected
    assert len(data) == usable
    assert len(data.ground_truth().image_ids) == usable
    every = data.boxes()
    limits = data.sizes[every.image_index][:, [1, 0, 1, 0]]
    assert (every.boxes >= 0).all()
    assert (every.boxes <= limits).all()
    assert (every.boxes[:, 2:] > every.boxes[:, :2]).all()


@pytest.mark.parametrize(
    ("name", "split", "expected"),
    [
        ("messy_coad", "val", {"box partly outside": 2, "unused category": 1}),
        ("messy_mix", "val", {"box of zero size": 1, "box partly outside": 2, "unused category": 2}),
    ],
)
def test_box_problems_alone_do_not_refuse_but_are_printed(
    shared: Path, capsys: pytest.CaptureFixture[str], name: str, split: str, expected: dict[str, int]
) -> None:
    root = shared / "datasets" / name
    data = read_coco(root / "annotations" / f"{split}.json", root / "images")
    assert kinds(data) == expected
    printed = capsys.readouterr().err
    assert "box clipped for training (by at most 0.19 px)" in printed
    assert "box clipped for training (by at most 0.19 px)" in data.summary()
    is_readable(data.summary())


def test_annotations_alone_open_although_every_image_is_missing(shared: Path) -> None:
    path = shared / "datasets" / "messy_taco_json" / "annotations" / "train.json"
    data = read_coco(path, None, progress=False)
    assert len(data) == 3831
    assert len(data.ground_truth().boxes) == 8334 - 15
    assert np.isfinite(data.ground_truth().boxes).all()


def test_ignore_marks_are_ignored_in_training_and_counted_in_evaluation_as_pycocotools_does(make: Make) -> None:
    data = read_coco(*make(with_annotation(ignore=1)), progress=False)
    assert data.objects(0).ignore_boxes.tolist() == [[1, 1, 3, 3]]
    assert data.num_objects.tolist() == [1, 2]
    assert data.ground_truth().iscrowd.sum() == 0
    assert len(data.ground_truth().boxes) == 4


def test_control_characters_of_the_file_do_not_reach_the_terminal(make: Make, tmp_path: Path) -> None:
    listed = tmp_path / "list.tsv"
    with pytest.raises(DatasetError) as refusal:
        read_coco(*make(altered("images", 0, file_name="x\x1b[31m\n\t.jpg")), progress=False, problems_file=listed)
    assert "\x1b" not in str(refusal.value)
    assert len(listed.read_text().splitlines()) == 1


def test_all_problems_are_reported_together(make: Make) -> None:
    content = with_annotation(image_id=77)
    content["annotations"] += [{"id": 1, "image_id": 5, "category_id": 99, "bbox": [0, 0, 1, 1]}]
    content["images"][0]["file_name"] = "absent.jpg"
    with pytest.raises(DatasetError) as refusal:
        read_coco(*make(content), progress=False)
    for kind in ("missing image", "orphan annotation", "unknown category", "duplicate annotation id"):
        assert kind in str(refusal.value)


def test_what_a_file_publishes_survives_packing_in_any_order(make: Make) -> None:
    content = minimal()
    content["annotations"] = [
        {"id": k, "image_id": (5, 0)[k % 2], "category_id": (0, 7)[k % 3 % 2], "bbox": [k, k, 2, 3], "area": k}
        for k in range(12)
    ]
    data = read_coco(*make(content), progress=False)
    truth = data.ground_truth()
    for i, image_id in enumerate([5, 0]):
        own = [a for a in content["annotations"] if a["image_id"] == image_id]
        here = truth.ann_image_ids == image_id
        assert truth.areas[here].tolist() == [a["area"] for a in own]
        assert truth.ann_category_ids[here].tolist() == [a["category_id"] for a in own]
        assert data.objects(i).boxes[:, 0].tolist() == [a["bbox"][0] for a in own]


def test_the_dataset_is_packed_and_pickles_small(tmp_path: Path) -> None:
    content = minimal()
    n = 5000
    content["images"] = [{"id": k, "file_name": f"folder/{k:012d}.jpg", "width": 30, "height": 20} for k in range(n)]
    content["annotations"] = [
        {"id": k, "image_id": k % n, "category_id": 7, "bbox": [1, 1, 2, 2], "segmentation": [[1.5] * 40]}
        for k in range(4 * n)
    ]
    (tmp_path / "a.json").write_text(json.dumps(content))
    data = read_coco(tmp_path / "a.json", None, progress=False)
    for value in vars(data).values():
        if isinstance(value, np.ndarray):
            assert value.dtype != object
        elif isinstance(value, dict):
            assert all(isinstance(column, np.ndarray) for column in value.values())
        else:
            assert not isinstance(value, list | set)
            assert not isinstance(value, tuple) or len(value) < 100
    pickled = pickle.dumps(data)
    assert len(pickled) < 60 * n + 60 * 4 * n
    again = pickle.loads(pickled)
    assert again.file_name(n - 1) == f"folder/{n - 1:012d}.jpg"
    assert again.findings == data.findings
    np.testing.assert_array_equal(again.objects(3).boxes, data.objects(3).boxes)


def test_the_list_of_problems_is_deleted_once_they_are_fixed(make: Make, tmp_path: Path) -> None:
    (tmp_path / "problems.tsv").write_text("from an earlier attempt")
    read_coco(*make(minimal()), progress=False, problems_file=tmp_path / "problems.tsv")
    assert not (tmp_path / "problems.tsv").exists()
