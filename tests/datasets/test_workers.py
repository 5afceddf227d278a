"""Loader workers that die, hang, or find no memory: one error each, which names the worker and its image."""

from __future__ import annotations

import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch

from detector.atomic import write_text
from detector.datasets import loader as loader_module
from detector.datasets import worker_process, workers
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.opening import read_coco
from detector.datasets.sampling import SampleKey
from detector.datasets.shared_memory import SharedArray
from detector.datasets.store import FileStat, FolderStore
from detector.errors import ImageError, WorkerError
from detector.structures import Batch
from tests.tiny import REPO, images_of, start_process, wait_for, write_coco


class OddStore:
    """A folder in which opening one image does something else first."""

    def __init__(self, folder: FolderStore, name: str, what: str) -> None:
        self.folder, self.name, self.what = folder, name, what
        self.key = folder.key
        self.tries = 0

    def open(self, name: str) -> BinaryIO:
        if name == self.name:
            self.tries += 1
            match self.what:
                case "hang":
                    time.sleep(1000)
                case "slow":
                    time.sleep(0.3)
                case "exit":
                    os._exit(3)
                case "brief" if self.tries <= 2:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                case "missing":
                    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
                case "brief" | "missing":
                    pass
                case name_of_signal:
                    os.kill(os.getpid(), signal.Signals[name_of_signal])
                    time.sleep(1000)
        return self.folder.open(name)

    def stat(self, name: str) -> FileStat:
        return self.folder.stat(name)

    def describe(self, name: str) -> str:
        return self.folder.describe(name)


@pytest.fixture(scope="module", name="annotations")
def _annotations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("workers") / "train.json", 8, seed=1)


@pytest.fixture(autouse=True)
def _no_worker_is_left() -> Iterator[None]:
    yield
    workers.end_workers()


def odd(annotations: Path, what: str, name: str = "0040.png") -> CocoDataset:
    store = OddStore(FolderStore(images_of(annotations)), name, what)
    return read_coco(annotations, store, verify="none", progress=False)


def batches(
    coco: CocoDataset, *, num_workers: int = 2, timeout: float = 60.0, size: int = 2, skip: bool = False
) -> Iterator[Batch]:
    keys = [SampleKey(0, i, 64, (128, 128)) for i in range(len(coco))]
    dataset = DetectionDataset(coco, max_size=96, skip_unreadable=skip)
    parts = [keys[i : i + size] for i in range(0, len(keys), size)]
    return iter(build_loader(dataset, parts, num_workers=num_workers, worker_timeout=timeout))


def test_no_batches_need_no_workers(annotations: Path) -> None:
    coco = odd(annotations, "hang")
    assert list(build_loader(DetectionDataset(coco, max_size=96), [], num_workers=2)) == []


@pytest.mark.parametrize(
    ("what", "texts"),
    [
        ("SIGKILL", ["was killed by SIGKILL", "ran out of memory", "data.num_workers=1", "data.cache_gb"]),
        ("SIGBUS", ["was killed by SIGBUS", "ran full"]),
        ("SIGSEGV", ["was killed by SIGSEGV", "decoder crash", "check that image"]),
        ("SIGUSR1", ["was killed by SIGUSR1", "data.num_workers=0"]),
        ("exit", ["ended with exit code 3", "data.num_workers=0"]),
    ],
)
def test_a_worker_that_dies_is_named_with_its_image(annotations: Path, what: str, texts: list[str]) -> None:
    with pytest.raises(WorkerError) as raised:
        list(batches(odd(annotations, what)))
    message = str(raised.value)
    for text in ["loader worker 2 of 2 (process ", "0040.png", *texts]:
        assert text in message
    assert "\n" not in message
    assert not multiprocessing.active_children()


