"""The front door: train, evaluate and load a detector from Python. Everything heavy is imported where it is needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detector.config import Config
from detector.config_yaml import config_from_dict, load_config, with_overrides

if TYPE_CHECKING:
    from detector.evaluation.coco_metrics import Metrics
    from detector.inference.predictor import Predictor

ConfigLike = Config | str | Path | Mapping[str, Any]
"""A config, the path of its YAML file, or nested settings as in one."""


def train(
    config: ConfigLike,
    output_dir: str | Path,
    *,
    resume: Literal["auto"] | str | Path | None = None,
    init_from: str | Path | None = None,
    overrides: Iterable[str] = (),
) -> dict[str, Any]:
    """Train a detector; the same as `tools/train.py`.

    Args:
        config: the run's config, the path of its YAML file, or nested settings.
        output_dir: the run's folder.
        resume: "auto" to continue the run in `output_dir` if it has a checkpoint, or a checkpoint's path; None for a
            fresh run.
        init_from: a checkpoint to fine-tune from.
        overrides: settings to change, for example ["train.epochs=3"].

    Returns:
        The content of metrics.json: COCO's 12 numbers on the validation set, `per_class`, and `test` if there is a test
        set.

    Raises:
        UserError: anything wrong with the config, the data or the folder.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint saved.

    Example:
        >>> import detector
        >>> detector.train({"data": {"min_size": 64, "max_size": 32}}, "runs/bad")
        Traceback (most recent call last):
            ...
        detector.errors.ConfigError: the config has 1 mistake: ...
    """
    from detector.training.train import train as run_training

    settings = _as_config(config, overrides)
    if init_from is not None:
        training = settings.train.model_copy(update={"init_from": str(init_from)})
        settings = settings.model_copy(update={"train": training})
    return run_training(settings, Path(output_dir), resume=None if resume is None else str(resume))


def evaluate(
    checkpoint: str | Path,
    config: ConfigLike,
    *,
    split: Literal["val", "test"] = "val",
    output_dir: str | Path | None = None,
    overrides: Iterable[str] = (),
) -> Metrics:
    """Evaluate a checkpoint in COCO AP; the same as `tools/eval.py`.

    Args:
        checkpoint: gives the model and its classes. Checkpoints of torchvision's, detectron2's and mmdetection's
            RetinaNet are read as well.
        config: gives the data and the evaluation settings.
        split: which dataset of the config to use.
        output_dir: where metrics.json and detections.json are written; None: `eval_SPLIT` next to the checkpoint.
        overrides: settings to change, for example ["eval.batch_size=4"].

    Returns:
        `values` maps COCO's names (AP, AP50, ..., -1 where undefined) to numbers; `per_class` has one entry per class.

    Raises:
        UserError: anything wrong with the checkpoint, the config or the data.
    """
    from detector.evaluation.score import score_checkpoint

    path = Path(checkpoint)
    folder = path.parent / f"eval_{split}" if output_dir is None else Path(output_dir)
    return score_checkpoint(_as_config(config, overrides), path, split=split, output_dir=folder)


def load_detector(
    checkpoint: str | Path, *, device: Literal["auto", "cpu", "cuda", "mps"] = "auto", score_thresh: float = 0.3
) -> Predictor:
    """Load a detector, ready for images.

    Args:
        checkpoint: a checkpoint of this package, which needs nothing else, or a RetinaNet of torchvision, detectron2 or
            mmdetection. EMA weights are used where there are any. Nothing in the file is executed.
        device: auto: a CUDA device, else Apple's mps, else the CPU.
        score_thresh: minimum score of a detection.

    Returns:
        Call it with a path, a PIL image, a uint8 array (H, W, 3) in RGB, or a list of them; see `Predictor`.

    Raises:
        UserError: the checkpoint cannot be used.

    Example:
        >>> import detector
        >>> detector.load_detector("nowhere.pt")
        Traceback (most recent call last):
            ...
        detector.errors.CheckpointError: checkpoint nowhere.pt does not exist...
    """
    from detector.inference.predictor import load_predictor

    return load_predictor(checkpoint, device=device, score_thresh=score_thresh)


def _as_config(config: ConfigLike, overrides: Iterable[str]) -> Config:
    if isinstance(config, str | Path):
        return load_config(Path(config), overrides)
    if not isinstance(config, Config):
        config = config_from_dict(config, "the settings given to Python")
    return with_overrides(config, overrides) if (overrides := list(overrides)) else config
