"""Download large files: resume interrupted transfers unless the server's file changed, and verify the result."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import re
import shutil
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from detector.atomic import read_json, write_json
from detector.dataset_tools.progress import Meter, format_bytes
from detector.errors import DownloadError, RunError
from detector.files import open_regular
from detector.text import printable

CHUNK_BYTES = 2**20
# A busy or restarting server; retrying does not help with any other 4xx or 5xx.
TRANSIENT_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})


class _AttemptError(Exception):
    """An attempt failed, but another one may succeed.

    Args:
        message: the reason.
        network: whether the network or the server is at fault rather than the received bytes.
        wait_s: the pause that the server asked for.
    """

    def __init__(self, message: str, *, network: bool = True, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.network = network
        self.wait_s = wait_s


@dataclass(frozen=True)
class Archive:
    """A zip file on a server. `size` (bytes) and `sha256` are None where the server packs it again for each request."""

    url: str
    name: str
    size: int | None
    sha256: str | None
    unpacked_limit: int
    """Upper bound of the unpacked size in bytes, slightly above the real one, to reject zip bombs and full disks."""


def fetch(archive: Archive, folder: Path, *, retries: int = 6, backoff_s: float = 1.0, timeout_s: float = 60.0) -> Path:
    """Download `archive` to `folder/name` and verify it; an existing valid file is kept.

    Bytes go to `name.part`; `name.part.json` records which version of the server's file they belong to. An attempt that
    gets further than all before it resets the count of failures, so a long download survives any number of short
    connections. Every retry prints one line.

    Args:
        archive: URL, name and, where known, size and checksum of the file.
        folder: an existing folder.
        retries: number of attempts after the first without progress.
        backoff_s: pause before the first retry; doubles up to a minute.
        timeout_s: seconds without data after which a connection counts as dead.

    Raises:
        DownloadError: no network, the server does not have the file, or the file is not the expected one.
    """
    path = folder / archive.name
    part = part_path(path)
    if path.exists():
        try:
            _verify(path, archive, "finish copying or delete it, and run this again")
        except DownloadError as error:
            raise DownloadError(str(error), exit_code=2) from error
        return path
    by_hand = f"if this persists, download the file to {path} by hand and run this again"
    failures, furthest = 0, size_on_disk(part)
    may_start_over = True
    while True:
        try:
            resumed = _receive(archive, part, by_hand=by_hand, timeout_s=timeout_s)
            try:
                _verify(part, archive, by_hand)
            except DownloadError as error:
                _discard(part)
                # Joined from two responses, the older half may be wrong. From one response, the server's file is wrong.
                if not (resumed and may_start_over):
                    raise
                may_start_over = False
                raise _AttemptError(f"{error}; restarting from the first byte", network=False) from error
            os.replace(part, path)
            _discard(part)
            return path
        except _AttemptError as error:
            failures = 0 if size_on_disk(part) > furthest else failures + 1
            furthest = max(furthest, size_on_disk(part))
            if failures > retries:
                raise DownloadError(
                    f"{archive.url} must be reachable, got {error} ({failures} times in a row); {by_hand}",
                    exit_code=2 if error.network else 1,
                ) from error
            wait_s = min(120.0, max(error.wait_s, min(60.0, backoff_s * 2 ** max(0, failures - 1))))
            print(f"{archive.name}: {error}; retrying in {wait_s:.0f} s")
            time.sleep(wait_s)


@dataclass(frozen=True)
class _Version:
    """The version of the server's file that a `.part` belongs to."""

    url: str
    etag: str | None
    last_modified: str | None
    total: int | None

    def if_range(self) -> str | None:
        """Return the validator for If-Range; RFC 9110 section 13.1.5 does not allow weak entity tags there."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.last_modified

    def continues(self, earlier: _Version) -> bool:
        """Whether bytes of this version may follow those of `earlier`, whose length may be unknown."""
        return self == (replace(earlier, total=self.total) if earlier.total is None else earlier)


def _receive(archive: Archive, part: Path, *, by_hand: str, timeout_s: float) -> bool:
    """Make one attempt to complete `part`; return whether it contains bytes of an earlier attempt."""
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
                message = "the server's file is shorter than the partial download; restarting from the first byte"
                raise _AttemptError(message, network=False) from error
            if error.code in TRANSIENT_STATUS:
                asked = error.headers.get("Retry-After", "")
                wait_s = float(asked) if re.fullmatch(r"[0-9]{1,9}", asked) else 0.0
                raise _AttemptError(f"HTTP {error.code} {printable(str(error.reason))}", wait_s=wait_s) from error
            answer = f"HTTP {error.code} {printable(str(error.reason))}"
            raise DownloadError(f"{archive.url} must exist, got {answer}; {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise _AttemptError(f"no connection ({printable(str(reason))})") from error
    with response:
        offered, first = _offered(archive, response)
        if response.status == 206 and (known is None or first != start or not offered.continues(known)):
            _discard(part)
            raise _AttemptError("the server's file changed; restarting from the first byte", network=False)
        if archive.size is not None and offered.total is not None and offered.total != archive.size:
            _discard(part)
            raise DownloadError(
                f"{archive.url} must have {archive.size} bytes, got {offered.total}: the file was replaced, "
                f"or a proxy answers instead of the server; {by_hand}"
            )
        if response.status != 206:  # no Range requested, or the server ignored it, or its file changed
            start = 0
            _discard(part)
            write_json(asdict(offered), _state_path(part))
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
        raise _AttemptError(f"connection lost after {format_bytes(done)} of {format_bytes(offered.total)}")
    return start > 0


def _read(response: http.client.HTTPResponse) -> bytes:
    """Read the available bytes, at most one chunk, so that a lost connection costs little."""
    try:
        return response.read1(CHUNK_BYTES)
    except (OSError, http.client.HTTPException) as error:
        raise _AttemptError(f"connection lost ({printable(str(error))})") from error


def _resume_point(archive: Archive, part: Path) -> tuple[int, _Version | None]:
    """Return the size and version of the partial download; discard it if it cannot be resumed safely."""
    try:
        state = _Version(**read_json(_state_path(part)))
    except (RunError, TypeError):
        state = None
    # With neither a validator nor a checksum, two halves of different files would go unnoticed.
    detectable = state is not None and (state.if_range() or archive.sha256)
    if state is not None and detectable and state.url == archive.url and size_on_disk(part) > 0:
        return size_on_disk(part), state
    _discard(part)
    return 0, None


def _offered(archive: Archive, response: http.client.HTTPResponse) -> tuple[_Version, int]:
    """Return the version that a response belongs to and the offset of its first byte."""
    first, total = 0, None
    span = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", response.headers.get("Content-Range", "").strip())
    length = response.headers.get("Content-Length", "")
    if response.status == 206:
        if span is None:
            raise _AttemptError("a partial response without Content-Range", network=False)
        first, total = int(span[1]), None if span[2] == "*" else int(span[2])
    elif re.fullmatch(r"[0-9]{1,18}", length):
        total = int(length)
    headers = response.headers
    return _Version(archive.url, headers.get("ETag"), headers.get("Last-Modified"), total), first


def _verify(path: Path, archive: Archive, remedy: str) -> None:
    """Raise DownloadError unless `path` has the archive's size and checksum or, without a checksum, is a zip file."""
    size = size_on_disk(path)
    if archive.size is not None and size != archive.size:
        raise DownloadError(f"{path} must have {archive.size} bytes, got {size}; {remedy}")
    if archive.sha256 is None:
        if not zipfile.is_zipfile(path):
            with open_regular(path) as file:
                raise DownloadError(
                    f"{path} must be a zip file, got {size} bytes that start with {file.read(16)!r}; {remedy}"
                )
        return
    digest, done = hashlib.sha256(), 0
    with open_regular(path) as file, Meter(f"verifying {archive.name}") as meter:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            meter.update(done, size)
    if digest.hexdigest() != archive.sha256:
        raise DownloadError(f"{path} must have sha256 {archive.sha256}, got {digest.hexdigest()}; {remedy}")


def require_space(folder: Path, needed: int) -> None:
    """Raise `DownloadError` unless the disk of `folder` has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        message = f"disk of {folder} must have {format_bytes(needed)} free, got {format_bytes(free)}"
        raise DownloadError(f"{message}; free {format_bytes(needed - free)} or choose another --root", exit_code=2)


@contextlib.contextmanager
def full_disk_explained(folder: Path, needed: int | None) -> Iterator[None]:
    """Turn the system's "no space left" into a `DownloadError` with a remedy; `needed` in bytes, None: unknown."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        required = "enough space" if needed is None else f"{format_bytes(needed)} free for this step"
        message = f"disk of {folder} must have {required}, got {error.strerror}"
        raise DownloadError(
            f"{message}; free some or choose another --root, then run this again", exit_code=2
        ) from error


def part_path(path: Path) -> Path:
    """Return the path of the unfinished download of `path`."""
    return path.with_name(f"{path.name}.part")


def _state_path(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state_path(part).unlink(missing_ok=True)


def size_on_disk(path: Path) -> int:
    """Return the size of a file in bytes, 0 if it does not exist."""
    return path.stat().st_size if path.exists() else 0
