"""Analysis of the class loss: which share of it the hardest examples hold, as figures, tables, JSON and a summary."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from detector.atomic import make_folder, write_json
from detector.checkpoint import load_checkpoint
from detector.config import Config, config_differences
from detector.datasets.opening import open_split
from detector.distributed import pick_device
from detector.errors import DatasetError, FigureError
from detector.evaluation.score import Split, config_for_checkpoint, split_config
from detector.inference.predictor import model_of
from detector.losses import ClassLoss, build_loss
from detector.reports.figures import Curve, cumulative_loss, import_matplotlib, probabilities, reliability, save
from detector.reports.loss_examples import Examples, collect_examples
from detector.reports.loss_statistics import (
    GAMMAS,
    HARDEST,
    Calibration,
    CumulativeLoss,
    TableRow,
    calibration,
    cumulative_losses,
    group_rows,
    loss_table,
)
from detector.text import spreadsheet_cell


class LossConcentration(NamedTuple):
    """What a run logs about its class loss."""

    scalars: dict[str, float]
    """Shares of the loss that the hardest examples hold under the run's own gamma, and the calibration error."""
    histograms: dict[str, NDArray[np.float64]]
    """Probabilities of the ground truth of the positives and of the negatives, (n,) each."""
    figures: dict[str, Any]
    """Cumulative losses for several gammas, and the calibration. Empty without matplotlib."""
    text: list[str]
    """The table for several gammas, line by line."""


def loss_concentration(examples: Examples, loss: ClassLoss) -> LossConcentration:
    """The results of `write_analysis` for all classes and levels together, as a record to log."""
    gammas = sorted({*GAMMAS, loss.gamma})
    rows = group_rows(examples, gammas)
    positive, negative = (row for row in rows if row.gamma == loss.gamma)
    scalars = {"calibration_error": positive.calibration_error}
    if examples.positive.any():
        for row in (positive, negative):
            for share, of_loss in zip(HARDEST, row.hardest, strict=True):
                scalars[f"{row.side}_loss_of_hardest_{100 * share:g}_percent"] = of_loss
        scalars["positive_over_negative_loss"] = positive.loss / max(negative.loss, 1e-12)
    histograms = {f"{side}s": some.p_t() for side, some in examples.by_side().items() if len(some.x_t)}
    text = [*loss_notes(loss), *summary(rows, examples)]
    try:
        figures = {
            "cumulative_loss": _cumulative_figure(cumulative_losses(examples, gammas)),
            "calibration": _calibration_figure(calibration(examples)),
        }
        for figure in figures.values():
            figure.set_layout_engine("none")  # halves the time to draw it
    except FigureError as error:
        figures, text = {}, [*text, str(error)]
    return LossConcentration(scalars, histograms, figures, text)


def analyze_checkpoint(
    config: Config, checkpoint: Path, *, split: Split, gammas: Sequence[float], output_dir: Path
) -> list[str]:
    """Analyze a checkpoint on a config's data; write figures, loss.csv and loss.json.

    Returns:
        The lines of a summary.

    Raises:
        ConfigError, CheckpointError, DatasetError, FigureError: user errors.
    """
    import_matplotlib()  # fail before hours of work
    state = load_checkpoint(checkpoint)
    config = config_for_checkpoint(config, state, checkpoint)
    device = pick_device(config.train.device)
    make_folder(output_dir)
    dataset = open_split(
        config,
        split_config(config, split),
        categories=state.categories,
        problems_file=output_dir / f"problems_{split}.tsv",
    )
    model = model_of(state, device)
    if state.origin:  # imported weights: only the user knows how their anchors were assigned
        state.config = state.config.model_copy(update={"matching": config.matching})
    loss = build_loss(state.config, alpha=state.alpha).to(device)
    with Progress(console=Console(highlight=False)) as bar:
        task = bar.add_task(f"analyzing {len(dataset)} images", total=len(dataset))
        examples = collect_examples(
            model, loss, dataset, config, device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )  # fmt: skip
    if not examples.positive.any():
        raise DatasetError(f"{dataset.annotations}: no anchor is positive, so there is nothing to analyze")
    notes = [
        f"{key} is the checkpoint's {used}, not the config's {given}"
        for key, given, used in config_differences(config, state.config, ["loss", "matching"])
    ]
    return write_analysis(
        examples,
        loss.class_loss,
        names=state.categories.names,
        gammas=gammas,
        output_dir=output_dir,
        notes=[*notes, *loss_notes(loss.class_loss)],
    )


