"""Results of a sweep: the comparison of all its trials, and the config of the best one."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detector.atomic import write_json, write_text
from detector.config import resolve_data_paths
from detector.config_yaml import to_yaml
from detector.errors import FigureError
from detector.experiments.arm import Arm
from detector.experiments.compare import Comparison, compare, write_figure
from detector.experiments.finished_runs import add_run
from detector.experiments.search_space import SweepPlan
from detector.experiments.study import SweepStudy
from detector.training.logger import duration


def write_results(study: SweepStudy, output_dir: Path, log: Callable[[str], None]) -> Comparison:
    """Compare all trials of the study, also those of other machines; write results.* and winner.yaml.

    Args:
        study: the sweep's study.
        output_dir: output folder of this machine; only runs in it are resampled.
        log: called with every note on a run.
    """
    arms: list[Arm] = []
    seconds: dict[str, float] = {}
    points: dict[str, dict[str, Any]] = {}
    for trial in study.trials("COMPLETE", "FAIL", "PRUNED", "RUNNING"):
        attributes, state = trial.user_attrs, trial.state.name
        if "folder" not in attributes:  # its machine died before the trial got a name
            continue
        excluded = {"COMPLETE": "", "RUNNING": "running on another machine"}
        arm = Arm(attributes["folder"], excluded=excluded.get(state, attributes.get("why", "failed: process died")))
        for run in (key.name for key in study.plan.run_keys() if key.name in attributes):
            folder = output_dir / "trials" / arm.name / run
            if study.is_own(trial) and (folder / "metrics.json").exists():
                note = add_run(arm, run, folder)
                if note:
                    log(f"{arm.name}/{run}: {note}")
            arm.metrics[run] = attributes[run]
            arm.val_sets[run] = run  # by the study's definition, trials have the same data
        if arm.metrics:
            known = [metrics["seconds"] for metrics in arm.metrics.values() if metrics["seconds"] is not None]
            seconds[arm.name] = statistics.fmean(known) if known else math.inf
            points[arm.name] = dict(trial.params)
        arms.append(arm)
    comparison = compare(arms, preferred=_preferred(study.plan, arms, seconds, points))
    write_json(comparison.to_json(), output_dir / "results.json")
    write_text(comparison.markdown(), output_dir / "results.md")
    try:
        write_figure(comparison, output_dir / "results.svg")
    except FigureError as error:
        log(f"no results.svg: {error}")
    if comparison.reference is not None:
        _write_winner(study.plan, comparison, points[comparison.reference.name], output_dir / "winner.yaml")
    return comparison


def _preferred(
    plan: SweepPlan, arms: Sequence[Arm], seconds: Mapping[str, float], points: Mapping[str, dict[str, Any]]
) -> list[tuple[str, str]]:
    """Arms to prefer if they do not differ significantly from the best: the unchanged recipe, or 10 % faster ones."""
    best = max((arm for arm in arms if arm.metrics and not arm.excluded), key=lambda arm: arm.mean, default=None)
    if best is None:
        return []
    unchanged = plan.unchanged_point()
    same = [(name, "the unchanged recipe") for name, point in points.items() if point == unchanged]
    faster = sorted((t, name) for name, t in seconds.items() if t < 0.9 * seconds[best.name])
    return [*same, *((name, f"the fastest to train ({duration(t)} per run)") for t, name in faster)]


def _write_winner(plan: SweepPlan, comparison: Comparison, point: Mapping[str, Any], path: Path) -> None:
    """Write the recipe with the settings of the best arm, without seed and fold."""
    best = comparison.reference
    assert best is not None, "checked by the caller"
    header = [
        f"{best.name}: mean AP {best.mean:.3f} of {len(best.metrics)} (optimistically biased: chosen by this AP)",
        comparison.verdict,
        f"python tools/train.py --config {path}",
    ]
    config = resolve_data_paths(plan.config(point))
    write_text("".join(f"# {line}\n" for line in header) + to_yaml(config), path)
