"""Ids are read alike wherever they stand: integers, text of digits, other text, and integers beyond 64 bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detector.datasets.coco import CocoDataset
from detector.datasets.ids import Ids, id_key
from detector.datasets.opening import read_coco
from detector.errors import DatasetError, ResultsError
from detector.evaluation.coco_metrics import evaluate
from detector.evaluation.coco_results import CocoResults, write_results
from detector.evaluation.results_file import load_results
from tests.datasets.coco_files import Json, Make, kinds, minimal

NAMES: dict[str, dict[int, Any]] = {
    "text of digits": {5: "5", 0: "0"},
    "floats": {5: 5.0, 0: 0.0},
    "names": {5: "img-5", 0: "img-0"},
    "beyond 64 bits": {5: 2**63 + 5, 0: 2**63},
    "text beyond 64 bits": {5: str(2**64 + 5), 0: str(2**64)},
    "mixed": {5: 5, 0: "zero"},
}


def renamed(names: dict[int, Any], *, annotations: dict[int, Any] | None = None) -> Json:
    content = minimal()
    for image in content["images"]:
        image["id"] = names[image["id"]]
    for annotation in content["annotations"]:
        annotation["image_id"] = (annotations or names)[annotation["image_id"]]
    return content


def opened(make: Make, content: Json) -> CocoDataset:
    return read_coco(*make(content), progress=False)


@pytest.mark.parametrize("names", NAMES.values(), ids=NAMES)
def test_a_file_with_other_ids_opens_and_scores_as_with_integers(
    names: dict[int, Any], make: Make, tmp_path: Path
) -> None:
    data, reference = opened(make, renamed(names)), opened(make, minimal())
    assert [len(data.objects(i).boxes) for i in range(2)] == [len(reference.objects(i).boxes) for i in range(2)]
    assert set(kinds(data)) <= {"number written as text", "id that is no integer"}
    assert kinds(data)
    results = [
        {"image_id": names[0], "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.9},
        {"image_id": names[5], "category_id": 0, "bbox": ["0.5", "0.5", "20", "19"], "score": "0.8"},
    ]
    (tmp_path / "results.json").write_text(json.dumps(results))
    truth = data.ground_truth()
    loaded = load_results(tmp_path / "results.json", truth, file_ids=data.file_ids)
    values = evaluate(truth, loaded).values
    expected = CocoResults(
        np.array([0, 5]), np.array([7, 0]), np.array([[1.0, 2, 3, 4], [0.5, 0.5, 20, 19]]), np.array([0.9, 0.8])
    )
    assert values == evaluate(reference.ground_truth(), expected).values
    write_results(tmp_path / "written.json", loaded, data.file_ids)
    written = json.loads((tmp_path / "written.json").read_text())
    assert [record["image_id"] for record in written] == [names[0], names[5]]


def test_the_number_of_an_id_is_no_id_of_the_file(make: Make, tmp_path: Path) -> None:
    data = opened(make, renamed(NAMES["names"]))
    number = int(data.image_ids[0])
    record = {"image_id": number, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.9}
    (tmp_path / "results.json").write_text(json.dumps([record]))
    with pytest.raises(ResultsError, match="image_id unknown"):
        load_results(tmp_path / "results.json", data.ground_truth(), file_ids=data.file_ids)


def test_ids_of_two_types_that_mean_the_same_are_matched(make: Make) -> None:
    data = opened(make, renamed({5: 5, 0: 0}, annotations={5: "5", 0: 0.0}))
    assert [len(data.objects(i).boxes) for i in range(2)] == [1, 2]
    assert kinds(data) == {"number written as text": 3}


def test_flags_boxes_and_class_names_of_other_types_are_read(make: Make) -> None:
    content = minimal()
    content["categories"] = [{"id": "7", "name": 1}, {"id": "0", "name": 2}]
    first, second, third = content["annotations"]
    first |= {"bbox": ["1", "2", "3", "4"], "iscrowd": "0", "ignore": ""}
    second |= {"iscrowd": "true", "category_id": "0"}
    third |= {"iscrowd": False, "category_id": 0.0}
    data = opened(make, content)
    assert data.categories.names == ("2", "1")
    assert data.ground_truth().iscrowd.tolist() == [True, False, False]
    assert kinds(data) == {"number written as text": 5, "class name written as number": 2}


def with_parent(**parent: Any) -> Json:
    """As Roboflow exports: category 0 has the project's name and no annotation."""
    content = minimal()
    content["categories"] = [
        {"id": 0, "name": "cat", "supercategory": "pets"}, {"id": 7, "name": "dog", "supercategory": "pets"},
        {"id": 9, **parent},
    ]  # fmt: skip
    return content


@pytest.mark.parametrize("name", ["pets", "dog"])
def test_an_unused_category_that_is_a_parent_or_a_copy_is_no_class(name: str, make: Make) -> None:
    data = opened(make, with_parent(name=name))
    assert data.categories.names == ("cat", "dog")
    assert kinds(data) == {"unused category": 1}


def test_other_unused_categories_and_used_parents_stay_classes(make: Make) -> None:
    assert opened(make, with_parent(name="bird")).categories.names == ("cat", "dog", "bird")
    content = with_parent(name="pets")
    content["annotations"][0]["category_id"] = 9
    assert opened(make, content).categories.names == ("cat", "dog", "pets")
    content = with_parent(name="dog")
    content["annotations"][1]["category_id"] = 9
    with pytest.raises(DatasetError, match="category name 'dog' must belong to one id, got ids 7, 9"):
        opened(make, content)


def test_a_class_of_training_stays_one_in_other_sets(make: Make) -> None:
    annotations, images = make(with_parent(name="pets"))
    content = with_parent(name="pets")
    content["annotations"][0]["category_id"] = 9
    training = opened(make, content).categories
    annotations, images = make(with_parent(name="pets"))
    assert read_coco(annotations, images, categories=training, progress=False).categories.names == training.names


def test_the_name_is_taken_from_the_url_of_lvis(make: Make) -> None:
    content = minimal()
    del content["images"][0]["file_name"]
    content["images"][0]["coco_url"] = "http://images.cocodataset.org/train2017/a.jpg"
    data = opened(make, content)
    assert data.file_name(0) == "a.jpg"
    assert kinds(data) == {"file name from coco_url": 1}


values = st.one_of(
    st.integers(), st.text(max_size=4), st.floats(), st.booleans(), st.none(), st.from_regex(r"-?[0-9]{1,25}")
)


@given(declared=st.lists(values, max_size=6), asked=st.lists(values, max_size=6))
def test_equal_ids_and_only_those_have_equal_numbers(declared: list[Any], asked: list[Any]) -> None:
    ids = Ids(declared)
    numbers, bad, _ = ids.read(declared)
    keys = [id_key(value) for value in declared]
    assert bad.tolist() == [key is None for key in keys]
    for key, number in zip(keys, numbers.tolist(), strict=True):
        assert [number == other for other, k in zip(numbers.tolist(), keys, strict=True) if k is not None] == [
            key == k for k in keys if k is not None
        ] or key is None
    found, unknown, _ = ids.read(asked)
    for value, number, missing in zip(asked, found.tolist(), unknown.tolist(), strict=True):
        key = id_key(value)
        if key in keys and key is not None:
            assert not missing
            assert number == numbers[keys.index(key)]
        elif not missing:
            assert number == key
