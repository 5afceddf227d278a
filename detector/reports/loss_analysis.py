"""What the class loss is made of: which examples of a val set hold it, for any gamma (Lin et al. 2017, section 5.1)."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from detector.atomic import make_folder, write_json
from detector.checkpoint import load_checkpoint
from detector.config import Config, flatten
from detector.config_yaml import with_model_of
from detector.datasets.coco import CocoDataset
from detector.datasets.loader import DetectionDataset, build_loader, to_device
from detector.datasets.opening import open_split
from detector.distributed import pick_device
from detector.errors import DatasetError, FigureError
from detector.evaluation.evaluate import eval_keys
from detector.evaluation.score import require_model_of, split_of
from detector.inference.postprocess import one_against_all
from detector.inference.predictor import model_of
from detector.losses import ClassLoss, RetinaNetLoss, build_loss
from detector.losses.retinanet import labels_of
from detector.models import RetinaNet
from detector.precision import autocast, resolve_precision
from detector.reports.figures import Curve, cumulative_loss, probabilities, pyplot, reliability, save

HARDEST = (0.001, 0.01, 0.1, 0.2)
"""Shares of the examples whose share of the loss is told."""
GAMMAS = (0.0, 0.5, 1.0, 2.0, 5.0)
"""The paper's figure 1 has these; its figure 4 all but the last."""


class Examples(NamedTuple):
    """Entries of the class logits: every positive one, and all negatives or a sample of them. (n,) each."""

    x_t: NDArray[np.float32]
    """The logit of being right: p_t is its sigmoid."""
    positive: NDArray[np.bool_]
    label: NDArray[np.int64]
    """The class that the entry is about."""
    level: NDArray[np.int64]
    """0 for P3."""
    alpha: NDArray[np.float64]
    """What the run's loss multiplies its loss by."""
    weight: NDArray[np.float64]
    """How many entries it stands for."""

    def where(self, chosen: NDArray[np.bool_] | slice) -> Examples:
        """Some of them."""
        return Examples._make(field[chosen] for field in self)


def joined(parts: Sequence[Examples]) -> Examples:
    """One after the other."""
    return Examples(*map(np.concatenate, zip(*parts, strict=True)))


