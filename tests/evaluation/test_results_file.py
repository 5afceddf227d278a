"""Results of programs that number images themselves are matched by file name and class name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from detector.datasets.opening import read_coco
from detector.errors import ResultsError
from detector.evaluation.coco_results import CocoResults
from detector.evaluation.results_file import load_results
from tests.datasets.coco_files import minimal

FILES = {0: "sub/b.png", 5: "a.jpg"}
CLASSES = {7: "dog", 0: "cat", 3: "unused"}


def record(image: int, category: int, **values: Any) -> dict[str, Any]:
    """A detection as predict writes it: with numbers of its own."""
    return {
        "image_id": 9 - image, "category_id": category + 100, "bbox": [1, 2, 3, 4], "score": 0.5,
        "file_name": f"images/{FILES[image]}", "category_name": CLASSES[category],
    } | values  # fmt: skip


def load(tmp_path: Path, records: list[dict[str, Any]], *, names: list[str] | None = None) -> tuple[CocoResults, str]:
    content = minimal()
    for image, name in zip(content["images"], names or [], strict=False):
        image["file_name"] = name
    (tmp_path / "a.json").write_text(json.dumps(content))
    (tmp_path / "r.json").write_text(json.dumps(records))
    data = read_coco(tmp_path / "a.json", None, progress=False)
    notes: list[str] = []
    results = load_results(
        tmp_path / "r.json", data.ground_truth(), file_ids=data.file_ids,
        file_names=[data.file_name(i) for i in range(len(data))], notes=notes,
    )  # fmt: skip
    return results, "\n".join(notes)


def test_images_and_classes_are_those_of_the_names(tmp_path: Path) -> None:
    results, notes = load(tmp_path, [record(5, 7), record(0, 0), record(0, 7)])
    assert results.image_ids.tolist() == [5, 0, 0]
    assert results.category_ids.tolist() == [7, 0, 7]
    assert "images are matched by file_name" in notes
    assert "classes are matched by category_name" in notes


def test_names_that_agree_with_the_ids_need_no_note(tmp_path: Path) -> None:
    results, notes = load(tmp_path, [record(5, 7, image_id=5, category_id="7")])
    assert (results.image_ids.tolist(), results.category_ids.tolist(), notes) == ([5], [7], "")


def test_detections_of_other_files_are_left_out_with_a_note(tmp_path: Path) -> None:
    results, notes = load(tmp_path, [record(5, 7), record(5, 7, file_name="images/c.jpg"), record(0, 0)])
    assert results.image_ids.tolist() == [5, 0]
    assert "left out: 1 detections in 1 files that the annotations do not list, for example 'images/c.jpg'" in notes


@pytest.mark.parametrize("name", ["b.png", "sub\\b.png", "/srv/x/images/sub/b.png", "./sub/b.png", "sub/b.png"])
def test_of_two_paths_to_a_file_one_ends_with_the_other(name: str, tmp_path: Path) -> None:
    results, _ = load(tmp_path, [record(0, 7, file_name=name)])
    assert results.image_ids.tolist() == [0]


def test_files_of_one_name_in_two_folders_are_different(tmp_path: Path) -> None:
    names = ["x/a.jpg", "y/a.jpg"]
    results, _ = load(tmp_path, [record(0, 7, file_name="i/y/a.jpg"), record(0, 7, file_name="i/x/a.jpg")], names=names)
    assert results.image_ids.tolist() == [0, 5]
    with pytest.raises(ResultsError, match="neither image_id nor file_name is that of an image"):
        load(tmp_path, [record(0, 7, file_name="z/a.jpg")], names=names)


def test_without_known_class_names_ids_decide(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="category_id unknown, 1 times: 107"):
        load(tmp_path, [record(5, 7, category_name="bird")])
    results, _ = load(tmp_path, [record(5, 7, category_name="bird", category_id=3)])
    assert results.category_ids.tolist() == [3]
