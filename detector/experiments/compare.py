"""Finished runs side by side: what they score, how far that can be trusted, and whether a difference is more than noise.

Two things move an AP that are not the recipe: the seed (and fold) of a training, and which pictures happen to be in the
val set. The first shows in the spread over runs, the second in a bootstrap over images. Recipes are compared in pairs:
the same seeds and folds, the same resampled images.
"""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detector.checkpoint import load_checkpoint
from detector.config_yaml import load_config
from detector.datasets.coco import read_coco
from detector.errors import RunError
from detector.evaluation.coco_metrics import load_results
from detector.evaluation.score import score_checkpoint, split_of
from detector.experiments.bootstrap import draw, match, resampled_ap
from detector.experiments.statistics import CONFIDENCE, by_repetition, standard_error, student_quantile
from detector.reports.figures import pyplot, save

REPLICATES = 500

Replicates = NDArray[np.float64]
"""(R,) AP on each of R resamplings of the val images; the same resamplings for all runs with the same val set."""


@dataclass
class Arm:
    """The runs of one recipe. A run is known by its unit, as `seed0` or `seed0_fold1`, which pairs it with others'."""

    name: str
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)
    """By unit: what metrics.json holds."""
    replicates: dict[str, Replicates] = field(default_factory=dict)
    """By unit, where there are detections to resample."""
    truth: dict[str, str] = field(default_factory=dict)
    """By unit: fingerprint of the val set."""
    why_out: str = ""
    """Why it takes no part in the comparison: failed, pruned. It is shown all the same."""

    def values(self, metric: str = "AP") -> dict[str, float]:
        """One number by unit: of `metrics.json`, or the AP of a class. Undefined ones are left out."""
        found = {unit: _value(metrics, metric) for unit, metrics in self.metrics.items()}
        return {unit: value for unit, value in found.items() if value >= 0}

    @property
    def mean(self) -> float:
        """AP over all runs; nan without any."""
        values = self.values().values()
        return statistics.fmean(values) if values else math.nan


def _value(metrics: Mapping[str, Any], metric: str) -> float:
    if metric in metrics:
        return float(metrics[metric])
    return next((float(row["AP"]) for row in metrics["per_class"] if row["name"] == metric), -1.0)


def image_interval(arm: Arm) -> tuple[float, float] | None:
    """Bootstrap interval of an arm's AP over images, without the bootstrap's own bias; None without detections."""
    values = arm.values()
    if not values or not values.keys() <= arm.replicates.keys():
        return None
    means = np.nanmean([arm.replicates[unit] for unit in values], axis=0)
    shift = float(arm.mean - np.nanmean(means))
    low, high = np.nanquantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low) + shift, float(high) + shift


class Difference(NamedTuple):
    """AP of one arm minus AP of another, over the runs that both have."""

    mean: float
    low: float
    high: float
    repetitions: int
    over_images: bool
    """Whether the interval allows for other images in the val set, too."""

    @property
    def known(self) -> bool:
        """Whether one can tell it from noise at all: one seed says nothing about another."""
        return self.repetitions > 1

    @property
    def beyond_noise(self) -> bool:
        """Whether there is a difference."""
        return self.known and not self.low <= 0 <= self.high


def difference(one: Arm, other: Arm, *, comparisons: int = 1) -> Difference | None:
    """The paired difference with its interval; None where the arms have no run in common.

    Its half-width is that over seeds (Student's t: with three of them 4.3 standard errors) and that over images
    (bootstrap) added in quadrature, so neither kind of noise can hide the other. Folds are tested on other images each,
    so their spread holds both.
    The interval holds with 95 % for all `comparisons` together (Bonferroni): the best of many has been lucky, too.
    """
    a, b = one.values(), other.values()
    common = [unit for unit in a if unit in b and one.truth.get(unit) == other.truth.get(unit)]
    if not common:
        return None
    repetitions, shared = by_repetition({unit: a[unit] - b[unit] for unit in common})
    n, mean = len(repetitions), statistics.fmean(repetitions)
    tail = (1 - CONFIDENCE) / 2 / comparisons
    over_runs = over_images = 0.0
    if n > 1:
        error = statistics.stdev(repetitions) * math.sqrt(1 / n + shared)
        over_runs = student_quantile(1 - tail, n - 1) * error
    resampled = all(unit in one.replicates and unit in other.replicates for unit in common)
    if resampled and not shared:
        drawn = np.nanmean([one.replicates[unit] - other.replicates[unit] for unit in common], axis=0)
        over_images = statistics.NormalDist().inv_cdf(1 - tail) * float(np.nanstd(drawn, ddof=1))
    reach = math.hypot(over_runs, over_images)
    return Difference(mean, mean - reach, mean + reach, n, resampled or shared > 0)


