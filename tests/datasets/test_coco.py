"""Reading and checking COCO files: the real and the messy sets, and a hand-made file for every kind of problem."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO

from detector.datasets.coco import CocoDataset, read_coco
from detector.datasets.coco_json import box_of_segmentation
from detector.datasets.images import decode_image
from detector.datasets.problems import KINDS, check_boxes, count_kinds
from detector.errors import DatasetError
from detector.structures import Categories

Json = dict[str, Any]


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def minimal() -> Json:
    """Two images of 30 x 20 (width x height), three objects, no key more than COCO's readers need."""
    return {
        "images": [
            {"id": 5, "file_name": "a.jpg", "width": 30, "height": 20},
            {"id": 0, "file_name": "sub/b.png", "width": 30, "height": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3, 4]},
            {"id": 2, "image_id": 5, "category_id": 0, "bbox": [0.5, 0.5, 29.5, 19.5]},
            {"id": 3, "image_id": 0, "category_id": 0, "bbox": [10, 10, 5, 6]},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 0, "name": "cat"}, {"id": 3, "name": "unused"}],
    }


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """Write a dataset: the JSON, and an image for every entry unless its name is in `without`."""

    def write(content: Any, *, without: tuple[str, ...] = ()) -> tuple[Path, Path]:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        for name in ("a.jpg", "sub/b.png"):
            if name not in without:
                (images / name).parent.mkdir(exist_ok=True)
                Image.new("RGB", (30, 20), "green").save(images / name)
        (tmp_path / "train.json").write_text(json.dumps(content))
        return tmp_path / "train.json", images

    return write


def kinds(dataset: CocoDataset) -> dict[str, int]:
    return count_kinds(dataset.problems)


def is_readable(text: str) -> None:
    """Plain text at 110 columns, save for paths, which cannot be folded."""
    for line in text.splitlines():
        assert len(line) <= 110 or "/" in line, line
        assert line == line.rstrip()
    assert "Traceback" not in text


Make = Callable[..., tuple[Path, Path]]


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
    assert data.problems == ()
    assert data.categories == Categories((0, 3, 7), ("cat", "unused", "dog"))
    assert [data.file_name(i) for i in range(2)] == ["a.jpg", "sub/b.png"]
    assert data.file_name(-1) == "sub/b.png"
    assert data.path(1).is_file()
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
def test_clean_sets_open_and_equal_what_pycocotools_reads(
    shared: Path, capsys: pytest.CaptureFixture[str], name: str, split: str, images: int, boxes: int, classes: int
) -> None:
    root = shared / "datasets" / name
    data = read_coco(root / "annotations" / f"{split}.json", root / "images", verify="header", progress=False)
    assert data.problems == ()
    assert (len(data), len(data.ground_truth().boxes), len(data.categories)) == (images, boxes, classes)
    truth = data.ground_truth()
    oracle = COCO(str(root / "annotations" / f"{split}.json"))
    assert sorted(oracle.getImgIds()) == sorted(truth.image_ids.tolist())
    assert sorted(oracle.getCatIds()) == list(truth.categories.ids)
    for i, image_id in enumerate(truth.image_ids.tolist()):
        here = truth.ann_image_ids == image_id
        theirs = oracle.imgToAnns[image_id]
        np.testing.assert_array_equal(truth.boxes[here], np.array([a["bbox"] for a in theirs]).reshape(-1, 4))
        np.testing.assert_array_equal(truth.areas[here], [a["area"] for a in theirs])
        np.testing.assert_array_equal(truth.ann_category_ids[here], [a["category_id"] for a in theirs])
        np.testing.assert_array_equal(truth.iscrowd[here], [a["iscrowd"] for a in theirs])
        entry = oracle.imgs[image_id]
        assert (data.file_name(i), *data.sizes[i].tolist()) == (entry["file_name"], entry["height"], entry["width"])
        objects = data.objects(i)
        assert len(objects.boxes) == data.num_objects[i] == sum(not a["iscrowd"] for a in theirs)
        assert len(objects.ignore_boxes) == sum(a["iscrowd"] for a in theirs)


def test_the_evaluation_reference_opens_without_its_images(shared: Path) -> None:
    path = shared / "datasets" / "coco_eval_reference" / "annotations" / "instances_val2014_100.json"
    data = read_coco(path, None, progress=False)
    assert (len(data), len(data.ground_truth().boxes), int(data.ground_truth().iscrowd.sum())) == (100, 839, 9)
    assert data.problems == ()
    with pytest.raises(ValueError, match="without an image folder"):
        data.path(0)


MESSY: list[tuple[str, str, dict[str, int], int]] = [
    ("messy_coad", "train", {"missing image": 1, "box partly outside": 200}, 368),
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
        },
        66,
    ),
    ("messy_taco_json", "train", {"missing image": 3831, "box not finite": 15, "outside": 27}, 0),
    ("messy_taco_json", "val", {"missing image": 1500, "duplicate annotation id": 2, "box partly outside": 7}, 0),
]


