"""Evaluations during training: validation AP and loss, the best checkpoint, images and loss concentration for
TensorBoard."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from detector import distributed
from detector.atomic import write_json
from detector.datasets.coco import CocoDataset
from detector.errors import DatasetError, ImageError, Interrupted, RunError
from detector.evaluation.coco_results import CocoResults
from detector.evaluation.evaluate import evaluate_model, highest_score
from detector.evaluation.validation_loss import ValidationLoss
from detector.inference.predictor import model_of
from detector.reports.draw import side_by_side
from detector.reports.loss_analysis import loss_concentration
from detector.reports.loss_examples import collect_examples
from detector.structures import Detections
from detector.training.checkpoints import holds_best, load_best
from detector.training.logger import duration
from detector.training.run import Run, finished_metrics


def validate(run: Run, epoch: int) -> None:
    """Evaluate on the validation set, log, and save best.pt if AP is the highest yet.

    Args:
        run: at the end of an epoch; it has a validation set.
        epoch: number of finished epochs.

    Raises:
        Interrupted: a signal arrived. (One of several processes continues to the end: the others wait for it.)
    """
    config, learner, state, val_set = run.config, run.learner, run.state, run.val_set
    assert val_set is not None
    show = run.log.progress("evaluating")

    def progress(done: int, total: int) -> None:
        if show is not None:
            show(done, total)
        if run.stop.signum is not None and distributed.world_size() == 1:
            raise Interrupted(run.stop.signum)

    started = time.monotonic()
    for model in {id(m): m for m in (learner.model, learner.evaluated_model)}.values():
        distributed.sync_buffers(model)
    losses = ValidationLoss(learner.loss, learner.device)
    watch = losses.add if config.eval.loss else None
    metrics, results = evaluate_model(
        learner.evaluated_model, val_set, config, device=learner.device, progress=progress, watch=watch
    )
    means = losses.means() if watch is not None else {}
    values = metrics.values
    # While AP is undefined (-1: no objects), the latest weights are the best.
    improved = values["AP"] > state.best_ap or state.best_ap < 0
    # Patience is for a model that stagnates, not for one that has not detected anything yet.
    state.evaluations_since_best = 0 if improved or state.best_ap <= 0 else state.evaluations_since_best + 1
    state.best_ap = max(values["AP"], state.best_ap)
    record = metrics.to_json()
    per_class = record.pop("per_class")
    run.log.evaluation({"step": state.step, "epoch": epoch, "split": "val", **means, **record}, per_class)
    loss_text = f"loss {means['loss']:.4f}, " if means else ""
    run.log.info(
        f"epoch {epoch}: val AP {values['AP']:.4f} AP50 {values['AP50']:.4f} AP75 {values['AP75']:.4f}"
        f"{' (best)' if improved else ''}, {loss_text}{len(results.scores)} detections, "
        f"{duration(time.monotonic() - started)}"
    )
    if not len(results.scores):
        highest = highest_score(learner.evaluated_model, val_set, config, device=learner.device)
        run.log.warn(
            f"no score above postprocess.score_thresh {config.postprocess.score_thresh} (the highest of some images is "
            f"{highest:.4f}): usual in the first epochs; if it lasts, check the losses, optim.lr and the anchors"
        )
    if distributed.rank() != 0:
        return
    if improved:
        run.write(lambda: write_json(metrics.to_json(), run.output_dir / "metrics.json"))
        run.save_best()
    every = config.train.images_every_epochs
    if every and epoch % every == 0:
        images = val_images(val_set, results, skip_unreadable=config.data.on_error == "skip")
        run.log.images("val: ground truth, detections", images, state.step)
    every = config.train.loss_every_epochs
    if every and epoch % every == 0:
        _log_loss_concentration(run, val_set)


def _log_loss_concentration(run: Run, val_set: CocoDataset) -> None:
    """Log which share of the class loss the hardest examples of a few validation images hold."""
    started = time.monotonic()
    indices = _spread(len(val_set), run.config.train.loss_images)
    try:
        examples = collect_examples(
            run.learner.evaluated_model, run.learner.loss, val_set, run.config, device=run.learner.device,
            indices=indices, max_negatives=100_000,
        )  # fmt: skip
    except DatasetError:  # exactly these few images are unreadable, which was reported
        return
    concentration = loss_concentration(examples, run.learner.loss.class_loss)
    concentration.scalars["seconds"] = time.monotonic() - started
    run.log.loss_concentration(concentration, run.state.step)


def val_images(
    coco: CocoDataset, results: CocoResults, *, skip_unreadable: bool = False, count: int = 6
) -> list[Image.Image]:
    """Draw ground truth next to detections for a few images spread over the set, always the same ones."""
    label_of = {category_id: k for k, category_id in enumerate(coco.categories.ids)}
    images = []
    for index in _spread(len(coco), count):
        try:
            image = coco.decode(index)
        except ImageError:
            if skip_unreadable:
                continue
            raise
        rows: NDArray[np.intp] = np.nonzero(results.image_ids == coco.image_ids[index])[0]
        xywh = torch.from_numpy(results.boxes[rows]).float()
        detections = Detections(
            torch.cat([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], dim=1),
            torch.from_numpy(results.scores[rows]).float(),
            torch.tensor([label_of[int(c)] for c in results.category_ids[rows]], dtype=torch.int64),
        )
        objects = coco.objects(index)
        images.append(
            side_by_side(
                image,
                detections,
                objects.boxes,
                objects.labels,
                coco.categories.names,
                ignore_boxes=objects.ignore_boxes,
            )
        )
    return images


def _spread(total: int, count: int) -> list[int]:
    """At most `count` indices spread evenly over `total`."""
    indices: list[int] = np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist()
    return indices


def _score_best_on(dataset: CocoDataset, run: Run) -> dict[str, Any]:
    device = run.learner.device
    model = model_of(load_best(run.output_dir, warn=run.log.warn), device)
    metrics, _ = evaluate_model(model, dataset, run.config, device=device, progress=run.log.progress("testing"))
    return metrics.to_json()


def score_best(run: Run) -> dict[str, Any]:
    """Score the best weights on the test set, if there is one, and complete metrics.json.

    Returns:
        The content of metrics.json.
    """
    distributed.barrier()  # best.pt is written by the first process
    if not holds_best(run.output_dir):
        run.log.warn(f"best.pt was removed from {run.output_dir}: the last weights are saved and evaluated as the best")
        run.save_best()
        distributed.barrier()
    metrics: dict[str, Any] = {}
    if run.val_set is not None:
        try:
            metrics = finished_metrics(run.output_dir)
        except RunError as error:  # damaged or removed during the run
            run.log.warn(f"{error}; evaluating it again")
            metrics = _score_best_on(run.val_set, run)
    if run.test_set is not None:
        metrics["test"] = _score_best_on(run.test_set, run)
    run.write(lambda: write_json(metrics, run.output_dir / "metrics.json"))
    return metrics
