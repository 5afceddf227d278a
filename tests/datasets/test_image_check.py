"""The check of image files: what it finds, and what it remembers between runs."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from detector.datasets import image_check
from detector.datasets import images as images_module
from detector.datasets.image_check import BAD, GOOD, MISSING, UNCHECKED, check_images
from detector.datasets.store import FolderStore, ImageStore

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were opened so far."""
    real, names = images_module.open_image, list[str]()

    def open_and_note(store: ImageStore, name: str) -> AbstractContextManager[tuple[Image.Image, BinaryIO]]:
        names.append(Path(name).name)
        return real(store, name)

    monkeypatch.setattr(images_module, "open_image", open_and_note)
    monkeypatch.setattr(image_check, "open_image", open_and_note)
    return names


def noise(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def folder(tmp_path: Path) -> tuple[Path, list[str]]:
    root = tmp_path / "images"
    (root / "sub").mkdir(parents=True)
    Image.fromarray(noise(20, 30, 3)).save(root / "good.jpg")
    Image.fromarray(noise(64, 64, 3)).save(root / "sub" / "cut.jpg")
    whole = (root / "sub" / "cut.jpg").read_bytes()
    (root / "sub" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(root / "deep.png")
    return root, ["good.jpg", "sub/cut.jpg", "absent.jpg", "deep.png", "sub"]


def test_a_folder_without_names_needs_no_check(tmp_path: Path) -> None:
    facts = check_images(FolderStore(tmp_path), [], np.zeros(0, bool), decode=True, progress=False)
    assert len(facts.status) == 0


def test_truncation_is_found_by_decoding_and_not_by_headers(tmp_path: Path) -> None:
    root, names = folder(tmp_path)
    which = np.ones(len(names), bool)
    header = check_images(FolderStore(root), names, which, decode=False, progress=False)
    assert header.status.tolist() == [GOOD, GOOD, MISSING, GOOD, BAD]
    decoded = check_images(FolderStore(root), names, which, decode=True, progress=False)
    assert decoded.status.tolist() == [GOOD, BAD, MISSING, GOOD, BAD]
    assert "truncated" in decoded.reasons[1]
    assert decoded.sizes[0].tolist() == [20, 30]
    assert decoded.modes[3] == b"I;16"
    assert decoded.peaks[3] == round(4095 / 257)
    which[0] = False
    assert check_images(FolderStore(root), names, which, decode=False, progress=False).status[0] == UNCHECKED


def test_good_files_are_remembered_until_they_change(tmp_path: Path, opened: list[str]) -> None:
    root, names = folder(tmp_path)

    def opened_by_checking(names: list[str], *, decode: bool) -> list[str]:
        opened.clear()
        check_images(FolderStore(root), names, np.ones(len(names), bool), decode=decode, progress=False)
        return sorted(opened)

    which = np.ones(len(names), bool)
    first = check_images(FolderStore(root), names, which, decode=True, progress=False)
    assert sorted(opened) == ["cut.jpg", "deep.png", "good.jpg"]
    opened.clear()
    again = check_images(FolderStore(root), names, which, decode=True, progress=False)
    assert opened == ["cut.jpg"]  # unusable ones are checked each time
    for a, b in zip(first[:5], again[:5], strict=True):
        np.testing.assert_array_equal(a, b)
    Image.fromarray(noise(10, 10, 3)).save(root / "good.jpg")
    opened.clear()
    changed = check_images(FolderStore(root), names, which, decode=True, progress=False)
    assert sorted(opened) == ["cut.jpg", "good.jpg"]
    assert changed.sizes[0].tolist() == [10, 10]
    # a header check is satisfied by an earlier decoding, not the other way round
    assert opened_by_checking(["good.jpg"], decode=False) == []
    Image.fromarray(noise(11, 11, 3)).save(root / "good.jpg")
    assert opened_by_checking(["good.jpg"], decode=False) == ["good.jpg"]
    assert opened_by_checking(["good.jpg"], decode=True) == ["good.jpg"]
    assert opened_by_checking(names, decode=True) == ["cut.jpg"]  # the others are remembered


@pytest.mark.parametrize("damage", ["garbage", "truncated", "foreign", "folder"])
def test_a_damaged_check_cache_costs_time_and_nothing_else(
    tmp_path: Path, own_cache: Path, opened: list[str], damage: str
) -> None:
    root, names = folder(tmp_path)
    which = np.ones(len(names), bool)
    first = check_images(FolderStore(root), names, which, decode=True, progress=False)
    (saved,) = (own_cache / "detector").iterdir()
    if damage == "garbage":
        saved.write_bytes(b"\0garbage" * 9)
    elif damage == "truncated":
        saved.write_bytes(saved.read_bytes()[:-50])
    elif damage == "foreign":
        np.savez(saved, names=np.zeros(3))
    else:
        saved.unlink()
        saved.mkdir()
    opened.clear()
    again = check_images(FolderStore(root), names, which, decode=True, progress=False)
    assert sorted(opened) == ["cut.jpg", "deep.png", "good.jpg"]
    np.testing.assert_array_equal(first.status, again.status)


def test_an_unwritable_check_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    root, names = folder(tmp_path)
    assert check_images(FolderStore(root), names, np.ones(5, bool), decode=True, progress=False).status[0] == GOOD


def test_reading_the_check_cache_cannot_run_code(tmp_path: Path, own_cache: Path) -> None:
    root, names = folder(tmp_path)
    check_images(FolderStore(root), names, np.ones(5, bool), decode=True, progress=False)
    (saved,) = (own_cache / "detector").iterdir()
    np.savez(saved, names=np.array([{"pickled": 1}], dtype=object))
    assert image_check._CheckCache(FolderStore(root)).rows == {}


def test_a_file_that_changed_without_changing_its_size_is_checked_again(tmp_path: Path, opened: list[str]) -> None:
    pixels = Image.fromarray(noise(20, 30, 3))
    pixels.save(tmp_path / "a.bmp")
    one = np.ones(1, bool)
    check_images(FolderStore(tmp_path), ["a.bmp"], one, decode=True, progress=False)
    pixels.transpose(Image.Transpose.ROTATE_90).resize((30, 20)).save(tmp_path / "a.bmp")
    os.utime(tmp_path / "a.bmp", ns=(1, 1))
    check_images(FolderStore(tmp_path), ["a.bmp"], one, decode=True, progress=False)
    assert opened == ["a.bmp", "a.bmp"]