@pytest.mark.parametrize(("name", "split", "expected", "usable"), MESSY)
def test_messy_sets_are_refused_with_every_problem_and_open_when_told_to_skip(
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
        assert kind == "outside" or re.search(rf"{n:,}  {kind} ", text), kind
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
        ("messy_coad", "val", {"box partly outside": 2}),
        ("messy_mix", "val", {"box of zero size": 1, "box partly outside": 2}),
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


def altered(where: str, k: int, **values: Any) -> Json:
    content = minimal()
    entry = content[where][k]
    for key, value in values.items():
        if value is ...:
            del entry[key]
        else:
            entry[key] = value
    return content


def with_annotation(**values: Any) -> Json:
    content = minimal()
    content["annotations"].append({"id": 9, "image_id": 5, "category_id": 7, "bbox": [1, 1, 2, 2]} | values)
    return content


def with_entry(key: str, entry: Any) -> Json:
    content = minimal()
    content[key].append(entry)
    return content


REFUSED: list[tuple[str, Json, int, int]] = [
    # kind, file, images and annotations left under skip
    ("malformed image", with_entry("images", 17), 2, 3),
    ("malformed image", with_entry("images", None), 2, 3),
    ("malformed image", with_entry("images", {"file_name": "c.jpg"}), 2, 3),
    ("malformed image", with_entry("images", {"id": "abc", "file_name": "c.jpg"}), 2, 3),
    ("malformed image", with_entry("images", {"id": True, "file_name": "a.jpg"}), 2, 3),
    ("malformed image", with_entry("images", {"id": 10**30, "file_name": "a.jpg"}), 2, 3),
    ("malformed image", altered("images", 0, file_name=None), 1, 2),
    ("duplicate image id", with_entry("images", {"id": 5, "file_name": "c.jpg"}), 2, 3),
    ("unsafe file name", altered("images", 0, file_name=""), 1, 2),
    ("unsafe file name", altered("images", 0, file_name="/etc/passwd"), 1, 2),
    ("unsafe file name", altered("images", 0, file_name="C:\\a.jpg"), 1, 2),
    ("unsafe file name", altered("images", 0, file_name="../images/../../x.jpg"), 1, 2),
    ("unsafe file name", altered("images", 0, file_name=".."), 1, 2),
    ("unsafe file name", altered("images", 0, file_name="a\0.jpg"), 1, 2),
    ("unsafe file name", altered("images", 0, file_name="\ud800.jpg"), 1, 2),
    ("missing image", altered("images", 0, file_name="c.jpg"), 1, 2),
    ("missing image", altered("images", 0, file_name="a.jpg/c.jpg"), 1, 2),
    ("undecodable image", altered("images", 0, file_name="sub"), 1, 2),
    ("image size mismatch", altered("images", 0, width=31), 1, 2),
    ("image size mismatch", altered("images", 0, width=40, height=30), 1, 2),
    ("malformed annotation", with_entry("annotations", [1, 2]), 2, 3),
    ("malformed annotation", with_entry("annotations", None), 2, 3),
    ("malformed annotation", with_annotation(bbox=None), 2, 3),
    ("malformed annotation", with_annotation(bbox=[1, 2, 3]), 2, 3),
    ("malformed annotation", with_annotation(bbox=["1", 2, 3, 4]), 2, 3),
    ("malformed annotation", with_annotation(bbox=[1, 2, None, 4]), 2, 3),
    ("malformed annotation", with_annotation(bbox=[1, 2, True, 4]), 2, 3),
    ("malformed annotation", with_annotation(bbox={"x": 1}), 2, 3),
    ("malformed annotation", with_annotation(bbox="1 2 3 4"), 2, 3),
    ("malformed annotation", with_annotation(category_id=None), 2, 3),
    ("malformed annotation", with_annotation(category_id=True), 2, 3),
    ("malformed annotation", with_annotation(category_id=[7]), 2, 3),
    ("malformed annotation", with_annotation(image_id="a.jpg"), 2, 3),
    ("malformed annotation", with_annotation(image_id=5.5), 2, 3),
    ("malformed annotation", with_annotation(iscrowd="yes"), 2, 3),
    ("malformed annotation", with_annotation(iscrowd=2), 2, 3),
    ("malformed annotation", with_annotation(ignore="1"), 2, 3),
    ("malformed annotation", with_annotation(iscrowd=[1]), 2, 3),
    ("orphan annotation", with_annotation(image_id=77), 2, 3),
    ("unknown category", with_annotation(category_id=1), 2, 3),
    ("duplicate annotation id", with_annotation(id=1), 2, 4),
]


@pytest.mark.parametrize(("kind", "content", "images", "annotations"), REFUSED)
def test_structural_problems_refuse_and_are_left_out_when_told_to_skip(
    make: Make, tmp_path: Path, kind: str, content: Json, images: int, annotations: int
) -> None:
    files = make(content)
    with pytest.raises(DatasetError) as refusal:
        read_coco(*files, progress=False)
    text = str(refusal.value)
    is_readable(text)
    assert kind in text
    assert str(files[0]) in text.splitlines()[0]
    assert KINDS[kind].remedy.split()[0] in text
    data = read_coco(*files, on_error="skip", progress=False)
    assert kinds(data) == {kind: 1}
    assert len(data) == images
    assert len(data.ground_truth().boxes) == annotations
    assert sum(len(data.objects(i).boxes) for i in range(len(data))) == annotations
    is_readable(data.summary())


NOTED: list[tuple[str, Json]] = [
    ("unusable image size", altered("images", 0, width=...)),
    ("unusable image size", altered("images", 0, width=None, height=None)),
    ("unusable image size", altered("images", 0, width=0)),
    ("unusable image size", altered("images", 0, height="tall")),
    ("number written as text", altered("images", 0, id="5")),
    ("number written as text", altered("images", 0, id=5.0)),
    ("number written as text", altered("annotations", 1, image_id="5")),
    ("number written as text", altered("annotations", 1, category_id=0.0)),
    ("unusable annotation id", altered("annotations", 1, id=...)),
    ("unusable annotation id", altered("annotations", 1, id="ann-1")),
    ("unusable area", altered("annotations", 1, area=float("nan"))),
    ("unusable area", altered("annotations", 1, area="big")),
    ("unusable area", altered("annotations", 1, area=-1)),
    ("number written as text", altered("categories", 0, id="7")),
    ("duplicate file name", altered("images", 0, file_name="sub/b.png")),
]


@pytest.mark.parametrize(("kind", "content"), NOTED)
def test_harmless_oddities_are_read_and_noted(make: Make, kind: str, content: Json) -> None:
    data = read_coco(*make(content), progress=False)
    assert kinds(data) == {kind: 1}
    assert data.sizes.tolist() == [[20, 30], [20, 30]]
    truth = data.ground_truth()
    assert truth.ann_image_ids.tolist() == [5, 0, 0]
    assert truth.ann_category_ids.tolist() == [0, 7, 0]
    assert truth.areas.tolist() == [29.5 * 19.5, 12, 30]


@pytest.mark.parametrize(
    ("box", "kind", "published", "trained"),
    [
        ([1, 1, 0, 5], "box of zero size", False, None),
        ([1, 1, 5, -5], "box of zero size", False, None),
        ([float("inf"), 1, 5, 5], "box not finite", False, None),
        ([1, 1, float("nan"), 5], "box not finite", False, None),
        ([1, 1, 10**400, 5], "box not finite", False, None),
        ([30, 1, 5, 5], "box outside image", True, None),
        ([-5, 1, 5, 5], "box outside image", True, None),
        ([1, 500, 5, 5], "box outside image", True, None),
        ([-1, 1, 5, 5], "box partly outside", True, [0, 1, 4, 6]),
        ([25, 15, 5.4, 5.1], "box partly outside", True, [25, 15, 30, 20]),
        ([1, 1, 1e308, 1e308], "box partly outside", True, [1, 1, 30, 20]),
        ([29.75, 1, 5, 5], "box partly outside", True, [29.75, 1, 30, 6]),
        ([20, 1, 1e-9, 5], "box of zero size", True, None),
        ([25, 15, 5 + 1e-9, 5], None, True, [25, 15, 30, 20]),
    ],
)
def test_bad_boxes_are_dropped_or_clipped_for_training_and_published_as_they_are(
    make: Make, box: list[float], kind: str | None, published: bool, trained: list[float] | None
) -> None:
    data = read_coco(*make(with_annotation(bbox=box)), progress=False)
    assert kinds(data) == ({kind: 1} if kind else {})
    truth = data.ground_truth()
    assert [box] == [b for b in truth.boxes.tolist() if b == box] if published else len(truth.boxes) == 3
    boxes = data.objects(0).boxes
    assert len(boxes) == data.num_objects[0] == (1 if trained is None else 2)
    if trained is not None:
        np.testing.assert_array_equal(boxes[1], np.array(trained, np.float32))


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(allow_nan=True, allow_infinity=True)] * 4), max_size=5),
    st.integers(0, 5000),
    st.integers(0, 5000),
)
def test_every_box_is_trained_on_or_told_about(boxes: list[tuple[float, ...]], height: int, width: int) -> None:
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    sizes = np.tile(np.array([[height, width]], np.int32), (len(xywh), 1))
    checks = check_boxes(xywh, sizes)
    told = np.stack(checks[:4]).sum(axis=0)
    assert (told <= 1).all()
    for k in np.flatnonzero(told == 0):
        x, y, w, h = xywh[k]
        assert w > 0
        assert h > 0
        assert x >= -1e-6
        assert y >= -1e-6
        assert not width or x + w <= width + 1e-6
        assert not height or y + h <= height + 1e-6


