"""Image files: each format with its structure changed, truncated, or declaring what it does not hold."""

from __future__ import annotations

import functools
import io
import os
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detector.datasets.image_check import GOOD, check_images
from detector.datasets.images import decode_at_least, read_header
from detector.datasets.store import FolderStore
from tests.fuzz.mutations import mutate_bytes

MODULES = ("detector.datasets.images", "detector.datasets.image_budget", "detector.datasets.image_check")
REGRESSIONS = ("1:566", "2:2309")

SIZES = (0, 1, 2, 7, 8, 255, 256, 4_095, 16_383, 16_384, 32_767, 32_768, 65_500, 65_535)
WORDS = (0, 1, 2, 3, 4, 8, 16, 127, 128, 255, 256, 32_767, 65_535, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1)


def prepare(folder: Path) -> None:
    """Nothing is shared."""


@functools.cache
def _pixels(mode: str, width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 4), dtype=np.uint8)
    values[height // 3 :] //= 64  # something that compresses
    image = Image.fromarray(values, "RGBA")
    if mode == "I;16":
        return Image.fromarray(values[..., 0].astype(np.uint16) * 257)
    if mode == "I":
        return Image.fromarray(values[..., 0].astype(np.int32) * 300)
    if mode == "F":
        return Image.fromarray(values[..., 0].astype(np.float32))
    return image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA") else image.convert(mode)


def _saved(rng: random.Random, form: str, modes: str, **options: Any) -> bytes:
    image = _pixels(rng.choice(modes.split()), *rng.choice([(1, 1), (8, 8), (33, 17), (64, 48), (200, 3)]))
    content = io.BytesIO()
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = rng.choice([1, 3, 6, 8, 0, 9, 65_535])
        exif[0x010E] = "x" * rng.choice([0, 10, 3000])
        options["exif"] = exif
    try:
        image.save(content, form, **options)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError):  # an option that this mode does not have
        content = io.BytesIO()
        _pixels("RGB", 33, 17).save(content, form)
    return content.getvalue()


def jpeg(rng: random.Random) -> bytes:
    """A JPEG with changed segments or scans."""
    options: dict[str, Any] = {"progressive": rng.random() < 0.5, "quality": rng.choice([1, 50, 100])}
    if rng.random() < 0.3:
        options["restart_marker_blocks"] = rng.choice([1, 3])
    data = _saved(rng, "JPEG", "L RGB CMYK", **options)
    segments, rest = _jpeg_segments(data)
    for _ in range(rng.choice([0, 1, 1, 1, 2, 5])):
        change = rng.randrange(9)
        place = rng.randrange(len(segments))
        marker, payload = segments[place]
        frames = [i for i, (m, _) in enumerate(segments) if 0xC0 <= m <= 0xCF and m not in (0xC4, 0xC8, 0xCC)]
        if change == 0:
            del segments[place]
            segments = segments or [(0xE0, b"JFIF\0")]
        elif change == 1:
            segments.insert(rng.randrange(len(segments) + 1), (marker, payload))
        elif change == 2:
            segments[place] = (rng.choice([0xC0, 0xC2, 0xC3, 0xC9, 0xCA, 0xC4, 0xDB, 0xDD, 0xDA, 0xE1, 0xFE]), payload)
        elif change == 3:
            segments[place] = (marker, mutate_bytes(rng, payload))
        elif change in (4, 5) and frames:
            i = rng.choice(frames)
            header = bytearray(segments[i][1].ljust(6, b"\0"))
            struct.pack_into(">HH", header, 1, rng.choice(SIZES), rng.choice(SIZES))
            if rng.random() < 0.3:
                header[rng.choice([0, 5])] = rng.choice([0, 1, 2, 3, 4, 8, 12, 255])
            if rng.random() < 0.3 and len(header) > 7:
                header[7] = rng.choice([0x11, 0x22, 0x41, 0x44, 0x00, 0xFF])
            segments[i] = (segments[i][0], bytes(header))
        elif change == 6:
            scans = rng.choice([5, 30, 100, 600, 3000])
            rest = rest.removesuffix(b"\xff\xd9") + _last_scan(rest) * scans + b"\xff\xd9"
        elif change == 7:
            rest = mutate_bytes(rng, rest)
        else:
            segments.insert(0, (0xE2, b"MPF\0" + mutate_bytes(rng, _exif(rng))))
    body = b"".join(b"\xff" + bytes([m]) + struct.pack(">H", min(len(p) + 2, 65_535)) + p for m, p in segments)
    return b"\xff\xd8" + body + rest


