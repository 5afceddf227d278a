"""Memory: what a step needs of it, how many pictures fit at once, and what to say when they do not."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from detector.config import ConfigError, DataConfig
from detector.datasets.loader import DetectionDataset, padded_rows
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.engine import distributed
from detector.engine.errors import RunError
from detector.engine.optim import autocast
from detector.engine.run import Run
from detector.structures import Targets

Work = Callable[[], object]

SPARE = 0.1
"""Share of the free memory that a step is not to use: what evaluation, pictures and fragments take."""


def resolved_micro_batch(run: Run, planner: StepPlanner, most_objects: int) -> int | None:
    """Pictures of a forward pass; `train.micro_batch: auto` is answered by trying (a resumed run remembers).

    Tried is the largest canvas that a step can have, with as many objects in every picture as the fullest has, before
    anything is compiled (which takes less). Several processes take what fits all of them.

    Args:
        run: about to begin.
        planner: of its steps.
        most_objects: in any picture.

    Raises:
        RunError: not even one picture fits.
    """
    wanted = run.config.train.micro_batch
    if wanted != "auto":
        return wanted
    share = -(-run.config.train.batch_size // distributed.world_size())
    canvas = planner.largest_canvas()
    if run.state.micro_batch is None:
        run.model.eval()  # so that no running statistics move; it takes as much
        try:
            fits, why = _largest_that_fits(run, canvas, padded_rows(most_objects), share)
        finally:
            run.model.train()
        run.state.micro_batch = min(distributed.gather(fits))
        run.log.info(f"train.micro_batch auto, with pictures of {canvas[0]} x {canvas[1]}: {why}")
    found = run.state.micro_batch
    if found == 0:
        raise too_little(run, canvas, 1, step=run.state.step)
    parts = -(-share // found)
    if parts > 1:
        run.log.info(f"so a step's {share} pictures go through the network in {parts} parts; the update is that of all")
        if run.config.model.norm in ("bn", "sync_bn"):
            run.log.warn(
                f"model.norm {run.config.model.norm} takes its statistics of {-(-share // parts)} pictures at once, not {share}"
            )
    return found


def _largest_that_fits(run: Run, canvas: tuple[int, int], objects: int, share: int) -> tuple[int, str]:
    """How many pictures, 0 to `share`, and the figures."""
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
    free_bytes = free_memory()
    if free_bytes is None:
        return share, f"this system does not say how much memory is free, so all {share} go at once"
    free_bytes //= distributed.world_size()
    # No error to catch here: a process that asks for too much is ended. So from what one and two take.
    one = peak_of(partial(_try, run, canvas, objects, 1), run.device)
    more = peak_of(partial(_try, run, canvas, objects, 2), run.device) - one if share > 1 else 0
    usable = (1 - SPARE) * free_bytes - later
    count = min(share, 1 + int((usable - one) / max(1, more))) if usable > one else 0
    return count, (
        f"the first takes {one / 1e9:.2f} GB, each further one {more / 1e9:.2f}, {free_bytes / 1e9:.1f} are free: {count} at once"
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
    help_ = [f"data.min_size below {max(run.config.data.train_sizes)}"]
    if at_once > 1:
        bn = " (norm bn then sees fewer pictures at once)" if run.config.model.norm == "bn" else ""
        help_.insert(0, f"train.micro_batch={at_once // 2} or auto, which does the same step in smaller parts{bn}")
    if run.config.model.norm in ("frozen_bn", "gn") and not run.config.train.checkpoint_activations:
        help_.append("train.checkpoint_activations=true")
    if run.precision == "fp32":
        help_.append("train.precision=bf16")
    resume = "; --resume auto goes on from the last checkpoint" if step else ""
    return RunError(
        f"the memory{there} must hold {at_once} picture{'s' * (at_once > 1)} of {canvas[0]} x {canvas[1]} pixels at once in step "
        f"{step + 1}, and does not; set {', or '.join(help_)}{resume}"
    )


def keep_pictures(dataset: DetectionDataset, settings: DataConfig) -> str:
    """Give a dataset the cache that the settings ask for; returns what it holds, in words.

    Raises:
        ConfigError: there is no room for it.
    """
    wanted = int(settings.cache_gb * 1e9 / distributed.world_size())
    folder = None if settings.cache_folder is None else Path(settings.cache_folder)
    where = "memory" if folder is None else str(folder)
    try:
        cache = dataset.keep_pictures(wanted, min_sizes=settings.train_sizes, folder=folder)
    except OSError as error:
        raise ConfigError(
            f"data.cache_gb must fit into data.cache_folder {where}, got {settings.cache_gb:g}: {error.strerror}; set less, or another "
            "folder"
        ) from None
    free = free_memory()
    if folder is None and free is not None and cache.num_bytes > free:
        raise ConfigError(
            f"data.cache_gb must leave room for the network, got {settings.cache_gb:g} of {free / 1e9:.1f} GB of free memory; set "
            "less, or data.cache_folder to keep them on a disk"
        )
    what = "resized" if dataset.resizes_first else "decoded"
    return (
        f"data.cache_gb: {cache.num_bytes / 1e9:.2f} GB of {where} keep {cache.num_kept:,} of {cache.num_pictures:,} pictures, "
        f"{what}"
    )


def free_memory() -> int | None:
    """Bytes of main memory that this process may still take: of the machine, or of its container. None where unknown."""
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())  # "max" where there is none
        free = min(free, limit - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free


def peak_of(work: Work, device: torch.device) -> int:
    """Bytes that one repetition needs beyond what is held already."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back, so that what is needed shows
    with _Watch() as watch:
        work()
    return watch.peak - watch.before


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
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