MASK = np.zeros((20, 30), np.uint8, order="F")
MASK[4:10, 6:16] = 1  # x 6, y 4, width 10, height 6
COMPRESSED = rle.encode(MASK)
FLAT = MASK.flatten(order="F")
EDGES = np.flatnonzero(np.diff(FLAT)) + 1
UNCOMPRESSED = np.diff(np.concatenate([[0], EDGES, [FLAT.size]])).tolist()
POLYGON = [[6, 4, 16, 4, 16, 10, 6, 10]]
SEGMENTATIONS = [
    {"size": [20, 30], "counts": COMPRESSED["counts"].decode()},
    {"size": [20, 30], "counts": UNCOMPRESSED},
    POLYGON,
]


@pytest.mark.parametrize("segmentation", [None, *SEGMENTATIONS])
def test_crowds_become_ignore_boxes_however_their_mask_is_written(make: Make, segmentation: Any) -> None:
    crowd = with_annotation(iscrowd=1, bbox=[6, 4, 10, 6], area=60)
    if segmentation is not None:
        crowd["annotations"][-1]["segmentation"] = segmentation
    data = read_coco(*make(crowd), progress=False)
    assert data.problems == ()
    assert data.objects(0).ignore_boxes.tolist() == [[6, 4, 16, 10]]
    assert len(data.objects(0).boxes) == data.num_objects[0] == 1
    assert data.ground_truth().iscrowd.tolist() == [False, True, False, False]
    assert len(data.boxes().boxes) == 3
    assert "1 crowd" in data.summary()