def _jpeg_segments(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """The segments before the first scan, and everything from it on."""
    segments, at = [], 2
    while data[at + 1] != 0xDA:
        length = struct.unpack_from(">H", data, at + 2)[0]
        segments.append((data[at + 1], data[at + 4 : at + 2 + length]))
        at += 2 + length
    return segments, data[at:]


def _last_scan(rest: bytes) -> bytes:
    return rest[max(0, rest.rfind(b"\xff\xda")) :].removesuffix(b"\xff\xd9")[:3000]


def png(rng: random.Random) -> bytes:
    """A PNG with changed chunks, whose checksums are mostly right."""
    options: dict[str, Any] = rng.choice([{}, {"optimize": True}, {"compress_level": 0}])
    data = _saved(rng, "PNG", "1 L LA P RGB RGBA I;16", **options)
    chunks, at = [], 8
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(rng.choice([0, 1, 1, 2, 5])):
        place, change = rng.randrange(len(chunks)), rng.randrange(8)
        kind, payload = chunks[place]
        if change == 0 and len(chunks) > 1:
            del chunks[place]
        elif change == 1:
            chunks.insert(rng.randrange(len(chunks) + 1), (kind, payload))
        elif change == 2:
            chunks[place] = (kind, mutate_bytes(rng, payload))
        elif change == 3 and chunks[0][0] == b"IHDR" and len(chunks[0][1]) == 13:
            header = bytearray(chunks[0][1])
            struct.pack_into(">II", header, 0, rng.choice([*SIZES, *WORDS]), rng.choice([*SIZES, *WORDS]))
            chunks[0] = (b"IHDR", bytes(header))
        elif change == 4 and chunks[0][0] == b"IHDR" and len(chunks[0][1]) == 13:
            header = bytearray(chunks[0][1])
            header[rng.randrange(8, 13)] = rng.choice([0, 1, 2, 3, 4, 6, 7, 8, 16, 32, 255])
            chunks[0] = (b"IHDR", bytes(header))
        else:
            chunks.insert(rng.randrange(len(chunks) + 1), _odd_png_chunk(rng))
    out = b"\x89PNG\r\n\x1a\n"
    for kind, payload in chunks:
        checksum = zlib.crc32(kind + payload) if rng.random() < 0.97 else rng.getrandbits(32)
        length = len(payload) if rng.random() < 0.97 else rng.choice(WORDS)
        out += struct.pack(">I", length) + kind + payload + struct.pack(">I", checksum)
    return out


def _odd_png_chunk(rng: random.Random) -> tuple[bytes, bytes]:
    kind = rng.choice([b"zTXt", b"iTXt", b"tEXt", b"iCCP", b"PLTE", b"tRNS", b"eXIf", b"acTL", b"fcTL", b"fdAT",
                       b"IDAT", b"gAMA", b"pHYs", b"cHRM", b"IEND", b"xxXx"])  # fmt: skip
    if kind in (b"zTXt", b"iCCP", b"IDAT"):
        packed = zlib.compress(bytes(rng.choice([10, 10_000, 3_000_000])))
        return kind, (b"key\0\0" if kind != b"IDAT" else b"") + packed
    if kind == b"eXIf":
        return kind, mutate_bytes(rng, _exif(rng))
    if kind in (b"acTL", b"fcTL", b"fdAT"):
        return kind, struct.pack(">IIIIIHHBB", *(rng.choice(SIZES) for _ in range(7)), 1, 1)
    return kind, rng.randbytes(rng.choice([0, 1, 3, 9, 768, 769]))


def _exif(rng: random.Random) -> bytes:
    entries = [(0x0112, 3, 1, rng.choice([1, 6, 8, 0, 65_535])), (0x8769, 4, 1, rng.choice([8, 26, *WORDS]))]
    entries.append((rng.choice([0x010F, 0x8825, 0xA005, 0x927C]), rng.choice([1, 2, 3, 5, 7]), rng.choice(WORDS), 8))
    rng.shuffle(entries)
    table = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + struct.pack("<I", rng.choice([0, 8, *WORDS]))


def gif(rng: random.Random) -> bytes:
    """A GIF with another canvas, other blocks and frames."""
    data = bytearray(_saved(rng, "GIF", "1 L P RGB"))
    if rng.random() < 0.3:
        frames = [_pixels("P", 33, 17), _pixels("L", 8, 8)]
        content = io.BytesIO()
        frames[0].save(content, "GIF", save_all=True, append_images=frames[1:], disposal=rng.choice([0, 1, 2, 3]))
        data = bytearray(content.getvalue())
    if rng.random() < 0.4:
        struct.pack_into("<HH", data, 6, rng.choice(SIZES), rng.choice(SIZES))
    if rng.random() < 0.3:
        data[10] = rng.choice([0, 0x80, 0x87, 0xF7, 0xFF, 0x70])
    frame = data.find(b",", 13)
    if frame > 0 and rng.random() < 0.4 and frame + 10 < len(data):
        struct.pack_into("<HHHH", data, frame + 1, *(rng.choice(SIZES) for _ in range(4)))
    if frame > 0 and rng.random() < 0.3 and frame + 10 < len(data):
        data[rng.choice([frame + 9, frame + 10])] = rng.choice([0, 1, 2, 8, 11, 12, 13, 64, 128, 255])
    if rng.random() < 0.3:
        block = b"!" + rng.choice([b"\xf9\x04\x09\0\0\xff\0", b"\xfe" + b"\xff" + b"x" * 255, b"\xff\x0bNETSCAPE2.0"])
        place = rng.randrange(13, len(data) + 1) if len(data) > 13 else len(data)
        data[place:place] = block * rng.choice([1, 3, 500])
    return mutate_bytes(rng, bytes(data)) if rng.random() < 0.3 else bytes(data)


def tiff(rng: random.Random) -> bytes:
    """A TIFF whose tags have other types, counts and values."""
    if rng.random() < 0.2:  # as fax machines write them; Pillow 12.0 corrupts its memory when it writes other modes so
        data = bytearray(_saved(rng, "TIFF", "1", compression=rng.choice(("group3", "group4"))))
    else:
        compressions = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "zstd", "lzma")
        data = bytearray(_saved(rng, "TIFF", "1 L P RGB RGBA CMYK I;16 I F LAB", compression=rng.choice(compressions)))
    at = struct.unpack_from("<I", data, 4)[0]
    if at + 2 > len(data):
        return bytes(data)
    count = struct.unpack_from("<H", data, at)[0]
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        entry = at + 2 + 12 * rng.randrange(count)
        tag, kind, number, value = struct.unpack_from("<HHII", data, entry)
        change = rng.randrange(6)
        if change == 0:
            value = rng.choice([*SIZES, *WORDS])
        elif change == 1:
            number = rng.choice(WORDS)
        elif change == 2:
            kind = rng.choice([0, 1, 2, 3, 4, 5, 7, 12, 13, 16, 99])
        elif change == 3:
            tag = rng.choice([256, 257, 258, 259, 262, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323, 324, 325, 330,
                              338, 339, 347, 529, 530, 532, 700, 34675])  # fmt: skip
        elif change == 4 and tag in (256, 257, 278):
            value = rng.choice(SIZES)
        else:
            struct.pack_into("<I", data, at + 2 + 12 * count, rng.choice([at, 8, *WORDS]))  # the next page: a circle
        struct.pack_into("<HHII", data, entry, tag, kind, number, value)
    if rng.random() < 0.1:
        struct.pack_into("<H", data, at, rng.choice([0, 1, 255, 65_535]))
    if rng.random() < 0.1:
        data[:4] = rng.choice([b"MM\0*", b"II+\0", b"MM\0+", b"II*\0"])
    return mutate_bytes(rng, bytes(data)) if rng.random() < 0.2 else bytes(data)


