"""Decoding image files to RGB."""

from __future__ import annotations

import errno
import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageOps

from detector.datasets import image_budget
from detector.datasets import images as images_module
from detector.datasets.image_check import BAD, check_images
from detector.datasets.images import decode_at_least, decode_image, file_system_error, read_header
from detector.datasets.store import FolderStore
from detector.errors import ImageError, RunError

RNG = np.random.default_rng(0)


def noise(*shape: int) -> NDArray[np.uint8]:
    return RNG.integers(0, 256, shape).astype(np.uint8)


def png16(pixels: NDArray[np.uint16]) -> bytes:
    """A 16-bit PNG of (H, W, C): 1 grey, 2 grey and alpha, 3 colour."""
    height, width, channels = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 16, {1: 0, 2: 4, 3: 2}[channels], 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_an_empty_file_is_no_image(tmp_path: Path) -> None:
    path = tmp_path / "a.jpg"
    path.touch()
    for read in (read_header, lambda p: decode_image(p, apply_exif=False)):
        with pytest.raises(ImageError, match=r"a\.jpg: is empty"):
            read(path)


@pytest.mark.parametrize(
    "settings",
    [
        {"quality": 90}, {"quality": 30, "subsampling": 0}, {"subsampling": 1}, {"subsampling": 2, "optimize": True},
        {"progressive": True}, {"restart_marker_rows": 1}, {"keep_rgb": True},
    ],
    ids=str,
)  # fmt: skip
def test_jpegs_of_every_kind_equal_pillows(tmp_path: Path, settings: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 11, 3), dtype=np.uint8)).resize(
        (131, 97), Image.Resampling.BICUBIC
    )
    coarse.save(tmp_path / "a.jpg", **settings)
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(decode_image(tmp_path / "a.jpg", apply_exif=True), np.asarray(image.convert("RGB")))
    by_simplejpeg = images_module._decode_jpeg((tmp_path / "a.jpg").read_bytes())
    assert by_simplejpeg is not None
    assert by_simplejpeg.flags.writeable
    assert by_simplejpeg.flags.c_contiguous


def test_a_jpeg_with_a_decoder_warning_is_decoded_by_pillow(tmp_path: Path) -> None:
    """Bytes between its segments: libjpeg warns and continues."""
    Image.new("RGB", (64, 48), (200, 30, 90)).save(tmp_path / "a.jpg")
    content = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(content.replace(b"\xff\xda", b"\x01\x02\x03\xff\xda", 1))
    assert images_module._decode_jpeg((tmp_path / "a.jpg").read_bytes()) is None
    with Image.open(tmp_path / "a.jpg") as image:
        assert np.array_equal(decode_image(tmp_path / "a.jpg", apply_exif=True), np.asarray(image.convert("RGB")))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "bmp", "gif", "webp"])
