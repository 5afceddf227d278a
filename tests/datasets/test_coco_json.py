"""COCO files with every kind of error: each is reported, and refuses the file or is left out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from detector.datasets.opening import read_coco
from detector.datasets.problems import KINDS
from detector.errors import DatasetError
from detector.structures import Categories
from tests.datasets.coco_files import Json, Make, altered, is_readable, kinds, minimal, with_annotation, with_entry

REFUSED: list[tuple[str, Json, int, int]] = [
    # kind, file, images and annotations left under skip
    ("malformed image", with_entry("images", 17), 2, 3),
    ("malformed image", with_entry("images", None), 2, 3),
    ("malformed image", with_entry("images", {"file_name": "c.jpg"}), 2, 3),
    ("malformed image", with_entry("images", {"id": " ", "file_name": "c.jpg"}), 2, 3),
    ("malformed image", with_entry("images", {"id": True, "file_name": "a.jpg"}), 2, 3),
    ("malformed image", with_entry("images", {"id": 1.5, "file_name": "a.jpg"}), 2, 3),
    ("malformed image", altered("images", 0, file_name=None), 1, 2),
    ("duplicate image id", with_entry("images", {"id": 5, "file_name": "c.jpg"}), 2, 3),
    ("unsafe file name", altered("images", 0, file_name=""), 1, 2),
    ("unsafe file name", altered("images", 0, file_name="/etc/passwd"), 1, 2),
    ("unsafe file name", altered("images", 0, file_name="C:\\c.jpg"), 1, 2),
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
    ("malformed annotation", with_annotation(bbox=["1px", 2, 3, 4]), 2, 3),
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
    ("malformed annotation", with_annotation(ignore="2"), 2, 3),
    ("malformed annotation", with_annotation(iscrowd=[1]), 2, 3),
    ("orphan annotation", with_annotation(image_id=77), 2, 3),
    ("unknown category", with_annotation(category_id=1), 2, 3),
    ("duplicate annotation id", with_annotation(id=1), 2, 4),
]


@pytest.mark.parametrize(("kind", "content", "images", "annotations"), REFUSED)
def test_errors_refuse_a_dataset_and_are_left_out_with_on_error_skip(
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
def test_harmless_deviations_are_read_and_noted(make: Make, kind: str, content: Json) -> None:
    data = read_coco(*make(content), progress=False)
    assert kinds(data) == {kind: 1}
    assert data.sizes.tolist() == [[20, 30], [20, 30]]
    truth = data.ground_truth()
    assert truth.ann_image_ids.tolist() == [5, 0, 0]
    assert truth.ann_category_ids.tolist() == [0, 7, 0]
    assert truth.areas.tolist() == [29.5 * 19.5, 12, 30]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
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
def test_other_files_than_coco_files_are_named(tmp_path: Path, text: str, reason: str) -> None:
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
        ([{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "category id 1 must have one name, got 'a' and 'b'"),
        ([{"id": 1, "name": "a"}, {"id": 2, "name": "a"}], "category name 'a' must belong to one id, got ids 1, 2"),
        ([{"id": None, "name": "a"}], "must have an id, a number or a text, got null"),
        ([{"id": True, "name": "a"}], "must have an id, a number or a text, got true"),
        ([{"id": 1}], "must have a name, got null"),
        ([{"id": 1, "name": [3]}], r"must have a name, got \[3\]"),
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
    assert (
        "category names must be those of training: 'dog' is only in this file (nearest on the other side: 'Dog')"
        in text
    )
    assert "'Dog' is only in training (nearest on the other side: 'dog')" in text
    assert "'bird' is only in training" in text
    assert "'cat'" not in text


keys = st.sampled_from(
    [
        "id", "image_id", "category_id", "bbox", "file_name", "width", "iscrowd", "ignore", "area", "name",
        "segmentation", None,
    ]
)  # fmt: skip
values = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 8),
    st.floats(),
    st.text(max_size=3),
    st.lists(st.integers(-2, 40), max_size=5),
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 2), keys, values), max_size=4
    )
)
def test_any_file_opens_or_is_refused_and_nothing_is_left_out_silently(
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
        assert len(data) == len(content["images"]) or data.findings
        assert trained == len(content["annotations"]) or data.findings
        assert data.num_objects.sum() == len(data.boxes().boxes)


@pytest.mark.parametrize(("folder", "name"), [("bccd", "bccd"), ("coco", "coco2017")])
def test_a_missing_public_dataset_is_an_error_that_names_the_command_to_fetch_it(
    folder: str, name: str, tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(
        DatasetError, match=rf"no such annotation file; python tools/get_data.py {name} creates .*data/{folder}"
    ):
        read_coco(tmp_path / "data" / folder / "annotations" / "train.json", None)