def test_a_death_that_the_kernel_counted_as_one_for_memory_is_called_so(
    annotations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = itertools.chain([7], itertools.repeat(8))
    monkeypatch.setattr(workers, "kills_for_memory", lambda: next(counts))
    with pytest.raises(WorkerError, match="the kernel killed a process because memory was full"):
        list(batches(odd(annotations, "SIGKILL")))


def test_a_worker_that_dies_is_noticed_where_its_batch_is_needed_and_nowhere_else(annotations: Path) -> None:
    """torch's own handler of SIGCHLD would raise in the middle of an optimizer step."""
    before = set(multiprocessing.active_children())
    loaded = batches(odd(annotations, "", name=""))
    next(loaded)
    (worker, _) = sorted(set(multiprocessing.active_children()) - before, key=lambda p: p.pid or 0)
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while worker.exitcode is None:  # the signal handler runs here
        assert time.monotonic() < until
    with pytest.raises(WorkerError, match="was killed by SIGKILL while it read "):
        list(loaded)


@pytest.mark.parametrize("what", ["hang", "SIGSTOP"])
def test_a_worker_that_hangs_is_named_with_its_image(annotations: Path, what: str) -> None:
    """Stopped, it does not even hand over the batches that it has sent before."""
    with pytest.raises(WorkerError) as raised:
        list(batches(odd(annotations, what), timeout=1.0))
    message = str(raised.value)
    for text in ["loader worker 2 of 2", "has been reading", "0040.png", "more than 1 s (data.worker_timeout)"]:
        assert text in message
    assert not multiprocessing.active_children()


def test_workers_that_stop_between_images_are_noticed_too(annotations: Path) -> None:
    before = set(multiprocessing.active_children())
    loaded = batches(odd(annotations, "", name=""), timeout=1.0, size=1)
    next(loaded)
    notes = loaded._watch.notes  # type: ignore[attr-defined]
    until = time.monotonic() + 20
    while notes[:, 1].sum() < 15 or (notes[:, 0] >= 0).any():  # they have read four images ahead
        assert time.monotonic() < until
    for worker in set(multiprocessing.active_children()) - before:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match=r"have read nothing for 1 s \(data.worker_timeout\)"):
        list(loaded)
    assert not multiprocessing.active_children()