# ---- the comparison ------------------------------------------------------------------------------------------------


@dataclass
class Comparison:
    """Arms, best first, each against one of them."""

    arms: list[Arm]
    reference: Arm | None
    """The best, or the baseline asked for; None if no arm has a finished run."""
    differences: dict[str, Difference | None]
    """By arm: its AP minus the reference's."""
    verdict: str

    def rows(self, classes: Sequence[str] = ()) -> list[list[str]]:
        """A table as text, its head first.

        Raises:
            RunError: no run knows a class of this name.
        """
        known = {row["name"] for arm in self.arms for metrics in arm.metrics.values() for row in metrics["per_class"]}
        if not known.issuperset(classes):
            raise RunError(f"--classes must be among {', '.join(sorted(known))}, got {', '.join(classes)}")
        reference = self.reference.name if self.reference is not None else "-"
        head = ["", "runs", "AP", "± SE", "95 % over images", f"minus {reference}", "AP50", *classes]
        rows = [head]
        for arm in self.arms:
            interval, minus = image_interval(arm), self.differences.get(arm.name)
            if arm.why_out:
                last = arm.why_out.partition(":")[0]
            elif arm is self.reference:
                last = ""
            else:
                last = _minus_text(minus)
            rows.append(
                [
                    arm.name,
                    str(len(arm.metrics)),
                    _number(arm.mean),
                    _number(standard_error(arm.values())),
                    f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-",
                    last,
                    _mean_text(arm.values("AP50")),
                    *(_mean_text(arm.values(name)) for name in classes),
                ]
            )
        return rows

    def show(self, classes: Sequence[str] = ()) -> None:
        """Print the table, how to read it, and the verdict."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 200  # lines of a file stay whole
        head, *rows = self.rows(classes)
        table = Table(*head)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for line in [*self.legend(), self.verdict]:
            console.print(line, markup=False, soft_wrap=True)

    def markdown(self, classes: Sequence[str] = ()) -> str:
        """The table, what its columns mean, and the verdict."""
        head, *rows = self.rows(classes)
        lines = ["| " + " | ".join(row) + " |" for row in (head, ["--"] * len(head), *rows)]
        return "\n".join([*lines, "", *self.legend(), "", self.verdict, ""])

    def legend(self) -> list[str]:
        """How the numbers of the table are to be read."""
        count = max(1, len([d for d in self.differences.values() if d is not None]))
        together = f"95 % for all {count} differences together" if count > 1 else "95 %"
        lines = [
            f"SE: standard error over seeds and folds. Differences are over the runs that both have; their interval is {together}."
        ]
        if any(d is not None and not d.over_images for d in self.differences.values()):
            lines.append("Not every run has detections to resample, so intervals without them allow for seeds only.")
        return [*lines, *(f"{arm.name} {arm.why_out}" for arm in self.arms if arm.why_out)]

    def to_json(self) -> dict[str, Any]:
        """Everything, unrounded; undefined numbers are null."""

        def plain(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            "reference": self.reference.name if self.reference is not None else None,
            "verdict": self.verdict,
            "arms": [
                {
                    "name": arm.name,
                    "AP": plain(arm.mean),
                    "standard_error": plain(standard_error(arm.values())),
                    "interval_over_images": image_interval(arm),
                    "difference": d._asdict() if (d := self.differences.get(arm.name)) is not None else None,
                    "why_out": arm.why_out,
                    "runs": arm.metrics,
                }
                for arm in self.arms
            ],
        }


def compare(
    arms: Iterable[Arm], *, baseline: str | None = None, preferred: Sequence[tuple[str, str]] = ()
) -> Comparison:
    """Order arms by AP and say which differences from the best (or from a baseline) are more than noise.

    Args:
        arms: each with its finished runs.
        baseline: the arm to compare with, instead of the best.
        preferred: (arm, reason) in order: which one to take of those that cannot be told from the best.

    Raises:
        RunError: no arm is called like the baseline.
    """
    ordered = sorted(arms, key=lambda arm: (bool(arm.why_out), -arm.mean if arm.values() else math.inf, arm.name))
    able = [arm for arm in ordered if not arm.why_out and arm.values()]
    reference = able[0] if able else None
    if baseline is not None:
        reference = next((arm for arm in able if arm.name == baseline), None)
        if reference is None:
            raise RunError(f"--baseline must be one of {', '.join(arm.name for arm in able)}, got {baseline}")
    others = [arm for arm in able if arm is not reference]
    differences: dict[str, Difference | None] = {}
    if reference is not None:
        for arm in others:
            differences[arm.name] = difference(arm, reference, comparisons=len(others))
    return Comparison(ordered, reference, differences, _verdict(reference, differences, baseline is None, preferred))


def _verdict(
    reference: Arm | None,
    differences: Mapping[str, Difference | None],
    is_best: bool,
    preferred: Sequence[tuple[str, str]],
) -> str:
    if reference is None:
        return "No run is finished: nothing to compare."
    said = [f"{'Best' if is_best else 'Baseline'}: {reference.name}, AP {reference.mean:.3f}."]
    if not differences:
        return f"{said[0]} There is nothing to compare it with."
    paired = {name: d for name, d in differences.items() if d is not None}
    above = [name for name, d in paired.items() if d.beyond_noise and d.mean > 0]
    below = [name for name, d in paired.items() if d.beyond_noise and d.mean < 0]
    same = [name for name, d in paired.items() if d.known and not d.beyond_noise]
    single = [name for name, d in paired.items() if not d.known]
    apart = [name for name, d in differences.items() if d is None]
    if above:
        said.append(f"Better beyond noise: {_names(above)}.")
    if below:
        said.append(f"Worse beyond noise: {_names(below)}.")
    if same and len(same) == len(differences):
        said.append(f"No difference from it is distinguishable from noise ({_names(same)}).")
    elif same:
        said.append(f"Not distinguishable from it: {_names(same)}.")
    if single:
        said.append(
            f"One run each is too few to tell from the luck of a seed: {_names(single)}. Train several seeds of each."
        )
    if apart:
        said.append(f"No seed, fold and val set in common: {_names(apart)}.")
    open_to_choice = {reference.name, *same, *single}
    choice = next(((name, reason) for name, reason in preferred if name in open_to_choice), None)
    if is_best and choice is not None and len(open_to_choice) > 1 and choice[0] != reference.name:
        said.append(f"Of these {choice[0]} is {choice[1]}: as good a choice as any.")
    return " ".join(said)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 5 else [*names[:4], f"and {len(names) - 4} more"])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _mean_text(values: Mapping[str, float]) -> str:
    if not values:
        return "-"
    error = standard_error(values)
    return f"{statistics.fmean(values.values()):.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _minus_text(minus: Difference | None) -> str:
    if minus is None:
        return "not paired"
    if not minus.known and not minus.over_images:
        return f"{minus.mean:+.3f}"
    return f"{minus.mean:+.3f} ({minus.low:+.3f} to {minus.high:+.3f})"


def figure(comparison: Comparison, path: Path) -> None:
    """Draw every arm's runs, its mean with the standard error, and the interval over images.

    Raises:
        FigureError: no matplotlib; neither .svg nor .png.
    """
    arms = [arm for arm in comparison.arms if arm.values() or arm.why_out][::-1]  # a row without a mark says why
    height = 1.2 + 0.32 * len(arms)
    drawn, axes = pyplot().subplots(figsize=(7.5, height), layout="constrained")
    for y, arm in enumerate(arms):
        color = "tab:grey" if arm.why_out else "tab:blue"
        interval, error = image_interval(arm), standard_error(arm.values())
        if interval is not None:
            axes.plot(interval, [y, y], color=color, linewidth=6, alpha=0.25, solid_capstyle="butt")
        axes.plot([*arm.values().values()], [y] * len(arm.values()), "o", color=color, markersize=3, alpha=0.6)
        axes.errorbar(arm.mean, y, xerr=None if math.isnan(error) else error, fmt="D", color=color, capsize=3)
    names = [arm.name + (f" ({arm.why_out.partition(':')[0]})" if arm.why_out else "") for arm in arms]
    axes.set_yticks(range(len(arms)), names)
    axes.set(xlabel="val AP: runs, mean ± SE; broad bar: 95 % over images", ylim=(-0.6, len(arms) - 0.4))
    axes.grid(axis="x", alpha=0.3)
    save(drawn, path)


# ---- reading runs --------------------------------------------------------------------------------------------------

UNIT = re.compile(r"seed\d+(_fold\d+)?|fold\d+")


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The finished runs that are, or lie in, some folders; in order.

    Raises:
        RunError: a place holds none.
    """
    runs: dict[Path, None] = {}
    for place in places:
        found = sorted(path.parent for path in place.glob("**/metrics.json"))
        found = [run for run in found if (run / "config.yaml").exists()]
        if not found:
            raise RunError(
                f"{place} must be the output folder of a finished run of tools/train.py, with config.yaml and metrics.json, "
                "or one that holds such"
            )
        runs.update(dict.fromkeys(found))
    return list(runs)