@pytest.mark.parametrize("segmentation", SEGMENTATIONS)
def test_a_missing_box_is_taken_from_the_segmentation(make: Make, segmentation: Any) -> None:
    content = with_annotation(segmentation=segmentation, iscrowd=1)
    del content["annotations"][-1]["bbox"]
    data = read_coco(*make(content), progress=False)
    assert kinds(data) == {"box from segmentation": 1}
    assert data.objects(0).ignore_boxes.tolist() == [[6, 4, 16, 10]]


@pytest.mark.parametrize(
    "segmentation",
    [
        [],
        [[1, 2, 3]],
        [["a"] * 6],
        "abc",
        {},
        {"size": [0, 30], "counts": "PPP"},
        {"size": [20, 30], "counts": [1, 2]},
        {"size": [20, 30], "counts": [-1, 601]},
        {"size": "20x30", "counts": "PPP"},
        {"size": [20, 30], "counts": [2**70, 1]},
        {"size": [20, 30], "counts": ""},
        {"size": [20, 30], "counts": "é"},
        {"size": [20, 30], "counts": "hb0/"},  # characters outside of 48..111
        {"size": [20, 30], "counts": "hb0p"},
        {"size": [20, 30], "counts": "h"},  # ends within a number
        {"size": [20, 30], "counts": "hb0P"},
        {"size": [20, 30], "counts": "h" * 100_000 + "0"},  # a number that never ends
        {"size": [20, 30], "counts": "O1hb0"},  # a run of -1
        {"size": [20, 30], "counts": "gb0"},  # one pixel short of 600
    ],
)
def test_a_missing_box_with_an_unusable_segmentation_is_malformed(make: Make, segmentation: Any) -> None:
    content = with_annotation(segmentation=segmentation)
    del content["annotations"][-1]["bbox"]
    data = read_coco(*make(content), on_error="skip", progress=False)
    assert kinds(data) == {"malformed annotation": 1}


@pytest.mark.parametrize("counts", [[600], [0, 0, 600], [7, 0, 593], "hb0", "00hb0"])
def test_a_mask_without_a_pixel_has_a_box_of_zero_size(make: Make, counts: Any) -> None:
    content = with_annotation(segmentation={"size": [20, 30], "counts": counts})
    del content["annotations"][-1]["bbox"]
    data = read_coco(*make(content), progress=False)
    assert kinds(data) == {"box of zero size": 1, "box from segmentation": 1}


def test_a_polygon_beyond_all_numbers_has_a_box_that_is_not_finite(make: Make) -> None:
    content = with_annotation(segmentation=[[10**400, 0.5, 0.5, 10**400, 3, 3]])
    del content["annotations"][-1]["bbox"]
    data = read_coco(*make(content), progress=False)
    assert kinds(data) == {"box not finite": 1, "box from segmentation": 1}


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_the_box_of_a_mask_is_that_of_pycocotools(height: int, width: int, data: st.DataObject) -> None:
    pixels = data.draw(st.lists(st.integers(0, 1), min_size=height * width, max_size=height * width))
    mask = np.array(pixels, np.uint8).reshape(height, width, order="F")
    encoded = rle.encode(mask)
    lengths = [len(list(run)) for _, run in itertools.groupby([0, *pixels])]  # the 0 makes the first run background
    for counts in (encoded["counts"].decode(), [lengths[0] - 1, *lengths[1:]]):
        segmentation = {"size": [height, width], "counts": counts}
        assert box_of_segmentation({"segmentation": segmentation}) == rle.toBbox(encoded).tolist()


