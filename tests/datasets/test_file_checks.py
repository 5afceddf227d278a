"""Image files against the annotations: names, damage, sizes, EXIF orientations, modes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from detector.datasets.opening import read_coco
from detector.errors import DatasetError
from tests.datasets.coco_files import Make, altered, kinds, minimal


def test_truncated_images_are_found_by_decoding(make: Make) -> None:
    files = make(minimal())
    Image.effect_noise((30, 20), 50).save(files[1] / "a.jpg")
    whole = (files[1] / "a.jpg").read_bytes()
    (files[1] / "a.jpg").write_bytes(whole[: len(whole) - 60])
    assert len(read_coco(*files, verify="header", progress=False)) == 2
    assert len(read_coco(*files, verify="none", progress=False)) == 2
    for verify in ("decode", "auto"):
        with pytest.raises(DatasetError, match="truncated"):
            read_coco(*files, verify=verify, progress=False)


def test_verify_none_trusts_the_annotations_and_opens_only_images_without_a_declared_size(make: Make) -> None:
    content = altered("images", 0, width=..., height=...)
    content["images"][1]["file_name"] = "not there.jpg"
    data = read_coco(*make(content), verify="none", progress=False)
    assert data.sizes.tolist() == [[20, 30], [20, 30]]
    content["images"][0]["file_name"] = "absent.jpg"
    with pytest.raises(DatasetError, match="missing image"):
        read_coco(*make(content), verify="none", progress=False)


def tagged_images(tmp_path: Path, orientations: list[int], stated: list[tuple[int, int]]) -> tuple[Path, Path]:
    """Images stored as 30 x 20 (width x height) with EXIF orientations; `stated` is (width, height) in the JSON."""
    images = tmp_path / "images"
    images.mkdir()
    for k, orientation in enumerate(orientations):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (20, 30, 3)).astype(np.uint8)).save(
            images / f"{k}.png", exif=exif
        )
    content = minimal() | {"annotations": []}
    content["images"] = [{"id": k, "file_name": f"{k}.png", "width": w, "height": h} for k, (w, h) in enumerate(stated)]
    (tmp_path / "train.json").write_text(json.dumps(content))
    return tmp_path / "train.json", images


@pytest.mark.parametrize(
    ("orientations", "stated", "applied", "found"),
    [
        ([1, 1], [(30, 20), (30, 20)], False, {}),
        ([6, 1, 3], [(20, 30), (30, 20), (30, 20)], True, {}),
        ([6, 1, 3], [(30, 20), (30, 20), (30, 20)], False, {}),
        ([6, 8, 5], [(20, 30), (20, 30), (30, 20)], True, {"image size mismatch": 1}),
        ([6, 8, 7], [(20, 30), (30, 20), (30, 20)], False, {"image size mismatch": 1}),
        ([3, 3], [(30, 20), (30, 20)], False, {"undecided EXIF orientation": 1}),
    ],
)
def test_exif_is_decided_by_the_declared_sizes(
    tmp_path: Path, orientations: list[int], stated: list[tuple[int, int]], applied: bool, found: dict[str, int]
) -> None:
    files = tagged_images(tmp_path, orientations, stated)
    data = read_coco(*files, on_error="skip", progress=False)
    assert data.apply_exif is applied
    assert kinds(data) == found
    assert "EXIF" in data.summary()
    for i in range(len(data)):
        assert data.decode(i).shape[:2] == tuple(data.sizes[i])


def test_undecided_orientations_are_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = tagged_images(tmp_path, [6, 6], [(20, 30), (30, 20)])
    data = read_coco(*files, on_error="skip", progress=True)
    assert (data.apply_exif, data.overrides_exif) == (False, True)
    printed = " ".join(capsys.readouterr().err.split())
    assert "warning:" in printed
    assert "set data.exif to apply or ignore" in printed
    assert not read_coco(*files, on_error="skip", exif="apply", progress=False).overrides_exif


def test_exif_can_be_forced_either_way(tmp_path: Path) -> None:
    files = tagged_images(tmp_path, [6, 6, 1], [(20, 30), (20, 30), (30, 20)])
    assert len(read_coco(*files, exif="apply", progress=False)) == 3
    data = read_coco(*files, exif="ignore", on_error="skip", progress=False)
    assert (data.apply_exif, len(data), kinds(data)) == (False, 1, {"image size mismatch": 2})


def test_names_with_dots_are_judged_by_their_real_path_and_links_are_followed(make: Make, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    Image.new("RGB", (30, 20)).save(outside / "c.jpg")
    Image.new("RGB", (30, 20)).save(tmp_path / "d.jpg")
    annotations, images = make(altered("images", 0, file_name="sub/../a.jpg"))
    (images / "link").symlink_to(outside)
    assert len(read_coco(annotations, images, progress=False)) == 2
    make(altered("images", 0, file_name="link/c.jpg"))  # the folder's owner linked it in
    assert len(read_coco(annotations, images, progress=False)) == 2
    make(altered("images", 0, file_name="link/../d.jpg"))  # inside by its letters, outside by the link
    with pytest.raises(DatasetError, match="leads out of the image folder"):
        read_coco(annotations, images, progress=False)


def test_a_folder_too_many_or_too_few_in_the_names_is_pointed_out(make: Make) -> None:
    annotations, images = make(altered("images", 0, file_name="train/a.jpg"))
    with pytest.raises(DatasetError, match=r"remove the folders\s+from\s+file_name"):
        read_coco(annotations, images, progress=False)
    make(altered("images", 0, file_name="b.png"))
    with pytest.raises(DatasetError, match=r"set\s+the\s+image\s+folder\s+to\s+that"):
        read_coco(annotations, images, progress=False)


def test_how_images_were_checked_does_not_change_what_is_read(make: Make) -> None:
    files = make(minimal())
    opened = [read_coco(*files, verify=v, progress=False) for v in ("none", "header", "decode", "decode")]
    for data in opened[1:]:
        for key, value in vars(opened[0]).items():
            if isinstance(value, np.ndarray):
                np.testing.assert_array_equal(value, getattr(data, key), err_msg=key)


def test_dark_16_bit_images_are_pointed_out(make: Make) -> None:
    annotations, images = make(minimal())
    Image.fromarray(np.full((20, 30), 4000, np.uint16)).save(images / "sub" / "b.png")
    data = read_coco(annotations, images, progress=False)
    assert kinds(data) == {"dark 16-bit images": 1}
    assert "I;16 (grey, scaled by 1/257)" in data.summary()


def test_the_conversion_of_unusual_image_modes_is_reported(make: Make) -> None:
    annotations, images = make(minimal())
    Image.new("1", (30, 20)).save(images / "sub" / "b.png")
    assert "1 (black and white)" in read_coco(annotations, images, progress=False).summary()
    cv2.imwrite(str(images / "sub" / "b.png"), np.zeros((20, 30, 3), np.uint16))
    assert "RGB;16 (high byte of 16 bits)" in read_coco(annotations, images, progress=False).summary()
