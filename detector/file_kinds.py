"""Recognize what a file is that is not what was expected: the usual results of failed downloads and copies."""

from __future__ import annotations

LONGEST = 512
"""Bytes from the start of a file that are compared."""

_STARTS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<!doctype html", "is a web page: a download that needed a login or failed; download it again"),
    (b"<html", "is a web page: a download that needed a login or failed; download it again"),
    (b"<?xml", "is an XML file"),
    (b"<", "is an XML file"),
    (b"PK\x03\x04", "is a zip archive; unpack it"),
    (b"\x1f\x8b", "is compressed with gzip; unpack it with `gunzip`"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it"),
    (b"Rar!\x1a\x07", "is a RAR archive; unpack it"),
    (b"BZh", "is compressed with bzip2; unpack it with `bunzip2`"),
    (b"\xfd7zXZ\x00", "is compressed with xz; unpack it with `unxz`"),
    (b"\x28\xb5\x2f\xfd", "is compressed with zstd; unpack it with `unzstd`"),
    (b"SQLite format 3\x00", "is an SQLite database"),
    (b"%PDF-", "is a PDF document"),
    (b"\xff\xd8\xff", "is a JPEG image"),
    (b"\x89PNG\r\n\x1a\n", "is a PNG image"),
    (b"\x00\x05\x16\x07", "is a companion file of macOS, without content of its own; use the file without `._`"),
)


def other_kind(head: bytes, *, expected: tuple[str, ...] = ()) -> str:
    """Return what a file is by its first bytes, with a remedy; empty where that is not known.

    Args:
        head: the first `LONGEST` bytes.
        expected: parts of answers that are no surprise, such as "zip" for a weight file.
    """
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text:
        return "is empty" if len(head) < LONGEST else ""
    for start, answer in _STARTS:
        if (head.startswith(start) or text[: len(start)].lower() == start) and not any(e in answer for e in expected):
            return answer
    return ""
