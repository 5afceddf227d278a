"""What the class loss is made of: which examples of a val set hold it, for any gamma (Lin et al. 2017, section 5.1)."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from detector.config import Config, LossConfig, with_model_of
from detector.datasets.coco import CocoDataset, DatasetError
from detector.datasets.loader import DetectionDataset, build_loader, to_device
from detector.engine.checkpoint import load_checkpoint, make_folder, write_json
from detector.engine.distributed import pick_device
from detector.engine.evaluate import eval_keys
from detector.engine.optim import autocast, resolve_precision
from detector.engine.predict import model_of
from detector.engine.preflight import open_split
from detector.engine.score import require_model_of, split_of
from detector.losses import RetinaNetLoss, build_loss
from detector.losses.retinanet import labels_of
from detector.models import RetinaNet
from detector.postprocess import one_against_all
from detector.reports.figures import Curve, cumulative_loss, probabilities, pyplot, reliability, save

HARDEST = (0.001, 0.01, 0.1, 0.2)
"""Shares of the examples whose share of the loss is told."""


class Examples(NamedTuple):
    """Entries of the class logits: every positive one, and a sample of the negatives. (n,) each."""

    x_t: NDArray[np.float32]
    """The logit of being right: p_t is its sigmoid."""
    positive: NDArray[np.bool_]
    label: NDArray[np.int64]
    """The class that the entry is about."""
    level: NDArray[np.int64]
    """0 for P3."""
    weight: NDArray[np.float64]
    """How many entries it stands for."""

    def where(self, mask: NDArray[np.bool_]) -> Examples:
        """Some of them."""
        return Examples(self.x_t[mask], self.positive[mask], self.label[mask], self.level[mask], self.weight[mask])


def joined(parts: Sequence[Examples]) -> Examples:
    """One after the other."""
    return Examples(
        np.concatenate([p.x_t for p in parts]),
        np.concatenate([p.positive for p in parts]),
        np.concatenate([p.label for p in parts]),
        np.concatenate([p.level for p in parts]),
        np.concatenate([p.weight for p in parts]),
    )


def collect_examples(
    model: RetinaNet,
    loss: RetinaNetLoss,
    coco: CocoDataset,
    config: Config,
    *,
    device: torch.device,
    indices: Sequence[int] | None = None,
    max_negatives: int = 2_000_000,
    progress: Callable[[int, int], None] | None = None,
) -> Examples:
    """Look at a dataset as evaluation does, and match its anchors as training does.

    Args:
        model: on `device`; its mode is restored afterwards.
        loss: how anchors are matched.
        coco: the dataset.
        config: sizes and precision.
        device: to run on.
        indices: of the images to look at; None: all.
        max_negatives: sampled evenly over images and entries, always the same ones.
        progress: called with images done and in all.
    """
    batches = eval_keys(coco, config, indices)
    total = sum(map(len, batches))
    quota = max(1, max_negatives // max(1, total))
    dataset = DetectionDataset(
        coco, max_size=config.data.max_size, resize=config.model.resize, skip_unreadable=config.data.on_error == "skip"
    )
    precision = resolve_precision(config.eval.precision, device)
    was_training = model.training
    model.eval()
    parts: list[Examples] = []
    done = 0
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        workers = 0 if indices is not None else min(config.data.num_workers, len(batches))
        for loaded in build_loader(dataset, batches, num_workers=workers):
            batch = to_device(loaded, device)
            with autocast(precision, device):
                outputs = model(batch.images, batch.image_sizes)
            logits = outputs.all_cls_logits().float()
            if outputs.activation == "softmax":
                logits = one_against_all(logits)
            labels = labels_of(batch.targets, loss.match(outputs.anchors, batch.targets)).cpu()
            sizes = [level.shape[1] for level in outputs.cls_logits]
            levels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
            for index, x, label in zip(loaded.index.tolist(), logits.cpu(), labels, strict=True):
                if index >= 0:
                    parts.append(_examples_of(x, label, levels, quota, index))
            done += len(loaded.index)
            if progress is not None:
                progress(done, total)
    model.train(was_training)
    return joined(parts)


def _examples_of(x: torch.Tensor, label: torch.Tensor, levels: torch.Tensor, quota: int, seed: int) -> Examples:
    """Of one image: (A, K) logits, (A,) labels, (A,) levels."""
    num_classes = x.shape[1]
    anchor = torch.nonzero(label >= 0).squeeze(1)
    positive = _entries(x, label, levels, anchor, label[anchor], np.ones(len(anchor)))
    random = torch.Generator().manual_seed(seed)
    counted = int((label >= -1).sum()) * num_classes - len(anchor)
    place = torch.randint(0, x.numel(), (min(4 * quota, 2 * x.numel()),), generator=random)
    rows, classes = place // num_classes, place % num_classes
    valid = torch.nonzero((label[rows] >= -1) & (label[rows] != classes)).squeeze(1)[:quota]
    weight = np.full(len(valid), counted / max(1, len(valid)))
    negative = _entries(x, label, levels, rows[valid], classes[valid], weight)
    return joined([positive, negative])


def _entries(
    x: torch.Tensor,
    label: torch.Tensor,
    levels: torch.Tensor,
    rows: torch.Tensor,
    classes: torch.Tensor,
    weight: NDArray[np.float64],
) -> Examples:
    is_positive = label[rows] == classes
    logit = x[rows, classes]
    x_t = torch.where(is_positive, logit, -logit)
    return Examples(x_t.numpy(), is_positive.numpy(), classes.numpy(), levels[rows].numpy(), weight)


# ---- what they show ---------------------------------------------------------------------------------------------


def focal_losses(x_t: NDArray[np.float32], gamma: float) -> NDArray[np.float64]:
    """(1 - p_t)^gamma times -log(p_t), without alpha, which is the same for all of a side."""
    x = x_t.astype(np.float64)
    log_wrong = -np.logaddexp(0, x)  # log(1 - p_t)
    losses: NDArray[np.float64] = np.exp(gamma * log_wrong) * np.logaddexp(0, -x)
    return losses


class Cumulated(NamedTuple):
    """The share of the loss held by the easiest examples up to each (the paper's figure 4). (n,) each, ascending."""

    examples: NDArray[np.float64]
    """Share of the examples."""
    loss: NDArray[np.float64]
    """Share of the loss."""

    def held_by_hardest(self, share: float) -> float:
        """Share of the loss that the hardest such share of the examples holds."""
        if not len(self.loss):
            return 0.0
        return float(1 - np.interp(1 - share, np.r_[0.0, self.examples], np.r_[0.0, self.loss]))


def cumulate(losses: NDArray[np.float64], weight: NDArray[np.float64]) -> Cumulated:
    """From the easiest example to the hardest; losses (n,) and how many examples each stands for (n,)."""
    order = np.argsort(losses)
    examples, loss = np.cumsum(weight[order]), np.cumsum((losses * weight)[order])
    if not len(order) or loss[-1] <= 0:
        return Cumulated(np.zeros(0), np.zeros(0))
    return Cumulated(examples / examples[-1], loss / loss[-1])


class Row(NamedTuple):
    """One line of the table: some examples under one gamma."""

    group: str
    """all, a class, or a level."""
    gamma: float
    side: str
    """positive or negative."""
    entries: float
    loss: float
    """Their sum, with alpha."""
    hardest: tuple[float, ...]
    """Share of the loss held by the hardest, for each of HARDEST."""


def loss_table(examples: Examples, *, gammas: Sequence[float], alpha: float | None, names: Sequence[str]) -> list[Row]:
    """The table for all examples, for each class and for each level that has any positive."""
    groups = {"all": np.ones(len(examples.x_t), bool)}
    for k in np.unique(examples.label[examples.positive]):
        groups[names[k]] = examples.label == k
    for level in np.unique(examples.level[examples.positive]):
        groups[f"P{level + 3}"] = examples.level == level
    weights = {"positive": 1.0 if alpha is None else alpha, "negative": 1.0 if alpha is None else 1 - alpha}
    rows = []
    for gamma in gammas:
        losses = focal_losses(examples.x_t, gamma)
        for group, mask in groups.items():
            for side, alpha_t in weights.items():
                chosen = mask & (examples.positive == (side == "positive"))
                cumulated = cumulate(losses[chosen], examples.weight[chosen])
                held = tuple(cumulated.held_by_hardest(share) for share in HARDEST)
                total = alpha_t * float((losses * examples.weight)[chosen].sum())
                rows.append(Row(group, gamma, side, float(examples.weight[chosen].sum()), total, held))
    return rows


class Calibration(NamedTuple):
    """Scores against how often they are right, by bins of score. (bins,) each."""

    score: NDArray[np.float64]
    """Mean score; NaN where a bin is empty."""
    frequency: NDArray[np.float64]
    """Share of positives."""
    entries: NDArray[np.float64]

    @property
    def expected_error(self) -> float:
        """Mean difference of the two, by count (Guo et al. 2017, equation 3)."""
        filled = self.entries > 0
        if not filled.any():
            return 0.0
        gap = np.abs(self.score - self.frequency)[filled]
        return float((gap * self.entries[filled]).sum() / self.entries.sum())


def calibration(examples: Examples, *, bins: int = 15, above: float = 0.05) -> Calibration:
    """Of the entries that score at least `above`: the others, nearly all, are background and would drown the rest."""
    x = np.where(examples.positive, examples.x_t, -examples.x_t).astype(np.float64)
    score = 1 / (1 + np.exp(-x))
    kept = score >= above
    place = np.minimum(((score[kept] - above) / (1 - above) * bins).astype(int), bins - 1)
    weight, positive = examples.weight[kept], examples.positive[kept]
    count = np.bincount(place, weight, bins).astype(np.float64)
    with np.errstate(invalid="ignore"):
        return Calibration(
            np.bincount(place, weight * score[kept], bins) / count,
            np.bincount(place, weight * positive, bins) / count,
            count,
        )


def loss_holders(
    examples: Examples, *, gamma: float, alpha: float | None
) -> tuple[dict[str, float], dict[str, NDArray[np.float64]]]:
    """A few numbers to watch, and the probabilities of the truth of positives and negatives."""
    everything = np.ones(len(examples.x_t), np.int64)
    all_alike = examples._replace(label=0 * everything)
    rows = {
        row.side: row for row in loss_table(all_alike, gammas=[gamma], alpha=alpha, names=["all"]) if row.group == "all"
    }
    values = {"calibration_error": calibration(examples).expected_error}
    if examples.positive.any():
        positive, negative = rows["positive"], rows["negative"]
        values["positive_loss_of_hardest_20_percent"] = positive.hardest[3]
        values["negative_loss_of_hardest_1_percent"] = negative.hardest[1]
        values["positive_over_negative_loss"] = positive.loss / max(negative.loss, 1e-12)
    p_t = 1 / (1 + np.exp(-examples.x_t.astype(np.float64)))
    sides = {"positives": examples.positive, "negatives": ~examples.positive}
    return values, {side: p_t[mask] for side, mask in sides.items() if mask.any()}


# ---- written down -----------------------------------------------------------------------------------------------


def analyze_checkpoint(
    config: Config, checkpoint: Path, *, split: Literal["val", "test"], gammas: Sequence[float], output_dir: Path
) -> list[str]:
    """Analyze a checkpoint on a config's data; writes figures, loss.csv and loss.json, returns a summary.

    Raises:
        ConfigError, CheckpointError, DatasetError, FigureError: the user's to mend.
    """
    pyplot()  # before hours of work
    state = load_checkpoint(checkpoint)
    config = with_model_of(config, state.config)
    require_model_of(config, state.config, checkpoint)
    device = pick_device(config.train.device)
    make_folder(output_dir)
    dataset = open_split(
        config, split_of(config, split), categories=state.categories, problems_file=output_dir / f"problems_{split}.tsv"
    )
    model = model_of(state, device)
    loss = build_loss(config.model_copy(update={"loss": LossConfig()}))  # only to match
    with Progress(console=Console(highlight=False)) as bar:
        task = bar.add_task(f"looking at {len(dataset)} images", total=len(dataset))
        examples = collect_examples(
            model, loss, dataset, config, device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if not examples.positive.any():
        raise DatasetError(f"{dataset.annotations}: no anchor is positive, so there is nothing to analyze")
    return write_analysis(examples, config, names=state.categories.names, gammas=gammas, output_dir=output_dir)


def write_analysis(
    examples: Examples, config: Config, *, names: Sequence[str], gammas: Sequence[float], output_dir: Path
) -> list[str]:
    """Figures, loss.csv and loss.json of a collection; returns a summary."""
    alpha = config.loss.alpha if isinstance(config.loss.alpha, float | int) else None
    rows = loss_table(examples, gammas=gammas, alpha=alpha, names=names)
    with (output_dir / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["group", "gamma", "side", "entries", "loss", *(f"held by hardest {s:.1%}" for s in HARDEST)])
        for row in rows:
            writer.writerow(
                [
                    row.group,
                    row.gamma,
                    row.side,
                    round(row.entries),
                    f"{row.loss:.6g}",
                    *(f"{h:.4f}" for h in row.hardest),
                ]
            )
    scores = calibration(examples)
    histograms = {
        side: histogram(examples.where(examples.positive == (side == "positive"))) for side in ("positive", "negative")
    }
    record = {
        "alpha": alpha,
        "rows": [{**row._asdict(), "hardest": dict(zip(map(str, HARDEST), row.hardest, strict=True))} for row in rows],
        "p_t": {side: counts.tolist() for side, (_, counts) in histograms.items()},
        "expected_calibration_error": scores.expected_error,
    }
    write_json(record, output_dir / "loss.json")
    curves: dict[str, dict[str, Curve]] = {"positive": {}, "negative": {}}
    for gamma in gammas:
        losses = focal_losses(examples.x_t, gamma)
        for side, lines in curves.items():
            chosen = examples.positive == (side == "positive")
            cumulated = cumulate(losses[chosen], examples.weight[chosen])
            lines[f"gamma {gamma:g}"] = thinned(cumulated.examples, cumulated.loss)
    save(cumulative_loss(curves["positive"], curves["negative"]), output_dir / "cumulative_loss.svg")
    save(probabilities(histograms["positive"], histograms["negative"]), output_dir / "probabilities.svg")
    figure = reliability(scores.score.tolist(), scores.frequency.tolist(), expected_error=scores.expected_error)
    save(figure, output_dir / "calibration.svg")
    return summary(rows, scores)


def summary(rows: Sequence[Row], scores: Calibration) -> list[str]:
    """The table for all examples, to be read."""
    lines = ["gamma  positives: loss held by hardest 10 %  20 %   negatives: 0.1 %   1 %   positive : negative loss"]
    by = {(row.gamma, row.side): row for row in rows if row.group == "all"}
    for gamma in dict.fromkeys(row.gamma for row in rows):
        positive, negative = by[gamma, "positive"], by[gamma, "negative"]
        ratio = positive.loss / negative.loss if negative.loss else math.inf
        lines.append(
            f"{gamma:5g}  {positive.hardest[2]:31.0%}  {positive.hardest[3]:5.0%}  {negative.hardest[0]:18.0%}  "
            f"{negative.hardest[1]:5.0%}  {ratio:26.3g}"
        )
    lines.append(f"expected calibration error of scores above 0.05: {scores.expected_error:.3f}")
    return lines


def histogram(examples: Examples, bins: int = 50) -> Curve:
    """Left edges of bins of p_t, and entries in each."""
    p_t = 1 / (1 + np.exp(-examples.x_t.astype(np.float64)))
    counts, edges = np.histogram(p_t, bins, (0, 1), weights=examples.weight)
    return edges[:-1], counts


def thinned(x: NDArray[np.float64], y: NDArray[np.float64], points: int = 800) -> Curve:
    """A rising curve with few points, dense at its end, where everything happens."""
    if len(x) <= points:
        return x, y
    wanted = 1 - np.geomspace(1, 1e-6, points)
    at = np.unique(np.searchsorted(x, wanted).clip(max=len(x) - 1))
    return np.r_[x[at], x[-1]], np.r_[y[at], y[-1]]