def webp(rng: random.Random) -> bytes:
    """A WebP with changed chunks."""
    options: dict[str, Any] = rng.choice([{"lossless": True}, {"quality": 10}, {"lossless": True, "exact": True}])
    data = _saved(rng, "WEBP", "RGB RGBA L", **options)
    if rng.random() < 0.3:
        content = io.BytesIO()
        _pixels("RGBA", 33, 17).save(content, "WEBP", save_all=True, append_images=[_pixels("RGB", 33, 17)])
        data = content.getvalue()
    chunks, at = [], 12
    while at + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, at)
        chunks.append((kind, data[at + 8 : at + 8 + length]))
        at += 8 + length + length % 2
    for _ in range(rng.choice([0, 1, 1, 2])):
        place = rng.randrange(len(chunks))
        kind, payload = chunks[place]
        change = rng.randrange(5)
        if change == 0 and kind == b"VP8L" and len(payload) > 5:
            bits = (rng.choice([1, 8, 16_383]) - 1) | (rng.choice([1, 8, 16_383]) - 1) << 14
            payload = payload[:1] + struct.pack("<I", bits) + payload[5:]
        elif change == 1 and kind == b"VP8X" and len(payload) >= 10:
            sizes = struct.pack("<I", rng.choice(WORDS))[:3] + struct.pack("<I", rng.choice(WORDS))[:3]
            payload = bytes([rng.choice([0, 2, 16, 48, 255])]) + payload[1:4] + sizes
        elif change == 2:
            payload = mutate_bytes(rng, payload)
        elif change == 3:
            kind = rng.choice([b"VP8 ", b"VP8L", b"VP8X", b"ANIM", b"ANMF", b"ALPH", b"EXIF", b"ICCP", b"XMP "])
        else:
            chunks.insert(rng.randrange(len(chunks) + 1), (b"EXIF", _exif(rng)))
        place = min(place, len(chunks) - 1)
        chunks[place] = (kind, payload)
    body = b"WEBP"
    for kind, payload in chunks:
        length = len(payload) if rng.random() < 0.95 else rng.choice(WORDS)
        body += kind + struct.pack("<I", length) + payload + b"\0" * (len(payload) % 2)
    return b"RIFF" + struct.pack("<I", len(body) if rng.random() < 0.95 else rng.choice(WORDS)) + body