def test_every_mode_of_8_bits_equals_pillows_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    source = Image.fromarray(noise(17, 23, 4), "RGBA").convert(mode if mode != "YCbCr" else "RGB").convert(mode)
    try:
        source.save(path)
        Image.open(path).load()
    except (OSError, ValueError):
        pytest.skip(f"Pillow does not write {mode} as {suffix}, or cannot read it back (YCbCr as TIFF before 13)")
    pixels = decode_image(path, apply_exif=True)
    assert pixels.shape == (17, 23, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert pixels.flags.writeable
    with Image.open(path) as image:
        np.testing.assert_array_equal(pixels, np.asarray(image.convert("RGB")))
    header = read_header(path)
    assert (header.width, header.height, header.orientation) == (23, 17, 1)


@pytest.mark.filterwarnings("error")
def test_alpha_is_dropped_and_the_colour_below_it_kept(tmp_path: Path) -> None:
    rgba = noise(5, 6, 4)
    rgba[..., 3] = 0
    Image.fromarray(rgba, "RGBA").save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", apply_exif=False), rgba[..., :3])
    palette = Image.fromarray(noise(5, 6), "P")
    palette.putpalette(noise(768).tobytes())
    palette.save(tmp_path / "p.png", transparency=bytes(range(256)))
    np.testing.assert_array_equal(decode_image(tmp_path / "p.png", apply_exif=False), palette.convert("RGB"))


def test_16_bit_grey_is_scaled_by_one_fixed_rule(tmp_path: Path) -> None:
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    expected = np.rint(deep / 257).astype(np.uint8)
    (tmp_path / "a.png").write_bytes(png16(deep[..., None]))
    Image.fromarray(deep).save(tmp_path / "a.tif")
    Image.fromarray(deep.astype(np.int32)).save(tmp_path / "b.tif")
    Image.fromarray(deep).save(tmp_path / "a.pgm")
    big_endian = io.BytesIO()
    Image.frombytes("I;16B", (256, 256), deep.astype(">u2").tobytes()).save(big_endian, "TIFF")
    (tmp_path / "c.tif").write_bytes(big_endian.getvalue())
    for name in ("a.png", "a.tif", "b.tif", "a.pgm", "c.tif"):
        pixels = decode_image(tmp_path / name, apply_exif=True)
        for channel in range(3):
            np.testing.assert_array_equal(pixels[..., channel], expected, err_msg=name)


@pytest.mark.parametrize("channels", [2, 3])
def test_16_bit_colour_is_within_one_step_of_the_rule_for_grey(tmp_path: Path, channels: int) -> None:
    deep = RNG.integers(0, 65536, (40, 30, channels)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(png16(deep))
    pixels = decode_image(tmp_path / "a.png", apply_exif=False).astype(int)
    colour = deep[..., :3] if channels == 3 else deep[..., :1]
    assert np.abs(pixels - colour / 257).max() <= 1
    assert read_header(tmp_path / "a.png").mode.endswith(";16")


def test_pixels_without_a_known_white_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    for read in (read_header, lambda p: decode_image(p, apply_exif=False)):
        with pytest.raises(ImageError, match=r"f\.tif: pixels must be integers, got floating point"):
            read(tmp_path / "f.tif")
    for decode in (False, True):
        facts = check_images(FolderStore(tmp_path), ["f.tif"], np.ones(1, bool), decode=decode, progress=False)
        assert facts.status.tolist() == [BAD]
        assert facts.reasons[0].startswith("pixels must be integers")
    Image.fromarray(np.full((4, 4), -7, np.int32)).save(tmp_path / "i.tif")
    with pytest.raises(ImageError, match=r"i\.tif: integer pixels must lie in 0..65535, got -7..-7"):
        decode_image(tmp_path / "i.tif", apply_exif=False)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_every_exif_orientation_is_applied_as_pillow_does_or_not_at_all(
    tmp_path: Path, suffix: str, orientation: int
) -> None:
    path = tmp_path / f"a.{suffix}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(16, 24, 3)).save(path, exif=exif)
    with Image.open(path) as image:
        image.load()
        np.testing.assert_array_equal(decode_image(path, apply_exif=False), image)
        np.testing.assert_array_equal(decode_image(path, apply_exif=True), ImageOps.exif_transpose(image))
    assert read_header(path) == (24, 16, "RGB", orientation)


def test_tiff_is_always_rotated_by_its_tag(tmp_path: Path) -> None:
    pixels = noise(16, 24, 3)
    Image.fromarray(pixels).save(tmp_path / "a.tif", tiffinfo={0x0112: 6})
    for apply_exif in (False, True):
        rotated = decode_image(tmp_path / "a.tif", apply_exif=apply_exif)
        np.testing.assert_array_equal(rotated, np.rot90(pixels, -1))
    assert read_header(tmp_path / "a.tif")[:2] == (16, 24)
    assert read_header(tmp_path / "a.tif").orientation == 1


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif"])
def test_of_many_frames_the_first_counts(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 6), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
    pixels = decode_image(tmp_path / f"a.{suffix}", apply_exif=False)
    assert pixels[..., 0].min() > 240
    assert pixels[..., 2].max() < 20


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "bmp", "gif", "tif"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.95])
def test_truncated_files_are_errors(tmp_path: Path, suffix: str, share: float) -> None:
    Image.fromarray(noise(64, 64, 3)).save(tmp_path / f"a.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    (tmp_path / f"a.{suffix}").write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ImageError, match=rf"a\.{suffix}: "):
        decode_image(tmp_path / f"a.{suffix}", apply_exif=True)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
        (b"hello", "no image of a known format"),
    ],
)
def test_other_files_than_images_are_named(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(ImageError, match=reason):
        decode_image(tmp_path / "a.jpg", apply_exif=False)


def test_missing_files_and_folders_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"nothing\.jpg: no such file"):
        decode_image(tmp_path / "nothing.jpg", apply_exif=False)
    with pytest.raises(ImageError, match="is a folder"):
        decode_image(tmp_path, apply_exif=False)


