"""Downloads from a local server that can be made to misbehave."""

import dataclasses
import errno
import hashlib
import io
import json
import os
import random
import re
import shlex
import shutil
import stat
import struct
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from detector.dataset_tools import public
from detector.dataset_tools.archive import unpack
from detector.dataset_tools.download import Archive, fetch
from detector.dataset_tools.progress import Meter
from detector.dataset_tools.public import (
    BCCD_CATEGORIES,
    BCCD_SPLITS,
    COCO2017,
    Part,
    SplitCount,
    get_bccd,
    get_coco2017,
)
from detector.errors import DownloadError
from tools import get_data

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclasses.dataclass
class Site:
    """What the server offers, how it misbehaves, and the requests it received."""

    url: str = ""
    files: dict[str, bytes] = dataclasses.field(default_factory=dict)
    etag: str | None = '"one"'
    ranges: bool = True  # respects Range
    if_range: bool = True  # respects If-Range
    chunked: bool = False  # no Content-Length, like GitHub's archives
    breaks: list[int] = dataclasses.field(default_factory=list)  # one per response: number of bytes to send
    statuses: list[int] = dataclasses.field(default_factory=list)  # one per response, instead of the file
    requests: list[tuple[str, str | None]] = dataclasses.field(default_factory=list)  # path, Range


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def do_GET(self) -> None:
        site, requested = self.site, self.headers.get("Range")
        site.requests.append((self.path, requested))
        self.close_connection = True
        body = site.files.get(self.path)
        if site.statuses or body is None:
            self.send_error(site.statuses.pop(0) if site.statuses else 404)
            return
        start = 0
        condition = self.headers.get("If-Range")
        if requested and site.ranges and not (site.if_range and condition and condition != site.etag):
            start = int(requested.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_error(416)
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        if site.etag is not None:
            self.send_header("ETag", site.etag)
        self.send_header(
            *(("Transfer-Encoding", "chunked") if site.chunked else ("Content-Length", str(len(body) - start)))
        )
        self.end_headers()
        sent = body[start : start + site.breaks.pop(0)] if site.breaks else body[start:]
        if site.chunked:
            self.wfile.write(b"%x\r\n" % len(sent) + sent + b"\r\n")
            if len(sent) == len(body) - start:
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.wfile.write(sent)

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def site(server: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(urllib.request, "_opener", None)  # made once per process, with the proxies set at that time
    monkeypatch.setattr(time, "sleep", lambda _: None)
    Handler.site = Site(url=f"http://127.0.0.1:{server.server_address[1]}")
    return Handler.site


def zipped(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


BODY = zipped({"folder/noise": random.Random(0).randbytes(300_000)})
OTHER = zipped({"folder/noise": random.Random(1).randbytes(300_000)})


def offer(site: Site, body: bytes = BODY, name: str = "a.zip", **changes: Any) -> Archive:
    """Put a file on the server; return its description."""
    site.files[f"/{name}"] = body
    archive = Archive(f"{site.url}/{name}", name, len(body), hashlib.sha256(body).hexdigest(), 10_000_000)
    return dataclasses.replace(archive, **changes)


def interrupted(site: Site, archive: Archive, folder: Path, after: int = 100_000) -> Path:
    """Leave the files of a first run that lost its connection and gave up."""
    site.breaks = [after]
    with pytest.raises(DownloadError, match="connection lost"):
        fetch(archive, folder, retries=-1)
    part = folder / f"{archive.name}.part"
    assert part.stat().st_size == after
    site.requests.clear()
    return part


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_download_is_complete_verified_and_leaves_no_other_files(site: Site, tmp_path: Path) -> None:
    assert fetch(offer(site), tmp_path).read_bytes() == BODY
    assert files_in(tmp_path) == ["a.zip"]
    assert site.requests == [("/a.zip", None)]


def test_an_existing_file_is_verified_and_not_fetched(site: Site, tmp_path: Path) -> None:
    archive = offer(site)
    (tmp_path / "a.zip").write_bytes(BODY)
    fetch(archive, tmp_path)
    (tmp_path / "a.zip").write_bytes(BODY[:-1])
    with pytest.raises(DownloadError, match=r"must have \d+ bytes, got \d+; finish copying or delete it") as caught:
        fetch(archive, tmp_path)
    assert caught.value.exit_code == 2
    assert site.requests == []


def test_lost_connections_are_resumed(site: Site, tmp_path: Path) -> None:
    site.breaks = [100_000, 50_000]
    assert fetch(offer(site), tmp_path).read_bytes() == BODY
    assert [requested for _, requested in site.requests] == [None, "bytes=100000-", "bytes=150000-"]


def test_a_later_run_resumes_the_first(site: Site, tmp_path: Path) -> None:
    archive = offer(site)
    interrupted(site, archive, tmp_path)
    assert fetch(archive, tmp_path).read_bytes() == BODY
    assert site.requests == [("/a.zip", "bytes=100000-")]


def test_progress_resets_the_count_of_failures(site: Site, tmp_path: Path) -> None:
    site.breaks = [30_000] * 9
    assert fetch(offer(site), tmp_path, retries=1).read_bytes() == BODY


def test_a_server_that_ignores_range_restarts_the_download(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.breaks = [100_000]
    assert fetch(offer(site), tmp_path).read_bytes() == BODY
    assert [requested for _, requested in site.requests] == [None, "bytes=100000-"]


def test_a_connection_lost_after_an_ignored_range_is_detected(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.ranges = False
    site.breaks = [100_000, 250_000]
    assert fetch(offer(site, sha256=None, size=None), tmp_path).read_bytes() == BODY
    first, second = capsys.readouterr().out.splitlines()
    assert "connection lost after 100.0 kB" in first
    assert "connection lost after 250.0 kB" in second


def test_a_server_that_ignores_range_and_always_fails_is_given_up(site: Site, tmp_path: Path) -> None:
    site.ranges = False
    site.breaks = [100_000] * 50
    with pytest.raises(DownloadError, match="4 times in a row"):
        fetch(offer(site), tmp_path, retries=3)
    assert len(site.requests) == 5


# No checksum is known here: only the server's headers distinguish the two files. The last row also ignores If-Range.
@pytest.mark.parametrize("if_range", [True, False])
def test_a_file_that_changed_between_runs_is_never_mixed(site: Site, tmp_path: Path, if_range: bool) -> None:
    archive = offer(site, size=None, sha256=None)
    interrupted(site, archive, tmp_path)
    offer(site, OTHER)
    site.etag, site.if_range = '"two"', if_range
    assert fetch(archive, tmp_path).read_bytes() == OTHER


def test_without_validators_a_known_checksum_detects_mixed_halves_and_restarts(site: Site, tmp_path: Path) -> None:
    site.etag = None
    archive = offer(site)
    part = interrupted(site, archive, tmp_path)
    part.write_bytes(OTHER[:100_000])
    assert fetch(archive, tmp_path).read_bytes() == BODY
    assert [requested for _, requested in site.requests] == ["bytes=100000-", None]


@pytest.mark.parametrize("etag", [None, 'W/"weak"'])
def test_without_validators_and_checksum_nothing_is_resumed(site: Site, tmp_path: Path, etag: str | None) -> None:
    site.etag = etag
    archive = offer(site, sha256=None)
    interrupted(site, archive, tmp_path)
    assert fetch(archive, tmp_path).read_bytes() == BODY
    assert site.requests == [("/a.zip", None)]


@pytest.mark.parametrize(
    "state", ["", "[]", '{"url": "http://elsewhere", "etag": "x", "last_modified": "", "total": 1}']
)
def test_a_part_of_unknown_origin_is_not_used(site: Site, tmp_path: Path, state: str) -> None:
    (tmp_path / "a.zip.part").write_bytes(b"x" * 1000)
    (tmp_path / "a.zip.part.json").write_text(state)
    assert fetch(offer(site), tmp_path).read_bytes() == BODY
    assert site.requests == [("/a.zip", None)]


def test_a_complete_part_needs_no_request_and_a_too_long_one_restarts(site: Site, tmp_path: Path) -> None:
    archive = offer(site)
    part = interrupted(site, archive, tmp_path)
    part.write_bytes(BODY)
    assert fetch(archive, tmp_path).read_bytes() == BODY
    assert site.requests == []
    (tmp_path / "a.zip").unlink()
    interrupted(site, archive, tmp_path).write_bytes(BODY + b"more")
    assert fetch(archive, tmp_path).read_bytes() == BODY


def test_chunked_responses_of_unknown_length_are_verified_too(site: Site, tmp_path: Path) -> None:
    site.chunked = True
    site.breaks = [100_000]
    assert fetch(offer(site, size=None, sha256=None), tmp_path).read_bytes() == BODY
    assert len(site.requests) == 2


def test_a_wrong_size_is_refused_before_the_download(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=rf"^{site.url}/a.zip must have 7 bytes, got {len(BODY)}") as caught:
        fetch(offer(site, size=7), tmp_path)
    assert caught.value.exit_code == 1
    assert files_in(tmp_path) == []


def test_a_wrong_checksum_is_refused_and_leaves_no_files(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="must have sha256 0000"):
        fetch(offer(site, sha256="0" * 64), tmp_path)
    assert files_in(tmp_path) == []
    assert len(site.requests) == 1


def test_a_web_page_instead_of_a_zip_file_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"must be a zip file, got 18 bytes that start with b'<html>sign in"):
        fetch(offer(site, b"<html>sign in here", size=None, sha256=None), tmp_path)
    assert files_in(tmp_path) == []


def test_busy_servers_are_retried_and_missing_files_are_not(site: Site, tmp_path: Path) -> None:
    site.statuses = [503, 429]
    fetch(offer(site), tmp_path)
    assert len(site.requests) == 3
    with pytest.raises(
        DownloadError, match=r"got HTTP 404 Not Found; if this persists, download the file to .*absent\.zip by hand"
    ):
        fetch(Archive(f"{site.url}/absent.zip", "absent.zip", None, None, 1), tmp_path)
    assert len(site.requests) == 4


def test_retries_wait_longer_each_time(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    site.statuses = [503] * 5
    with pytest.raises(DownloadError, match="HTTP 503"):
        fetch(offer(site), tmp_path, retries=4, backoff_s=2)
    assert waits == [2, 4, 8, 16]


def test_a_silent_server_times_out(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    monkeypatch.setattr(Handler, "do_GET", lambda _: released.wait(5))
    with pytest.raises(DownloadError, match="timed out"):
        fetch(offer(site), tmp_path, retries=0, timeout_s=0.05)
    released.set()


def test_proxies_of_the_environment_are_used(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = dataclasses.replace(offer(site), url="http://images.invalid/a.zip")
    site.files["http://images.invalid/a.zip"] = BODY
    monkeypatch.setenv("http_proxy", site.url)
    assert fetch(archive, tmp_path).read_bytes() == BODY


def test_meter_estimates_the_time_left_from_the_speed_of_this_run() -> None:
    meter = Meter("a.zip", stream=io.StringIO())
    meter.started = (100.0, 1_000_000_000)  # resumed at 1 GB
    assert meter.line(1_500_000_000, 2_000_000_000, now=110.0) == "a.zip: 1.5 GB of 2.0 GB (75 %), 50.0 MB/s, 0:10 left"
    assert meter.line(500, None, now=100.0) == "a.zip: 500 B"


def test_meter_prints_rarely_outside_a_terminal() -> None:
    stream = io.StringIO()
    with Meter("a.zip", stream=stream, every_s=0.0) as meter:
        meter.update(1, 10)
    with Meter("a.zip", stream=stream, every_s=60.0) as meter:
        meter.update(5, 10)
    assert stream.getvalue() == "a.zip: 1 B of 10 B (10 %)\n"


def test_meter_draws_a_bar_in_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Meter("a.zip", stream=stream) as meter:
        meter.update(500_000, 2_000_000)
        meter.update(1_500_000, 2_000_000)
    assert "a.zip" in stream.getvalue()
    assert "1.5/2.0 MB" in stream.getvalue()


def written(path: Path, body: bytes) -> Path:
    path.write_bytes(body)
    return path


def link_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("folder/link")
        member.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(member, "/etc/passwd")
    return buffer.getvalue()


def twin_zip() -> bytes:
    twins = zipped({"folder/a": b"1", "folder/b": b"2"})
    return twins.replace(b"folder/b", b"folder/a")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (zipped({"folder/fine": b"", "../out": b"x"}), r"must not lead out of its folder, got member '../out'"),
        (zipped({"folder/../../out": b"x"}), "must not lead out"),
        (zipped({"/out": b"x"}), "must not lead out"),
        (zipped({"..\\out": b"x"}), "must not lead out"),
        (zipped({"C:out": b"x"}), "must not lead out"),
        (link_zip(), "got a link or device 'folder/link'"),
        (twin_zip(), "must contain every file name once"),
        (zipped({"folder/zeros": bytes(2_000_000)}), "must unpack to at most 1000000 bytes, got 2000000"),
        (BODY[:-30], "must be an undamaged zip file"),
        (BODY[:9000] + b"damage" + BODY[9006:], "must be an undamaged zip file"),
    ],
)
def test_malicious_and_damaged_zip_files_write_nothing_outside_the_folder(
    tmp_path: Path, body: bytes, message: str
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    path = written(inside / "a.zip", body)
    with pytest.raises(DownloadError, match=re.escape(message)):
        unpack(path, inside / "new", limit_bytes=1_000_000, place=lambda name: name)
    assert files_in(tmp_path) in (["inside/a.zip"], ["inside/a.zip", "inside/new/folder/noise"])


def test_a_member_larger_than_its_declared_size_is_cut_off(tmp_path: Path) -> None:
    body = zipped({"folder/zeros": bytes(2_000_000)})
    path = written(tmp_path / "a.zip", body.replace(struct.pack("<I", 2_000_000), struct.pack("<I", 10)))
    with pytest.raises(DownloadError, match="must be an undamaged zip file"):
        unpack(path, tmp_path / "new", limit_bytes=1_000_000, place=lambda name: name)
    assert (tmp_path / "new" / "folder" / "zeros").stat().st_size <= 10


def coco_table(site: Site) -> dict[str, Part]:
    val = offer(site, zipped({"val2017/": b"", "val2017/1.jpg": b"one", "val2017/2.jpg": b"two"}), "val2017.zip")
    notes = offer(site, zipped({"annotations/i.json": b"{}", "else/x": b""}), "notes.zip")
    return {
        "val": Part(val, "val2017", ".jpg", 2),
        "annotations": Part(notes, "annotations", ".json", 1, ("i.json",)),
    }


def test_coco_is_unpacked_and_a_second_run_does_nothing(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = coco_table(site)
    parts = ["val", "annotations"]
    get_coco2017(tmp_path, parts=parts, table=table)
    assert files_in(tmp_path) == ["coco/annotations/i.json", "coco/val2017/1.jpg", "coco/val2017/2.jpg"]
    before, requests = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, len(site.requests)
    capsys.readouterr()
    get_coco2017(tmp_path, parts=parts, table=table)
    lines = capsys.readouterr().out.splitlines()
    assert all("is complete" in line and "nothing to do" in line for line in lines)
    assert len(lines) == 2
    assert ({path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}, len(site.requests)) == (before, requests)


@pytest.mark.parametrize("by_hand", [False, True])
def test_archives_are_kept_if_requested_or_downloaded_by_hand(site: Site, tmp_path: Path, by_hand: bool) -> None:
    table = coco_table(site)
    if by_hand:
        (tmp_path / "archives").mkdir()
        written(tmp_path / "archives" / "val2017.zip", site.files["/val2017.zip"])
    get_coco2017(tmp_path, parts=["val"], keep_archives=not by_hand, table=table)
    assert (tmp_path / "archives" / "val2017.zip").exists()
    assert len(site.requests) == (0 if by_hand else 1)


def test_failed_unpacking_never_looks_complete(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, real = coco_table(site), shutil.copyfileobj

    def copy_one_then_fill_the_disk(source: Any, out: Any, length: int = 0) -> None:
        if out.name.endswith("2.jpg"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, out, length)

    monkeypatch.setattr(shutil, "copyfileobj", copy_one_then_fill_the_disk)
    with pytest.raises(
        DownloadError, match=r"disk of .* must have 6 B free for this step, got No space left"
    ) as caught:
        get_coco2017(tmp_path, parts=["val"], table=table)
    assert caught.value.exit_code == 2
    assert files_in(tmp_path) == ["archives/val2017.zip"]
    # A killed run leaves its hidden folder: the next run must not use it.
    (tmp_path / "coco" / ".val2017.unfinished").mkdir()
    written(tmp_path / "coco" / ".val2017.unfinished" / "9.jpg", b"half")
    monkeypatch.setattr(shutil, "copyfileobj", real)
    get_coco2017(tmp_path, parts=["val"], table=table)
    assert sorted(os.listdir(tmp_path / "coco")) == ["val2017"]
    assert sorted(os.listdir(tmp_path / "coco" / "val2017")) == ["1.jpg", "2.jpg"]


def test_an_archive_with_too_few_files_is_refused(site: Site, tmp_path: Path) -> None:
    table = coco_table(site)
    table["val"] = dataclasses.replace(table["val"], count=3)
    with pytest.raises(DownloadError, match=r"must contain 3 \.jpg files, got 2"):
        get_coco2017(tmp_path, parts=["val"], table=table)
    assert not (tmp_path / "coco" / "val2017").exists()


def test_an_incomplete_folder_of_the_user_is_not_touched(site: Site, tmp_path: Path) -> None:
    (tmp_path / "coco" / "val2017").mkdir(parents=True)
    written(tmp_path / "coco" / "val2017" / "1.jpg", b"own")
    with pytest.raises(DownloadError, match=r"must contain 2 \.jpg files, got 1; move it away") as caught:
        get_coco2017(tmp_path, parts=["val"], table=coco_table(site))
    assert caught.value.exit_code == 2
    assert site.requests == []
    (tmp_path / "coco" / "val2017" / "1.jpg").unlink()  # an empty folder may be replaced
    get_coco2017(tmp_path, parts=["val"], table=coco_table(site))


# Without --keep-archives each archive is deleted before the next one: the largest part alone determines the space.
@pytest.mark.parametrize(("options", "needed"), [([], "41.3"), (["--keep-archives"], "44.6"), (["--parts=val"], "1.8")])
def test_a_full_disk_is_reported_before_the_download(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    needed: str,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert get_data.main(["coco2017", f"--root={tmp_path}", *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: disk of ")
    assert f"must have {needed} GB free, got 1.0 GB; free " in error
    assert error.count("\n") == 1


def test_without_network_the_error_names_the_url_and_the_target_path(
    site: Site,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there
    assert get_data.main(["bccd", f"--root={tmp_path}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: https://github.com/Shenggan/BCCD_Dataset/archive/d272fb14cdff")
    assert f"download the file to {tmp_path}/archives/BCCD_Dataset-d272fb14cdff.zip by hand" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["coco2017", "--parts", "vall,test"],
            "one or more of train, val, annotations, got vall,test; did you mean val?",
        ),
        (["coco2017", "--parts", ""], "parts must be one or more of train, val, annotations, got none"),
        (["bccd", "--root", "/dev/null"], "--root must be a folder to write in, got /dev/null"),
    ],
)
def test_user_errors_are_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert get_data.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["coco2071"], "invalid choice: 'coco2071' (choose from 'bccd', 'coco2017', 'voc', 'split')"),
        (["bccd", "--rot", "x"], "unrecognized arguments: --rot x"),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_command_line_ends_with_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        get_data.main(arguments)
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("command", [[], ["bccd"], ["coco2017"], ["voc"], ["split"]])
def test_every_help_has_a_purpose_defaults_and_examples_that_parse(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        get_data.main([*command, "--help"])
    text = capsys.readouterr().out
    usage, purpose, examples = text.split("\n\n")[:3]
    assert usage.startswith("usage: ")
    assert purpose.endswith(".")
    lines = examples.replace("\\\n", "").splitlines()
    assert lines[0] == "examples:"
    assert len(lines) > 2
    for line in lines[1:]:
        python, tool, *arguments = shlex.split(line)
        assert (python, tool) == ("python", "tools/get_data.py")
        assert [get_data.make_parser().parse_args(arguments).command] == (command or arguments[:1])
    options = re.split(r"\n  (?=-|F\.json)", text.partition("options:\n")[2])
    assert all("(default:" in option or "(required)" in option for option in options if "--help" not in option)


def test_ctrl_c_ends_without_a_traceback_and_the_output_explains_how_to_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(public, "fetch", stop)
    assert get_data.main(["bccd", "--root", str(tmp_path)]) == 130
    assert "run the same command again to resume" in capsys.readouterr().out


def test_the_table_of_coco_parts_is_complete() -> None:
    assert list(COCO2017) == ["train", "val", "annotations"]
    for part in COCO2017.values():
        assert part.archive.url.endswith(f"/{part.archive.name}")
        assert part.archive.size is not None
        assert part.archive.sha256 is not None
        assert re.fullmatch("[0-9a-f]{64}", part.archive.sha256)
        assert part.archive.unpacked_limit > part.archive.size


def bccd_xml(*objects: tuple[str, int, int, int, int]) -> bytes:
    rows = "".join(
        f"<object><name>{name}</name><bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>{right}</xmax>"
        f"<ymax>{bottom}</ymax></bndbox></object>"
        for name, left, top, right, bottom in objects
    )
    return f"<annotation><size><width>640</width><height>480</height></size>{rows}</annotation>".encode()


def bccd_zip(
    splits: Mapping[str, Mapping[str, list[tuple[str, int, int, int, int]]]], image: Callable[[str], bytes]
) -> bytes:
    """Return a repository archive in GitHub's layout from split -> image name -> objects."""
    members = {"LICENSE": b"MIT License\n", "README.md": b"# BCCD\n", "BCCD/ImageSets/Main/trainval.txt": b"x\n"}
    for split, images in splits.items():
        members[f"BCCD/ImageSets/Main/{split}.txt"] = "".join(f"{name}\n" for name in images).encode()
        for name, objects in images.items():
            members[f"BCCD/JPEGImages/{name}.jpg"] = image(name)
            members[f"BCCD/Annotations/{name}.xml"] = bccd_xml(*objects)
    return zipped({f"BCCD_Dataset-d272fb14/{name}": content for name, content in members.items()})


def small_bccd() -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (640, 480)).save(buffer, "JPEG")
    splits = {
        "train": {"b": [("WBC", 1, 2, 11, 22), ("RBC", 5, 5, 5, 5)]},
        "test": {"a": [("Platelets", 1, 1, 3, 3), ("RBC", 2, 2, 4, 5)]},
    }
    return bccd_zip(splits, lambda _: buffer.getvalue())


SMALL_SPLITS = {"train": SplitCount(1, 1), "test": SplitCount(1, 2)}


def test_bccd_is_converted_its_empty_boxes_are_listed_and_a_second_run_does_nothing(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    site.chunked, site.ranges = True, False
    archive = offer(site, small_bccd(), size=None, sha256=None)
    get_bccd(tmp_path, archive=archive, splits=SMALL_SPLITS)
    lines = capsys.readouterr().out.splitlines()
    assert files_in(tmp_path) == [
        "bccd/LICENSE",
        "bccd/annotations/test.json",
        "bccd/annotations/train.json",
        "bccd/images/a.jpg",
        "bccd/images/b.jpg",
    ]
    assert "dropped 1 of 4 boxes; 1 problems in all:" in lines
    assert any("b: box must have xmax > xmin" in line and "RBC [5,5,5,5]" in line for line in lines)
    test = json.loads((tmp_path / "bccd" / "annotations" / "test.json").read_text())
    assert [box["category_id"] for box in test["annotations"]] == [3, 1]
    get_bccd(tmp_path, archive=archive, splits=SMALL_SPLITS)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert lines[0].endswith("nothing to do")
    assert len(site.requests) == 1


def test_bccd_with_other_counts_is_refused(site: Site, tmp_path: Path) -> None:
    archive = offer(site, small_bccd())
    splits = {**SMALL_SPLITS, "test": SplitCount(1, 3)}
    with pytest.raises(DownloadError, match="must contain test 1 images and 3 boxes, got test 1 images and 2 boxes"):
        get_bccd(tmp_path, archive=archive, splits=splits)
    assert files_in(tmp_path) == ["archives/a.zip"]


def test_bccd_without_its_lists_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"must contain .*train\.txt, got no such file"):
        get_bccd(tmp_path, archive=offer(site), splits=SMALL_SPLITS)


def test_bccd_with_a_missing_image_is_not_complete(site: Site, tmp_path: Path) -> None:
    archive = offer(site, small_bccd())
    get_bccd(tmp_path, archive=archive, splits=SMALL_SPLITS)
    (tmp_path / "bccd" / "images" / "a.jpg").unlink()
    with pytest.raises(
        DownloadError, match=r"must contain test 1 images and 2 boxes, got test 0 images.*; move it away"
    ):
        get_bccd(tmp_path, archive=archive, splits=SMALL_SPLITS)


def test_bccd_from_its_archive_equals_the_shared_copy(
    site: Site, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = Path(os.environ.get("DETECTOR_SHARED", REPOSITORY.parent / "shared")) / "datasets" / "bccd"
    if not shared.is_dir():
        pytest.skip(f"no shared dataset at {shared}; set DETECTOR_SHARED")
    splits: dict[str, dict[str, list[tuple[str, int, int, int, int]]]] = {}
    for split in BCCD_SPLITS:
        coco = json.loads((shared / "annotations" / f"{split}.json").read_text())
        names = {image["id"]: Path(image["file_name"]).stem for image in coco["images"]}
        splits[split] = {name: [] for name in names.values()}
        for box in coco["annotations"]:
            x, y, w, h = box["bbox"]
            label = BCCD_CATEGORIES[box["category_id"] - 1]
            splits[split][names[box["image_id"]]].append((label, x, y, x + w, y + h))
    # The two empty boxes that the shared copy dropped, see its SOURCE.md.
    splits["val"]["BloodImage_00338"].insert(0, ("RBC", 504, 337, 504, 337))
    split_of_343 = next(split for split in splits if "BloodImage_00343" in splits[split])
    splits[split_of_343]["BloodImage_00343"].append(("RBC", 181, 329, 181, 329))
    body = bccd_zip(splits, lambda name: (shared / "images" / f"{name}.jpg").read_bytes())
    get_bccd(tmp_path, archive=offer(site, body, size=None, sha256=None, unpacked_limit=10**8))
    assert "dropped 2 of 4888 boxes; 2 problems in all:" in capsys.readouterr().out.splitlines()
    for split in BCCD_SPLITS:
        converted, expected = (folder / "annotations" / f"{split}.json" for folder in (tmp_path / "bccd", shared))
        assert json.loads(converted.read_text()) == json.loads(expected.read_text())
    assert sorted(os.listdir(tmp_path / "bccd" / "images")) == sorted(os.listdir(shared / "images"))
