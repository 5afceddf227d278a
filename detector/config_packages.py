"""Packages that only some settings need: they are looked for before anything slow is imported or computed."""

from __future__ import annotations

import importlib
from importlib.util import find_spec
from typing import Any

from detector.config import Config, Engine
from detector.errors import ConfigError

OTHER_ENGINE: dict[Engine, Engine] = {"hotcoco": "pycocotools", "pycocotools": "hotcoco"}


def require_packages(config: Config, *, training: bool) -> None:
    """Raise ConfigError if a package that the settings need is not installed.

    Args:
        config: of a run.
        training: whether it trains, which needs the packages of `data.augment`, too.
    """
    scores = not training or config.data.val is not None or config.data.test is not None
    if scores and find_spec(config.eval.engine) is None:
        raise _engine_error(config.eval.engine, "it is not installed")
    if training and config.data.augment and find_spec("albumentations") is None:
        raise _augmentation_error("it is not installed")


def import_engine(engine: Engine, module: str) -> Any:
    """Import a module of the package that computes COCO's metrics.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise _engine_error(engine, str(error)) from None


def import_albumentations() -> Any:
    """Import the package of `data.augment`.

    Raises:
        ConfigError: it cannot be imported.
    """
    try:
        return importlib.import_module("albumentations")
    except ImportError as error:
        raise _augmentation_error(str(error)) from None


def _engine_error(engine: Engine, reason: str) -> ConfigError:
    other = OTHER_ENGINE[engine]
    return ConfigError(
        f"eval.engine={engine} needs {engine}: {reason}; pip install {engine}, or set eval.engine={other}"
    )


def _augmentation_error(reason: str) -> ConfigError:
    return ConfigError(
        f"data.augment needs albumentations: {reason}; pip install albumentations, or set data.augment=[]"
    )
