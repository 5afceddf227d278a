"""`train.micro_batch: auto`: how many images fit through the network together, and the errors when too many do not."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch

from detector import distributed
from detector.checkpoint import TrainState
from detector.config import Config
from detector.datasets.loader import DetectionDataset, padded_rows
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.errors import ConfigError, RunError
from detector.evaluation.dataset_loop import eval_batch_size
from detector.memory import SPARE, free_memory, peak_of
from detector.structures import Batch, Targets
from detector.training.logger import RunLog
from detector.training.running_statistics import running_statistics, unchanged_buffers
from detector.training.step import Learner, train_step


def resolve_micro_batch(
    config: Config, learner: Learner, state: TrainState, planner: StepPlanner, dataset: DetectionDataset, log: RunLog
) -> int | None:
    """Resolve `train.micro_batch`; auto is measured once and stored in the state, so that a resumed run computes alike.

    Measured is the largest canvas that a step can have, with as many objects in every image as the fullest image has,
    before anything is compiled (which takes less memory). Several processes use what fits on all of them.

    Args:
        config, learner, planner: of the run that is about to start.
        state: remembers the result.
        dataset: of the run, with its cache.
        log: reports the figures.

    Returns:
        Images per forward pass and process; None: the process's whole share of a step.

    Raises:
        RunError: not even one image fits.
        ConfigError: the processes exchange statistics in every forward pass, so that none can measure alone.
    """
    wanted, world, norm = config.train.micro_batch, distributed.world_size(), config.model.norm
    if wanted == "auto" and norm == "sync_bn" and world > 1:
        raise ConfigError(
            f"train.micro_batch must be a number with model.norm sync_bn in {world} processes, got auto: they exchange "
            "statistics in every forward pass, so none can measure its memory alone"
        )
    fitting = state.fitting_micro_batch
    if fitting is not None:
        log.info(f"at most {fitting} image{'s' * (fitting > 1)} in each forward pass, since a step ran out of memory")
    if wanted != "auto":
        return wanted
    share = -(-config.train.batch_size // world)
    canvas = planner.largest_canvas()
    if state.micro_batch is None:
        objects = padded_rows(int(dataset.coco.num_objects.max(initial=0)))
        reserved = 0  # memory that the cache will fill
        if dataset.cache is not None and config.data.cache_folder is None:
            reserved = dataset.cache.num_bytes
        with unchanged_buffers(learner.model):
            fits, figures = _largest_that_fits(config, learner, canvas, objects, share, reserved)
        state.micro_batch = min(distributed.gather(fits))
        log.info(f"train.micro_batch auto, with images of {canvas[0]} x {canvas[1]}: {figures}")
    micro_batch = state.micro_batch
    if micro_batch == 0:
        raise out_of_memory(config, learner, canvas, 1, step=state.step)
    parts = -(-share // micro_batch)
    if parts > 1:
        log.info(f"the {share} images of a step are processed in {parts} micro-batches; the update is that of all")
        if norm in ("bn", "sync_bn"):
            log.warn(f"model.norm {norm} computes its statistics over {-(-share // parts)} images, not {share}")
    return micro_batch


def _largest_that_fits(
    config: Config, learner: Learner, canvas: tuple[int, int], objects: int, share: int, reserved: int
) -> tuple[int, str]:
    """Number of images that fit, 0 to `share`, and the figures. `reserved`: bytes of main memory that others will
    use."""
    trained = 4 * sum(p.numel() for p in learner.model.parameters() if p.requires_grad)
    # What the first real step adds and keeps: the optimizer's moments, and DDP's gradient buckets.
    later = trained * ({"sgd": 1, "adamw": 2}[config.optim.name] + (distributed.world_size() > 1))
    if learner.device.type == "cuda":
        free, total = torch.cuda.mem_get_info(learner.device)
        available = free + torch.cuda.memory_reserved(learner.device) - torch.cuda.memory_allocated(learner.device)
        try:
            kept = torch.empty(int(later + SPARE * available), dtype=torch.uint8, device=learner.device)
        except torch.OutOfMemoryError:
            return 0, "not even the optimizer's state fits"
        count = share
        while count:
            try:
                peak = peak_of(partial(_trial_step, learner, canvas, objects, count), learner.device)
                break
            except torch.OutOfMemoryError:
                learner.optimizer.zero_grad(set_to_none=True)
                count = -(-count // 2) if count > 1 else 0
            finally:
                torch.cuda.empty_cache()
        del kept
        torch.cuda.empty_cache()
        return count, f"{count} need {peak / 1e9:.1f} of {total / 1e9:.1f} GB" if count else "none fits"
    available_now = free_memory()
    if available_now is None:
        return share, f"this system does not report its free memory, so all {share} are processed together"
    free = (available_now - reserved) // distributed.world_size()
    usable = (1 - SPARE) * free - later
    # There is no error to catch: a process that asks for too much is killed. So extrapolate from one image and, if they
    # surely fit, two.
    one = more = peak_of(partial(_trial_step, learner, canvas, objects, 1), learner.device)
    if share > 1 and 2 * one <= usable:
        more = peak_of(partial(_trial_step, learner, canvas, objects, 2), learner.device) - one
    count = min(share, 1 + int((usable - one) / max(1, more))) if one <= usable else 0
    return count, (
        f"the first needs {one / 1e9:.2f} GB, each further one {more / 1e9:.2f}, {free / 1e9:.1f} are free: {count} fit"
    )


def _trial_step(learner: Learner, canvas: tuple[int, int], objects: int, count: int) -> None:
    """Compute and discard the gradients of a step over `count` made-up images, without any communication."""
    height, width = canvas
    images = torch.zeros((count, height, width, 3), dtype=torch.uint8, device=learner.device).permute(0, 3, 1, 2)
    corner = torch.rand((count, objects, 2), generator=torch.Generator().manual_seed(0)) / 2
    boxes = torch.cat([corner, corner + 0.3], dim=2) * torch.tensor([width, height, width, height])
    targets = Targets(boxes, torch.zeros((count, objects), dtype=torch.int64), boxes[:, :0]).to(learner.device)
    sizes = torch.tensor([canvas] * count, device=learner.device)
    batch = Batch(images, targets, sizes[:, 0], sizes, sizes, sizes[:, 0])
    disabled = torch.amp.GradScaler(enabled=False)
    alone = replace(learner, network=learner.model, processes=1, scaler=disabled, halted=None)
    train_step(alone, [batch])
    learner.optimizer.zero_grad(set_to_none=True)


def split_batch(batch: Batch, size: int | None) -> list[Batch]:
    """Split a micro-batch on its device into the fewest, nearly equal parts of at most `size` images; None: one."""
    length = len(batch.images)
    if size is None or length <= size:
        return [batch]
    bounds = [tuple(part[[0, -1]].tolist()) for part in torch.arange(length).tensor_split(-(-length // size))]

    def part(rows: slice) -> Batch:
        targets = Targets(*(None if t is None else t[rows] for t in batch.targets))  # type: ignore[arg-type]
        return Batch(
            batch.images[rows], targets, batch.image_ids[rows], batch.image_sizes[rows], batch.original_sizes[rows],
            batch.index[rows],
        )  # fmt: skip

    return [part(slice(first, last + 1)) for first, last in bounds]


@contextlib.contextmanager
def parts_that_fit(
    micro_batches: Sequence[Batch], learner: Learner, state: TrainState, log: RunLog
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of a step, cut so that they fit into memory as far as is known.

    If the block runs out of memory, which `train_step` undoes, the state remembers half of the size, for the rest of
    the run, and the error is suppressed: do the step again. With several processes it is not, because the others wait
    in the exchange of gradients.

    Args:
        micro_batches: of the step, as loaded.
        learner, state, log: of the run.

    Raises:
        OutOfMemoryError: not even one image fits; or there are several processes.
    """
    parts = [part for batch in micro_batches for part in split_batch(batch, state.fitting_micro_batch)]
    try:
        yield parts
    except torch.OutOfMemoryError as error:
        together = max(len(part.images) for part in parts)
        if together == 1 or learner.processes > 1:
            raise
        state.fitting_micro_batch = -(-together // 2)
        traceback.clear_frames(error.__traceback__)  # which hold activations
        height, width = parts[0].images.shape[-2:]
        has_bn = bool(running_statistics(learner.model))
        fewer = f"; model.norm bn computes its statistics over {state.fitting_micro_batch} images" if has_bn else ""
        log.warn(
            f"out of memory at step {state.step + 1}: {together} images of {height} x {width} pixels did not fit; from "
            f"now on at most {state.fitting_micro_batch} are processed together (the update is that of all{fewer})"
        )
        if learner.device.type == "cuda":
            torch.cuda.empty_cache()


@contextlib.contextmanager
def explain_out_of_memory(config: Config, learner: Learner, sampler: TrainSampler, state: TrainState) -> Iterator[None]:
    """Turn a GPU's out-of-memory error in a training step into one that names the settings that reduce memory.

    Raises:
        RunError: a step did not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        planner = sampler.planner
        epoch, within = divmod(state.step, planner.steps_per_epoch)
        keys = planner.keys(epoch, within, planner.epoch(epoch)[within])
        share = -(-len(keys) // distributed.world_size())
        together = min(-(-share // sampler.num_micro_batches(len(keys))), state.fitting_micro_batch or share)
        raise out_of_memory(config, learner, keys[0].canvas, together, step=state.step) from error


def out_of_memory(config: Config, learner: Learner, canvas: tuple[int, int], together: int, *, step: int) -> RunError:
    """The error for a step that does not fit, with the settings that help this run.

    Args:
        config, learner: of the run.
        canvas: padded height and width of the step.
        together: images per forward pass.
        step: number of steps done.
    """
    device = learner.device
    total = f" of {torch.cuda.mem_get_info(device)[1] / 1e9:.0f} GB" if device.type == "cuda" else ""
    resumable, others = [], [f"data.min_size below {max(config.data.train_sizes)}"]
    if together > 1:
        bn = " (norm bn then computes statistics over fewer images)" if config.model.norm == "bn" else ""
        resumable.append(f"train.micro_batch={together // 2}, which computes the same step in smaller parts{bn}")
    if config.model.norm in ("frozen_bn", "gn") and not config.train.checkpoint_activations:
        resumable.append("train.checkpoint_activations=true")
    if learner.precision == "fp32":
        others.append("train.precision=bf16")
    if step and resumable:
        settings = f"{', or '.join(resumable)}, with --resume auto; or in a new run {', or '.join(others)}"
    else:
        settings = ", or ".join([*resumable, *others])
    return RunError(
        f"out of memory{total} at step {step + 1}: {together} image{'s' * (together > 1)} of {canvas[0]} x {canvas[1]} "
        f"pixels did not fit; set {settings}"
    )


@contextlib.contextmanager
def explain_evaluation_out_of_memory(config: Config) -> Iterator[None]:
    """Turn a GPU's out-of-memory error in an evaluation into one that names the settings that reduce memory.

    Raises:
        RunError: a batch did not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        together = eval_batch_size(config)
        raise RunError(
            f"out of memory in evaluation: {together} images did not fit; set eval.batch_size={max(1, together // 2)}, "
            "eval.loss=false or train.loss_every_epochs=0, with --resume auto, which starts with this evaluation"
        ) from error
