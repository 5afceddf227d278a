"""Memory: what a step needs of it, how many pictures fit at once, and what to say when they do not."""

from __future__ import annotations

from functools import partial

import torch

from detector import distributed
from detector.config import Config
from detector.datasets.loader import DetectionDataset, padded_rows
from detector.datasets.sampling import StepPlanner, TrainSampler
from detector.errors import ConfigError, RunError
from detector.evaluation.evaluate import eval_batch_size
from detector.memory import SPARE, free_memory, peak_of
from detector.precision import autocast
from detector.structures import Targets
from detector.training.run import Run


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
