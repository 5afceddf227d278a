"""Fetch public datasets into a data folder: download, verify, unpack, convert.

Three promises. A download that stopped goes on where it was, unless the server's file changed. A dataset folder exists
only once it is whole: everything is built in a hidden folder beside it and renamed. What is whole is left alone.
"""

import contextlib
import difflib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import stat
import sys
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Literal, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from detector.datasets.voc import Problem, read_names, voc_to_coco, write_json

CHUNK_BYTES = 2**20
MAX_MEMBERS = 500_000  # four times COCO's largest archive
# A busy or restarting server; every other 4xx and 5xx says the same tomorrow.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

Say = Callable[[str], None]


class DataError(Exception):
    """Something to tell the user in one line. ``exit_code`` is 2 where the user can mend it, else 1."""

    def __init__(self, message: str, *, exit_code: Literal[1, 2] = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _InterruptedError(Exception):
    """An attempt failed in a way that another one may not. ``wait_s`` is the pause the server asked for."""

    def __init__(self, message: str, *, network: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.network = network
        self.wait_s = wait_s


@dataclass(frozen=True)
class Archive:
    """A zip file on the web. ``size`` (bytes) and ``sha256`` are None where the server packs it for each request."""

    url: str
    name: str
    size: int | None
    sha256: str | None
    unpacked_limit: int  # bytes, somewhat over what the real one holds: a bomb is refused, and the disk checked early


@dataclass(frozen=True)
class Part:
    """One archive that unpacks to one folder of a dataset."""

    archive: Archive
    folder: str  # also the archive's only top-level folder
    suffix: str
    count: int  # files with this suffix
    names: tuple[str, ...] = ()  # files that must be among them


@dataclass(frozen=True)
class SplitCount:
    """What a converted split must hold."""

    images: int
    boxes: int


# COCO publishes no sums. These sizes and sums are those TensorFlow Datasets and other projects pin, all the same.
COCO2017: Mapping[str, Part] = {
    "train": Part(
        Archive(
            url="http://images.cocodataset.org/zips/train2017.zip",
            name="train2017.zip",
            size=19_336_861_798,
            sha256="69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929",
            unpacked_limit=22_000_000_000,
        ),
        folder="train2017",
        suffix=".jpg",
        count=118_287,
    ),
    "val": Part(
        Archive(
            url="http://images.cocodataset.org/zips/val2017.zip",
            name="val2017.zip",
            size=815_585_330,
            sha256="4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05",
            unpacked_limit=950_000_000,
        ),
        folder="val2017",
        suffix=".jpg",
        count=5_000,
    ),
    "annotations": Part(
        Archive(
            url="http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
            name="annotations_trainval2017.zip",
            size=252_907_541,
            sha256="113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268",
            unpacked_limit=1_200_000_000,
        ),
        folder="annotations",
        suffix=".json",
        count=6,
        names=("instances_train2017.json", "instances_val2017.json"),
    ),
}

BCCD_URL = "https://github.com/Shenggan/BCCD_Dataset"
BCCD_COMMIT = "d272fb14cdff6e473fafeeeba32aba5f560e9e43"
# GitHub packs an archive for each request and its bytes are not stable: the counts below are the check.
BCCD_ARCHIVE = Archive(
    url=f"{BCCD_URL}/archive/{BCCD_COMMIT}.zip",
    name=f"BCCD_Dataset-{BCCD_COMMIT[:12]}.zip",
    size=None,
    sha256=None,
    unpacked_limit=100_000_000,
)
BCCD_CATEGORIES = ("RBC", "WBC", "Platelets")  # id 1, 2, 3
BCCD_SPLITS: Mapping[str, SplitCount] = {
    "train": SplitCount(images=205, boxes=2804),
    "val": SplitCount(images=87, boxes=1137),
    "test": SplitCount(images=72, boxes=945),
}


def get_coco2017(
    root: Path,
    *,
    parts: Sequence[str] = ("train", "val", "annotations"),
    keep_archives: bool = False,
    table: Mapping[str, Part] = COCO2017,
    say: Say = print,
) -> None:
    """Make ``root/coco/{train2017,val2017,annotations}``, as far as ``parts`` names them.

    Raises:
        DataError: an unknown part, too little disk, no network, a wrong file, or a folder in the way.
    """
    mistakes = [
        f"part must be one of {', '.join(table)}, got {name!r}{nearest(name, table)}"
        for name in dict.fromkeys(parts)
        if name not in table
    ]
    if mistakes or not parts:
        raise DataError("; ".join(mistakes) or f"parts must name one or more of {', '.join(table)}", exit_code=2)
    folder, archives = root / "coco", root / "archives"
    todo: list[Part] = []
    for name in dict.fromkeys(parts):
        part = table[name]
        missing = _missing_files(folder / part.folder, part)
        if missing is None:
            say(f"{folder / part.folder} is complete ({part.count} {part.suffix} files); nothing to do")
        else:
            _refuse_occupied(folder / part.folder, missing)
            todo.append(part)
    if not todo:
        return
    _make_folder(folder)
    _require_space(folder, _space_needed([part.archive for part in todo], archives, keep_archives))
    for part in todo:
        fetched = _archive(part.archive, archives, keep=keep_archives, say=say)
        with fetched as path, _built_aside(folder / part.folder) as staging:
            unpack(path, staging, limit_bytes=part.archive.unpacked_limit, place=_below(part.folder))
            missing = _missing_files(staging, part)
            if missing is not None:
                raise DataError(f"{path} {missing}; delete it and run this again")
        say(f"{folder / part.folder} is complete ({part.count} {part.suffix} files)")


def get_bccd(
    root: Path,
    *,
    keep_archives: bool = False,
    archive: Archive = BCCD_ARCHIVE,
    splits: Mapping[str, SplitCount] = BCCD_SPLITS,
    say: Say = print,
) -> None:
    """Make ``root/bccd/{images,annotations}``: 364 blood-cell images and one COCO JSON a split.

    Raises:
        DataError: too little disk, no network, counts other than expected, or a folder in the way.
    """
    folder, archives = root / "bccd", root / "archives"
    mistakes = _bccd_mistakes(folder, splits)
    if not mistakes:
        say(f"{folder} is complete ({_counts(splits)}); nothing to do")
        return
    _refuse_occupied(folder, mistakes[0])
    _make_folder(root)
    _require_space(root, _space_needed([archive], archives, keep_archives))
    with _archive(archive, archives, keep=keep_archives, say=say) as path, _built_aside(folder) as staging:
        raw = staging / "raw"
        staging.mkdir()
        unpack(path, raw, limit_bytes=archive.unpacked_limit, place=_bccd_place)
        try:
            _convert_bccd(raw, staging, splits=splits, say=say)
        except FileNotFoundError as error:
            raise DataError(f"{path} must hold {error.filename}, got no such file; delete it and run again") from error
        shutil.rmtree(raw)
        mistakes = _bccd_mistakes(staging, splits)
        if mistakes:
            raise DataError(
                f"{path} must be BCCD at {BCCD_COMMIT[:12]}: {'; '.join(mistakes)}; delete it and run again"
            )
    say(f"{folder} is complete ({_counts(splits)})")


def fetch(
    archive: Archive,
    folder: Path,
    *,
    retries: int = 6,
    backoff_s: float = 1.0,
    timeout_s: float = 60.0,
    say: Say = print,
) -> Path:
    """Download ``archive`` to ``folder/name`` and verify it; a sound file that is there already is left as it is.

    Bytes go to ``name.part``; ``name.part.json`` remembers which version of the server's file they belong to. An
    attempt that brings the file further than any before it sets the count of failures back to zero, so that a long
    download survives any number of short ones.

    Args:
        archive: what to fetch, and its size and sha256 as far as known.
        folder: an existing folder.
        retries: attempts after the first without any progress.
        backoff_s: pause before the first retry; doubles up to a minute.
        timeout_s: silence after which a connection counts as dead.
        say: gets one line for each retry.

    Raises:
        DataError: no network, the server has no such file, or the file is not the expected one.
    """
    path = folder / archive.name
    part = _part_path(path)
    if path.exists():
        try:
            _verify(path, archive, "finish copying or delete it, and run this again")
        except DataError as error:
            raise DataError(str(error), exit_code=2) from error
        return path
    by_hand = f"if it stays so, put the file at {path} by hand and run this again"
    failures, furthest = 0, _size(part)
    may_start_over = True
    while True:
        try:
            resumed = _receive(archive, part, by_hand=by_hand, timeout_s=timeout_s)
            try:
                _verify(part, archive, by_hand)
            except DataError as error:
                _discard(part)
                # Stitched from two answers: the old half may be to blame. One answer: the server's file is wrong.
                if not (resumed and may_start_over):
                    raise
                may_start_over = False
                raise _InterruptedError(f"{error}; starts again from the first byte", network=False) from error
            os.replace(part, path)
            _discard(part)
            return path
        except _InterruptedError as error:
            failures = 0 if _size(part) > furthest else failures + 1
            furthest = max(furthest, _size(part))
            if failures > retries:
                raise DataError(
                    f"{archive.url} must be reachable, got {error} ({failures} times in a row); {by_hand}",
                    exit_code=2 if error.network else 1,
                ) from error
            wait_s = min(120.0, max(error.wait_s, min(60.0, backoff_s * 2 ** max(0, failures - 1))))
            say(f"{archive.name}: {error}; tries again in {wait_s:.0f} s")
            time.sleep(wait_s)


def unpack(path: Path, folder: Path, *, limit_bytes: int, place: Callable[[str], str | None]) -> None:
    """Unpack the zip ``path`` into the new folder ``folder``.

    Every member is checked before the first byte is written, also those that are not wanted.

    Args:
        path: the zip file.
        folder: must not exist; its parent must.
        limit_bytes: largest sum of the unpacked sizes.
        place: gives a member's path below ``folder``, or None to leave the member out.

    Raises:
        DataError: a member leads out of the folder, is a link or encrypted, the content is too large or damaged, or the
            disk too small.
    """
    try:
        with zipfile.ZipFile(path) as archive, Meter(f"unpacks {path.name}") as meter:
            wanted = _checked_members(archive, path, limit_bytes=limit_bytes, place=place)
            total = sum(member.file_size for member, _ in wanted)
            _require_space(folder.parent, total)
            done, made = 0, {PurePosixPath()}
            folder.mkdir()
            with _full_disk_explained(folder.parent, total):
                for member, target in wanted:
                    if target.parent not in made:
                        (folder / target.parent).mkdir(parents=True, exist_ok=True)
                        made.add(target.parent)
                    # "x": two members of one name (or of names the file system takes for one) must not pass.
                    with archive.open(member) as source, (folder / target).open("xb") as out:
                        shutil.copyfileobj(source, out, CHUNK_BYTES)
                    done += member.file_size
                    meter.update(done, total)
    except (zipfile.BadZipFile, zlib.error, EOFError, UnicodeDecodeError, NotImplementedError) as error:
        raise DataError(f"{path} must be a sound zip file, got {error}; delete it and run this again") from error


class Meter:
    """Shows bytes done: a bar with the time left in a terminal, else a plain line now and then."""

    def __init__(self, label: str, *, stream: IO[str] | None = None, every_s: float = 30.0) -> None:
        self.label = label
        self.stream = stream or sys.stderr
        self.every_s = every_s
        self.started: tuple[float, int] | None = None
        self.last_line = time.monotonic()
        self.bar: Progress | None = None
        self.task: TaskID | None = None

    def __enter__(self) -> Self:
        if self.stream.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self.bar = Progress(*columns, console=Console(file=self.stream))
            self.bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self, done: int, total: int | None) -> None:
        """Show ``done`` of ``total`` bytes; ``total`` is None where the server does not say it."""
        now = time.monotonic()
        if self.started is None or done < self.started[1]:
            self.started = (now, done)
        if self.bar is not None:
            if self.task is None:  # the first value is where a resumed download begins: no part of its speed
                self.task = self.bar.add_task(self.label, total=total, completed=done)
            self.bar.update(self.task, completed=done, total=total)
        elif now - self.last_line >= self.every_s:
            self.last_line = now
            print(self.line(done, total, now), file=self.stream, flush=True)

    def line(self, done: int, total: int | None, now: float) -> str:
        """Return the plain line, such as ``train2017.zip: 1.9 GB of 19.3 GB (10 %), 50.0 MB/s, 5:48 left``."""
        since, first = self.started or (now, done)
        speed = (done - first) / (now - since) if now > since else 0.0
        text = f"{self.label}: {_bytes(done)}"
        if total is not None:
            text += f" of {_bytes(total)} ({100 * done // max(total, 1)} %)"
        if speed > 0:
            text += f", {_bytes(speed)}/s"
            if total is not None:
                minutes, seconds = divmod(round((total - done) / speed), 60)
                text += f", {minutes}:{seconds:02d} left"
        return text


def nearest(name: str, choices: Mapping[str, object] | Sequence[str]) -> str:
    """Return ``; did you mean X?`` or nothing."""
    close = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class _Version:
    """Which file of the server a ``.part`` belongs to."""

    url: str
    etag: str | None
    last_modified: str | None
    total: int | None

    def if_range(self) -> str | None:
        """Return the validator for If-Range; RFC 9110 section 13.1.5 allows no weak entity tag there."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def continues(self, earlier: "_Version") -> bool:
        """Whether bytes of this version may follow those of ``earlier``, whose length may not have been told."""
        return self == (replace(earlier, total=self.total) if earlier.total is None else earlier)


def _receive(archive: Archive, part: Path, *, by_hand: str, timeout_s: float) -> bool:
    """Make one attempt to complete ``part``; return whether it holds bytes of an earlier attempt."""
    start, known = _resume_point(archive, part)
    if known is not None and start == known.total:
        return True  # stopped after the last byte
    request = urllib.request.Request(archive.url, headers={"User-Agent": "detector", "Accept-Encoding": "identity"})
    if known is not None:
        request.add_header("Range", f"bytes={start}-")
        validator = known.if_range()
        if validator is not None:
            request.add_header("If-Range", validator)
    try:
        response = urllib.request.urlopen(request, timeout=timeout_s)
    except urllib.error.HTTPError as error:
        with error:
            if error.code == 416 and start:
                _discard(part)
                message = "the server's file is shorter than what is here; starts again from the first byte"
                raise _InterruptedError(message, network=False) from error
            if error.code in TRANSIENT_STATUS:
                asked = error.headers.get("Retry-After", "")
                wait_s = float(asked) if asked.isdecimal() else 0.0
                raise _InterruptedError(f"HTTP {error.code} {error.reason}", wait_s=wait_s) from error
            raise DataError(f"{archive.url} must be there, got HTTP {error.code} {error.reason}; {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _InterruptedError(f"no connection ({reason})") from error
    with response:
        offered, first = _offered(archive, response)
        if response.status == 206 and (known is None or first != start or not offered.continues(known)):
            _discard(part)
            raise _InterruptedError("the server's file changed; starts again from the first byte", network=False)
        if archive.size is not None and offered.total is not None and offered.total != archive.size:
            _discard(part)
            raise DataError(
                f"{archive.url} must have {archive.size} bytes, got {offered.total}: it is another file now, "
                f"or something between here and there answers in its place; {by_hand}"
            )
        if response.status != 206:  # asked for all, or the server took no notice of Range, or its file changed
            start = 0
            _discard(part)
            _state_path(part).write_text(json.dumps(asdict(offered)), encoding="utf-8")
        done = start
        remaining = None if offered.total is None else offered.total - start
        full_disk = _full_disk_explained(part.parent, remaining)
        with full_disk, part.open("ab" if start else "wb") as out, Meter(archive.name) as meter:
            meter.update(done, offered.total)
            while chunk := _read(response):
                out.write(chunk)
                done += len(chunk)
                meter.update(done, offered.total)
    if offered.total is not None and done < offered.total:
        raise _InterruptedError(f"the connection broke after {_bytes(done)} of {_bytes(offered.total)}")
    return start > 0


def _read(response: http.client.HTTPResponse) -> bytes:
    """Read what is there, up to a chunk, so that little is lost when the connection breaks."""
    try:
        return response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _InterruptedError(f"the connection broke ({error})") from error


def _resume_point(archive: Archive, part: Path) -> tuple[int, _Version | None]:
    """Return how many bytes of which version are here; what cannot be trusted is discarded."""
    try:
        state = _Version(**json.loads(_state_path(part).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        state = None
    # With neither a validator nor a sum nobody would notice two halves of different files.
    can_tell = state is not None and (state.if_range() or archive.sha256)
    if state is not None and can_tell and state.url == archive.url and _size(part) > 0:
        return _size(part), state
    _discard(part)
    return 0, None


def _offered(archive: Archive, response: http.client.HTTPResponse) -> tuple[_Version, int]:
    """Return the version an answer belongs to and the offset of its first byte."""
    first, total = 0, None
    span = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    length = response.headers.get("Content-Length", "")
    if response.status == 206:
        if span is None:
            raise _InterruptedError("an answer in parts without a Content-Range", network=False)
        first, total = int(span[1]), None if span[2] == "*" else int(span[2])
    elif length.isdecimal():
        total = int(length)
    headers = response.headers
    return _Version(archive.url, headers.get("ETag"), headers.get("Last-Modified"), total), first


def _verify(path: Path, archive: Archive, remedy: str) -> None:
    """Raise DataError unless ``path`` has the archive's size and sum; with no sum, unless it ends as a zip does."""
    size = _size(path)
    if archive.size is not None and size != archive.size:
        raise DataError(f"{path} must have {archive.size} bytes, got {size}; {remedy}")
    if archive.sha256 is None:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                raise DataError(f"{path} must be a zip file, got {size} bytes that begin {file.read(16)!r}; {remedy}")
        return
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file, Meter(f"verifies {archive.name}") as meter:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            meter.update(done, size)
    if digest.hexdigest() != archive.sha256:
        raise DataError(f"{path} must have sha256 {archive.sha256}, got {digest.hexdigest()}; {remedy}")


@contextlib.contextmanager
def _archive(archive: Archive, folder: Path, *, keep: bool, say: Say) -> Iterator[Path]:
    """Fetch the archive; afterwards delete it, unless it is to be kept or was there before, put by hand."""
    _make_folder(folder)
    path = folder / archive.name
    was_there = path.exists()
    say(f"uses {path}" if was_there else f"downloads {archive.url}")
    yield fetch(archive, folder, say=say)
    if was_there or keep:
        say(f"{path} stays; nothing needs it any more")
    else:
        path.unlink()
        with contextlib.suppress(OSError):  # not empty: other archives
            folder.rmdir()


@contextlib.contextmanager
def _built_aside(folder: Path) -> Iterator[Path]:
    """Give a path to build at; it becomes ``folder`` in one step if the block ends well, else nothing stays."""
    staging = folder.with_name(f".{folder.name}.unfinished")
    if staging.exists():
        shutil.rmtree(staging)
    try:
        yield staging
        if folder.exists():  # empty, see _refuse_occupied
            folder.rmdir()
        staging.rename(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _checked_members(
    archive: zipfile.ZipFile, path: Path, *, limit_bytes: int, place: Callable[[str], str | None]
) -> list[tuple[zipfile.ZipInfo, PurePosixPath]]:
    """Return the wanted files and where they go, or raise for an archive that is not harmless."""
    members = archive.infolist()
    if len(members) > MAX_MEMBERS:
        raise DataError(f"{path} must have at most {MAX_MEMBERS} members, got {len(members)}")
    wanted: list[tuple[zipfile.ZipInfo, PurePosixPath]] = []
    for member in members:
        # orig_filename: zipfile has already cut filename at a NUL and turned the system's separators.
        name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
        if name.startswith("/") or re.search(r"[\\:\0]", name) or ".." in name.split("/"):
            raise DataError(f"{path} must not lead out of its folder, got member {name!r}; do not use this file")
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise DataError(f"{path} must hold only files and folders, got a link or device {name!r}; do not use it")
        if member.flag_bits & 1 or member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise DataError(f"{path} must be stored or deflated and not encrypted, got otherwise {name!r}")
        target = None if member.is_dir() else place(name)
        if target is not None:
            wanted.append((member, PurePosixPath(target)))
    total = sum(member.file_size for member, _ in wanted)  # zipfile gives no more of a member than this
    if total > limit_bytes:
        raise DataError(f"{path} must unpack to at most {limit_bytes} bytes, got {total}; do not use this file")
    if len({target for _, target in wanted}) < len(wanted):
        raise DataError(f"{path} must name each file once, got two of one name; do not use this file")
    return wanted


def _space_needed(archives: Sequence[Archive], folder: Path, keep: bool) -> int:
    """Return the largest number of bytes in use at any moment, beyond what is there now."""
    needed = peak = 0
    for archive in archives:
        path = folder / archive.name
        size = archive.size if archive.size is not None else archive.unpacked_limit
        download = 0 if path.exists() else max(0, size - _size(_part_path(path)))
        needed += download + archive.unpacked_limit
        peak = max(peak, needed)
        if not keep and not path.exists():
            needed -= size
    return peak


def _require_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"disk of {folder} must have {_bytes(needed)} free, got {_bytes(free)}"
        raise DataError(f"{message}; free {_bytes(needed - free)} or give another --root", exit_code=2)


@contextlib.contextmanager
def _full_disk_explained(folder: Path, needed: int | None) -> Iterator[None]:
    """Turn "no space left" (another program may have taken what was free) into what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        much = "enough space" if needed is None else f"{_bytes(needed)} free for this step"
        message = f"disk of {folder} must have {much}, got full ({error.strerror})"
        raise DataError(f"{message}; free some or give another --root, then run this again", exit_code=2) from error


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} must be a folder to write in, got {error.strerror}", exit_code=2) from error


def _refuse_occupied(folder: Path, mistake: str) -> None:
    """Raise if ``folder`` holds anything: it is not complete, and not ours to delete."""
    if folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir()):
        return
    if folder.exists() or folder.is_symlink():
        raise DataError(f"{folder} {mistake}; move it away and run this again", exit_code=2)


def _missing_files(folder: Path, part: Part) -> str | None:
    """Say what ``folder`` must hold and does not, or None if it is complete."""
    found = {path.name for path in folder.iterdir() if path.suffix == part.suffix} if folder.is_dir() else set()
    missing = [name for name in part.names if name not in found]
    if missing:
        return f"must hold {', '.join(missing)}, got {len(found)} other {part.suffix} files"
    if len(found) < part.count:
        return f"must hold {part.count} {part.suffix} files, got {len(found)}"
    return None


def _below(folder: str) -> Callable[[str], str | None]:
    """Return a ``place`` for `unpack` that takes the members below ``folder`` out of it and leaves out the others."""
    return lambda name: name.removeprefix(f"{folder}/") if name.startswith(f"{folder}/") else None


def _part_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def _bccd_place(name: str) -> str | None:
    """Keep what the conversion reads: GitHub puts everything below one folder named after the commit."""
    inner = name.partition("/")[2]
    wanted = inner == "LICENSE" or re.fullmatch(
        r"BCCD/(JPEGImages/[^/]+\.jpg|Annotations/[^/]+\.xml|ImageSets/Main/(train|val|test)\.txt)", inner
    )
    return inner if wanted else None


def _convert_bccd(raw: Path, folder: Path, *, splits: Mapping[str, SplitCount], say: Say) -> None:
    """Convert the unpacked repository to ``folder/{images,annotations}``; ids count on from split to split."""
    voc = raw / "BCCD"
    problems: list[Problem] = []
    images = boxes = 0
    for split in splits:
        result = voc_to_coco(
            voc / "JPEGImages",
            voc / "Annotations",
            names=read_names(voc / "ImageSets" / "Main" / f"{split}.txt"),
            categories=BCCD_CATEGORIES,
            first_image_id=images + 1,
            first_box_id=boxes + 1,
        )
        for image in result.coco["images"]:
            image["license"] = 1
        images += len(result.coco["images"])
        boxes += len(result.coco["annotations"])
        problems += result.problems
        info = {"description": "BCCD (blood cells), COCO conversion", "url": BCCD_URL, "version": BCCD_COMMIT}
        licenses = [{"id": 1, "name": "MIT", "url": "https://opensource.org/licenses/MIT"}]
        write_json(folder / "annotations" / f"{split}.json", {"info": info, "licenses": licenses, **result.coco})
    (voc / "JPEGImages").rename(folder / "images")
    (raw / "LICENSE").rename(folder / "LICENSE")
    dropped = sum(problem.lost == "box" for problem in problems)
    say(f"dropped {dropped} of {boxes + dropped} boxes; {len(problems)} problems in all" + (":" if problems else ""))
    for problem in problems:
        say(f"  {problem}")


def _bccd_mistakes(folder: Path, splits: Mapping[str, SplitCount]) -> list[str]:
    """Say how ``folder`` differs from the complete dataset."""
    if not folder.is_dir():
        return ["must be a folder"]
    mistakes = []
    present = {path.name for path in (folder / "images").iterdir()} if (folder / "images").is_dir() else set()
    for split, expected in splits.items():
        path = folder / "annotations" / f"{split}.json"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            names = [image["file_name"] for image in content["images"]]
            found = SplitCount(images=sum(name in present for name in names), boxes=len(content["annotations"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            mistakes.append(f"must hold a readable annotations/{split}.json, got {error}")
            continue
        if found != expected:
            mistakes.append(f"must hold {_counts({split: expected})}, got {_counts({split: found})}")
    return mistakes


def _counts(splits: Mapping[str, SplitCount]) -> str:
    return ", ".join(f"{name} {count.images} images and {count.boxes} boxes" for name, count in splits.items())
