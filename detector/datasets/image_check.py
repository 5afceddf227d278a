"""Check image files: present, readable; their sizes, orientations and modes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from detector.atomic import atomic_file
from detector.datasets.images import DEEP_GREY, decode_open, header_of, name_of, open_image, why_unreadable
from detector.datasets.store import FileStat, ImageStore
from detector.errors import ImageError, RunError
from detector.files import open_regular

UNCHECKED, GOOD, MISSING, BAD = range(4)

RECORD = np.dtype(
    [
        ("stat", np.int64, 2),
        ("decoded", np.bool_),
        ("size", np.int32, 2),
        ("orientation", np.uint8),
        ("mode", "S8"),
        ("peak", np.uint8),
    ]
)
"""What is remembered of a good file: its `FileStat`, whether it was decoded, and the facts in `ImageFacts`."""


class ImageFacts(NamedTuple):
    """What the check found out about N image files."""

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
    store: ImageStore, names: Sequence[str], which: NDArray[np.bool_], *, decode: bool, progress: bool
) -> ImageFacts:
    """Read the headers of image files, or decode every pixel.

    Good files are remembered in the user's cache folder by name, size and version, so that the next check only
    compares those. Unusable files do not raise: the reason is in the result.

    Args:
        store: the image store.
        names: of N images in the store.
        which: (N,) the images to check.
        decode: whether to decode all pixels.
        progress: whether to print a progress bar to stderr.
    """
    n = len(names)
    records = np.zeros(n, RECORD)
    records["peak"] = 255
    status = np.zeros(n, np.uint8)
    facts = ImageFacts(status, records["size"], records["orientation"], records["mode"], records["peak"], {})
    todo = np.flatnonzero(which)
    if not len(todo):
        return facts
    cache = _CheckCache(store)
    fresh = np.zeros(n, bool)

    def check(rows: NDArray[np.int64]) -> int:
        for i in rows.tolist():
            try:
                found = store.stat(names[i])
            except (OSError, ValueError) as error:
                status[i] = MISSING if isinstance(error, FileNotFoundError | NotADirectoryError) else BAD
                facts.reasons[i] = why_unreadable(error)
                continue
            row = cache.row(names[i], found, decode=decode)
            if row is not None:
                records[i], status[i] = cache.records[row], GOOD
                continue
            try:
                with open_image(store, names[i]) as (image, file):
                    header = header_of(image)
                    rgb = decode_open(image, file) if decode else None
                    peak = np.asarray(rgb).max(initial=0) if decode and header.mode in DEEP_GREY else 255
            except ImageError as error:
                status[i] = BAD
                facts.reasons[i] = str(error).removeprefix(f"{name_of(store, names[i])}: ")
                continue
            size, mode = (header.height, header.width), header.mode.encode("ascii", "replace")
            records[i] = found, decode, size, header.orientation, mode, peak
            status[i], fresh[i] = GOOD, True
        return len(rows)

    # Threads, not processes: decoders and file systems wait outside Python's lock, and results need no copying.
    chunks = np.array_split(todo, max(1, len(todo) // 32))
    pool = ThreadPoolExecutor(os.cpu_count() or 1)
    try:
        done = pool.map(check, chunks)
        what = f"checking {len(todo):,} images in {store.key} ({'every pixel' if decode else 'headers'})"
        _show_progress(done, len(todo), what if progress else None)
    finally:
        pool.shutdown(cancel_futures=True)
    if fresh.any():
        cache.add([names[i] for i in np.flatnonzero(fresh).tolist()], records[fresh])
    return facts


def _show_progress(done: Iterator[int], total: int, what: str | None) -> None:
    """Consume an iterator of counts; show a bar on a terminal, one line elsewhere, nothing without `what`."""
    if what is None:
        for _ in done:
            pass
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        print(what, file=sys.stderr, flush=True)
        _show_progress(done, total, None)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)
        for count in done:
            bar.advance(task, count)


CACHE_ERRORS = (
    OSError, ValueError, LookupError, EOFError, TypeError, AttributeError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error,
)  # fmt: skip
"""What NumPy raises for damaged files."""


class _CheckCache:
    """The good files of one image store, remembered between runs.

    An .npz file of plain arrays (reading it cannot run code) per store. It only saves time: a damaged, foreign or
    unwritable one is ignored.
    """

    def __init__(self, store: ImageStore) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        # Another Pillow, or other rules here, may judge files differently: increase the number with the rules.
        key = hashlib.sha256(f"{store.key}\0{PIL.__version__}\0v4".encode(errors="surrogatepass"))
        self.path = Path(base) / "detector" / f"images-{key.hexdigest()[:24]}.npz"
        try:
            with open_regular(self.path) as file, np.load(file, allow_pickle=False) as saved:
                names = bytes(saved["names"]).decode("utf-8", "surrogatepass").split("\0")[:-1]
                self.records = saved["records"]
            if self.records.dtype != RECORD or self.records.shape != (len(names),):
                raise ValueError("records of another format")
            self.rows = dict(zip(names, range(len(names)), strict=True))
        except CACHE_ERRORS:
            self.rows, self.records = {}, np.zeros(0, RECORD)

    def row(self, name: str, found: FileStat, *, decode: bool) -> int | None:
        """Return the row of a file that is unchanged and was checked at least as thoroughly; None without one."""
        row = self.rows.get(name)
        if row is None or (decode and not self.records["decoded"][row]):
            return None
        return row if tuple(self.records["stat"][row].tolist()) == found else None

    def add(self, names: Sequence[str], records: NDArray[np.void]) -> None:
        """Write new records together with those of other files in this store, such as other splits."""
        replaced = set(names)
        kept = {name: row for name, row in self.rows.items() if name not in replaced}
        text = "".join(f"{name}\0" for name in [*kept, *names])
        arrays = {
            "names": np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8),
            "records": np.concatenate([self.records[list(kept.values())], records]),
        }
        # Without a home folder, or with a full or read-only disk, the next run checks again.
        with contextlib.suppress(RunError), atomic_file(self.path) as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # numpy's stub takes the arrays for allow_pickle
