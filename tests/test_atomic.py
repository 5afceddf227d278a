"""Files are complete or absent, and JSON files of newer formats are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from detector.atomic import JSON_FORMAT, atomic_file, make_folder, read_json, write_json, write_text
from detector.errors import RunError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("text", ["", "a\n", "ünï\r\n", "x" * 100_000])
def test_text_is_written_as_it_is(text: str, tmp_path: Path) -> None:
    write_text(text, tmp_path / "new" / "a.txt")
    assert (tmp_path / "new" / "a.txt").read_bytes() == text.encode()
    assert names(tmp_path / "new") == ["a.txt"]


def test_lone_surrogates_of_file_names_are_escaped(tmp_path: Path) -> None:
    write_text(os.fsdecode(b"\xff.jpg"), tmp_path / "a.txt")
    assert (tmp_path / "a.txt").read_text() == "\\udcff.jpg"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("file write failed")])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(error: Exception, tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise error

    with pytest.raises(RunError, match=r"a\.bin cannot be written: .*; an older version of it is unchanged; free disk"):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def write() -> None:
        with atomic_file(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_a_path_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"file/a\.txt cannot be written: File exists; "):
        write_text("a", tmp_path / "file" / "a.txt")
    with pytest.raises(RunError, match=r"--output-dir must be a folder to write in, got .*file/b: Not a directory"):
        make_folder(tmp_path / "file" / "b")
    with pytest.raises(RunError, match=r"--storage must be a folder to write in"):
        make_folder(tmp_path / "file" / "b", option="--storage")


def test_writers_in_several_processes_use_different_temporary_files(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    with atomic_file(path) as file:
        assert Path(file.name).name == f".a.bin.{os.getpid()}.tmp"
    with atomic_file(path, single_writer=True) as file:
        assert Path(file.name).name == ".a.bin.tmp", "the same after a restart, so that leftovers are replaced"


@pytest.mark.parametrize("content", [{}, {"a": [1, None], "b": {"c": 0.1}}, [], [{"a": 1}], "text", None])
def test_json_is_read_as_it_was_written(content: Any, tmp_path: Path) -> None:
    write_json(content, tmp_path / "a.json")
    assert read_json(tmp_path / "a.json") == content
    stored = json.loads((tmp_path / "a.json").read_text())
    assert stored == ({"format": JSON_FORMAT, **content} if isinstance(content, dict) else content)


def test_compact_json_is_one_line_without_a_format(tmp_path: Path) -> None:
    write_json({"images": [{"file_name": "ü.jpg"}]}, tmp_path / "a.json", compact=True)
    assert (tmp_path / "a.json").read_text() == '{"images":[{"file_name":"ü.jpg"}]}\n'


def test_files_without_a_format_are_read(tmp_path: Path) -> None:
    """Those of versions before there were formats."""
    (tmp_path / "a.json").write_text('{"AP": 0.5}')
    assert read_json(tmp_path / "a.json") == {"AP": 0.5}


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"format": 2}')
    with pytest.raises(RunError, match=r"a\.json has format 2, this version reads up to 1; update retinanet-detector"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"[1] 2"])
def test_damaged_json_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(RunError, match=r"a\.json must be a JSON file, got .*; it may be damaged"):
        read_json(tmp_path / "a.json")


def test_missing_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"a\.json cannot be read: No such file or directory"):
        read_json(tmp_path / "a.json")