def test_images_beyond_the_limit_are_refused_and_large_ones_are_not(tmp_path: Path) -> None:
    Image.new("1", (20_000, 10_000)).save(tmp_path / "large.png")  # Pillow's own limit would refuse it
    assert read_header(tmp_path / "large.png").width == 20_000
    head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 0, 0, 0, 0)
    ihdr = struct.pack(">I", 13) + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + ihdr + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4)
    with pytest.raises(ImageError, match="at most 1,000,000,000 pixels"):
        decode_image(tmp_path / "bomb.png", apply_exif=False)


@pytest.mark.parametrize(
    ("mode", "num_bytes", "refused"),
    [("RGB", 31_999, True), ("RGB", 32_001, False), ("1", 3_999, True), ("1", 4_001, False)],
)
def test_a_large_image_must_not_be_much_larger_than_its_file(
    mode: str, num_bytes: int, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An animation of 50 bytes may declare a canvas that takes gigabytes."""
    monkeypatch.setattr(image_budget, "CHEAP_PIXELS", 1_000_000)
    monkeypatch.setattr(image_budget, "MAX_PIXELS", 10**9)
    image = Image.new(mode, (8_000, 8_000))
    if refused:
        with pytest.raises(ImageError, match=rf"got 8,000 x 8,000 in {num_bytes:,} bytes"):
            image_budget.require_few_pixels(image, num_bytes)
    else:
        image_budget.require_few_pixels(image, num_bytes)
    image_budget.require_few_pixels(Image.new(mode, (1_000, 1_000)), 50)


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_a_small_file_that_declares_a_huge_canvas_is_refused(tmp_path: Path, kind: str) -> None:
    size = (16_383, 16_383)
    if kind == "GIF":
        small = io.BytesIO()
        Image.new("P", (1, 1)).save(small, "GIF")
        content = small.getvalue()[:6] + struct.pack("<HH", *size) + small.getvalue()[10:]
    else:
        bits = (size[0] - 1) | (size[1] - 1) << 14
        frame = b"VP8L" + struct.pack("<I", 12) + b"\x2f" + struct.pack("<I", bits) + b"\x88\x88\x08\0\0\0\0"
        content = b"RIFF" + struct.pack("<I", 4 + len(frame)) + b"WEBP" + frame
    (tmp_path / "a").write_bytes(content)
    for read in (read_header, lambda path: decode_image(path, apply_exif=False)):
        with pytest.raises(ImageError, match="it may be damaged, or made to fill memory"):
            read(tmp_path / "a")


def test_an_image_larger_than_free_memory_is_not_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it left out as unusable, which would make results depend on the memory of the moment."""
    monkeypatch.setattr(image_budget, "CHEAP_PIXELS", 100)
    monkeypatch.setattr("detector.memory.free_memory", lambda: 10_000)
    Image.fromarray(noise(40, 50, 3)).save(tmp_path / "a.png")
    with pytest.raises(RunError, match=r"a\.png: decoding 50 x 40 pixels needs up to 0\.0 GB of memory"):
        decode_image(tmp_path / "a.png", apply_exif=False)
    with pytest.raises(RunError, match=r"a\.png: "):
        check_images(FolderStore(tmp_path), ["a.png"], np.ones(1, bool), decode=True, progress=False)
    assert read_header(tmp_path / "a.png").width == 50


def with_more_scans(count: int, *, progressive: bool, size: tuple[int, int] = (400, 300)) -> bytes:
    """A JPEG whose last scan is repeated."""
    content = encoded(lambda b: Image.new("RGB", size, (10, 20, 30)).save(b, "JPEG", progressive=progressive))
    start, end = content.rindex(b"\xff\xda"), content.rindex(b"\xff\xd9")
    return content[:end] + content[start:end] * count + b"\xff\xd9"


@pytest.mark.parametrize(("scans", "refused"), [(0, False), (480, False), (500, True), (20_000, True)])
def test_a_jpeg_with_too_many_scans_is_refused(tmp_path: Path, scans: int, refused: bool) -> None:
    (tmp_path / "a.jpg").write_bytes(with_more_scans(scans, progressive=True))
    facts = check_images(FolderStore(tmp_path), ["a.jpg"], np.ones(1, bool), decode=True, progress=False)
    if refused:
        with pytest.raises(ImageError, match=rf"must have at most 500 scans, got {scans + 10:,}"):
            decode_image(tmp_path / "a.jpg", apply_exif=False)
        assert facts.status.tolist() == [BAD]
    else:
        assert decode_image(tmp_path / "a.jpg", apply_exif=False).shape == (300, 400, 3)


def test_of_a_larger_jpeg_fewer_scans_are_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_budget, "MAX_SCANNED_PIXELS", 400 * 300 * 40)
    for scans, refused in ((29, False), (31, True)):
        (tmp_path / "a.jpg").write_bytes(with_more_scans(scans, progressive=True))
        if refused:
            with pytest.raises(ImageError, match="at most 40 scans, got 41"):
                decode_image(tmp_path / "a.jpg", apply_exif=False)
        else:
            decode_image(tmp_path / "a.jpg", apply_exif=False)