def bmp(rng: random.Random) -> bytes:
    """A BMP with another header, also with run lengths."""
    data = bytearray(_saved(rng, "BMP", "1 L P RGB RGBA"))
    fields = ((2, "<I"), (10, "<I"), (14, "<I"), (18, "<i"), (22, "<i"), (26, "<H"), (28, "<H"), (30, "<I"), (34, "<I"),
              (46, "<I"))  # fmt: skip
    for _ in range(rng.choice([0, 1, 2, 4])):
        at, form = rng.choice(fields)
        value = rng.choice([*SIZES, *WORDS, 1, 4, 8, 16, 24, 32, 40, 64, 108, 124])
        limit = {"<I": 2**32, "<i": 2**31, "<H": 2**16}[form]
        struct.pack_into(form, data, at, value % limit if form != "<i" else min(value, limit - 1) * rng.choice([1, -1]))
    if rng.random() < 0.2:
        struct.pack_into("<iiHHI", data, 18, rng.choice(SIZES), rng.choice(SIZES), 1, 8, rng.choice([1, 2]))
        data[54:] = bytes(rng.choice([0, 1024])) + rng.randbytes(30) + b"\0\2\xff\xff\0\1"
    return bytes(data)


def ppm(rng: random.Random) -> bytes:
    """A PPM with another header, in binary or in digits."""
    kind = rng.choice([b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"Pf", b"PF", b"P7", b"P0CMYK"])
    tokens = [str(rng.choice([1, 4, 4, 4, *SIZES])).encode() for _ in range(2)]
    tokens.append(str(rng.choice([1, 15, 255, 255, 65_535, 65_536, 0, -1])).encode())
    if rng.random() < 0.2:
        tokens[rng.randrange(3)] = rng.choice([b"", b"x", b"1e9", b"9" * 5000, b"# \xff\n4", b"-4", b"0x10", b"\0"])
    if kind in (b"P1", b"P2", b"P3"):
        pixels = b" ".join(
            str(rng.choice([0, 1, 255, 256, 10**9])).encode() for _ in range(rng.choice([0, 16, 48, 200]))
        )
        if rng.random() < 0.3:
            pixels += rng.choice([b"#", b"# x\n" * 1000, b"9" * 100_000, b"a", b"\0"])
    else:
        pixels = rng.randbytes(rng.choice([0, 16, 48, 96, 10_000]))
    return rng.choice([b"\n", b" ", b"\n# comment\n"]).join([kind, *tokens]) + b"\n" + pixels


