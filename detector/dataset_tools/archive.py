"""Unpack zip files from untrusted sources."""

from __future__ import annotations

import re
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from detector.dataset_tools.download import CHUNK_BYTES, full_disk_explained, require_space
from detector.dataset_tools.progress import Meter
from detector.errors import DownloadError
from detector.files import os_error_text
from detector.text import printable, shown

MAX_MEMBERS = 500_000  # four times COCO's largest archive


def unpack(path: Path, folder: Path, *, limit_bytes: int, place: Callable[[str], str | None]) -> None:
    """Unpack the zip file `path` into the new folder `folder`.

    Every member is checked before the first byte is written, including those that are left out.

    Args:
        path: the zip file.
        folder: a folder that must not exist yet; its parent must.
        limit_bytes: upper bound of the sum of the unpacked sizes.
        place: maps a member's name to its path below `folder`, or to None to leave it out.

    Raises:
        DownloadError: a member leads out of the folder, is a link or encrypted, the content is too large or damaged, or
            the disk is too small.
    """
    try:
        with zipfile.ZipFile(path) as archive, Meter(f"unpacking {path.name}") as meter:
            wanted = _checked_members(archive, path, limit_bytes=limit_bytes, place=place)
            total = sum(member.file_size for member, _ in wanted)
            require_space(folder.parent, total)
            done, made = 0, {PurePosixPath()}
            folder.mkdir()
            with full_disk_explained(folder.parent, total):
                for member, target in wanted:
                    if target.parent not in made:
                        (folder / target.parent).mkdir(parents=True, exist_ok=True)
                        made.add(target.parent)
                    # "x": fail on two members of one name, or of names that are one to the file system.
                    with archive.open(member) as source, (folder / target).open("xb") as out:
                        shutil.copyfileobj(source, out, CHUNK_BYTES)
                    done += member.file_size
                    meter.update(done, total)
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, NotImplementedError) as error:
        if isinstance(error, DownloadError):
            raise
        raise DownloadError(
            f"{path} must be an undamaged zip file, got {printable(str(error), 500)}; delete it and run this again"
        ) from error
    except OSError as error:  # for example, names that the file system refuses
        raise DownloadError(f"{path} cannot be unpacked: {os_error_text(error)}", exit_code=2) from error


def _checked_members(
    archive: zipfile.ZipFile, path: Path, *, limit_bytes: int, place: Callable[[str], str | None]
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """Return the wanted files and their target paths; raise `DownloadError` if any member is unsafe."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise DownloadError(f"{path} must have at most {MAX_MEMBERS} members, got {len(members)}")
    wanted: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    for member in members:
        # orig_filename: in filename, zipfile has already cut at NUL and replaced the system's separators.
        name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
        if name.startswith("/") or re.search(r"[\\:\0]", name) or ".." in name.split("/"):
            raise DownloadError(
                f"{path} must not lead out of its folder, got member {shown(name, 100)}; do not use this file"
            )
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DownloadError(
                f"{path} must contain only files and folders, got a link or device {shown(name, 100)}; do not use it"
            )
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DownloadError(
                f"{path} must be stored or deflated and not encrypted, got another kind of member {shown(name, 100)}"
            )
        target = None if member.is_dir() else place(name)
        if target is not None:
            wanted.append((member, PurePosixPath(target)))
    total = sum(member.file_size for member, _ in wanted)  # zipfile extracts no more of a member than this
    if total > limit_bytes:
        raise DownloadError(f"{path} must unpack to at most {limit_bytes} bytes, got {total}; do not use this file")
    if len({target for _, target in wanted}) < len(wanted):
        raise DownloadError(f"{path} must contain every file name once, got a repeated name; do not use this file")
    return wanted
