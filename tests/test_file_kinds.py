"""What a file is instead of the expected one is named alike by every reader."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import pytest

from detector.datasets.images import read_header
from detector.datasets.opening import read_coco
from detector.errors import DatasetError, ImageError, ResultsError, WeightsError
from detector.evaluation.results_file import load_results
from detector.file_kinds import LONGEST, other_kind
from detector.weights.safe_load import read_content
from tests.datasets.coco_files import minimal
from tests.evaluation.test_coco_metrics import make_ground_truth

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"
PAGE = b"\n<!DOCTYPE HTML><html><body>sign in</body></html>"
KINDS = [
    (POINTER, "is a Git LFS pointer"),
    (PAGE, "is a web page"),
    (b"", "is empty"),
    (b"%PDF-1.7", "is a PDF document"),
]


@pytest.mark.parametrize(("content", "kind"), KINDS)
def test_every_reader_names_what_a_file_is(content: bytes, kind: str, tmp_path: Path) -> None:
    for name in ("a.json", "a.jpg", "a.pth", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DatasetError, match=kind):
        read_coco(tmp_path / "a.json", None)
    with pytest.raises(ResultsError, match=kind):
        load_results(tmp_path / "a.json", make_ground_truth([], [1]))
    with pytest.raises(ImageError, match=kind):
        read_header(tmp_path / "a.jpg")
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(WeightsError, match=kind):
            read_content(tmp_path / name)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("a", "b")
    return file.getvalue()


def test_compressed_files_and_archives_are_named_unless_they_are_expected() -> None:
    assert other_kind(gzip.compress(b"x")) == "is compressed with gzip; unpack it with `gunzip`"
    assert other_kind(gzip.compress(b"x"), expected=("gzip",)) == ""
    assert other_kind(zipped()) == "is a zip archive; unpack it"
    assert other_kind(b'{"images": []}') == other_kind(b"\x80\x02") == other_kind(b" " * LONGEST) == ""


def test_a_packed_annotation_file_opens(tmp_path: Path) -> None:
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(minimal()).encode()))
    assert len(read_coco(tmp_path / "a.json.gz", None, progress=False)) == 2
