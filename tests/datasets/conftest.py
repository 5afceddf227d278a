"""Fixtures shared by the tests of datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.datasets.coco_files import Make


@pytest.fixture(autouse=True, scope="module")
def own_check_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a dataset: the annotations, and the two images that `minimal` names."""

    def write(content: Any) -> tuple[Path, Path]:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        for name in ("a.jpg", "sub/b.png"):
            (images / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (30, 20), "green").save(images / name)
        (tmp_path / "train.json").write_text(json.dumps(content))
        return tmp_path / "train.json", images

    return write