def test_a_slow_batch_is_no_hung_image(annotations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each image is faster than the timeout, and the batch of eight slower. The main process checks in between."""
    monkeypatch.setattr(loader_module, "CHECK_SECONDS", 0.2)
    coco = odd(annotations, "slow")
    monkeypatch.setattr(coco.image_store, "name", None)
    monkeypatch.setattr(type(coco.image_store), "name", property(lambda _: Everything()), raising=False)
    assert [len(b.index) for b in batches(coco, timeout=1.5, size=8)] == [8]


class Everything:
    """Equal to every name."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def test_a_pause_of_the_main_process_is_no_hang_of_its_workers(annotations: Path) -> None:
    """An evaluation, for example, during which the workers have nothing to do."""
    loaded = batches(odd(annotations, "", name=""), timeout=0.5, size=1)
    next(loaded)
    time.sleep(2)
    assert len(list(loaded)) == 7


def test_the_thread_that_watches_workers_ends_with_them(annotations: Path) -> None:
    names = [t.name for t in threading.enumerate()]
    coco = odd(annotations, "", name="")
    list(batches(coco))
    abandoned = batches(coco)
    next(abandoned)
    del abandoned
    until = time.monotonic() + 20
    while [t.name for t in threading.enumerate()].count("loader workers") > names.count("loader workers"):
        assert time.monotonic() < until
        time.sleep(0.05)


def wait_for_a_batch(annotations: Path, method: str, pids: Path) -> None:
    """Start two workers, write their process ids, and wait for a batch for ever."""
    multiprocessing.set_start_method(method, force=True)
    found = batches(odd(annotations, "hang"))
    next(found)
    children = multiprocessing.active_children()
    write_text(" ".join(str(child.pid) for child in children), pids)
    next(found)


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_workers_end_with_a_process_that_is_killed(annotations: Path, method: str, tmp_path: Path) -> None:
    pids, log = tmp_path / "pids", tmp_path / "log"
    process = start_process(wait_for_a_batch, (annotations, method, pids), log)
    wait_for(pids.exists, process, log)
    workers = [int(pid) for pid in pids.read_text().split()]
    assert len(workers) == 2
    process.kill()
    process.join()
    until = time.monotonic() + 4  # torch's own workers look every five seconds
    while any(Path("/proc", str(pid)).exists() for pid in workers):
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_is_briefly_unreadable_is_read_again(annotations: Path, num_workers: int) -> None:
    expected = list(batches(odd(annotations, "", name=""), num_workers=0))
    for one, other in zip(batches(odd(annotations, "brief"), num_workers=num_workers), expected, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.index, other.index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_file_that_stays_unreadable_is_tried_three_times(annotations: Path, num_workers: int) -> None:
    coco = odd(annotations, "missing")
    with pytest.raises(ImageError, match=r"0040\.png: no such file"):
        list(batches(coco, num_workers=num_workers))
    if not num_workers:
        assert isinstance(coco.image_store, OddStore)
        assert coco.image_store.tries == 3


def test_an_image_that_was_reported_is_not_waited_for_again(annotations: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor are others, once many were waited for in vain: a missing folder would cost 2.5 s per image."""
    pauses: list[float] = []
    monkeypatch.setattr(loader_module, "RETRY_PAUSES", (0.5, 2.0))
    monkeypatch.setattr(loader_module.time, "sleep", pauses.append)  # type: ignore[attr-defined]
    coco = odd(annotations, "missing")
    dataset = DetectionDataset(coco, max_size=96, skip_unreadable=True)
    for _ in range(3):
        assert dataset[SampleKey(0, 3, 64, (128, 128))].image_id == -1
    assert pauses == [0.5, 2.0]
    monkeypatch.setattr(loader_module, "MAX_RETRIES_IN_VAIN", 1)
    other = DetectionDataset(coco, max_size=96)
    for _ in range(2):
        with pytest.raises(ImageError):
            other[SampleKey(0, 3, 64, (128, 128))]
    assert pauses == [0.5, 2.0] * 2


@pytest.mark.parametrize("content", [b"", b"no image"])
def test_a_damaged_image_is_not_read_again(tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_module.time, "sleep", lambda _: pytest.fail("it waits"))  # type: ignore[attr-defined]
    annotations = write_coco(tmp_path / "train.json", 1, seed=1)
    (images_of(annotations) / "0010.png").write_bytes(content)
    with pytest.raises(ImageError):
        list(batches(odd(annotations, "", name=""), num_workers=0))


@pytest.mark.parametrize(
    ("number", "remedy"),
    [(errno.EMFILE, "ulimit -n 4096"), (errno.ENOMEM, "use fewer workers"), (errno.ENOSPC, "--shm-size")],
)
def test_a_resource_that_runs_out_in_a_worker_is_an_error_with_a_remedy(
    annotations: Path, number: int, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(shape: Sequence[int], dtype: type[np.uint8]) -> SharedArray[np.uint8]:
        if torch.utils.data.get_worker_info() is not None:
            raise OSError(number, os.strerror(number))
        return SharedArray(shape, dtype)

    monkeypatch.setattr(worker_process, "SharedArray", refuse)
    with pytest.raises(WorkerError, match=f"a loader worker failed: .*{remedy}") as raised:
        list(batches(odd(annotations, "", name="")))
    assert "Traceback" not in str(raised.value)
    assert not multiprocessing.active_children()


def test_workers_that_cannot_be_started_are_an_error_with_a_remedy(
    annotations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their queues need semaphores, which need room in /dev/shm."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(multiprocessing, "Semaphore", refuse)
    with pytest.raises(WorkerError, match=r"loader workers cannot be started: .*data.num_workers=0.*--shm-size"):
        next(batches(odd(annotations, "", name="")))


READS_BATCHES = """
import os, sys
from pathlib import Path
from detector.datasets.loader import DetectionDataset, build_loader
from detector.datasets.opening import read_coco
from detector.datasets.sampling import SampleKey
coco = read_coco(Path(sys.argv[1]), Path(sys.argv[2]), verify="none", progress=False)
keys = [[SampleKey(0, i, 640, (640, 640))] * 4 for i in range(8)]
for workers in (0, 2):
    loader = build_loader(DetectionDataset(coco, max_size=640), keys, num_workers=workers)
    print(sum(int(batch.images.sum()) for batch in loader))
print(os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize)
with open("/dev/shm/full", "wb") as file:
    file.write(bytes(240 * 1024))
next(iter(build_loader(DetectionDataset(coco, max_size=640), keys, num_workers=2)))
"""


def test_a_small_dev_shm_is_enough_and_a_full_one_is_an_error(annotations: Path) -> None:
    """Docker gives containers 64 MB. Batches of 5 MB are sent here with 256 kB."""
    small = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=256k tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*small, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a file system")
    command = [*small, sys.executable, "-c", READS_BATCHES, str(annotations), str(images_of(annotations))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPO, check=False)
    alone, with_workers, room = map(int, done.stdout.split())
    assert alone == with_workers > 0
    assert room == 256 * 1024
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("detector.errors.WorkerError: loader workers cannot be started: [Errno 28] No space left on")
    assert "data.num_workers=0" in last
    assert "--shm-size" in last
    assert "Exception ignored" not in done.stderr


def child_adds(array: SharedArray[np.int64]) -> None:
    array.array[1, 2] += 5


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_shared_array_is_the_same_memory_in_a_child(method: str) -> None:
    array = SharedArray((2, 3), np.int64)
    assert not array.array.any()
    context: Any = multiprocessing.get_context(method)
    process = context.Process(target=child_adds, args=(array,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert array.array.tolist() == [[0, 0, 0], [0, 0, 5]]


def test_an_empty_shared_array_is_empty() -> None:
    assert SharedArray((0, 3), np.uint8).array.shape == (0, 3)
