"""Boxes against their images: dropped, clipped or kept, and signs of another box format."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.datasets.box_checks import check_boxes
from detector.datasets.opening import read_coco
from detector.errors import DatasetError
from tests.datasets.coco_files import Make, is_readable, kinds, minimal, with_annotation


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
def test_every_box_is_used_in_training_or_reported(boxes: list[tuple[float, ...]], height: int, width: int) -> None:
    xywh = np.array(boxes, np.float64).reshape(-1, 4)
    sizes = np.tile(np.array([[height, width]], np.int32), (len(xywh), 1))
    checks = check_boxes(xywh, sizes)
    reported = np.stack(checks[:4]).sum(axis=0)
    assert (reported <= 1).all()
    for k in np.flatnonzero(reported == 0):
        x, y, w, h = xywh[k]
        assert w > 0
        assert h > 0
        assert x >= -1e-6
        assert y >= -1e-6
        assert not width or x + w <= width + 1e-6
        assert not height or y + h <= height + 1e-6


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
def test_other_box_formats_are_recognised_and_refused(tmp_path: Path, mistake: str, word: str) -> None:
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
    with pytest.raises(DatasetError) as refusal:
        read_coco(path, None, progress=False)
    text = " ".join(str(refusal.value).split())
    assert word in text
    assert re.search(r"\d+ % of 200 boxes", text)
    is_readable(str(refusal.value))


def test_another_box_format_is_a_printed_warning_with_on_error_skip(
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
    assert kinds(data)["suspected format"] == 1
    assert "format" not in kinds(data)


def test_the_correct_format_is_not_suspected(tmp_path: Path) -> None:
    for n in (1, 3, 10, 200):
        for seed in range(10):
            data = read_coco(boxes_file(tmp_path / "a.json", scattered(n, seed=seed)), None, progress=False)
            assert not {"format", "suspected format"} & set(kinds(data))
    whole = np.tile([[0.0, 0, 300, 200]], (20, 1))  # every object fills its image
    assert read_coco(boxes_file(tmp_path / "a.json", whole), None, progress=False).findings == ()


def test_centres_instead_of_corners_are_a_warning(tmp_path: Path) -> None:
    boxes = scattered(300)
    boxes[:, :2] += boxes[:, 2:] / 2
    data = read_coco(boxes_file(tmp_path / "a.json", boxes), None, progress=False)
    (finding,) = [finding for finding in data.findings if finding.kind == "suspected format"]
    assert len(finding.problems) == 1
    assert "centres" in finding.problems[0].detail
