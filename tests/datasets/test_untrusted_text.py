"""Names, keys and values of annotation and results files are harmless and short wherever they are shown."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detector.datasets.coco_json import load_json
from detector.datasets.missing_paths import missing_image_hint, nearest_path
from detector.datasets.opening import read_coco
from detector.datasets.problems import group, problem, write_problems
from detector.errors import DatasetError, ResultsError, UserError
from detector.evaluation.coco_metrics import evaluate
from detector.evaluation.coco_results import CocoResults
from detector.evaluation.results_file import load_results
from detector.structures import Categories
from detector.text import MAX_MESSAGE
from tests.datasets.coco_files import Json, Make, kinds, minimal, with_entry

ODD_NAMES = {"dog\n": "dog\\n", "\x1b[2Jdog": "\\x1b[2Jdog", "dog\u202e": "dog\\u202e", "\ud800": "\\ud800"}


def named(name: str) -> Json:
    content = minimal()
    content["categories"][0]["name"] = name
    return content


def is_harmless(text: str) -> None:
    assert all(character.isprintable() or character == "\n" for character in text)
    assert len(text.encode()) <= MAX_MESSAGE


@pytest.mark.parametrize("name", ["dog", "traffic\u00a0light", "می\u200cخواهم", "a\\nb", " dog "])
def test_ordinary_class_names_are_kept(name: str, make: Make) -> None:
    dataset = read_coco(*make(named(name)), progress=False)
    assert name in dataset.categories.names
    assert "unprintable class name" not in kinds(dataset)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_class_names_that_cannot_be_printed_are_escaped_and_noted(name: str, make: Make) -> None:
    dataset = read_coco(*make(named(name)), progress=False)
    assert ODD_NAMES[name] in dataset.categories.names
    assert kinds(dataset)["unprintable class name"] == 1
    is_harmless(dataset.summary())
    ground_truth = dataset.ground_truth()
    nothing = CocoResults.concatenate([])
    assert ODD_NAMES[name] in evaluate(ground_truth, nothing, engine="pycocotools").table()


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_are_escaped_alike_in_every_source(name: str, make: Make) -> None:
    """So that a validation set, and a checkpoint of an older version, match the training set."""
    own = read_coco(*make(named(name)), progress=False).categories
    assert own == Categories(own.ids, tuple(name if k == ODD_NAMES[name] else k for k in own.names))
    assert read_coco(*make(named(name)), categories=own, progress=False).categories == own


def test_names_that_differ_in_what_cannot_be_printed_only_are_one_name(make: Make) -> None:
    content = named("dog\n")
    content["categories"][1]["name"] = "dog\\n"
    with pytest.raises(DatasetError, match="must belong to one id, got ids 7, 0"):
        read_coco(*make(content), progress=False)


@pytest.mark.parametrize(
    ("ids", "names"),
    [
        ((), ()), ((1,), ("",)), ((1,), (3,)), ((True,), ("a",)), ((2**70,), ("a",)), ((1.5,), ("a",)),
        ((1, 1), ("a", "b")), ((1, 2), ("a",)),
    ],
)  # fmt: skip
def test_classes_must_have_an_id_and_a_name(ids: tuple[Any, ...], names: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match="must hold at least one class"):
        Categories(ids, names)


def test_a_spreadsheet_runs_nothing_from_the_list_of_problems(tmp_path: Path) -> None:
    findings = group([problem("missing image", "=HYPERLINK(1)", "@x\ty"), problem("missing image", "image 1", "-1")])
    write_problems(tmp_path / "problems.tsv", findings)
    rows = [line.split("\t") for line in (tmp_path / "problems.tsv").read_text().splitlines()]
    assert [row[1:3] for row in rows] == [["'=HYPERLINK(1)", "'@x\\ty"], ["image 1", "'-1"]]


LONG = "x" * 1_000_000
MANY = [{"id": k, "name": f"class {k} {'y' * 300}"} for k in range(3000)]
HOSTILE: dict[str, Any] = {
    "long file names": minimal() | {"images": [{"id": k, "file_name": LONG} for k in range(6)]},
    "long class names": minimal() | {"categories": [{"id": k, "name": LONG} for k in range(6)]},
    "long keys": {LONG + str(k): k for k in range(20)},
    "many classes of one id": minimal() | {"categories": [{"id": 1, "name": f"{k}{LONG}"} for k in range(20)]},
    "many classes of one name": minimal() | {"categories": [{"id": k, "name": "a"} for k in range(20_000)]},
    "every kind of mistake": minimal() | {
        "images": [{"id": 1, "file_name": "\x1b" * 500}, {"id": 1, "file_name": "b"}, {"id": "x\n"}, 3, None,
                   {"id": 2, "file_name": ".."}, {"id": 3, "file_name": "a.jpg", "width": 3, "height": 4}],
        "annotations": [{"id": k, "image_id": k, "category_id": k, "bbox": [k, k - 1, "\x1b" * 99]} for k in range(9)]
        + [{"id": 1, "image_id": 3, "category_id": 7, "bbox": [1, 1, k, 5]} for k in (0, 2, 900)]
        + [{"image_id": "3", "category_id": 7.0, "bbox": None, "segmentation": [[0, 0, 1, 1, 1, 0]], "area": "z"}],
    },
    "vast numbers": minimal() | {"images": [{"id": 10**4000, "file_name": "a.jpg"}]},
    "deep values": minimal() | {"images": [json.loads("[" * 900 + "]" * 900)]},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_refusal_is_harmless_and_has_at_most_four_kilobytes(name: str, make: Make, tmp_path: Path) -> None:
    with pytest.raises(DatasetError) as caught:
        read_coco(*make(HOSTILE[name]), progress=False, problems_file=tmp_path / "problems.tsv")
    is_harmless(str(caught.value))


def test_many_differing_classes_are_a_short_error_soon(make: Make) -> None:
    training = Categories(tuple(range(3000)), tuple(f"other {k} {'z' * 150}" for k in range(3000)))
    with pytest.raises(DatasetError) as caught:
        read_coco(*make(minimal() | {"categories": MANY, "annotations": []}), categories=training, progress=False)
    is_harmless(str(caught.value))
    assert "class 0" in str(caught.value)


def test_a_key_that_stands_twice_is_an_error_with_its_place(make: Make) -> None:
    annotations, images = make(minimal())
    text = annotations.read_text()
    annotations.write_text(text[:-1] + ',\n "annotations": []}')
    reason = r"the key 'annotations' stands twice in one object \(line \d+, column 15\)"
    for on_error in ("fail", "skip"):
        with pytest.raises(DatasetError, match=reason):
            read_coco(annotations, images, on_error=on_error, progress=False)


@pytest.mark.parametrize("value", [5, None, "x", {}, True])
def test_annotations_that_are_no_list_are_an_error(value: Any, make: Make) -> None:
    for content in ({"annotations": value}, minimal() | {"annotations": value}):
        with pytest.raises(DatasetError, match=r"a file without a list of (images and )?annotations"):
            read_coco(*make(content), progress=False)


SPECIAL: dict[str, Callable[[Path], object]] = {
    "FIFO": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_an_error_at_once(kind: str, make: Make, tmp_path: Path) -> None:
    ground_truth = read_coco(*make(minimal()), progress=False).ground_truth()
    SPECIAL[kind](tmp_path / "special.json")
    with pytest.raises(DatasetError, match=r"special\.json: cannot be read: (is a|Too many levels)"):
        load_json(tmp_path / "special.json")
    with pytest.raises(ResultsError, match=r"special\.json must be a readable file, got: (is a|Too many levels)"):
        load_results(tmp_path / "special.json", ground_truth)


GOOD = {"image_id": 5, "category_id": 7, "bbox": [1, 2, 3, 4], "score": 0.5}


@pytest.mark.parametrize(
    "content",
    [
        json.dumps([{**GOOD, "image_id": LONG}] * 5), json.dumps({LONG + str(k): 1 for k in range(9)}), f'"{LONG}"',
        json.dumps([{**GOOD, "bbox": LONG, "score": [LONG], "category_id": "\x1b[2J"}, LONG, {LONG: 1}]),
        '[{"image_id": 5, "image_id": 5}]', "[" * 10_000, "9" * 5000, json.dumps([{**GOOD, "image_id": 10**4000}]),
        json.dumps([{**GOOD, "category_id": (2**61 - 1) * k} for k in range(20_000)]), "\ufeff[3]", "\ud800",
    ],
)  # fmt: skip
def test_an_error_of_a_results_file_is_harmless_and_short(content: str, make: Make, tmp_path: Path) -> None:
    ground_truth = read_coco(*make(minimal()), progress=False).ground_truth()
    (tmp_path / "results.json").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ResultsError) as caught:
        load_results(tmp_path / "results.json", ground_truth)
    is_harmless(str(caught.value))


@pytest.mark.parametrize("name", ["", ".", "..", "/", "a" * 5000, "\0", "\ud800", "a\x1b.jpg", "a//b", "x/."])
def test_hints_for_missing_files_stand_any_name(name: str, tmp_path: Path) -> None:
    (tmp_path / "b\x1b[2J.jpg").touch()
    assert isinstance(missing_image_hint(tmp_path, name), str)
    is_harmless(nearest_path(tmp_path / "b" / name.replace("/", "_")))


def test_an_empty_list_of_results_stays_valid(make: Make, tmp_path: Path) -> None:
    ground_truth = read_coco(*make(minimal()), progress=False).ground_truth()
    (tmp_path / "results.json").write_text("[]")
    assert len(load_results(tmp_path / "results.json", ground_truth)) == 0
    assert np.isfinite(evaluate(ground_truth, load_results(tmp_path / "results.json", ground_truth)).values["AP"])


def test_a_file_name_of_a_problem_is_shortened(make: Make, tmp_path: Path) -> None:
    files = make(with_entry("images", {"id": 9, "file_name": LONG}))
    with pytest.raises(UserError):
        read_coco(*files, progress=False, problems_file=tmp_path / "p")
    assert (tmp_path / "p").stat().st_size < 2000
