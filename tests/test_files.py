"""Files are opened only if they are regular; errors of the operating system are explained."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from detector.files import open_regular, os_error_text, read_bytes


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


SPECIAL: dict[str, tuple[Callable[[Path], object], str]] = {
    "FIFO": (os.mkfifo, "is a pipe (FIFO), not a regular file"),
    "socket": (make_socket, "is a socket, not a regular file"),
    "device": (lambda path: path.symlink_to("/dev/zero"), "is a device, not a regular file"),
    "folder": (Path.mkdir, "is a folder, not a file"),
    "loop": (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
    "missing": (lambda path: None, "No such file or directory"),
}


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_is_an_error_and_never_waited_for(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # names of sockets are short
    make, reason = SPECIAL[kind]
    make(Path("x"))
    with pytest.raises(OSError, match=re.escape(f"{reason}: 'x'")):
        open_regular("x")


@pytest.mark.parametrize("name", ["a\0b", "\ud800", "x" * 300])
def test_names_that_no_file_can_have_are_an_os_error(name: str) -> None:
    with pytest.raises(OSError, match=r"no file can have this name|File name too long"):
        open_regular(name)


@pytest.mark.parametrize("content", [b"", b"abc", bytes(10**6)])
def test_regular_files_and_links_to_them_are_read(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    (tmp_path / "link").symlink_to("x")
    assert read_bytes(tmp_path / "link") == read_bytes(tmp_path / "x", limit=len(content)) == content


def test_a_file_above_the_limit_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abcd")
    with pytest.raises(OSError, match="is larger than 3 bytes"):
        read_bytes(tmp_path / "x", limit=3)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "f"), "f: No space left on device; free disk space"),
        (OSError(errno.EACCES, "Permission denied"), "Permission denied; correct its permissions"),
        (OSError(errno.ENOENT, "No such file or directory", "f"), "f: No such file or directory"),
        (OSError("bare"), "bare"),
    ],
)  # fmt: skip
def test_an_os_error_names_the_path_the_reason_and_a_remedy(error: OSError, text: str) -> None:
    assert os_error_text(error).startswith(text)
