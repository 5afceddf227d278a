"""Stratified splits and folds: every image is in one part, every class is in all parts, and files stay together."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.dataset_tools.stratify import split_coco, split_file, stratify, write_folds
from detector.errors import DatasetError, UserError
from tests.tiny import write_coco
from tools import get_data


def content_of(classes: list[list[int]], files: list[int] | None = None) -> dict[str, Any]:
    """One image per list of the classes in it; `files` numbers the file of each."""
    names = files or list(range(len(classes)))
    images = [{"id": i, "file_name": f"{name}.jpg"} for i, name in enumerate(names)]
    pairs = [(i, c) for i, present in enumerate(classes) for c in present]
    annotations = [{"id": k, "image_id": i, "category_id": c} for k, (i, c) in enumerate(pairs)]
    categories = [{"id": c, "name": f"class {c}"} for c in range(1, 7)]
    return {"info": {"year": 1}, "images": images, "annotations": annotations, "categories": categories}


def images_with(part: dict[str, Any], category: int) -> int:
    return len({a["image_id"] for a in part["annotations"] if a["category_id"] == category})


def equal(k: int) -> list[float]:
    return [1 / k] * k


def test_an_empty_file_gives_empty_parts() -> None:
    assert stratify(content_of([]), equal(5), seed=0) == ({}, {})
    parts = split_coco(content_of([]), {"val": 0.2}, seed=0)
    assert [len(part["images"]) for part in parts.values()] == [0, 0]


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.lists(st.integers(1, 6), max_size=4), max_size=60),
    shares=st.sampled_from([{"val": 0.2}, {"val": 0.15, "test": 0.15}, {"val": 0.5}]),
    seed=st.integers(0, 9),
)
def test_every_image_is_in_one_part_with_its_annotations(
    classes: list[list[int]], shares: dict[str, float], seed: int
) -> None:
    content = content_of(classes)
    parts = split_coco(content, shares, seed=seed)
    assert parts == split_coco(content, shares, seed=seed), "the split depends on the seed alone"
    for kind in ("images", "annotations"):
        ids = [item["id"] for part in parts.values() for item in part[kind]]
        assert sorted(ids) == [item["id"] for item in content[kind]]
    for part in parts.values():
        assert {a["image_id"] for a in part["annotations"]} <= {i["id"] for i in part["images"]}
        assert part["info"] == content["info"]
        assert part["categories"] == content["categories"]


def test_every_part_gets_its_share_of_every_class() -> None:
    """A common class, one in every tenth image, one in five images, one in two, and images without annotations."""
    rows = [[1] + [2] * (i % 10 == 0) + [3] * (i in (3, 50, 77, 120, 199)) + [4] * (i in (8, 9)) for i in range(200)]
    content = content_of([*rows, *([[]] * 50)])
    for seed in range(5):
        parts = split_coco(content, {"val": 0.2}, seed=seed)
        assert len(parts["val"]["images"]) == pytest.approx(50, abs=4)
        assert images_with(parts["val"], 1) == pytest.approx(40, abs=4)
        assert images_with(parts["val"], 2) == pytest.approx(4, abs=1)
        assert images_with(parts["val"], 3) == 1
        assert images_with(parts["val"], 4) == images_with(parts["train"], 4) == 1
    val = {seed: [i["id"] for i in split_coco(content, {"val": 0.2}, seed=seed)["val"]["images"]] for seed in (0, 1)}
    assert val[0] != val[1]


@pytest.mark.parametrize("images", [3, 4, 10])
def test_every_part_gets_images_of_a_class_that_has_enough(images: int) -> None:
    for classes in ([1], list[int]()):
        parts = split_coco(content_of([classes] * images), {"val": 0.01, "test": 0.01}, seed=0)
        assert [len(part["images"]) for part in parts.values()] == [images - 2, 1, 1]


def test_an_image_listed_twice_is_not_in_two_parts() -> None:
    content = content_of([[1]] * 40, files=[i // 2 for i in range(40)])
    parts = split_coco(content, {"val": 0.3}, seed=0)
    names = [{i["file_name"] for i in part["images"]} for part in parts.values()]
    assert not names[0] & names[1]
    assert names[1]


def test_entries_without_an_image_are_left_in_the_training_set() -> None:
    content = content_of([[1]] * 10)
    odd = [{"id": 98, "image_id": 777, "category_id": 1}, {"id": 99}, "nonsense"]
    content["annotations"] += odd
    content["images"].append(None)
    parts = split_coco(content, {"val": 0.3}, seed=0)
    assert [a for a in parts["train"]["annotations"] if a in odd] == odd
    assert None in parts["train"]["images"]


@settings(max_examples=60, deadline=None)
@given(
    classes=st.lists(st.integers(1, 6), min_size=1, max_size=60), k=st.integers(2, 6), seed=st.integers(0, 9)
)  # fmt: skip
def test_fold_sizes_differ_by_at_most_one_where_each_image_has_one_class(classes: list[int], k: int, seed: int) -> None:
    fold_of = stratify(content_of([[c] for c in classes]), equal(k), seed=seed).part_of
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
def test_the_rarest_class_is_in_as_many_folds_as_possible(classes: list[list[int]], k: int, seed: int) -> None:
    content = content_of(classes)
    fold_of, images_with = stratify(content, equal(k), seed=seed)
    assert stratify(content, equal(k), seed=seed).part_of == fold_of, "the folds depend on the seed alone"
    assert sorted(fold_of) == sorted(str(i) for i in range(len(classes)))
    if images_with:
        rarest = min(images_with.values(), key=len)
        fewest = [images for images in images_with.values() if len(images) == len(rarest)]
        if len(fewest) == 1:
            assert len({fold_of[image] for image in rarest}) == min(k, len(rarest))


@pytest.mark.parametrize("seed", range(8))
def test_images_assigned_for_a_rarer_class_count_for_their_other_classes(seed: int) -> None:
    fold_of = stratify(content_of([[1, 2], [1], [2]]), equal(2), seed=seed).part_of
    assert fold_of["0"] != fold_of["1"]
    assert fold_of["0"] != fold_of["2"]


def test_images_of_one_file_are_in_one_fold() -> None:
    content = content_of([[1 + i % 3] for i in range(40)], files=[i // 4 for i in range(40)])
    fold_of, images_with = stratify(content, equal(5), seed=3)
    for file in range(10):
        assert len({fold_of[str(i)] for i in range(4 * file, 4 * file + 4)}) == 1
    assert len(set(fold_of.values())) == 5
    assert {len(images) for images in images_with.values()} == {10}, "files, not entries"


def test_every_image_is_in_one_validation_fold_and_k_minus_one_training_sets(tmp_path: Path) -> None:
    content = content_of([[1, 2], [1], [2], [1], [1, 3], [], [2]])
    content["annotations"].append({"id": 99, "image_id": 12345, "category_id": 1})  # without an image
    (tmp_path / "all.json").write_text(json.dumps(content))
    folds, warnings = write_folds(tmp_path / "all.json", 3, output_dir=tmp_path / "folds", seed=1)
    parts = [(json.loads(fold.train.read_text()), json.loads(fold.val.read_text())) for fold in folds]
    for kind in ("images", "annotations"):
        whole = sorted(item["id"] for item in content[kind])
        validated = sorted(item["id"] for _, val in parts for item in val[kind])
        assert validated == [i for i in whole if i != 99]
        for train, val in parts:
            assert sorted(item["id"] for part in (train, val) for item in part[kind]) == whole
            assert train["categories"] == val["categories"] == content["categories"]
    assert warnings == [
        "all.json: class class 3 is in 1 image, fewer than 3 folds: in a fold without it, its AP is undefined and left "
        "out of the mean"
    ]


@pytest.mark.parametrize("k", [0, 1, 5])
def test_fewer_than_two_folds_and_more_folds_than_images_are_refused(tmp_path: Path, k: int) -> None:
    (tmp_path / "all.json").write_text(json.dumps(content_of([[1], [2], [1], []])))
    with pytest.raises(DatasetError, match=f"got {k} for the 4 images"):
        write_folds(tmp_path / "all.json", k, output_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_tool_writes_the_parts_and_prints_their_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = write_coco(tmp_path / "all.json", 20, seed=1)
    argv = ["split", str(annotations), "--val", "0.2", "--test", "0.1", "--output-dir", str(tmp_path / "parts")]
    assert get_data.main(argv) == 0
    printed = capsys.readouterr().out
    counts: Counter[str] = Counter()
    for name in ("train", "val", "test"):
        part = json.loads((tmp_path / "parts" / f"{name}.json").read_text())
        counts[name] = len(part["images"])
        assert f"{name}.json" in printed
    assert sum(counts.values()) == 20
    assert min(counts.values()) >= 1
    assert "square" in printed
    assert get_data.main(argv) == 2, "nothing is overwritten"
    assert "must not exist yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--val", "1.2"], "shares must be"),
        (["--val", "0"], "shares must be"),
        (["--val", "0.6", "--test", "0.4"], "shares"),
    ],
)
def test_shares_that_leave_nothing_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = write_coco(tmp_path / "all.json", 3, seed=1)
    assert get_data.main(["split", str(annotations), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert [p.name for p in tmp_path.glob("*.json")] == ["all.json"]


def test_a_file_of_another_kind_and_a_single_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DatasetError, match="COCO"):
        split_file(tmp_path / "x.json", {"val": 0.2}, output_dir=tmp_path)
    one = write_coco(tmp_path / "one.json", 1, seed=0)
    with pytest.raises(UserError, match="must have images for val too"):
        split_file(one, {"val": 0.2}, output_dir=tmp_path)
