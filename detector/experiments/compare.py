"""Compare recipes: order them by AP, test which differences are significant, and show a table and a figure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from detector.errors import RunError
from detector.experiments.arm import Arm, Difference, interval_over_images, paired_difference
from detector.experiments.statistics import standard_error
from detector.reports.figures import save, subplots
from detector.text import cut


@dataclass
class Comparison:
    """Arms in descending order of AP, each compared with the reference."""

    arms: list[Arm]
    reference: Arm | None
    """The best arm, or the requested baseline; None if no arm has a finished run."""
    differences: dict[str, Difference | None]
    """AP of each arm minus AP of the reference, by arm name."""
    verdict: str

    def rows(self, classes: Sequence[str] = ()) -> list[list[str]]:
        """Format the table, header first.

        Args:
            classes: names of classes whose AP gets a column.

        Raises:
            RunError: no run has a class of this name.
        """
        known = {row["name"] for arm in self.arms for metrics in arm.metrics.values() for row in metrics["per_class"]}
        if not known.issuperset(classes):
            raise RunError(f"--classes must be among {cut(sorted(known), 12)}, got {cut(list(classes), 12)}")
        reference = self.reference.name if self.reference is not None else "-"
        rows = [["", "runs", "AP", "± SE", "95 % over images", f"minus {reference}", "AP50", *classes]]
        for arm in self.arms:
            interval = interval_over_images(arm)
            if arm.excluded:
                difference = arm.excluded.partition(":")[0]
            else:
                difference = "" if arm is self.reference else _difference_text(self.differences.get(arm.name))
            rows.append(
                [
                    arm.name,
                    str(len(arm.metrics)),
                    _number(arm.mean),
                    _number(standard_error(arm.values())),
                    f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else "-",
                    difference,
                    _mean_text(arm.values("AP50")),
                    *(_mean_text(arm.values(name)) for name in classes),
                ]
            )
        return rows

    def show(self, classes: Sequence[str] = ()) -> None:
        """Print table, legend and verdict."""
        console = Console(highlight=False)
        if not console.is_terminal:
            console.width = 200  # no line breaks in a file
        header, *rows = self.rows(classes)
        table = Table(*header)
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        for line in [*self.legend(), self.verdict]:
            console.print(line, markup=False, soft_wrap=True)

    def markdown(self, classes: Sequence[str] = ()) -> str:
        """Table, legend and verdict as Markdown."""
        header, *rows = self.rows(classes)
        table = ([cell.replace("|", "\\|") for cell in row] for row in (header, ["--"] * len(header), *rows))
        lines = ["| " + " | ".join(row) + " |" for row in table]
        return "\n".join([*lines, "", *self.legend(), "", self.verdict, ""])

    def legend(self) -> list[str]:
        """What the columns mean, and why arms are excluded."""
        count = max(1, len([d for d in self.differences.values() if d is not None]))
        confidence = f"95 % for all {count} differences simultaneously" if count > 1 else "95 %"
        lines = [
            "SE: standard error over seeds and folds. Differences are over the runs that both have; their confidence "
            f"level is {confidence}."
        ]
        if any(d is not None and not d.over_images for d in self.differences.values()):
            lines.append("Not every run has detections to resample; intervals without them cover seeds only.")
        return [*lines, *(f"{arm.name} {arm.excluded}" for arm in self.arms if arm.excluded)]

    def to_json(self) -> dict[str, Any]:
        """All numbers, unrounded; undefined ones are null."""

        def defined(value: float) -> float | None:
            return None if math.isnan(value) else value

        return {
            "reference": self.reference.name if self.reference is not None else None,
            "verdict": self.verdict,
            "arms": [
                {
                    "name": arm.name,
                    "AP": defined(arm.mean),
                    "standard_error": defined(standard_error(arm.values())),
                    "interval_over_images": interval_over_images(arm),
                    "difference": d._asdict() if (d := self.differences.get(arm.name)) is not None else None,
                    "excluded": arm.excluded,
                    "runs": arm.metrics,
                }
                for arm in self.arms
            ],
        }


def compare(
    arms: Iterable[Arm], *, baseline: str | None = None, preferred: Sequence[tuple[str, str]] = ()
) -> Comparison:
    """Order arms by AP and test which differences from the best one (or from a baseline) are significant.

    Args:
        arms: arms with their finished runs.
        baseline: name of the arm to compare with, instead of the best.
        preferred: (arm name, reason) by preference, for arms that do not differ significantly from the best.

    Raises:
        RunError: no arm has the baseline's name, or scipy is not installed.
    """
    ordered = sorted(arms, key=lambda arm: (bool(arm.excluded), -arm.mean if arm.values() else math.inf, arm.name))
    compared = [arm for arm in ordered if not arm.excluded and arm.values()]
    reference = compared[0] if compared else None
    if baseline is not None:
        reference = next((arm for arm in compared if arm.name == baseline), None)
        if reference is None:
            raise RunError(f"--baseline must be one of {cut([arm.name for arm in compared], 12)}, got {baseline}")
    others = [arm for arm in compared if arm is not reference]
    differences = {
        arm.name: paired_difference(arm, reference, comparisons=len(others)) for arm in others if reference is not None
    }
    return Comparison(ordered, reference, differences, _verdict(reference, differences, baseline is None, preferred))


def _verdict(
    reference: Arm | None,
    differences: Mapping[str, Difference | None],
    is_best: bool,
    preferred: Sequence[tuple[str, str]],
) -> str:
    if reference is None:
        return "No run has finished: nothing to compare."
    first = f"{'Best' if is_best else 'Baseline'}: {reference.name}, AP {reference.mean:.3f}."
    if not differences:
        return f"{first} There is nothing to compare it with."
    paired = {name: d for name, d in differences.items() if d is not None}
    better = [name for name, d in paired.items() if d.significant and d.mean > 0]
    worse = [name for name, d in paired.items() if d.significant and d.mean < 0]
    similar = [name for name, d in paired.items() if d.testable and not d.significant]
    single = [name for name, d in paired.items() if not d.testable]
    unpaired = [name for name, d in differences.items() if d is None]
    sentences = [first]
    if better:
        sentences.append(f"Significantly better: {_names(better)}.")
    if worse:
        sentences.append(f"Significantly worse: {_names(worse)}.")
    if similar:
        sentences.append(f"Not significantly different: {_names(similar)}.")
    if single:
        sentences.append(
            f"One run each is too few for a significance test: {_names(single)}. Train several seeds of each."
        )
    if unpaired:
        sentences.append(f"No seed, fold and validation set in common: {_names(unpaired)}.")
    candidates = {reference.name, *similar, *single}
    choice = next(((name, reason) for name, reason in preferred if name in candidates), None)
    if is_best and choice is not None and choice[0] != reference.name:
        sentences.append(f"Of these, {choice[0]} is {choice[1]}: an equally good choice.")
    return " ".join(sentences)


def _names(names: Sequence[str]) -> str:
    return ", ".join(names if len(names) <= 5 else [*names[:4], f"and {len(names) - 4} more"])


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.3f}"


def _mean_text(values: Mapping[str, float]) -> str:
    if not values:
        return "-"
    error = standard_error(values)
    return f"{statistics.fmean(values.values()):.3f}" + ("" if math.isnan(error) else f" ± {error:.3f}")


def _difference_text(difference: Difference | None) -> str:
    if difference is None:
        return "not paired"
    if not difference.testable and not difference.over_images:
        return f"{difference.mean:+.3f}"
    return f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def write_figure(comparison: Comparison, path: Path) -> None:
    """Draw every arm's runs, its mean with the standard error, and the confidence interval over images.

    Raises:
        FigureError: matplotlib is not installed, or the path ends neither in .svg nor in .png.
    """
    arms = [arm for arm in comparison.arms if arm.values() or arm.excluded][::-1]
    figure, axes = subplots(figsize=(7.5, 1.2 + 0.32 * len(arms)))
    for y, arm in enumerate(arms):
        color = "tab:grey" if arm.excluded else "tab:blue"
        interval, error = interval_over_images(arm), standard_error(arm.values())
        if interval is not None:
            axes.plot(interval, [y, y], color=color, linewidth=6, alpha=0.25, solid_capstyle="butt")
        axes.plot([*arm.values().values()], [y] * len(arm.values()), "o", color=color, markersize=3, alpha=0.6)
        axes.errorbar(arm.mean, y, xerr=None if math.isnan(error) else error, fmt="D", color=color, capsize=3)
    names = [arm.name + (f" ({arm.excluded.partition(':')[0]})" if arm.excluded else "") for arm in arms]
    axes.set_yticks(range(len(arms)), names)
    axes.set(xlabel="val AP: runs, mean ± SE; broad bar: 95 % over images", ylim=(-0.6, len(arms) - 0.4))
    axes.grid(axis="x", alpha=0.3)
    save(figure, path)