def is_finished(run: Path) -> bool:
    """Whether a run came to its end; metrics.json alone stands there from the first evaluation on."""
    last = run / "checkpoints" / "last.pt"
    return not last.exists() or load_checkpoint(last).finished


def group_runs(runs: Sequence[Path], *, replicates: int = REPLICATES) -> tuple[list[Arm], list[str]]:
    """Finished runs by parent folder (`ce/seed0`, `ce/seed1`, ...), or each for itself if not so named.

    Returns:
        The arms, and what is to be said of single runs.

    Raises:
        RunError: the runs were scored on different val sets.
    """
    said: dict[str, list[str]] = {}
    folders: dict[Path, list[tuple[str, Path]]] = {}
    for run in (run.absolute() for run in runs):
        if not is_finished(run):
            said.setdefault("still running or interrupted, left out", []).append(str(run))
        elif UNIT.fullmatch(run.name):
            folders.setdefault(run.parent, []).append((run.name, run))
        else:
            seed = load_config(run / "config.yaml").train.seed
            folders.setdefault(run, []).append((f"seed{seed}", run))
    above = Path(os.path.commonpath([folder.parent for folder in folders])) if folders else Path()
    arms = []
    for folder, members in folders.items():
        arm = Arm(str(folder.relative_to(above)))
        for unit, run in members:
            note = add_run(arm, unit, run, replicates=replicates)
            if note:
                said.setdefault(note, []).append(f"{arm.name}/{unit}")
        arms.append(arm)
    by_unit: dict[str, dict[str, str]] = {}
    for arm in arms:
        for unit, truth in arm.truth.items():
            by_unit.setdefault(unit, {}).setdefault(truth, f"{arm.name}/{unit}")
    for unit, truths in by_unit.items():
        if len(truths) > 1:
            raise RunError(
                f"runs to compare must have the same val set, got different ones for {unit}: {', '.join(truths.values())}; "
                "compare those that belong together"
            )
    return arms, [f"{', '.join(who)}: {note}" for note, who in said.items()]


