"""Memory: what a step needs of it, how many pictures fit at once, and what to say when they do not."""

from __future__ import annotations

import ctypes
import os
import platform
import socket
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from detector.config import Config, ConfigError, DataConfig
from detector.datasets.loader import DetectionDataset, padded_rows
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.engine import distributed
from detector.engine.errors import RunError
from detector.engine.evaluate import eval_batch_size
from detector.engine.optim import autocast
from detector.engine.run import Run
from detector.structures import Targets

Work = Callable[[], object]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""

SPARE = 0.1
"""Share of the free memory that a step is not to use: what evaluation, pictures and fragments take."""


def resolved_micro_batch(run: Run, planner: StepPlanner, dataset: DetectionDataset) -> int | None:
    """Pictures of a forward pass; `train.micro_batch: auto` is answered by trying (a resumed run remembers).

    Tried is the largest canvas that a step can have, with as many objects in every picture as the fullest has, before
    anything is compiled (which takes less). Several processes take what fits all of them.

    Args:
        run: about to begin.
        planner: of its steps.
        dataset: of its pictures, with its cache.

    Raises:
        RunError: not even one picture fits.
        ConfigError: processes that wait for each other in every forward pass cannot try alone.
    """
    wanted = run.config.train.micro_batch
    if wanted != "auto":
        return wanted
    world, norm = distributed.world_size(), run.config.model.norm
    if norm == "sync_bn" and world > 1:
        raise ConfigError(
            f"train.micro_batch must be a number with model.norm sync_bn in {world} processes, got auto: they exchange statistics in "
            "every pass, so none can try what it holds"
        )
    share = -(-run.config.train.batch_size // world)
    canvas = planner.largest_canvas()
    if run.state.micro_batch is None:
        objects = padded_rows(int(dataset.coco.num_objects.max(initial=0)))
        to_come = 0  # what the cache will fill
        if dataset.cache is not None and run.config.data.cache_folder is None:
            to_come = dataset.cache.num_bytes
        statistics = {name: buffer.clone() for name, buffer in run.model.named_buffers()}
        fits, why = _largest_that_fits(run, canvas, objects, share, to_come)
        for name, buffer in run.model.named_buffers():
            buffer.copy_(statistics[name])
        run.state.micro_batch = min(distributed.gather(fits))
        run.log.info(f"train.micro_batch auto, with pictures of {canvas[0]} x {canvas[1]}: {why}")
    found = run.state.micro_batch
    if found == 0:
        raise too_little(run, canvas, 1, step=run.state.step)
    parts = -(-share // found)
    if parts > 1:
        run.log.info(f"so a step's {share} pictures go through the network in {parts} parts; the update is that of all")
        if norm in ("bn", "sync_bn"):
            run.log.warn(
                f"model.norm {norm} takes its statistics of {-(-share // parts)} pictures at once, not {share}"
            )
    return found


def _largest_that_fits(run: Run, canvas: tuple[int, int], objects: int, share: int, to_come: int) -> tuple[int, str]:
    """How many pictures, 0 to `share`, and the figures. `to_come`: bytes of main memory that others will take."""
    trained = 4 * sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    # What the first real step adds and keeps: the optimizer's averages, and DDP's buckets of gradients.
    later = trained * ({"sgd": 1, "adamw": 2}[run.config.optim.name] + (distributed.world_size() > 1))
    if run.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(run.device)
        there = free + torch.cuda.memory_reserved(run.device) - torch.cuda.memory_allocated(run.device)
        try:
            kept = torch.empty(int(later + SPARE * there), dtype=torch.uint8, device=run.device)
        except torch.OutOfMemoryError:
            return 0, "not even what the optimizer keeps fits"
        count = share
        while count:
            try:
                peak = peak_of(partial(_try, run, canvas, objects, count), run.device)
                break
            except torch.OutOfMemoryError:
                run.optimizer.zero_grad(set_to_none=True)
                count = -(-count // 2) if count > 1 else 0
            finally:
                torch.cuda.empty_cache()
        del kept
        torch.cuda.empty_cache()
        return count, f"{count} at once take {peak / 1e9:.1f} of {total / 1e9:.1f} GB" if count else "none fits"
    there_is = free_memory()
    if there_is is None:
        return share, f"this system does not say how much memory is free, so all {share} go at once"
    free = (there_is - to_come) // distributed.world_size()
    usable = (1 - SPARE) * free - later
    # No error to catch here: a process that asks for too much is ended. So from what one and, if they surely fit, two take.
    one = more = peak_of(partial(_try, run, canvas, objects, 1), run.device)
    if share > 1 and 2 * one <= usable:
        more = peak_of(partial(_try, run, canvas, objects, 2), run.device) - one
    count = min(share, 1 + int((usable - one) / max(1, more))) if one <= usable else 0
    return count, (
        f"the first takes {one / 1e9:.2f} GB, each further one {more / 1e9:.2f}, {free / 1e9:.1f} are free: {count} at once"
    )


def _try(run: Run, canvas: tuple[int, int], objects: int, count: int) -> None:
    """A step's forward and backward pass, which leaves nothing behind."""
    height, width = canvas
    images = torch.zeros((count, height, width, 3), dtype=torch.uint8, device=run.device).permute(0, 3, 1, 2)
    corner = torch.rand((count, objects, 2), generator=torch.Generator().manual_seed(0)) / 2
    boxes = torch.cat([corner, corner + 0.3], dim=2) * torch.tensor([width, height, width, height])
    targets = Targets(boxes, torch.zeros((count, objects), dtype=torch.int64), boxes[:, :0])
    targets = Targets(*(t.to(run.device) for t in targets))
    sizes = torch.tensor([canvas] * count, device=run.device)
    matches = run.loss.match(run.model.anchors_of(images), targets, grids=run.model.grids_of(images))
    with autocast(run.precision, run.device):
        outputs = run.model(images, sizes)
    parts = run.loss(outputs, targets, matches=matches, num_pos=matches.num_pos.sum())
    (parts["loss_cls"] + parts["loss_box"]).backward()
    run.optimizer.zero_grad(set_to_none=True)


def out_of_memory(run: Run, sampler: TrainSampler) -> RunError:
    """What the step at hand took, what there is, and which settings make it less."""
    planner = sampler.planner
    epoch, within = divmod(run.state.step, planner.steps_per_epoch)
    keys = planner.keys(epoch, within, planner.epoch(epoch)[within])
    share = -(-len(keys) // distributed.world_size())
    at_once = -(-share // sampler.num_micro_batches(len(keys)))
    return too_little(run, keys[0].canvas, at_once, step=run.state.step)


def too_little(run: Run, canvas: tuple[int, int], at_once: int, *, step: int) -> RunError:
    """The error of a step that does not fit, with the settings that help this run."""
    there = f" of {torch.cuda.mem_get_info(run.device)[1] / 1e9:.0f} GB" if run.device.type == "cuda" else ""
    resumable, others = [], [f"data.min_size below {max(run.config.data.train_sizes)}"]
    if at_once > 1:
        bn = " (norm bn then sees fewer pictures at once)" if run.config.model.norm == "bn" else ""
        resumable.append(f"train.micro_batch={at_once // 2}, which does the same step in smaller parts{bn}")
    if run.config.model.norm in ("frozen_bn", "gn") and not run.config.train.checkpoint_activations:
        resumable.append("train.checkpoint_activations=true")
    if run.precision == "fp32":
        others.append("train.precision=bf16")
    if step and resumable:
        settings = f"{', or '.join(resumable)}, with --resume auto; or in a new run {', or '.join(others)}"
    else:
        settings = ", or ".join([*resumable, *others])
    return RunError(
        f"the memory{there} must hold {at_once} picture{'s' * (at_once > 1)} of {canvas[0]} x {canvas[1]} pixels at once in step "
        f"{step + 1}, and does not; set {settings}"
    )


def too_large_evaluation(config: Config) -> RunError:
    """The error of an evaluation that does not fit."""
    at_once = eval_batch_size(config)
    return RunError(
        f"the memory must hold {at_once} pictures at once in evaluation, and does not; set eval.batch_size={max(1, at_once // 2)} or "
        "eval.loss=false, with --resume auto, which begins with this evaluation"
    )


def keep_pictures(dataset: DetectionDataset, settings: DataConfig) -> str:
    """Give a dataset the cache that the settings ask for, one for all processes of a machine; returns what it holds, in words.

    Raises:
        ConfigError: there is no room for it.
    """
    node, first = socket.gethostname(), int(os.environ.get("LOCAL_RANK", "0")) == 0
    path, mistake = None, ""
    if first:
        try:
            path, mistake = _make_cache(dataset, settings)
        except OSError as error:
            where = "memory" if settings.cache_folder is None else settings.cache_folder
            mistake = (
                f"data.cache_gb must fit into data.cache_folder {where}, got {settings.cache_gb:g}: {error.strerror}; set less, or "
                "another folder"
            )
    told = distributed.gather((node, first, path, mistake))
    mistakes = [mistake for *_, mistake in told if mistake]
    if mistakes:  # all end alike, and none waits for the others
        raise ConfigError(mistakes[0])
    if not first:
        shared = next((path for host, is_first, path, _ in told if host == node and is_first), None)
        _make_cache(dataset, settings, shared=shared)
    cache = dataset.cache
    assert cache is not None
    what = "decoded" if dataset.keeps_whole else "resized"
    return (
        f"data.cache_gb: {cache.num_bytes / 1e9:.2f} GB of {settings.cache_folder or 'memory'} keep {cache.num_kept:,} of "
        f"{cache.num_pictures:,} pictures, {what}"
    )


def _make_cache(
    dataset: DetectionDataset, settings: DataConfig, *, shared: str | None = None
) -> tuple[str | None, str]:
    """By which path others find it, and what is wrong with it."""
    folder = None if settings.cache_folder is None else Path(settings.cache_folder)
    cache = dataset.keep_pictures(
        int(settings.cache_gb * 1e9), min_sizes=settings.train_sizes, folder=folder, shared=shared
    )
    free = free_memory()
    if folder is None and shared is None and free is not None and cache.num_bytes > (1 - SPARE) * free:
        return None, (
            f"data.cache_gb must leave room for the network, got {cache.num_bytes / 1e9:.1f} of {free / 1e9:.1f} GB of free memory; "
            "set less, or data.cache_folder to keep them on a disk"
        )
    return cache.path, ""


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take, of the machine or of its containers (cgroup v2); what files keep there
    only as long as nobody needs the room counts as free. None where unknown."""
    _give_back()
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        own = next(
            (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")), "/"
        )
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup", own.strip("/"))
    for inside in [group, *group.parents][: len(group.parts) - 3]:  # up to /sys/fs/cgroup
        try:
            limit = int((inside / "memory.max").read_text())  # "max" where there is none
            used = int((inside / "memory.current").read_text())
            stat = dict(line.split() for line in (inside / "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(stat["file"]) - int(stat["shmem"]))
        except (OSError, KeyError, ValueError):
            continue
    return free


def keep_freed_memory() -> None:
    """Tell the C library to keep what it gets back: a step asks for the same memory as the one before, and pages that went
    to the system come back empty, one fault each (a ResNet-18's steps of small pictures on two cores take 5 % less time). Only glibc
    knows how; where the environment has told it otherwise, that stands."""
    if platform.libc_ver()[0] != "glibc" or any(key.startswith(("MALLOC_", "GLIBC_TUNABLES")) for key in os.environ):
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(M_MMAP_THRESHOLD, 32 << 20)  # larger blocks may still go back: kept, they would leave holes
    mallopt(M_TRIM_THRESHOLD, -1)  # never


def peak_of(work: Work, device: torch.device) -> int:
    """Bytes that one repetition needs beyond what is held already."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _give_back()  # so that what is needed shows
    with _Watch() as watch:
        work()
    return watch.peak - watch.before


def _give_back() -> None:
    """To the system, what the C library keeps of what was freed."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


class _Watch:
    """The highest memory of this process in pages really used, looked at every millisecond (the kernel's own record cannot be
    set back everywhere)."""

    def __enter__(self) -> _Watch:
        self.before = self.peak = _resident()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._done.wait(0.001):
            self.peak = max(self.peak, _resident())


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
