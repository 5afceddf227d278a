"""Scoring what is already there: a checkpoint or a results file against a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from detector import distributed
from detector.atomic import make_folder, write_json
from detector.checkpoint import load_checkpoint
from detector.config import NOT_PART_OF_THE_MODEL, Config, SplitConfig, flatten, with_micro_batch
from detector.config_yaml import with_model_of
from detector.datasets.coco import CocoDataset, read_coco
from detector.datasets.opening import open_split
from detector.errors import ConfigError
from detector.evaluation.coco_metrics import Metrics, evaluate, ground_truth_warnings, load_results, write_results
from detector.evaluation.evaluate import evaluate_model
from detector.inference.predictor import model_of

Split = Literal["val", "test"]


def score_checkpoint(config: Config, checkpoint: Path, *, split: Split, output_dir: Path) -> Metrics:
    """Detect with a checkpoint's model in a config's data; write metrics.json and detections.json.

    The model and its classes are the checkpoint's; data, image size and metric are the config's, and so is the
    post-processing, as far as the config says anything about it.

    Raises:
        ConfigError: the config describes another model.
    """
    state = load_checkpoint(checkpoint)
    config = with_micro_batch(with_model_of(config, state.config), state.micro_batch)
    require_model_of(config, state.config, checkpoint)
    with distributed.process_group(config.train.device) as device:
        named = split_of(config, split)
        main = distributed.rank() == 0
        if main:
            make_folder(output_dir)
        problems_file = output_dir / f"problems_{split}.tsv" if main else None
        dataset = open_split(config, named, categories=state.categories, problems_file=problems_file)
        console = Console(highlight=False, soft_wrap=True, quiet=not main)
        for line in state.origin:
            console.print(line, markup=False)
        _say(dataset, config, console)
        with Progress(console=console) as bar:
            task = bar.add_task(f"detecting in {len(dataset)} images", total=len(dataset))
            metrics, results = evaluate_model(
                model_of(state, device), dataset, config, device=device,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        if main:
            write_results(output_dir / "detections.json", results)
            write_json(metrics.to_json(), output_dir / "metrics.json")
    return metrics


def require_model_of(config: Config, stored: Config, checkpoint: Path) -> None:
    """Refuse a config that describes another network than the checkpoint's.

    Raises:
        ConfigError: naming both values of each setting that differs.
    """
    theirs, ours = flatten(stored.model.model_dump()), flatten(config.model.model_dump())
    different = [k for k in ours if theirs.get(k) != ours[k] and k not in NOT_PART_OF_THE_MODEL]
    if different:
        raise ConfigError(
            "\n".join(
                [
                    f"the config must describe the model in {checkpoint}, got:",
                    *(
                        f"  model.{k}: {ours[k]!r} in the config, {theirs.get(k)!r} in the checkpoint"
                        for k in different
                    ),
                    f"Use the run's own config ({checkpoint.parent.parent / 'config.yaml'}), or leave these settings out: "
                    "what a config does not say of the model is the checkpoint's.",
                ]
            )
        )


def score_results_file(config: Config, detections: Path, *, split: Split, output_dir: Path) -> Metrics:
    """Score a COCO results file against a config's annotations; the images need not exist.

    Raises:
        ResultsError: everything that is wrong with the file.
    """
    dataset = read_coco(Path(split_of(config, split).annotations), None, on_error=config.data.on_error)
    _say(dataset, config, Console(highlight=False, soft_wrap=True))
    truth = dataset.ground_truth()
    results = load_results(detections, truth)
    metrics = evaluate(truth, results, engine=config.eval.engine, max_dets=config.eval.max_dets)
    make_folder(output_dir)
    write_results(output_dir / "detections.json", results)
    write_json(metrics.to_json(), output_dir / "metrics.json")
    return metrics


def split_of(config: Config, split: Split) -> SplitConfig:
    """The set of a config that is to be looked at.

    Raises:
        ConfigError: there is none of this name.
    """
    named: SplitConfig | None = getattr(config.data, split)
    if named is None:
        raise ConfigError(
            f"data.{split} must name images and annotations to be scored; add it to the config, or give "
            f"data.{split}.images=DIR data.{split}.annotations=FILE.json"
        )
    return named


def _say(dataset: CocoDataset, config: Config, console: Console) -> None:
    console.print(dataset.summary(), markup=False)
    for line in ground_truth_warnings(dataset.ground_truth(), config.eval.max_dets):
        console.print(f"warning: {line}", style="yellow", markup=False)
