"""Scoring a checkpoint or an existing COCO results file against a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import Progress

from detector import distributed
from detector.atomic import make_folder, write_json
from detector.checkpoint import TrainState, load_checkpoint
from detector.config import NOT_PART_OF_THE_MODEL, Config, SplitConfig, config_differences, with_micro_batch
from detector.config_yaml import with_model_of
from detector.datasets.coco import CocoDataset
from detector.datasets.opening import open_split, read_coco
from detector.errors import ConfigError
from detector.evaluation.coco_metrics import Metrics, evaluate, ground_truth_warnings
from detector.evaluation.coco_results import CocoResults, write_results
from detector.evaluation.evaluate import evaluate_model
from detector.evaluation.results_file import load_results
from detector.inference.predictor import model_of
from detector.text import printable

Split = Literal["val", "test"]


def score_checkpoint(config: Config, checkpoint: Path, *, split: Split, output_dir: Path) -> Metrics:
    """Run a checkpoint's model on a config's data; write metrics.json and detections.json.

    Model and classes come from the checkpoint, data and metric from the config; image size and post-processing from the
    config if it sets them, else from the checkpoint.

    Raises:
        ConfigError: the config describes another model, or has no such split.
        CheckpointError, DatasetError: the checkpoint or the data cannot be used.
    """
    state = load_checkpoint(checkpoint)
    config = config_for_checkpoint(config, state, checkpoint)
    with distributed.process_group(config.train.device, timeout=config.train.rank_timeout) as device:
        data = split_config(config, split)
        main = distributed.rank() == 0
        if main:
            make_folder(output_dir)
        problems_file = output_dir / f"problems_{split}.tsv" if main else None
        dataset = open_split(config, data, categories=state.categories, problems_file=problems_file)
        console = Console(highlight=False, soft_wrap=True, quiet=not main)
        for line in state.origin:
            console.print(line, markup=False)
        _print_summary(dataset, config, console)
        with Progress(console=console) as bar:
            task = bar.add_task(f"detecting in {len(dataset)} images", total=len(dataset))
            metrics, results = evaluate_model(
                model_of(state, device), dataset, config, device=device,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )  # fmt: skip
        if main:
            _write(metrics, results, dataset, output_dir)
    return metrics


def config_for_checkpoint(config: Config, state: TrainState, checkpoint: Path) -> Config:
    """Fill the model settings that a config does not set from a checkpoint.

    Args:
        config: of the user.
        state: the checkpoint's content.
        checkpoint: its path, for the message.

    Raises:
        ConfigError: the config describes another model; lists both values of each setting that differs.
    """
    config = with_micro_batch(with_model_of(config, state.config), state.micro_batch)
    differences = [
        f"  {key}: {given!r} in the config, {stored!r} in the checkpoint"
        for key, given, stored in config_differences(config, state.config, ["model"])
        if key.removeprefix("model.") not in NOT_PART_OF_THE_MODEL
    ]
    if differences:
        raise ConfigError(
            "\n".join(
                [
                    f"the config must describe the model in {checkpoint}, got:",
                    *differences,
                    f"Use the run's own config ({checkpoint.parent.parent / 'config.yaml'}), or remove these settings: "
                    "model settings missing from the config come from the checkpoint.",
                ]
            )
        )
    return config


def score_results_file(config: Config, detections: Path, *, split: Split, output_dir: Path) -> Metrics:
    """Score a COCO results file against a config's annotations; the images need not exist.

    Raises:
        ResultsError: lists every problem of the file.
        ConfigError, DatasetError: the config has no such split, or its annotations cannot be used.
    """
    dataset = read_coco(Path(split_config(config, split).annotations), None, on_error=config.data.on_error)
    _print_summary(dataset, config, Console(highlight=False, soft_wrap=True))
    ground_truth = dataset.ground_truth()
    notes: list[str] = []
    file_names = [dataset.file_name(i) for i in range(len(dataset))]
    results = load_results(detections, ground_truth, file_ids=dataset.file_ids, file_names=file_names, notes=notes)
    for note in notes:
        print(f"note: {printable(note)}")
    metrics = evaluate(ground_truth, results, engine=config.eval.engine, max_dets=config.eval.max_dets)
    make_folder(output_dir)
    _write(metrics, results, dataset, output_dir)
    return metrics


def split_config(config: Config, split: Split) -> SplitConfig:
    """The data of a split.

    Raises:
        ConfigError: the config has no such split.
    """
    data: SplitConfig | None = getattr(config.data, split)
    if data is None:
        raise ConfigError(
            f"data.{split} must name images and annotations to score; add it to the config, or give "
            f"data.{split}.images=DIR data.{split}.annotations=FILE.json"
        )
    return data


def _print_summary(dataset: CocoDataset, config: Config, console: Console) -> None:
    console.print(dataset.summary(), markup=False)
    for line in ground_truth_warnings(dataset.ground_truth(), config.eval.max_dets):
        console.print(f"warning: {line}", style="yellow", markup=False)


def _write(metrics: Metrics, results: CocoResults, dataset: CocoDataset, output_dir: Path) -> None:
    write_results(output_dir / "detections.json", results, dataset.file_ids)
    (output_dir / "metrics.json").unlink(missing_ok=True)  # on a full disk, those of other detections must not stay
    write_json(metrics.to_json(), output_dir / "metrics.json")
