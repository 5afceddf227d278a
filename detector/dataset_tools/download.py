"""Downloading a large file: a transfer that stopped goes on where it was, unless the server's file changed; what
arrives is verified."""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import http.client
import json
import os
import re
import shutil
import sys
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from detector.errors import DownloadError

CHUNK_BYTES = 2**20
# A busy or restarting server; every other 4xx and 5xx says the same tomorrow.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})

Say = Callable[[str], None]


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
        DownloadError: no network, the server has no such file, or the file is not the expected one.
    """
    path = folder / archive.name
    part = part_path(path)
    if path.exists():
        try:
            _verify(path, archive, "finish copying or delete it, and run this again")
        except DownloadError as error:
            raise DownloadError(str(error), exit_code=2) from error
        return path
    by_hand = f"if it stays so, put the file at {path} by hand and run this again"
    failures, furthest = 0, size_on_disk(part)
    may_start_over = True
    while True:
        try:
            resumed = _receive(archive, part, by_hand=by_hand, timeout_s=timeout_s)
            try:
                _verify(part, archive, by_hand)
            except DownloadError as error:
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
            failures = 0 if size_on_disk(part) > furthest else failures + 1
            furthest = max(furthest, size_on_disk(part))
            if failures > retries:
                raise DownloadError(
                    f"{archive.url} must be reachable, got {error} ({failures} times in a row); {by_hand}",
                    exit_code=2 if error.network else 1,
                ) from error
            wait_s = min(120.0, max(error.wait_s, min(60.0, backoff_s * 2 ** max(0, failures - 1))))
            say(f"{archive.name}: {error}; tries again in {wait_s:.0f} s")
            time.sleep(wait_s)


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

    def continues(self, earlier: _Version) -> bool:
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
            raise DownloadError(
                f"{archive.url} must be there, got HTTP {error.code} {error.reason}; {by_hand}"
            ) from error
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
            raise DownloadError(
                f"{archive.url} must have {archive.size} bytes, got {offered.total}: it is another file now, "
                f"or something between here and there answers in its place; {by_hand}"
            )
        if response.status != 206:  # asked for all, or the server took no notice of Range, or its file changed
            start = 0
            _discard(part)
            _state_path(part).write_text(json.dumps(asdict(offered)), encoding="utf-8")
        done = start
        remaining = None if offered.total is None else offered.total - start
        full_disk = full_disk_explained(part.parent, remaining)
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
    if state is not None and can_tell and state.url == archive.url and size_on_disk(part) > 0:
        return size_on_disk(part), state
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
    """Raise DownloadError unless ``path`` has the archive's size and sum; with no sum, unless it ends as a zip does."""
    size = size_on_disk(path)
    if archive.size is not None and size != archive.size:
        raise DownloadError(f"{path} must have {archive.size} bytes, got {size}; {remedy}")
    if archive.sha256 is None:
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                raise DownloadError(
                    f"{path} must be a zip file, got {size} bytes that begin {file.read(16)!r}; {remedy}"
                )
        return
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file, Meter(f"verifies {archive.name}") as meter:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            meter.update(done, size)
    if digest.hexdigest() != archive.sha256:
        raise DownloadError(f"{path} must have sha256 {archive.sha256}, got {digest.hexdigest()}; {remedy}")


def require_space(folder: Path, needed: int) -> None:
    """Raise `DownloadError` unless the disk of ``folder`` has so many bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"disk of {folder} must have {_bytes(needed)} free, got {_bytes(free)}"
        raise DownloadError(f"{message}; free {_bytes(needed - free)} or give another --root", exit_code=2)


@contextlib.contextmanager
def full_disk_explained(folder: Path, needed: int | None) -> Iterator[None]:
    """Turn "no space left" (another program may have taken what was free) into what to do about it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        much = "enough space" if needed is None else f"{_bytes(needed)} free for this step"
        message = f"disk of {folder} must have {much}, got full ({error.strerror})"
        raise DownloadError(f"{message}; free some or give another --root, then run this again", exit_code=2) from error


def part_path(path: Path) -> Path:
    """Where the bytes of an unfinished download of ``path`` are."""
    return path.with_name(f"{path.name}.part")


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)


def size_on_disk(path: Path) -> int:
    """Bytes of a file, 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
