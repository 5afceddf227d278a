"""Boxes of segmentations equal those of pycocotools, and no text makes one outside the image."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as rle

from detector.datasets.opening import read_coco
from detector.datasets.segmentation import box_of_segmentation
from tests.datasets.coco_files import Make, kinds, with_annotation

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
    assert data.findings == ()
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
