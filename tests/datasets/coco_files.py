"""Small handmade COCO files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from detector.datasets.coco import CocoDataset

Json = dict[str, Any]
Make = Callable[[Any], tuple[Path, Path]]
"""Writes a dataset; returns its annotation file and image folder."""


def minimal() -> Json:
    """Two images of 30 x 20 (width x height), three objects, no key more than COCO's readers need."""
    return {
        "images": [
            {"id": 5, "file_name": "a.jpg", "width": 30, "height": 20},
            {"id": 0, "file_name": "sub/b.png", "width": 30, "height": 20},
        ],
        "annotations": [
            {"id": 1, "image_id": 0, "category_id": 7, "bbox": [1, 2, 3, 4]},
            {"id": 2, "image_id": 5, "category_id": 0, "bbox": [0.5, 0.5, 29.5, 19.5]},
            {"id": 3, "image_id": 0, "category_id": 0, "bbox": [10, 10, 5, 6]},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 0, "name": "cat"}, {"id": 3, "name": "unused"}],
    }


def kinds(dataset: CocoDataset) -> dict[str, int]:
    return {finding.kind: len(finding.problems) for finding in dataset.findings}


def is_readable(text: str) -> None:
    """Plain text at 110 columns, save for paths, which cannot be folded."""
    for line in text.splitlines():
        assert len(line) <= 110 or "/" in line, line
        assert line == line.rstrip()
    assert "Traceback" not in text


def altered(where: str, k: int, **values: Any) -> Json:
    content = minimal()
    entry = content[where][k]
    for key, value in values.items():
        if value is ...:
            del entry[key]
        else:
            entry[key] = value
    return content


def with_annotation(**values: Any) -> Json:
    content = minimal()
    content["annotations"].append({"id": 9, "image_id": 5, "category_id": 7, "bbox": [1, 1, 2, 2]} | values)
    return content


def with_entry(key: str, entry: Any) -> Json:
    content = minimal()
    content[key].append(entry)
    return content
