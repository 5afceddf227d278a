"""Folds: every image is measured by once, every class is in all of them alike, and images of one file stay together."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.dataset_tools.folds import deal, write_folds
from detector.errors import DatasetError


def content_of(classes: list[list[int]], files: list[int] | None = None) -> dict[str, Any]:
    """One image per list of the classes in it; `files` names the file of each."""
    names = files or list(range(len(classes)))
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(names)]
    pairs = [(i, c) for i, found in enumerate(classes) for c in found]
    annotations = [{"id": k, "image_id": i, "category_id": c} for k, (i, c) in enumerate(pairs)]
    categories = [{"id": c, "name": f"class {c}"} for c in range(1, 7)]
    return {"info": {"year": 1}, "images": images, "annotations": annotations, "categories": categories}


def test_nothing_gives_nothing() -> None:
    assert deal(content_of([]), 5, seed=0) == ({}, {})


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.integers(1, 6), min_size=1, max_size=60), k=st.integers(2, 6), seed=st.integers(0, 9)
)  # fmt: skip
def test_images_of_one_class_each_are_shared_out_to_within_one(classes: list[int], k: int, seed: int) -> None:
    fold_of, _ = deal(content_of([[c] for c in classes]), k, seed=seed)
    for category in set(classes):
        counts = Counter(dict.fromkeys(range(k), 0))
        counts.update(fold_of[str(i)] for i, c in enumerate(classes) if c == category)
        assert max(counts.values()) - min(counts.values()) <= 1


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.lists(st.integers(1, 6), max_size=4), min_size=6, max_size=40),
    k=st.integers(2, 6),
    seed=st.integers(0, 9),
)
def test_the_rarest_class_is_in_as_many_folds_as_it_can_be(classes: list[list[int]], k: int, seed: int) -> None:
    content = content_of(classes)
    fold_of, images_with = deal(content, k, seed=seed)
    assert deal(content, k, seed=seed)[0] == fold_of, "the seed decides"
    assert sorted(fold_of) == sorted(str(i) for i in range(len(classes)))
    if images_with:
        rarest = min(images_with.values(), key=len)
        fewest = [images for images in images_with.values() if len(images) == len(rarest)]
        if len(fewest) == 1:
            assert len({fold_of[image] for image in rarest}) == min(k, len(rarest))


@pytest.mark.parametrize("seed", range(8))
def test_a_class_is_shared_out_counting_what_came_along_with_rarer_ones(seed: int) -> None:
    fold_of, _ = deal(content_of([[1, 2], [1], [2]]), 2, seed=seed)
    assert fold_of["0"] != fold_of["1"]
    assert fold_of["0"] != fold_of["2"]


def test_images_of_one_file_are_in_one_fold() -> None:
    content = content_of([[1 + i % 3] for i in range(40)], files=[i // 4 for i in range(40)])
    fold_of, images_with = deal(content, 5, seed=3)
    for file in range(10):
        assert len({fold_of[str(i)] for i in range(4 * file, 4 * file + 4)}) == 1
    assert len(set(fold_of.values())) == 5
    assert {len(images) for images in images_with.values()} == {10}, "pictures, not entries"


def test_written_folds_hold_everything_once_to_measure_and_k_minus_one_times_to_learn(tmp_path: Path) -> None:
    content = content_of([[1, 2], [1], [2], [1], [1, 3], [], [2]])
    content["annotations"].append({"id": 99, "image_id": 12345, "category_id": 1})  # of no image
    (tmp_path / "all.json").write_text(json.dumps(content))
    folds, warnings = write_folds(tmp_path / "all.json", 3, output_dir=tmp_path / "folds", seed=1)
    parts = [(json.loads(fold.train.read_text()), json.loads(fold.val.read_text())) for fold in folds]
    for kind in ("images", "annotations"):
        whole = sorted(entry["id"] for entry in content[kind])
        measured = sorted(entry["id"] for _, val in parts for entry in val[kind])
        assert measured == [i for i in whole if i != 99]
        for train, val in parts:
            assert sorted(entry["id"] for part in (train, val) for entry in part[kind]) == whole
            assert train["categories"] == val["categories"] == content["categories"]
    assert warnings == [
        "all.json: class class 3 is in 1 image, fewer than 3 folds: where a fold has none of it, its AP is undefined and "
        "in no mean"
    ]


@pytest.mark.parametrize("k", [0, 1, 5])
def test_more_folds_than_images_are_refused(tmp_path: Path, k: int) -> None:
    (tmp_path / "all.json").write_text(json.dumps(content_of([[1], [2], [1], []])))
    with pytest.raises(DatasetError, match=f"got {k} for the 4 images"):
        write_folds(tmp_path / "all.json", k, output_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