def test_the_box_of_a_large_mask_is_that_of_pycocotools() -> None:
    rows, columns = np.indices((3000, 2000))
    for radius in (900, 10):
        mask = np.asfortranarray((rows - 1400) ** 2 + (columns - 1000) ** 2 < radius**2).astype(np.uint8)
        encoded = rle.encode(mask)
        segmentation = {"size": [3000, 2000], "counts": encoded["counts"].decode()}
        assert box_of_segmentation({"segmentation": segmentation}) == rle.toBbox(encoded).tolist()


@settings(max_examples=500, deadline=None)
@given(
    st.integers(1, 5),
    st.integers(1, 5),
    st.text(max_size=8) | st.text([chr(c) for c in range(48, 112)], max_size=8) | st.text("0123456789OP", max_size=8),
)
def test_any_text_as_a_mask_is_refused_or_has_a_box_inside_the_image(height: int, width: int, counts: str) -> None:
    box = box_of_segmentation({"segmentation": {"size": [height, width], "counts": counts}})
    if box is not None:
        x, y, w, h = box
        assert min(x, y, w, h) >= 0
        assert x + w <= width
        assert y + h <= height


def test_ignore_marks_are_ignored_in_training_and_counted_in_evaluation_as_pycocotools_does(make: Make) -> None:
    data = read_coco(*make(with_annotation(ignore=1)), progress=False)
    assert data.objects(0).ignore_boxes.tolist() == [[1, 1, 3, 3]]
    assert data.num_objects.tolist() == [1, 2]
    assert data.ground_truth().iscrowd.sum() == 0
    assert len(data.ground_truth().boxes) == 4


def test_truncated_images_are_found_by_decoding(make: Make) -> None:
    files = make(minimal())
    Image.effect_noise((30, 20), 50).save(files[1] / "a.jpg")
    whole = (files[1] / "a.jpg").read_bytes()
    (files[1] / "a.jpg").write_bytes(whole[: len(whole) - 60])
    assert len(read_coco(*files, verify="header", progress=False)) == 2
    assert len(read_coco(*files, verify="none", progress=False)) == 2
    for verify in ("decode", "auto"):
        with pytest.raises(DatasetError, match="truncated"):
            read_coco(*files, verify=verify, progress=False)


def test_verify_none_trusts_the_file_and_opens_images_only_where_it_lacks_a_size(make: Make) -> None:
    content = altered("images", 0, width=..., height=...)
    content["images"][1]["file_name"] = "not there.jpg"
    data = read_coco(*make(content), verify="none", progress=False)
    assert data.sizes.tolist() == [[20, 30], [20, 30]]
    content["images"][0]["file_name"] = "gone.jpg"
    with pytest.raises(DatasetError, match="missing image"):
        read_coco(*make(content), verify="none", progress=False)


def turned(tmp_path: Path, orientations: list[int], stated: list[tuple[int, int]]) -> tuple[Path, Path]:
    """Images stored as 30 x 20 (width x height) with EXIF orientations; `stated` is (width, height) in the JSON."""
    images = tmp_path / "images"
    images.mkdir()
    for k, orientation in enumerate(orientations):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(
            images / f"{k}.png", exif=exif
        )
    content = minimal() | {"annotations": []}
    content["images"] = [{"id": k, "file_name": f"{k}.png", "width": w, "height": h} for k, (w, h) in enumerate(stated)]
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path / "train.json", images


@pytest.mark.parametrize(
    ("orientations", "stated", "applied", "mismatches"),
    [
        ([1, 1], [(30, 20), (30, 20)], False, 0),
        ([6, 1, 3], [(20, 30), (30, 20), (30, 20)], True, 0),
        ([6, 1, 3], [(30, 20), (30, 20), (30, 20)], False, 0),
        ([6, 8, 5], [(20, 30), (20, 30), (30, 20)], True, 1),
        ([6, 8, 7], [(20, 30), (30, 20), (30, 20)], False, 1),
        ([3, 3], [(30, 20), (30, 20)], False, 0),  # nothing tells
    ],
)
def test_exif_is_decided_by_what_the_sizes_in_the_file_say(
    tmp_path: Path, orientations: list[int], stated: list[tuple[int, int]], applied: bool, mismatches: int
) -> None:
    files = turned(tmp_path, orientations, stated)
    data = read_coco(*files, on_error="skip", progress=False)
    assert data.apply_exif is applied
    assert kinds(data) == ({"image size mismatch": mismatches} if mismatches else {})
    assert "EXIF" in data.summary()
    for i in range(len(data)):
        assert decode_image(data.path(i), apply_exif=data.apply_exif).shape[:2] == tuple(data.sizes[i])


def test_orientations_that_nothing_decides_are_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = turned(tmp_path, [6, 6], [(20, 30), (30, 20)])
    data = read_coco(*files, on_error="skip", progress=True)
    assert (data.apply_exif, data.overrides_exif) == (False, True)
    told = " ".join(capsys.readouterr().err.split())
    assert "warning:" in told
    assert "set data.exif to apply or ignore" in told
    assert not read_coco(*files, on_error="skip", exif="apply", progress=False).overrides_exif