def loss_notes(loss: ClassLoss) -> list[str]:
    """A sentence if the training loss is not the sigmoid focal loss of every entry."""
    if loss.kind == "focal" and loss.activation == "sigmoid":
        return []
    return [
        f"the analyzed loss is not the training loss: training used {loss.kind} with {loss.activation}, the analysis "
        "uses the focal loss of each class's score over all anchors"
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
    """Write figures, loss.csv and loss.json.

    Args:
        examples: from `collect_examples`.
        loss: the training loss.
        names: of the classes.
        gammas: to analyze.
        output_dir: an existing folder.
        notes: lines to include in loss.json and the summary.

    Returns:
        The lines of a summary, the notes first.
    """
    rows = loss_table(examples, gammas=gammas, names=names)
    _write_csv(rows, output_dir / "loss.csv")
    scores = calibration(examples)
    sides = examples.by_side()
    histograms = {side: _histogram(some) for side, some in sides.items()}
    curves = cumulative_losses(examples, gammas)
    alpha, negative_weight = loss.balance(len(names))
    record = {
        "loss": {"cls": loss.kind, "activation": loss.activation, "gamma": loss.gamma},
        "alpha": dict(zip(names, alpha.tolist(), strict=True)),
        "negative_weight": negative_weight,
        "notes": list(notes),
        "analyzed": {side: {"entries": len(s.x_t), "of": round(s.weight.sum())} for side, s in sides.items()},
        "rows": [{**row._asdict(), "hardest": dict(zip(map(str, HARDEST), row.hardest, strict=True))} for row in rows],
        "p_t": {side: counts.tolist() for side, (_, counts) in histograms.items()},
        "curves": {side: {g: curve_to_json(c) for g, c in by_gamma.items()} for side, by_gamma in curves.items()},
        "reliability": {key: _json_numbers(values) for key, values in scores._asdict().items()},
        "expected_calibration_error": scores.expected_error,
    }
    write_json(record, output_dir / "loss.json")
    save(_cumulative_figure(curves), output_dir / "cumulative_loss.svg")
    save(probabilities(histograms["positive"], histograms["negative"]), output_dir / "probabilities.svg")
    save(_calibration_figure(scores), output_dir / "calibration.svg")
    return [*notes, *summary(rows, examples)]


def summary(rows: Sequence[TableRow], examples: Examples) -> list[str]:
    """Lines with the number of analyzed entries and the table for all examples."""
    num_positive, total = int(examples.positive.sum()), round(examples.weight[~examples.positive].sum())
    num_negative = len(examples.x_t) - num_positive
    negatives = f"all {total:,}" if num_negative == total else f"a sample of {num_negative:,} of the {total:,}"
    lines = [
        f"analyzed all {num_positive:,} positive entries (an anchor and a class) and {negatives} negative ones",
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


def _write_csv(rows: Sequence[TableRow], path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        hardest = (f"held by hardest {share:.1%}" for share in HARDEST)
        group = ["kind", "group", "gamma", "side"]
        writer.writerow([*group, "entries", "loss", *hardest, "positive : negative loss", "calibration error"])
        for row in rows:
            shares = (f"{share:.4f}" for share in row.hardest)
            ratio = "" if row.ratio is None else f"{row.ratio:.4g}"
            values = (row.kind, spreadsheet_cell(row.group), row.gamma, row.side, round(row.entries), f"{row.loss:.6g}")
            writer.writerow([*values, *shares, ratio, f"{row.calibration_error:.4f}"])


def _cumulative_figure(curves: dict[str, dict[str, CumulativeLoss]]) -> Any:
    sides = (curves["positive"], curves["negative"])
    return cumulative_loss(
        *({f"gamma {g}": _subsample_curve(*c, points=800) for g, c in side.items()} for side in sides)
    )


def _calibration_figure(scores: Calibration) -> Any:
    return reliability(scores.score.tolist(), scores.frequency.tolist(), expected_error=scores.expected_error)


def curve_to_json(curve: CumulativeLoss, points: int = 100) -> dict[str, list[float | None]]:
    """Convert a curve for JSON, with at most `points` points."""
    examples, loss = _subsample_curve(*curve, points=points)
    return {"examples": _json_numbers(examples), "loss": _json_numbers(loss)}


def _json_numbers(values: NDArray[np.float64]) -> list[float | None]:
    """NaN becomes None, because JSON has none."""
    return [None if math.isnan(value) else round(value, 7) for value in values.tolist()]


def _histogram(examples: Examples, bins: int = 50) -> Curve:
    """Left edges of bins of p_t, and entries in each."""
    counts, edges = np.histogram(examples.p_t(), bins, (0, 1), weights=examples.weight)
    return edges[:-1], counts


def _subsample_curve(x: NDArray[np.float64], y: NDArray[np.float64], *, points: int) -> Curve:
    """Reduce a rising curve to few points, dense at its end, where it changes most."""
    if len(x) <= points:
        return x, y
    wanted = 1 - np.geomspace(1, 1 / len(x), points)
    index = np.unique([*np.searchsorted(x, wanted).clip(max=len(x) - 1)[:-1], len(x) - 1])
    return x[index], y[index]