def boxes(rng: random.Random) -> bytes:
    """An AVIF or a JPEG 2000 with changed bytes and box lengths."""
    data = bytearray(_saved(rng, rng.choice(["AVIF", "JPEG2000"]), "L RGB RGBA"))
    for name in (b"ispe", b"ihdr", b"iloc", b"meta", b"mdat", b"ftyp", b"\xff\x51"):
        at = data.find(name)
        if at >= 4 and rng.random() < 0.25 and at + 12 < len(data):
            place = at + rng.choice([-4, 4, 8])
            struct.pack_into(">I", data, place, rng.choice([*SIZES, *WORDS]))
    return mutate_bytes(rng, bytes(data)) if rng.random() < 0.6 else bytes(data)


def other(rng: random.Random) -> bytes:
    """No image."""
    texts = (b"", b"\n", b"<html>", b"version https://git-lfs.github.com/spec/v1", b"%!PS-Adobe-3.0 EPSF-3.0\n",
             b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP", b"II*\0\x08\0\0\0",
             b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x1cftypavif", b"P6 ", b"SIMPLE  =", b"8BPS")  # fmt: skip
    return rng.choice(texts) + rng.randbytes(rng.choice([0, 1, 30, 3000]))


FORMATS: tuple[Callable[[random.Random], bytes], ...] = (jpeg, jpeg, png, png, gif, tiff, tiff, webp, bmp, ppm, boxes)


def make(rng: random.Random, folder: Path) -> Path:
    """Write one image file, or what stands in its place."""
    path = folder / rng.choice(["a.jpg", "a.png", "a", "\x1b[2J.png", "é.tif", "a b\n.gif"])
    kind = rng.random()
    if kind < 0.02:
        match rng.randrange(4):
            case 0:
                path.symlink_to(path)
            case 1:
                os.mkfifo(path)
            case 2:
                path.mkdir()
        return path  # or nothing is there
    data = other(rng) if kind < 0.06 else rng.choice(FORMATS)(rng)
    if rng.random() < 0.15:
        data = data[: rng.randrange(len(data) + 1)]
    elif rng.random() < 0.1:
        data = mutate_bytes(rng, data)
    elif rng.random() < 0.05:
        data += rng.choice([bytes(100_000), data, rng.randbytes(1000), b"\xff\xda" * 5000])
    path.write_bytes(data)
    return path


def use(path: Path) -> str:
    """Check and decode the image in every way that the product does."""
    os.environ["XDG_CACHE_HOME"] = str(path.parent.parent / "shared")
    store = FolderStore(path.parent)
    facts = check_images(store, [path.name], np.ones(1, bool), decode=True, progress=False)
    small, size = decode_at_least(store, path.name, apply_exif=True, needed_size=lambda whole: (whole[0] // 8, 1))
    whole, same_size = decode_at_least(store, path.name, apply_exif=False)
    header = read_header(path)
    assert facts.status.tolist() == [GOOD], f"decoded, but the check found: {facts.reasons}"
    assert facts.sizes.tolist() == [[header.height, header.width]]
    assert whole.shape == (header.height, header.width, 3) == (*same_size, 3)
    assert size == (same_size[::-1] if header.orientation >= 5 else same_size)
    assert small.shape[2] == 3
    assert whole.dtype == small.dtype == np.uint8
    return header.mode.partition(";")[0] if header.mode != "I" else "deep"
