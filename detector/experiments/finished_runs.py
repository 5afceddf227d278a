"""Find finished runs, and read their metrics and detections for a comparison."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from detector.checkpoint import load_checkpoint
from detector.config_yaml import load_config
from detector.datasets.opening import read_coco
from detector.errors import CheckpointError, ConfigError, RunError
from detector.evaluation.results_file import load_results
from detector.evaluation.score import score_checkpoint, split_config
from detector.experiments.arm import Arm
from detector.experiments.bootstrap import draw_counts, match_classes, resampled_ap
from detector.reports.records import read_metrics
from detector.text import printable

REPLICATES = 500
"""Default number of bootstrap samples."""
RUN_KEY = re.compile(r"seed\d+(_fold\d+)?|fold\d+")


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """List the runs that are, or lie in, some folders.

    Raises:
        RunError: a folder contains no run.
    """
    runs: dict[Path, None] = {}
    for folder in folders:
        found = sorted(path.parent for path in folder.glob("**/metrics.json"))
        found = [run for run in found if (run / "config.yaml").exists()]
        if not found:
            raise RunError(
                f"{folder} must be the output folder of a finished run of tools/train.py, with config.yaml and "
                "metrics.json, or contain such folders"
            )
        runs.update(dict.fromkeys(found))
    return list(runs)


def is_finished(run: Path) -> bool:
    """Whether a run is finished. The file metrics.json does not show it: the first evaluation writes it."""
    last = run / "checkpoints" / "last.pt"
    return not last.exists() or load_checkpoint(last).finished


def group_runs(runs: Sequence[Path], *, replicates: int = REPLICATES) -> tuple[list[Arm], list[str]]:
    """Group finished runs by parent folder (`ce/seed0`, `ce/seed1`, ...); runs with other names are arms of their own.

    Returns:
        The arms, and notes about single runs.

    Raises:
        RunError: the runs were scored on different validation sets.
    """
    notes: dict[str, list[str]] = {}
    folders: dict[Path, list[tuple[str, Path]]] = {}
    for run in (run.absolute() for run in runs):
        try:
            finished, seed = is_finished(run), load_config(run / "config.yaml").train.seed
            read_metrics(run / "metrics.json")
        except (CheckpointError, ConfigError, RunError) as error:
            notes.setdefault(f"left out: {printable(str(error), 500)}", []).append(printable(str(run)))
            continue
        if not finished:
            notes.setdefault("still running or interrupted, left out", []).append(printable(str(run)))
        elif RUN_KEY.fullmatch(run.name):
            folders.setdefault(run.parent, []).append((run.name, run))
        else:
            folders.setdefault(run, []).append((f"seed{seed}", run))
    root = Path(os.path.commonpath([folder.parent for folder in folders])) if folders else Path()
    arms = []
    runs_by_val_set: dict[str, dict[str, str]] = {}
    for folder, members in folders.items():
        arm = Arm(printable(str(folder.relative_to(root))))
        for key, run in members:
            note = add_run(arm, key, run, replicates=replicates)
            if note:
                notes.setdefault(note, []).append(f"{arm.name}/{key}")
            runs_by_val_set.setdefault(key, {}).setdefault(arm.val_sets[key], f"{arm.name}/{key}")
        arms.append(arm)
    for key, examples in runs_by_val_set.items():
        if len(examples) > 1:
            raise RunError(
                f"runs to compare must have the same validation set, got different ones for {key}: "
                f"{', '.join(examples.values())}; compare only runs with the same one"
            )
    return arms, [f"{', '.join(names)}: {note}" for note, names in notes.items()]


def add_run(arm: Arm, key: str, run: Path, *, replicates: int = REPLICATES) -> str:
    """Read a finished run into an arm.

    Args:
        arm: where to add the run.
        key: run key, which pairs the run with those of other arms.
        run: output folder of the run.
        replicates: number of bootstrap samples; 0 for none.

    Returns:
        Why there is no bootstrap over images, or "".
    """
    metrics = read_metrics(run / "metrics.json")
    arm.metrics[key] = metrics
    config = load_config(run / "config.yaml")
    split = split_config(config, "val")
    if not Path(split.annotations).is_file():
        arm.val_sets[key] = split.annotations
        return f"{split.annotations} no longer exists, so no bootstrap over its images"
    dataset = read_coco(Path(split.annotations), None, on_error=config.data.on_error, progress=False)
    arm.val_sets[key] = dataset.fingerprint()
    if not replicates:
        return ""
    detections = run / "detections.json"
    if not detections.exists():
        return "no detections.json, so no bootstrap over images (tools/compare.py --detect writes it)"
    ground_truth = dataset.ground_truth()
    results = load_results(detections, ground_truth, file_ids=dataset.file_ids)
    matched = match_classes(ground_truth, results, max_dets=config.eval.max_dets[-1])
    ap = float(resampled_ap(matched, np.ones((1, len(dataset)), np.int64))[0])
    if abs(ap - metrics["AP"]) > 0.002:  # on a GPU, scores may differ in the last bits
        return (
            f"detections.json scores AP {ap:.4f} but metrics.json holds {metrics['AP']:.4f}, so the detections are of "
            "other weights and not resampled; delete the file and run tools/compare.py --detect"
        )
    # the same samples for every run with this validation set, which pairs the replicates
    counts = draw_counts(len(dataset), replicates, seed=int(arm.val_sets[key][:8], 16))
    arm.replicates[key] = resampled_ap(matched, counts)
    return ""


def write_detections(run: Path) -> None:
    """Run the best checkpoint of a run on its validation set and write detections.json into the run's folder.

    Raises:
        ConfigError, DatasetError, CheckpointError: config, data or checkpoint cannot be used.
    """
    config = load_config(run / "config.yaml")
    with tempfile.TemporaryDirectory(dir=run) as temporary:  # must not replace the run's own metrics.json
        score_checkpoint(config, run / "checkpoints" / "best.pt", split="val", output_dir=Path(temporary))
        (Path(temporary) / "detections.json").replace(run / "detections.json")
