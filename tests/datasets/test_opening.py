"""Opening the splits of a config: everything wrong with any of them is reported in one error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from detector.config import Config
from detector.datasets.opening import open_datasets, read_coco
from detector.errors import DatasetError
from tests.tiny import TinyData, images_of, tiny_config, write_coco


@pytest.fixture
def splits(tmp_path: Path) -> TinyData:
    write_coco(tmp_path / "test.json", 2, seed=3)
    return TinyData(write_coco(tmp_path / "train.json", 3, seed=1), write_coco(tmp_path / "val.json", 2, seed=2))


def config_of(folder: Path, splits: TinyData, **settings: Any) -> Config:
    test = folder / "test.json"
    settings = {"data__test": {"images": str(images_of(test)), "annotations": str(test)}} | settings
    return tiny_config(folder, splits, **settings)


def edit(annotations: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(annotations.read_text())
    change(content)
    annotations.write_text(json.dumps(content))


def refusal(config: Config, folder: Path) -> str:
    with pytest.raises(DatasetError) as error:
        open_datasets(config, folder / "run", quiet=False)
    return str(error.value)


def test_the_splits_of_a_config_are_opened_with_the_classes_of_training(tmp_path: Path, splits: TinyData) -> None:
    train_set, val_set, test_set = open_datasets(config_of(tmp_path, splits), tmp_path / "run", quiet=True)
    assert val_set is not None
    assert test_set is not None
    assert [len(data) for data in (train_set, val_set, test_set)] == [3, 2, 2]
    assert val_set.categories.names == train_set.categories.names
    assert open_datasets(config_of(tmp_path, splits, data__test=None), tmp_path / "run", quiet=True)[2] is None


def test_missing_files_and_folders_of_all_splits_are_reported_together(tmp_path: Path, splits: TinyData) -> None:
    splits.train.rename(tmp_path / "elsewhere.json")
    images_of(splits.val).rename(tmp_path / "elsewhere")
    edit(tmp_path / "test.json", lambda content: content["images"][0].update(file_name="absent.png"))
    text = refusal(config_of(tmp_path, splits, data__verify="header"), tmp_path)
    assert "train.json: no such annotation file" in text
    assert "no such image folder" in text
    assert "absent.png" in text


def test_both_a_missing_file_and_a_missing_folder_of_one_split_are_reported(tmp_path: Path, splits: TinyData) -> None:
    splits.train.unlink()
    images_of(splits.train).rename(tmp_path / "elsewhere")
    text = refusal(config_of(tmp_path, splits), tmp_path)
    assert "no such annotation file" in text
    assert "no such image folder" in text


def test_annotations_are_inspected_although_the_image_folder_is_missing(tmp_path: Path, splits: TinyData) -> None:
    images_of(splits.train).rename(tmp_path / "elsewhere")
    edit(splits.train, lambda content: content["annotations"][0].update(image_id=999))
    for on_error in ("fail", "skip"):
        text = refusal(config_of(tmp_path, splits, data__on_error=on_error), tmp_path)
        assert "no such image folder" in text
        assert "orphan annotation" in text
        assert "data.on_error=skip, which uses" not in text, "it would not help"


def test_contradictory_categories_do_not_hide_other_problems(tmp_path: Path, splits: TinyData) -> None:
    def change(content: dict[str, Any]) -> None:
        content["categories"][1]["name"] = content["categories"][0]["name"]
        content["annotations"][0]["image_id"] = 999
        content["annotations"][1]["bbox"] = [1, 1, 0, 5]
        content["images"][1]["file_name"] = "absent.png"

    edit(splits.train, change)
    text = refusal(config_of(tmp_path, splits, data__verify="header"), tmp_path)
    for part in ("must belong to one id", "orphan annotation", "box of zero size", "missing image", "absent.png"):
        assert part in text
    assert "category names must be those of training" not in text, "training has no classes to compare with"


def test_val_is_inspected_without_class_matching_if_the_training_classes_are_unknown(
    tmp_path: Path, splits: TinyData
) -> None:
    def change(content: dict[str, Any]) -> None:
        content["categories"][0]["name"] = "other"
        content["annotations"][0]["image_id"] = 999

    edit(splits.val, change)
    splits.train.rename(tmp_path / "elsewhere.json")
    text = refusal(config_of(tmp_path, splits), tmp_path)
    assert "train.json: no such annotation file" in text
    assert "orphan annotation" in text
    assert "'other'" not in text


def test_val_is_matched_with_training_classes_although_training_is_refused(tmp_path: Path, splits: TinyData) -> None:
    edit(splits.train, lambda content: content["annotations"][0].update(image_id=999))
    edit(splits.val, lambda content: content["categories"][0].update(name="other"))
    text = refusal(config_of(tmp_path, splits), tmp_path)
    assert "train.json: refused for 1 error" in text
    assert "val.json: category names must be those of training: 'other' is only in this file" in text


def test_each_split_has_its_own_list_of_problems(tmp_path: Path, splits: TinyData) -> None:
    edit(splits.train, lambda content: content["annotations"][0].update(image_id=999))
    edit(splits.val, lambda content: content["annotations"][0].update(bbox=[1, 1, 0, 5]))
    text = refusal(config_of(tmp_path, splits), tmp_path)
    listed = {path.name: path.read_text().split("\t")[0] for path in (tmp_path / "run").iterdir()}
    assert listed == {"problems_train.tsv": "orphan annotation", "problems_val.tsv": "box of zero size"}
    assert str(tmp_path / "run" / "problems_train.tsv") in text


def test_many_differing_class_names_are_listed_up_to_a_limit(tmp_path: Path, splits: TinyData) -> None:
    training = read_coco(splits.train, None, progress=False).categories
    edit(splits.val, lambda content: content["categories"].extend({"id": k, "name": f"n{k}"} for k in range(100, 160)))
    with pytest.raises(DatasetError, match=r"\n  and \d+ more\n"):
        read_coco(splits.val, None, categories=training, progress=False)