def thinned_out(examples: Examples, share: float) -> Examples:
    """Of one image's examples in random order: such a share of the entries they stand for, standing for all of them."""
    count = max(1, int(share * examples.weight.sum() + 1e-6))
    if count >= len(examples.x_t):
        return examples
    kept = examples.where(slice(count))
    return kept._replace(weight=kept.weight * (len(examples.x_t) / count))


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
        loss: how anchors are matched, and the weights of positives and negatives.
        coco: the dataset.
        config: sizes and precision.
        device: to run on.
        indices: of the images to look at; None: all.
        max_negatives: all negatives where there are no more; otherwise so many, drawn without replacement, the same share
            of every image's, always the same ones.
        progress: called with images done and in all.

    Raises:
        DatasetError: none of the images can be read.
    """
    batches = eval_keys(coco, config, indices)
    total = sum(map(len, batches))
    dataset = DetectionDataset(
        coco, max_size=config.data.max_size, resize=config.model.resize, skip_unreadable=config.data.on_error == "skip"
    )
    precision = resolve_precision(config.eval.precision, device)
    was_training = model.training
    model.eval()
    positives: list[Examples] = []
    negatives: list[Examples] = []
    done = held = entries = 0
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
                if index < 0:
                    continue
                image = ImageEntries(x, label, levels, *loss.class_loss.balance(x.shape[1]))
                entries += image.num_negatives
                positives.append(image.positives())
                negatives.append(image.negatives(min(1.0, max_negatives / max(1, entries)), seed=index))
                held += len(negatives[-1].x_t)
                if held > 2 * max_negatives:
                    negatives = [thinned_out(part, max_negatives / entries) for part in negatives]
                    held = sum(len(part.x_t) for part in negatives)
            done += len(loaded.index)
            if progress is not None:
                progress(done, total)
    model.train(was_training)
    if not positives:
        raise DatasetError(f"{coco.annotations}: none of its {total} images to look at can be read")
    share = min(1.0, max_negatives / max(1, entries))
    return joined([*positives, *(thinned_out(part, share) for part in negatives)])


class ImageEntries(NamedTuple):
    """What a network says of one image, and the truth."""

    x: torch.Tensor
    """(A, K) logits."""
    label: torch.Tensor
    """(A,) as from `labels_of`."""
    level: torch.Tensor
    """(A,)"""
    alpha: torch.Tensor
    """(K,) weights of positives."""
    negative_weight: float

    @property
    def num_negatives(self) -> int:
        """Entries that are to be small."""
        return int((self.label >= -1).sum()) * self.x.shape[1] - int((self.label >= 0).sum())

    def positives(self) -> Examples:
        """All of them."""
        anchor = torch.nonzero(self.label >= 0).squeeze(1)
        return self._at(anchor, self.label[anchor], 1.0)

    def negatives(self, share: float, *, seed: int) -> Examples:
        """All, or about such a share drawn without replacement; in random order."""
        rows = torch.nonzero(self.label >= -1).squeeze(1)
        entries = len(rows) * self.x.shape[1]
        count = min(entries, max(1, math.ceil(share * entries)))
        place = torch.from_numpy(np.random.default_rng(seed).choice(max(1, entries), count, replace=False))
        anchor, k = rows[place // self.x.shape[1]], place % self.x.shape[1]
        negative = self.label[anchor] != k
        return self._at(anchor[negative], k[negative], self.num_negatives / max(1, int(negative.sum())))

    def _at(self, anchor: torch.Tensor, k: torch.Tensor, weight: float) -> Examples:
        positive = self.label[anchor] == k
        x = self.x[anchor, k]
        alpha = torch.where(positive, self.alpha[k], self.negative_weight)
        return Examples(
            torch.where(positive, x, -x).numpy(), positive.numpy(), k.numpy(), self.level[anchor].numpy(), alpha.numpy(),
            np.full(len(k), weight),
        )  # fmt: skip


# ---- what they show ---------------------------------------------------------------------------------------------


def focal_losses(x_t: NDArray[np.float32], gamma: float) -> NDArray[np.float64]:
    """(1 - p_t)^gamma times -log(p_t), without alpha."""
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
    """One line of the table: one side of some examples under one gamma."""

    kind: Literal["all", "class", "level"]
    """Of the group; a class may well be named "all" or "P3"."""
    group: str
    """The name of the class, or P3 for the level."""
    gamma: float
    side: str
    """positive or negative."""
    entries: float
    loss: float
    """Their sum, with alpha."""
    hardest: tuple[float, ...]
    """Share of the loss held by the hardest, for each of HARDEST."""
    ratio: float | None
    """Loss of the group's positives over that of its negatives; None if that is 0."""
    calibration_error: float
    """Of the group, both sides together."""


def both_sides(examples: Examples) -> dict[str, Examples]:
    """Positives and negatives."""
    return {"positive": examples.where(examples.positive), "negative": examples.where(~examples.positive)}


def loss_curves(examples: Examples, gammas: Sequence[float]) -> dict[str, dict[str, Cumulated]]:
    """Figure 4: of each side, under each gamma."""
    return {
        side: {f"{gamma:g}": cumulate(focal_losses(some.x_t, gamma) * some.alpha, some.weight) for gamma in gammas}
        for side, some in both_sides(examples).items()
    }


def loss_table(examples: Examples, *, gammas: Sequence[float], names: Sequence[str]) -> list[Row]:
    """The table for all examples, for each class and for each level that has any positive."""
    rows = rows_of(examples, gammas)
    for k in np.unique(examples.label[examples.positive]):
        rows += rows_of(examples.where(examples.label == k), gammas, kind="class", group=names[k])
    for level in np.unique(examples.level[examples.positive]):
        rows += rows_of(examples.where(examples.level == level), gammas, kind="level", group=f"P{level + 3}")
    return rows


def rows_of(
    examples: Examples, gammas: Sequence[float], *, kind: Literal["all", "class", "level"] = "all", group: str = "all"
) -> list[Row]:
    """The lines of the table about one group, positives first under each gamma."""
    sides = both_sides(examples)
    error = calibration(examples).expected_error
    rows = []
    for gamma in gammas:
        losses = {side: focal_losses(some.x_t, gamma) * some.alpha for side, some in sides.items()}
        total = {side: float(losses[side] @ some.weight) for side, some in sides.items()}
        ratio = total["positive"] / total["negative"] if total["negative"] else None
        for side, some in sides.items():
            cumulated = cumulate(losses[side], some.weight)
            held = tuple(cumulated.held_by_hardest(share) for share in HARDEST)
            rows.append(Row(kind, group, gamma, side, float(some.weight.sum()), total[side], held, ratio, error))
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