def test_exif_can_be_forced_either_way(tmp_path: Path) -> None:
    files = turned(tmp_path, [6, 6, 1], [(20, 30), (20, 30), (30, 20)])
    assert len(read_coco(*files, exif="apply", progress=False)) == 3
    data = read_coco(*files, exif="ignore", on_error="skip", progress=False)
    assert (data.apply_exif, len(data), kinds(data)) == (False, 1, {"image size mismatch": 2})


def scattered(n: int, *, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """(n, 4) xywh well inside an image of 300 x 200."""
    rng = np.random.default_rng(seed)
    size = rng.uniform(5, 80, (n, 2))
    corner = rng.uniform(0, 1, (n, 2)) * (np.array([300, 200]) - size)
    return np.concatenate([corner, size], axis=1)


def boxes_file(path: Path, boxes: np.ndarray[Any, Any], width: int = 300, height: int = 200) -> Path:
    content = minimal()
    content["images"] = [{"id": 1, "file_name": "a.jpg", "width": width, "height": height}]
    content["annotations"] = [
        {"id": k, "image_id": 1, "category_id": 0, "bbox": box} for k, box in enumerate(boxes.tolist())
    ]
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("mistake", "word"),
    [("corners", "corners instead of xywh"), ("normalised", "fractions of the image"), ("swapped", "exchanged")],
)
def test_mistaken_formats_are_recognised_and_refused(tmp_path: Path, mistake: str, word: str) -> None:
    boxes = scattered(200)
    width, height = 300, 200
    if mistake == "corners":
        boxes[:, 2:] += boxes[:, :2]
    elif mistake == "normalised":
        boxes /= [300, 200, 300, 200]
    else:
        boxes[:, :2] += (np.array([300, 200]) - boxes[:, 2:] - boxes[:, :2]) * [0.9, 0]  # mostly at the right
        width, height = 200, 300
    path = boxes_file(tmp_path / "a.json", boxes, width, height)
    with pytest.raises(DatasetError, match=word) as refusal:
        read_coco(path, None, progress=False)
    assert re.search(r"\d+ % of 200 boxes", str(refusal.value))
    is_readable(str(refusal.value))


