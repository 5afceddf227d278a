"""Names of files that other systems and programs wrote otherwise find their file; nothing takes another one's place."""

from __future__ import annotations

import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detector.datasets.coco import CocoDataset
from detector.datasets.image_formats import FORMATS, SUFFIXES, is_image_name
from detector.datasets.opening import read_coco
from detector.errors import DatasetError
from tests.datasets.coco_files import Make, kinds, minimal


def opened(make: Make, first: str, second: str = "sub/b.png", **options: Any) -> CocoDataset:
    content = minimal()
    for image, name in zip(content["images"], (first, second), strict=True):
        image["file_name"] = name
    return read_coco(*make(content), progress=False, **options)


@pytest.mark.parametrize(
    "name", ["A.JPG", "a.jpg\r", " a.jpg ", "a%2Ejpg", "https://x.org/set/a.jpg?sig=1/2", "C:\\data\\a.jpg",
             "/srv/x/a.jpg", "s3://bucket/a.jpg"]
)  # fmt: skip
def test_a_name_that_is_written_differently_finds_its_file(name: str, make: Make) -> None:
    data = opened(make, name)
    assert data.file_name(0) == "a.jpg"
    assert data.decode(0).shape == (20, 30, 3)
    assert kinds(data) == {"file name written differently": 1}


def test_backslashes_of_windows_are_folders(make: Make) -> None:
    data = opened(make, "a.jpg", "sub\\b.png")
    assert data.file_name(1) == "sub/b.png"


@pytest.mark.parametrize(("form", "other"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_the_unicode_form_does_not_matter(form: Any, other: Any, make: Make) -> None:
    _, images = make(minimal())
    (images / "a.jpg").rename(images / unicodedata.normalize(other, "é.jpg"))
    data = opened(lambda content: (make(content)[0], images), unicodedata.normalize(form, "é.jpg"))
    assert data.decode(0).shape == (20, 30, 3)


def test_files_of_another_folder_take_no_ones_place(make: Make) -> None:
    with pytest.raises(DatasetError, match="no such file"):
        opened(make, "train/a.jpg")
    with pytest.raises(DatasetError, match="file_name must be relative to the image folder"):
        opened(make, "/train/a.jpg", "/val/a.jpg")
    with pytest.raises(DatasetError, match="file_name must be relative to the image folder"):
        opened(make, "/train/a.jpg", "/train/missing.jpg")
    with pytest.raises(DatasetError, match="file_name must be relative to the image folder"):
        opened(make, "/train/a.jpg", "a.jpg")
    with pytest.raises(DatasetError, match="file_name must be relative to the image folder"):
        opened(make, "/train/a.jpg", "/train/\ud800.jpg")


def test_of_two_files_that_match_none_is_chosen_and_two_names_do_not_share_one(make: Make) -> None:
    _, images = make(minimal())
    (images / "A.jpg").write_bytes((images / "a.jpg").read_bytes())
    with pytest.raises(DatasetError, match="no such file"):
        opened(make, "a.JPG")
    (images / "A.jpg").unlink()
    for second in ("a.jpg", "a.JPG"):
        with pytest.raises(DatasetError, match="no such file"):
            opened(make, "A.jpg", second)


def test_a_broken_link_is_named_with_its_target(make: Make) -> None:
    _, images = make(minimal())
    (images / "c.jpg").symlink_to("../store/c.jpg")
    with pytest.raises(DatasetError) as caught:
        opened(make, "c.jpg")
    assert "is a link to ../store/c.jpg, which does not exist" in " ".join(str(caught.value).split())


def test_links_in_circles_are_no_endless_search(make: Make) -> None:
    _, images = make(minimal())
    (images / "sub" / "circle").symlink_to(images, target_is_directory=True)
    assert opened(make, "A.jpg").file_name(0) == "a.jpg"


def test_the_suffixes_are_those_of_the_formats() -> None:
    Image.init()
    assert set(SUFFIXES) == {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
    assert is_image_name("A.JFIF")
    assert not any(map(is_image_name, ("._a.jpg", ".DS_Store", "Thumbs.db", "a.txt")))


def test_hidden_folders_of_the_disk_are_searched(tmp_path: Path, make: Make) -> None:
    _, images = make(minimal())
    (images / ".cache").mkdir()
    (images / "a.jpg").rename(images / ".cache" / "a.jpg")
    assert opened(lambda content: (make(content)[0], images), ".Cache/a.jpg").file_name(0) == ".cache/a.jpg"