def add_run(arm: Arm, unit: str, run: Path, *, replicates: int = REPLICATES) -> str:
    """Read a finished run into an arm; returns what is to be said about it, if anything."""
    metrics = json.loads((run / "metrics.json").read_text())
    metrics.pop("test", None)
    arm.metrics[unit] = metrics
    config = load_config(run / "config.yaml")
    split = split_of(config, "val")
    if not Path(split.annotations).is_file():
        arm.truth[unit] = split.annotations
        return f"{split.annotations} is no longer there, so no bootstrap over its images"
    truth = read_coco(Path(split.annotations), None, on_error=config.data.on_error, progress=False)
    arm.truth[unit] = truth.fingerprint()
    if not replicates:
        return ""
    detections = run / "detections.json"
    if not detections.exists():
        return "no detections.json, so no bootstrap over images (tools/compare.py --detect makes it)"
    results = load_results(detections, truth.ground_truth())
    matched = match(truth.ground_truth(), results, max_dets=config.eval.max_dets[-1])
    whole = float(resampled_ap(matched, np.ones((1, len(truth)), np.int64))[0])
    if abs(whole - metrics["AP"]) > 0.002:  # on a GPU, the last bits may differ from run to run
        return (
            f"detections.json scores AP {whole:.4f}, but metrics.json says {metrics['AP']:.4f}, so it is of other weights "
            "and not resampled; delete it and use tools/compare.py --detect"
        )
    # the same images for every run with this val set, which pairs their replicates
    counts = draw(len(truth), replicates, seed=int(arm.truth[unit][:8], 16))
    arm.replicates[unit] = resampled_ap(matched, counts)
    return ""


def detect(run: Path) -> None:
    """Write a run's detections.json: what its best checkpoint finds in its val set.

    Raises:
        ConfigError, DatasetError, CheckpointError
    """
    config = load_config(run / "config.yaml")
    with tempfile.TemporaryDirectory(dir=run) as aside:  # metrics.json of the run holds more than that of a scoring
        score_checkpoint(config, run / "checkpoints" / "best.pt", split="val", output_dir=Path(aside))
        (Path(aside) / "detections.json").replace(run / "detections.json")