def test_a_mistaken_format_is_a_loud_warning_when_told_to_skip(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    boxes = scattered(50)
    boxes[:, 2:] += boxes[:, :2]
    data = read_coco(boxes_file(tmp_path / "a.json", boxes), None, on_error="skip")
    assert kinds(data)["format"] == 1
    assert "warning: a.json: " in capsys.readouterr().err


def test_few_boxes_are_too_little_evidence_to_refuse(tmp_path: Path) -> None:
    boxes = scattered(9)
    boxes[:, 2:] += boxes[:, :2]
    data = read_coco(boxes_file(tmp_path / "a.json", boxes), None, progress=False)
    assert kinds(data)["format"] == 1


def test_right_formats_are_not_suspected(tmp_path: Path) -> None:
    for n in (1, 3, 10, 200):
        for seed in range(10):
            data = read_coco(boxes_file(tmp_path / "a.json", scattered(n, seed=seed)), None, progress=False)
            assert "format" not in kinds(data)
    whole = np.tile([[0.0, 0, 300, 200]], (20, 1))  # every object fills its image
    assert read_coco(boxes_file(tmp_path / "a.json", whole), None, progress=False).problems == ()


def test_centres_instead_of_corners_are_a_warning(tmp_path: Path) -> None:
    boxes = scattered(300)
    boxes[:, :2] += boxes[:, 2:] / 2
    data = read_coco(boxes_file(tmp_path / "a.json", boxes), None, progress=False)
    assert [p.kind for p in data.problems].count("format") == 1
    assert any("centres" in p.detail for p in data.problems)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "the file is empty"),
        ("{\n  'images': []}", r"no valid JSON: .* at line 2, column 3"),
        ('{"images": [], "annot', r"no valid JSON: .* at line 1"),
        ("<annotation></annotation>", "XML"),
        ("version https://git-lfs.github.com/spec/v1", "Git LFS pointer"),
        ("[]", "got a list"),
        ('[{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "score": 0.5}]', "COCO results file"),
        ("{}", r"without a list of images and annotations and categories \(its keys: none\)"),
        ('{"images": [], "categories": []}', "as COCO publishes for its test images"),
        ('{"images": {}, "annotations": [], "categories": []}', "without a list of images"),
        ('{"shapes": [], "imagePath": "a.jpg"}', "labelme"),
        ('{"type": "FeatureCollection", "features": []}', "GeoJSON"),
        ('{"images": [], "annotations": [{"caption": "a dog"}]}', "captions"),
        ('{"images": [], "annotations": [{"segments_info": []}], "categories": []}', "panoptic"),
        ("3", "got 3"),
        ("[" * 100_000, "no valid JSON"),
        ('{"a": ' + "1" * 5000 + "}", "no valid JSON"),
    ],
)
def test_files_that_are_no_coco_files_are_named(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(DatasetError, match=reason) as refusal:
        read_coco(path, None)
    assert str(path) in str(refusal.value)
    is_readable(str(refusal.value))


def test_other_encodings_of_json_are_read_and_broken_ones_refused(make: Make) -> None:
    annotations, images = make(minimal())
    text = annotations.read_text()
    for encoding in ("utf-8-sig", "utf-16", "utf-32"):
        annotations.write_text(text, encoding=encoding)
        assert len(read_coco(annotations, images, progress=False)) == 2
    annotations.write_bytes(text.replace("dog", "d\u00e9g").encode("latin-1"))
    if b"\xe9" in annotations.read_bytes():
        with pytest.raises(DatasetError, match="no valid JSON"):
            read_coco(annotations, images, progress=False)


def test_missing_paths_name_the_nearest(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    annotations, images = make(minimal())
    with pytest.raises(DatasetError, match=r"trian\.json: no such annotation file; nearest in .*: train\.json"):
        read_coco(annotations.with_name("trian.json"), images)
    with pytest.raises(DatasetError, match=r"no such image folder; nearest in .*: images"):
        read_coco(annotations, images.with_name("image"))
    with pytest.raises(DatasetError, match=r"no such annotation file; .* has no xyzzy"):
        read_coco(annotations.parent / "xyzzy" / "deep" / "a.json", images)
    monkeypatch.chdir(annotations.parent)
    with pytest.raises(DatasetError, match=r"has no xyzzy, but .*; relative paths start at the folder"):
        read_coco(Path("xyzzy/deep/a.json"), images)


@pytest.mark.parametrize(
    ("declared", "mistake"),
    [
        ([], "must declare at least one class, got none"),
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "category id 1 must stand for one class, got 'a' and 'b'"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "category name 'a' must belong to one id, got ids 1, 2"),
        ([{"id": None, "name": "a"}], "must have an integer id, got None"),
        ([{"id": True, "name": "a"}], "must have an integer id, got True"),
        ([{"id": 1}], "must have a name, got None"),
        ([{"id": 1, "name": 3}], "must have a name, got 3"),
        (["a"], "must be an object with id and name, got 'a'"),
    ],
)
def test_contradictory_categories_are_refused(make: Make, declared: list[Any], mistake: str) -> None:
    content = minimal() | {"categories": declared, "annotations": []}
    for on_error in ("fail", "skip"):
        with pytest.raises(DatasetError, match=mistake):
            read_coco(*make(content), on_error=on_error, progress=False)


def test_categories_of_training_are_matched_by_name_whatever_their_ids(make: Make) -> None:
    training = Categories((10, 20, 30), ("dog", "cat", "unused"))
    data = read_coco(*make(minimal()), categories=training, progress=False)
    assert data.categories == Categories((7, 0, 3), ("dog", "cat", "unused"))
    assert data.objects(1).labels.tolist() == [0, 1]
    assert data.ground_truth().ann_category_ids.tolist() == [0, 7, 0]


def test_differing_category_names_are_refused_with_both_sides(make: Make) -> None:
    training = Categories((1, 2, 3, 4), ("Dog", "cat", "unused", "bird"))
    with pytest.raises(DatasetError) as refusal:
        read_coco(*make(minimal()), categories=training, progress=False)
    text = str(refusal.value)
    assert "only in this file:\n    'dog'  (nearest on the other side: 'Dog')" in text
    assert "'bird'" in text


def test_names_with_dots_are_judged_by_where_they_lead_and_links_are_followed(make: Make, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    Image.new("RGB", (30, 20)).save(outside / "c.jpg")
    Image.new("RGB", (30, 20)).save(tmp_path / "d.jpg")
    annotations, images = make(altered("images", 0, file_name="sub/../a.jpg"))
    (images / "link").symlink_to(outside)
    assert len(read_coco(annotations, images, progress=False)) == 2
    make(altered("images", 0, file_name="link/c.jpg"))  # the folder's owner linked it in
    assert len(read_coco(annotations, images, progress=False)) == 2
    make(altered("images", 0, file_name="link/../d.jpg"))  # inside by its letters, outside by the link
    with pytest.raises(DatasetError, match="leads out of the image folder"):
        read_coco(annotations, images, progress=False)


def test_a_folder_too_many_or_too_few_in_the_names_is_pointed_out(make: Make) -> None:
    annotations, images = make(altered("images", 0, file_name="train/a.jpg"))
    with pytest.raises(DatasetError, match=r"take the folders\s+out of\s+file_name"):
        read_coco(annotations, images, progress=False)
    make(altered("images", 0, file_name="b.png"))
    with pytest.raises(DatasetError, match=r"set\s+the\s+image\s+folder\s+to\s+that"):
        read_coco(annotations, images, progress=False)


def test_control_characters_of_the_file_do_not_reach_the_terminal(make: Make, tmp_path: Path) -> None:
    listed = tmp_path / "list.tsv"
    with pytest.raises(DatasetError) as refusal:
        read_coco(*make(altered("images", 0, file_name="x\x1b[31m\n\t.jpg")), progress=False, problems_file=listed)
    assert "\x1b" not in str(refusal.value)
    assert len(listed.read_text().splitlines()) == 1


def test_all_problems_are_told_at_once(make: Make) -> None:
    content = with_annotation(image_id=77)
    content["annotations"] += [{"id": 1, "image_id": 5, "category_id": 99, "bbox": [0, 0, 1, 1]}]
    content["images"][0]["file_name"] = "gone.jpg"
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
        mine = [a for a in content["annotations"] if a["image_id"] == image_id]
        here = truth.ann_image_ids == image_id
        assert truth.areas[here].tolist() == [a["area"] for a in mine]
        assert truth.ann_category_ids[here].tolist() == [a["category_id"] for a in mine]
        assert data.objects(i).boxes[:, 0].tolist() == [a["bbox"][0] for a in mine]


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
        else:
            assert not isinstance(value, list | dict | set)
            assert not isinstance(value, tuple) or len(value) < 100
    pickled = pickle.dumps(data)
    assert len(pickled) < 60 * n + 60 * 4 * n
    again = pickle.loads(pickled)
    assert again.file_name(n - 1) == f"folder/{n - 1:012d}.jpg"
    assert again.problems == data.problems
    np.testing.assert_array_equal(again.objects(3).boxes, data.objects(3).boxes)


def test_how_images_were_checked_does_not_change_what_is_read(make: Make) -> None:
    files = make(minimal())
    opened = [read_coco(*files, verify=v, progress=False) for v in ("none", "header", "decode", "decode")]
    for data in opened[1:]:
        for key, value in vars(opened[0]).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, getattr(data, key), err_msg=key)


def test_dark_16_bit_images_are_pointed_out(make: Make) -> None:
    annotations, images = make(minimal())
    Image.fromarray(np.full((20, 30), 4000, np.uint16)).save(images / "sub" / "b.png")
    data = read_coco(annotations, images, progress=False)
    assert kinds(data) == {"dark 16-bit images": 1}
    assert "I;16 (grey, scaled by 1/257)" in data.summary()


def test_how_unusual_pictures_are_read_is_said(make: Make) -> None:
    annotations, images = make(minimal())
    Image.new("1", (30, 20)).save(images / "sub" / "b.png")
    assert "1 (black and white)" in read_coco(annotations, images, progress=False).summary()
    cv2.imwrite(str(images / "sub" / "b.png"), np.zeros((20, 30, 3), np.uint16))
    assert "RGB;16 (high byte of 16 bits)" in read_coco(annotations, images, progress=False).summary()


def test_a_list_of_problems_that_were_mended_is_gone(make: Make, tmp_path: Path) -> None:
    (tmp_path / "problems.tsv").write_text("of an earlier attempt")
    read_coco(*make(minimal()), progress=False, problems_file=tmp_path / "problems.tsv")
    assert not (tmp_path / "problems.tsv").exists()


values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 8),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 40), max_size=5),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 2),
       st.sampled_from(["id", "image_id", "category_id", "bbox", "file_name", "width", "iscrowd", "ignore", "area", "name",
                        "segmentation", None]), values), max_size=4))  # fmt: skip