class LossHolders(NamedTuple):
    """What is shown of the loss while a run trains."""

    values: dict[str, float]
    """Numbers to watch, under the run's own gamma."""
    p_t: dict[str, NDArray[np.float64]]
    """Probabilities of the truth, of positives and of negatives, (n,) each."""
    figures: dict[str, Any]
    """The cumulative distribution for several gammas, and the calibration. Empty where matplotlib is not installed."""
    text: list[str]
    """The table for several gammas."""


def loss_holders(examples: Examples, loss: ClassLoss) -> LossHolders:
    """As `write_analysis`, for all classes and levels together."""
    gammas = sorted({*GAMMAS, loss.gamma})
    rows = rows_of(examples, gammas)
    positive, negative = (row for row in rows if row.gamma == loss.gamma)
    values = {"calibration_error": positive.calibration_error}
    if examples.positive.any():
        for row in (positive, negative):
            for share, held in zip(HARDEST, row.hardest, strict=True):
                values[f"{row.side}_loss_of_hardest_{100 * share:g}_percent"] = held
        values["positive_over_negative_loss"] = positive.loss / max(negative.loss, 1e-12)
    p_t = 1 / (1 + np.exp(-examples.x_t.astype(np.float64)))
    sides = {"positives": examples.positive, "negatives": ~examples.positive}
    text = [*not_as_trained(loss), *summary(rows, examples)]
    try:
        figures = {
            "cumulative_loss": cumulative_figure(loss_curves(examples, gammas)),
            "calibration": calibration_figure(calibration(examples)),
        }
        for figure in figures.values():
            figure.set_layout_engine("none")  # half of the time that drawing takes
    except FigureError as error:
        figures, text = {}, [*text, str(error)]
    return LossHolders(values, {side: p_t[mask] for side, mask in sides.items() if mask.any()}, figures, text)


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
    if state.origin:  # another program's: how its anchors were matched is for the user to say
        state.config = state.config.model_copy(update={"matching": config.matching})
    loss = build_loss(state.config, alpha=state.alpha).to(device)
    with Progress(console=Console(highlight=False)) as bar:
        task = bar.add_task(f"looking at {len(dataset)} images", total=len(dataset))
        examples = collect_examples(
            model, loss, dataset, config, device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if not examples.positive.any():
        raise DatasetError(f"{dataset.annotations}: no anchor is positive, so there is nothing to analyze")
    notes = differences(config, state.config) + not_as_trained(loss.class_loss)
    return write_analysis(
        examples, loss.class_loss, names=state.categories.names, gammas=gammas, output_dir=output_dir, notes=notes
    )


def differences(config: Config, trained: Config) -> list[str]:
    """A sentence for each setting of the loss that the config has otherwise than the checkpoint."""
    ours, theirs = (flatten(c.model_dump(include={"loss", "matching"})) for c in (config, trained))
    return [
        f"{key} is the checkpoint's {theirs[key]}, not the config's {ours[key]}"
        for key in ours
        if ours[key] != theirs[key]
    ]


def not_as_trained(loss: ClassLoss) -> list[str]:
    """A sentence if the loss is another than the sigmoid focal loss of every entry."""
    if loss.kind == "focal" and loss.activation == "sigmoid":
        return []
    return [
        f"what is analyzed is not what was trained: that was {loss.kind} on a {loss.activation}, this is the focal loss of "
        "each class's sigmoid against all else, over all anchors"
    ]


def write_analysis(
    examples: Examples,
    loss: ClassLoss,
    *,
    names: Sequence[str],
    gammas: Sequence[float],
    output_dir: Path,
    notes: Sequence[str] = (),
) -> list[str]:
    """Figures, loss.csv and loss.json of a collection; returns a summary that begins with the notes."""
    rows = loss_table(examples, gammas=gammas, names=names)
    with (output_dir / "loss.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        hardest = (f"held by hardest {share:.1%}" for share in HARDEST)
        place = ["kind", "group", "gamma", "side"]
        writer.writerow([*place, "entries", "loss", *hardest, "positive : negative loss", "calibration error"])
        for row in rows:
            numbers = (*(f"{share:.4f}" for share in row.hardest), "" if row.ratio is None else f"{row.ratio:.4g}")
            found = (row.kind, row.group, row.gamma, row.side, round(row.entries), f"{row.loss:.6g}")
            writer.writerow([*found, *numbers, f"{row.calibration_error:.4f}"])
    scores = calibration(examples)
    sides = both_sides(examples)
    histograms = {side: histogram(some) for side, some in sides.items()}
    curves = loss_curves(examples, gammas)
    alpha, negative_weight = loss.balance(len(names))
    record = {
        "loss": {"cls": loss.kind, "activation": loss.activation, "gamma": loss.gamma},
        "alpha": dict(zip(names, alpha.tolist(), strict=True)),
        "negative_weight": negative_weight,
        "notes": list(notes),
        "looked_at": {side: {"entries": len(s.x_t), "of": round(s.weight.sum())} for side, s in sides.items()},
        "rows": [{**row._asdict(), "hardest": dict(zip(map(str, HARDEST), row.hardest, strict=True))} for row in rows],
        "p_t": {side: counts.tolist() for side, (_, counts) in histograms.items()},
        "curves": {side: {g: as_points(c, 100) for g, c in by.items()} for side, by in curves.items()},
        "reliability": {key: numbers_of(values) for key, values in scores._asdict().items()},
        "expected_calibration_error": scores.expected_error,
    }
    write_json(record, output_dir / "loss.json")
    save(cumulative_figure(curves), output_dir / "cumulative_loss.svg")
    save(probabilities(histograms["positive"], histograms["negative"]), output_dir / "probabilities.svg")
    save(calibration_figure(scores), output_dir / "calibration.svg")
    return [*notes, *summary(rows, examples)]


def cumulative_figure(curves: dict[str, dict[str, Cumulated]]) -> Any:
    """`loss_curves`, drawn."""
    lines = [{f"gamma {g}": thinned(*c) for g, c in curves[side].items()} for side in ("positive", "negative")]
    return cumulative_loss(*lines)


def calibration_figure(scores: Calibration) -> Any:
    """`calibration`, drawn."""
    return reliability(scores.score.tolist(), scores.frequency.tolist(), expected_error=scores.expected_error)


def as_points(cumulated: Cumulated, points: int) -> dict[str, list[float | None]]:
    """A curve for JSON."""
    examples, loss = thinned(*cumulated, points=points)
    return {"examples": numbers_of(examples), "loss": numbers_of(loss)}


def numbers_of(values: NDArray[np.float64]) -> list[float | None]:
    """For JSON, which has no NaN."""
    return [None if math.isnan(value) else round(value, 7) for value in values.tolist()]


def summary(rows: Sequence[Row], examples: Examples) -> list[str]:
    """How much was looked at, and the table for all examples, to be read."""
    num_positive, total = int(examples.positive.sum()), round(examples.weight[~examples.positive].sum())
    num_negative = len(examples.x_t) - num_positive
    negatives = f"all {total:,}" if num_negative == total else f"a sample of {num_negative:,} of the {total:,}"
    lines = [
        f"looked at all {num_positive:,} positive entries (an anchor and a class) and {negatives} negative ones",
        "gamma  positives: loss held by hardest 10 %  20 %   negatives: 0.1 %   1 %   positive : negative loss",
    ]
    overall = [row for row in rows if row.kind == "all"]
    for positive, negative in zip(overall[::2], overall[1::2], strict=True):
        ratio = math.inf if positive.ratio is None else positive.ratio
        lines.append(
            f"{positive.gamma:5g}  {positive.hardest[2]:31.0%}  {positive.hardest[3]:5.0%}  "
            f"{negative.hardest[0]:18.0%}  {negative.hardest[1]:5.0%}  {ratio:26.3g}"
        )
    lines.append(f"expected calibration error of scores above 0.05: {rows[0].calibration_error:.3f}")
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
    wanted = 1 - np.geomspace(1, 1 / len(x), points)
    at = np.unique([*np.searchsorted(x, wanted).clip(max=len(x) - 1)[:-1], len(x) - 1])
    return x[at], y[at]