def test_bytes_behind_an_image_are_no_scans(tmp_path: Path) -> None:
    """Cameras append videos."""
    once = encoded(lambda b: Image.fromarray(noise(30, 40, 3)).save(b, "JPEG"))
    (tmp_path / "a.jpg").write_bytes(once + b"\xff\xda" * 1000)
    with Image.open(io.BytesIO(once)) as image:
        np.testing.assert_array_equal(decode_image(tmp_path / "a.jpg", apply_exif=False), image.convert("RGB"))


@pytest.mark.parametrize("repeats", [1, 200])
def test_a_baseline_jpeg_of_separate_scans_is_counted(tmp_path: Path, repeats: int) -> None:
    """A decoder reads all of them before it returns anything."""
    grey = encoded(lambda b: Image.fromarray(noise(64, 64)).save(b, "JPEG"))
    frame, scan = grey.index(b"\xff\xc0"), grey.index(b"\xff\xda")
    channels = b"".join(bytes([channel, 0x11, 0]) for channel in (1, 2, 3))
    content = grey[:frame] + b"\xff\xc0" + struct.pack(">HBHHB", 17, 8, 64, 64, 3) + channels
    content += grey[frame + 13 : scan]  # the tables
    for channel in [1, 2, 3] * repeats:
        content += grey[scan : scan + 5] + bytes([channel]) + grey[scan + 6 : -2]
    (tmp_path / "a.jpg").write_bytes(content + b"\xff\xd9")
    if repeats == 1:
        assert decode_image(tmp_path / "a.jpg", apply_exif=False).shape == (64, 64, 3)
    else:
        with pytest.raises(ImageError, match="must have at most 500 scans, got 600"):
            decode_image(tmp_path / "a.jpg", apply_exif=False)


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "loop", "long", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path, reason = tmp_path / "a.jpg", "is a pipe"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(path))
        reason = "is a socket"
    elif kind == "device":
        path, reason = Path("/dev/zero"), "is a device"
    elif kind == "loop":
        path.symlink_to(path)
        reason = "the link leads to itself"
    elif kind == "long":
        path, reason = tmp_path / ("a" * 5000), "use a shorter path"
    else:
        path.mkdir()
        reason = "is a folder"
    for read in (read_header, lambda path: decode_image(path, apply_exif=False)):
        with pytest.raises(ImageError, match=reason) as raised:
            read(path)
        assert len(str(raised.value)) < 1500
    store = FolderStore(path.parent)
    for decode in (False, True):
        facts = check_images(store, [path.name], np.ones(1, bool), decode=decode, progress=False)
        assert facts.status.tolist() == [BAD]
        assert reason in facts.reasons[0]


@pytest.mark.parametrize("name", ["a\0b.jpg", "a\ud800.jpg"])
def test_a_name_that_no_file_can_have_is_an_image_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(ImageError, match="no file can have this name") as raised:
        decode_image(tmp_path / name, apply_exif=False)
    assert str(raised.value).isprintable()
    facts = check_images(FolderStore(tmp_path), [name], np.ones(1, bool), decode=True, progress=False)
    assert facts.status.tolist() == [BAD]


def test_names_in_messages_are_printable(tmp_path: Path) -> None:
    path = tmp_path / "\x1b]0;title\x07\n.jpg"
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match="is no image of a known format") as raised:
        decode_image(path, apply_exif=False)
    assert str(raised.value).isprintable()