def test_whatever_stands_in_the_file_it_opens_or_is_refused_and_nothing_is_lost_in_silence(
    tmp_path: Path, edits: list[tuple[str, int, str | None, Any]]
) -> None:
    content = copy.deepcopy(minimal())
    for where, k, key, value in edits:
        entry = content[where][k % len(content[where])]
        if key is None or not isinstance(entry, dict):
            content[where][k % len(content[where])] = value
        else:
            entry[key] = value
    (tmp_path / "fuzz.json").write_text(json.dumps(content))
    images = tmp_path / "images"
    if not images.exists():
        (images / "sub").mkdir(parents=True)
        for name in ("a.jpg", "sub/b.png"):
            Image.new("RGB", (30, 20)).save(images / name)
    for folder in (None, images):
        try:
            data = read_coco(tmp_path / "fuzz.json", folder, on_error="skip", progress=False)
        except DatasetError as error:
            is_readable(str(error))
            continue
        data.summary()
        trained = sum(len(data.objects(i).boxes) + len(data.objects(i).ignore_boxes) for i in range(len(data)))
        assert len(data) == len(content["images"]) or data.problems
        assert trained == len(content["annotations"]) or data.problems
        assert data.num_objects.sum() == len(data.boxes().boxes)


@pytest.mark.parametrize(("folder", "name"), [("bccd", "bccd"), ("coco", "coco2017")])
def test_of_public_data_that_is_not_there_the_error_says_how_to_fetch_it(
    folder: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(
        DatasetError, match=rf"no such annotation file; python tools/get_data.py {name} makes .*data/{folder}"
    ):
        read_coco(tmp_path / "data" / folder / "annotations" / "train.json", None)
