"""Dividing a dataset: nothing is lost, nothing is in two parts, and rare classes are in all of them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from detector.dataset_tools.stratify import split_coco, split_file
from detector.errors import DatasetError
from tests.tiny import write_coco
from tools import get_data


def content_of(classes: list[list[int]]) -> dict[str, Any]:
    """One image per list of the classes in it."""
    images = [{"id": i, "file_name": f"{i}.jpg"} for i in range(len(classes))]
    pairs = [(i, c) for i, found in enumerate(classes) for c in found]
    annotations = [{"id": k, "image_id": i, "category_id": c} for k, (i, c) in enumerate(pairs)]
    return {"info": {"year": 1}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "a"}]}


def images_with(part: dict[str, Any], category: int) -> int:
    return len({a["image_id"] for a in part["annotations"] if a["category_id"] == category})


def test_nothing_gives_nothing() -> None:
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
    assert parts == split_coco(content, shares, seed=seed), "the seed decides"
    for kind in ("images", "annotations"):
        entries = [entry["id"] for part in parts.values() for entry in part[kind]]
        assert sorted(entries) == [entry["id"] for entry in content[kind]]
    for part in parts.values():
        assert {a["image_id"] for a in part["annotations"]} <= {i["id"] for i in part["images"]}
        assert part["info"] == content["info"]
        assert part["categories"] == content["categories"]


def test_classes_are_shared_out_as_the_images_are() -> None:
    """A common class, one in every tenth image, one in five images, one in two, and images without any object."""
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


def test_a_picture_that_was_annotated_twice_is_not_in_two_parts() -> None:
    content = content_of([[1]] * 40)
    for image in content["images"]:
        image["file_name"] = f"{image['id'] // 2}.jpg"
    parts = split_coco(content, {"val": 0.3}, seed=0)
    names = [{i["file_name"] for i in part["images"]} for part in parts.values()]
    assert not names[0] & names[1]
    assert names[1]


def test_what_belongs_to_no_image_is_left_to_the_training_set() -> None:
    content = content_of([[1]] * 10)
    odd = [{"id": 98, "image_id": 777, "category_id": 1}, {"id": 99}, "nonsense"]
    content["annotations"] += odd
    content["images"].append(None)
    parts = split_coco(content, {"val": 0.3}, seed=0)
    assert [a for a in parts["train"]["annotations"] if a in odd] == odd
    assert None in parts["train"]["images"]


def test_the_tool_writes_files_that_say_what_they_hold(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    annotations = write_coco(tmp_path / "all.json", 20, seed=1)
    argv = ["split", str(annotations), "--val", "0.2", "--test", "0.1", "--output-dir", str(tmp_path / "parts")]
    assert get_data.main(argv) == 0
    told = capsys.readouterr().out
    counts: Counter[str] = Counter()
    for name in ("train", "val", "test"):
        part = json.loads((tmp_path / "parts" / f"{name}.json").read_text())
        counts[name] = len(part["images"])
        assert f"{name}.json" in told
    assert sum(counts.values()) == 20
    assert min(counts.values()) >= 1
    assert "square" in told
    assert get_data.main(argv) == 2, "nothing is written over"
    assert "must not be there yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--val", "1.2"], "shares must be"),
        (["--val", "0"], "shares must be"),
        (["--val", "0.6", "--test", "0.4"], "shares"),
    ],
)
def test_shares_that_leave_nothing_are_refused(
    arguments: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    annotations = write_coco(tmp_path / "all.json", 3, seed=1)
    assert get_data.main(["split", str(annotations), *arguments]) == 2
    assert told in capsys.readouterr().err
    assert [p.name for p in tmp_path.glob("*.json")] == ["all.json"]


def test_a_file_of_another_kind_and_one_image_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("[]")
    with pytest.raises(DatasetError, match="COCO"):
        split_file(tmp_path / "x.json", {"val": 0.2}, output_dir=tmp_path)
    one = write_coco(tmp_path / "one.json", 1, seed=0)
    with pytest.raises(ValueError, match="must have images for val too"):
        split_file(one, {"val": 0.2}, output_dir=tmp_path)
