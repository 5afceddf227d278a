"""RetinaNet-style object detection: train, evaluate and use a detector.

Importing this package is cheap: torch is loaded when a name below is first used.

    import detector

    metrics = detector.train("configs/quickstart.yaml", "runs/quickstart")
    model = detector.load_detector("runs/quickstart/checkpoints/best.pt")
    detections = model("image.jpg")

`docs/api.md` documents these names; they are stable. Everything else may change between versions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from detector.api import evaluate as evaluate
    from detector.api import load_detector as load_detector
    from detector.api import train as train
    from detector.config import Config as Config
    from detector.config_yaml import load_config as load_config
    from detector.errors import UserError as UserError
    from detector.inference.predictor import Predictor as Predictor
    from detector.losses import RetinaNetLoss as RetinaNetLoss
    from detector.losses import ghm_loss as ghm_loss
    from detector.losses import poly1_focal_loss as poly1_focal_loss
    from detector.losses import quality_focal_loss as quality_focal_loss
    from detector.losses import sigmoid_focal_loss as sigmoid_focal_loss
    from detector.losses import sigmoid_focal_star_loss as sigmoid_focal_star_loss
    from detector.losses import softmax_focal_loss as softmax_focal_loss
    from detector.losses import softmax_focal_star_loss as softmax_focal_star_loss
    from detector.losses import varifocal_loss as varifocal_loss
    from detector.structures import Detections as Detections

__version__ = "0.1.0"

_MODULES = {
    "train": "detector.api",
    "evaluate": "detector.api",
    "load_detector": "detector.api",
    "Config": "detector.config",
    "load_config": "detector.config_yaml",
    "UserError": "detector.errors",
    "Predictor": "detector.inference.predictor",
    "Detections": "detector.structures",
    "RetinaNetLoss": "detector.losses",
    "sigmoid_focal_loss": "detector.losses",
    "sigmoid_focal_star_loss": "detector.losses",
    "softmax_focal_loss": "detector.losses",
    "softmax_focal_star_loss": "detector.losses",
    "poly1_focal_loss": "detector.losses",
    "quality_focal_loss": "detector.losses",
    "varifocal_loss": "detector.losses",
    "ghm_loss": "detector.losses",
}
"""The public names and the modules that define them."""


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'detector' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
