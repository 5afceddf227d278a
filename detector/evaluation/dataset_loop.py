"""The loop that feeds a dataset to a network, shared by evaluation, loss analysis and the self-check."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from detector import distributed
from detector.config import Config
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, build_loader, to_device, unreadable_images
from detector.datasets.sampling import SampleKey, eval_batches
from detector.inference.detector import Detector
from detector.models import RetinaNet
from detector.precision import resolve_precision
from detector.structures import Batch


def loop_over_dataset(
    model: RetinaNet,
    coco: CocoDataset,
    config: Config,
    on_batch: Callable[[Detector, Batch, Batch], None],
    *,
    device: torch.device,
    indices: Sequence[int] | None = None,
    split_over_processes: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[int]:
    """Run a network in evaluation mode over a dataset.

    Args:
        model: on `device`; its mode is restored afterwards.
        coco: the dataset.
        config: image sizes, batch size, workers, precision and post-processing.
        on_batch: called with a detector around the model, the batch in main memory and the batch on `device`. Their
            `index` is negative where an image could not be read.
        device: to run on.
        indices: positions of the images to use, loaded in this process; None means all images.
        split_over_processes: whether each process runs only its share of the batches.
        progress: called with the number of images done and their total, of this process.

    Returns:
        The positions of the images that could not be read (only where `data.on_error` is "skip"), of all processes.

    Raises:
        ImageError: an image cannot be read.
        WorkerError: a loader worker died or hangs.
    """
    batches = eval_keys(coco, config, indices)
    if split_over_processes:
        batches = batches[distributed.rank() :: distributed.world_size()]
    dataset = DetectionDataset(
        coco,
        max_size=config.data.max_size,
        resize=config.model.compat.resize,
        skip_unreadable=config.data.on_error == "skip",
    )
    workers = min(config.data.num_workers, len(batches)) if indices is None else 0
    loader = build_loader(
        dataset, batches, num_workers=workers, pin_memory=device.type == "cuda",
        worker_timeout=config.data.worker_timeout,
    )  # fmt: skip
    precision = resolve_precision(config.eval.precision, device)
    missing: list[int] = []
    done, total = 0, sum(map(len, batches))
    was_training = model.training
    model.eval()
    try:
        detector = Detector(model, config.postprocess_arguments, precision=precision, device=device)
        # Images are padded one by one: far too many shapes to compile anything for.
        with torch.compiler.set_stance("force_eager"):
            for loaded in loader:
                on_batch(detector, loaded, to_device(loaded, device))
                missing += unreadable_images(loaded)
                done += len(loaded.index)
                distributed.note(f"evaluating, after {done} of its {total} images")
                if progress is not None:
                    progress(done, total)
    finally:
        model.train(was_training)
    return [i for part in distributed.gather(missing) for i in part] if split_over_processes else missing


def eval_batch_size(config: Config) -> int:
    """Images per forward pass in evaluation."""
    micro_batch = config.train.micro_batch if config.train.micro_batch != "auto" else None
    return config.eval.batch_size or micro_batch or config.train.batch_size


def eval_keys(coco: CocoDataset, config: Config, indices: Sequence[int] | None = None) -> list[list[SampleKey]]:
    """The samples of an evaluation (only those of `indices`, if given) in batches of equal padded shape."""
    batches = eval_batches(
        coco.sizes,
        eval_batch_size(config),
        min_size=config.data.eval_size,
        max_size=config.data.max_size,
        pad=config.model.pad,
        resize=config.model.compat.resize,
    )
    if indices is None:
        return batches
    wanted = set(indices)
    chosen = [[key for key in batch if key.index in wanted] for batch in batches]
    return [batch for batch in chosen if batch]
