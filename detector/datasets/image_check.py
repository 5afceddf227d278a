"""Check image files: present, readable, of the stated size."""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from detector.datasets.images import DEEP_GREY, _header, _opened, _to_rgb
from detector.errors import ImageError

UNCHECKED, GOOD, MISSING, BAD = range(4)


class ImageFacts(NamedTuple):
    """What is known of N image files after looking at them."""

    status: NDArray[np.uint8]
    """(N,) UNCHECKED, GOOD, MISSING or BAD."""
    sizes: NDArray[np.int32]
    """(N, 2) height and width as stored; 0 where not known."""
    orientations: NDArray[np.uint8]
    """(N,) EXIF orientation 1..8; 0 where not known."""
    modes: NDArray[np.bytes_]
    """(N,) as in `ImageHeader`."""
    peaks: NDArray[np.uint8]
    """(N,) brightest value after conversion of a decoded 16-bit grey image; 255 otherwise."""
    reasons: dict[int, str]
    """Why an image is BAD."""


def check_images(
    root: Path, names: Sequence[str], which: NDArray[np.bool_], *, decode: bool, progress: bool
) -> ImageFacts:
    """Open the files `root / names[i]` where `which` (N,) is set: their headers, or every pixel (`decode`).

    Good files are remembered in the user's cache folder, keyed by path, size and time of change, so that the next
    call only asks for those. Never raises for a file: what is wrong stands in the result.
    """
    n = len(names)
    facts = ImageFacts(
        status=np.zeros(n, np.uint8),
        sizes=np.zeros((n, 2), np.int32),
        orientations=np.zeros(n, np.uint8),
        modes=np.zeros(n, "S8"),
        peaks=np.full(n, 255, np.uint8),
        reasons={},
    )
    todo = np.flatnonzero(which)
    if not len(todo):
        return facts
    memory = _Memory(root)
    stats = np.zeros((n, 2), np.int64)
    fresh = np.zeros(n, bool)

    def look(rows: NDArray[np.int64]) -> int:
        for i in rows.tolist():
            path = os.path.join(root, names[i])
            try:
                found = os.stat(path)
            except OSError as error:
                facts.status[i] = MISSING if isinstance(error, FileNotFoundError | NotADirectoryError) else BAD
                facts.reasons[i] = error.strerror or str(error)
                continue
            stats[i] = found.st_size, found.st_mtime_ns
            row = memory.row(names[i], found, decode=decode)
            if row is not None:
                facts.sizes[i], facts.orientations[i] = memory.sizes[row], memory.orientations[row]
                facts.modes[i], facts.peaks[i], facts.status[i] = memory.modes[row], memory.peaks[row], GOOD
                continue
            if not stat.S_ISREG(found.st_mode):
                facts.status[i], facts.reasons[i] = BAD, "is a folder or device, not an image"
                continue
            try:
                with _opened(path) as image:
                    header = _header(image)
                    if decode:
                        rgb = _to_rgb(image)
                        if header.mode in DEEP_GREY:
                            facts.peaks[i] = np.asarray(rgb).max(initial=0)
            except ImageError as error:
                facts.status[i], facts.reasons[i] = BAD, str(error).removeprefix(f"{path}: ")
                continue
            facts.sizes[i] = header.height, header.width
            facts.orientations[i], facts.modes[i] = header.orientation, header.mode.encode("ascii", "replace")
            facts.status[i], fresh[i] = GOOD, True
        return len(rows)

    # Threads, not processes: decoders and file systems wait outside Python's lock, and results need no copying.
    chunks = np.array_split(todo, max(1, len(todo) // 32))
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        done = pool.map(look, chunks)
        what = f"checking {len(todo):,} images in {root} ({'every pixel' if decode else 'headers'})"
        _follow(done, len(todo), what if progress else None)
    finally:
        pool.shutdown(cancel_futures=True)
    if fresh.any():
        memory.remember(names, np.flatnonzero(fresh), stats, facts, decoded=decode)
    return facts


def _follow(done: Iterator[int], total: int, what: str | None) -> None:
    """Consume an iterator of counts; show a bar on a terminal, one line elsewhere, nothing without `what`."""
    if what is None:
        for _ in done:
            pass
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        print(what, file=sys.stderr, flush=True)
        _follow(done, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        for count in done:
            bar.advance(task, count)


class _Memory:
    """Good files of one image folder, remembered between runs.

    An .npz file of plain arrays (reading it cannot run code) per folder. It only saves time: a broken, foreign or
    unwritable one is treated as none.
    """

    def __init__(self, root: Path) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        # Another Pillow may judge files differently, and so do other rules of ours: count up when they change.
        key = hashlib.sha256(f"{os.path.realpath(root)}\0{PIL.__version__}\0v2".encode(errors="surrogatepass"))
        self.path = Path(base) / "detector" / f"images-{key.hexdigest()[:24]}.npz"
        self.rows: dict[str, int] = {}
        self.names: list[str] = []
        try:
            with np.load(self.path, allow_pickle=False) as saved:
                self.names = bytes(saved["names"]).decode("utf-8", "surrogatepass").split("\0")[:-1]
                self.stats, self.sizes = saved["stats"], saved["sizes"]
                self.orientations, self.modes, self.peaks = saved["orientations"], saved["modes"], saved["peaks"]
                self.decoded = saved["decoded"]
            n = len(self.names)
            shapes = [a.shape for a in self._arrays()]
            if shapes != [(n, 2), (n, 2), (n,), (n,), (n,), (n,)]:
                raise ValueError("arrays of unequal length")
            self.rows = dict(zip(self.names, range(n), strict=True))
        except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile, zlib.error):
            self.names, self.rows = [], {}
            self.stats, self.sizes = np.zeros((0, 2), np.int64), np.zeros((0, 2), np.int32)
            self.orientations, self.modes = np.zeros(0, np.uint8), np.zeros(0, "S8")
            self.peaks, self.decoded = np.zeros(0, np.uint8), np.zeros(0, bool)

    def _arrays(self) -> tuple[NDArray[np.generic], ...]:
        return self.stats, self.sizes, self.orientations, self.modes, self.peaks, self.decoded

    def row(self, name: str, found: os.stat_result, *, decode: bool) -> int | None:
        """Where the file is remembered, if it is, unchanged, and as thoroughly checked as asked for."""
        row = self.rows.get(name)
        if row is None or (decode and not self.decoded[row]):
            return None
        same = int(self.stats[row, 0]) == found.st_size and int(self.stats[row, 1]) == found.st_mtime_ns
        return row if same else None

    def remember(
        self,
        names: Sequence[str],
        fresh: NDArray[np.int64],
        stats: NDArray[np.int64],
        facts: ImageFacts,
        *,
        decoded: bool,
    ) -> None:
        """Write the fresh rows beside what else is remembered of this folder (other splits)."""
        new = [names[i] for i in fresh.tolist()]
        replaced = set(new)
        keep = np.array([row for name, row in self.rows.items() if name not in replaced], np.int64)
        known: tuple[NDArray[Any], ...] = self._arrays()[:-1]
        added: tuple[NDArray[Any], ...] = (stats, facts.sizes, facts.orientations, facts.modes, facts.peaks)
        merged = [np.concatenate([old[keep], more[fresh]]) for old, more in zip(known, added, strict=True)]
        flags = np.concatenate([self.decoded[keep], np.full(len(fresh), decoded)])
        text = "".join(f"{name}\0" for name in [*(self.names[i] for i in keep.tolist()), *new])
        blob = np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8)
        keys = ("stats", "sizes", "orientations", "modes", "peaks")
        arrays: dict[str, Any] = {"names": blob, "decoded": flags, **dict(zip(keys, merged, strict=True))}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".tmp", delete=False) as file:
                try:
                    np.savez(file, **arrays)
                    file.close()
                    os.replace(file.name, self.path)
                except BaseException:
                    os.unlink(file.name)
                    raise
        except OSError:  # no home, full or read-only disk: the next run checks again
            return