def test_an_error_of_the_file_system_is_distinguished_from_one_of_a_decoder(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(WHOLE[1][:300])
    (tmp_path / "empty.png").write_bytes(b"")
    for name, errno_of in (("absent.png", errno.ENOENT), ("cut.png", None), ("empty.png", None)):
        with pytest.raises(ImageError) as raised:
            decode_image(tmp_path / name, apply_exif=False)
        found = file_system_error(raised.value)
        assert (found.errno if found is not None else None) == errno_of


class FailingFile(io.BytesIO):
    """A file on a disk that fails after a while."""

    left = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(size)


@pytest.mark.parametrize("suffix", ["JPEG", "PNG"])
def test_a_read_that_fails_is_no_damaged_image(suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    content = WHOLE[["JPEG", "PNG"].index(suffix)]
    counting = FailingFile(content)
    counting.left = 1000
    monkeypatch.setattr(FolderStore, "open", lambda *_: counting)
    decode_image(Path("a"), apply_exif=False)
    for reads in range(1000 - counting.left):
        failing = FailingFile(content)
        failing.left = reads
        monkeypatch.setattr(FolderStore, "open", lambda *_, file=failing: file)
        with pytest.raises(ImageError, match="the disk or the network file system has a fault") as raised:
            decode_image(Path("a"), apply_exif=False)
        found = file_system_error(raised.value)
        assert found is not None
        assert found.errno == errno.EIO


def encoded(save: Callable[[io.BytesIO], None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer)
    return buffer.getvalue()


WHOLE = [
    encoded(lambda b, f=f: Image.fromarray(noise(24, 24, 3)).save(b, f))  # type: ignore[misc]
    for f in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP", "PPM", "AVIF")
]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.filterwarnings("ignore")
@given(whole=st.sampled_from(WHOLE), edits=st.lists(st.tuples(st.floats(0, 0.999), st.integers(0, 255)), max_size=8))
def test_damaged_files_give_pixels_or_an_image_error_and_nothing_else(
    tmp_path: Path, whole: bytes, edits: list[tuple[float, int]]
) -> None:
    damaged = bytearray(whole)
    for place, value in edits:
        damaged[int(place * min(len(damaged), 400))] = value
    (tmp_path / "a").write_bytes(damaged)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_budget, "MAX_PIXELS", 1_000_000)  # a damaged header may promise any size
        try:
            pixels = decode_image(tmp_path / "a", apply_exif=True)
        except ImageError:
            return
    assert pixels.ndim == 3


def test_headers_of_png_are_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(noise(20, 30, 3)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("the header check decoded the image"))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the header check decoded the image"))
    assert read_header(tmp_path / "a.png").width == 30


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize(("size", "needed", "read"), [
    ((97, 131), (10, 12), (97, 131)),
    ((98, 132), (10, 12), (49, 66)),
    ((800, 1000), (200, 250), (200, 250)),
    ((800, 1000), (201, 250), (400, 500)),
    ((804, 1004), (10, 12), (201, 251)),
    ((100, 100), (100, 100), (100, 100)),
    ((100, 100), (300, 300), (100, 100)),
])  # fmt: skip
def test_a_large_jpeg_is_decoded_no_larger_than_needed(
    tmp_path: Path, orientation: int, size: tuple[int, int], needed: tuple[int, int], read: tuple[int, int]
) -> None:
    """And is close to the whole image resized by areas, rotated or not."""
    coarse = Image.fromarray(noise(11, 9, 3)).resize((size[1], size[0]), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = orientation
    coarse.save(tmp_path / "a.jpg", quality=95, exif=exif)
    if orientation in (6, 8):
        needed, read = needed[::-1], read[::-1]
    whole = decode_image(tmp_path / "a.jpg", apply_exif=True)
    asked = []

    def needed_size(of: tuple[int, int]) -> tuple[int, int]:
        asked.append(of)
        return needed

    pixels, of = decode_at_least(FolderStore(tmp_path), "a.jpg", apply_exif=True, needed_size=needed_size)
    assert asked == [whole.shape[:2]] == [of]
    assert pixels.shape[:2] == read
    assert pixels.flags.c_contiguous
    by_areas = cv2.resize(whole, (read[1], read[0]), interpolation=cv2.INTER_AREA)
    assert np.abs(by_areas.astype(int) - pixels).mean() < 2
    assert np.array_equal(pixels, whole) == (read == whole.shape[:2])


def test_other_files_than_colour_jpegs_are_decoded_whole(tmp_path: Path) -> None:
    image = Image.fromarray(noise(40, 60, 3))
    image.save(tmp_path / "a.png")
    image.convert("L").save(tmp_path / "b.jpg")
    for name in ("a.png", "b.jpg"):
        pixels, size = decode_at_least(FolderStore(tmp_path), name, apply_exif=False, needed_size=lambda _: (5, 5))
        assert size == (40, 60)
        assert np.array_equal(pixels, decode_image(tmp_path / name, apply_exif=False))
