"""Write the files of format 1 in this folder, with the code of commit 1dc7cd2, the last one that wrote that format:

git worktree add ../format_1 1dc7cd2
PYTHONPATH=../format_1 python tests/golden/make_format_1.py tests/golden/format_1
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck

SETTINGS: dict[str, Any] = {
    "model": {
        "backbone": "resnet50", "backbone_weights": "none", "norm": "bn", "norm_eps": 0.001, "stride_in": "1x1",
        "fpn_channels": 8, "p6_from": "p5", "relu_before_p7": False, "channel_order": "bgr", "resize": "pil_bilinear",
        "pad": "batch_max_32", "head": {"depth": 1, "channels": 32, "norm": "gn", "bias_before_norm": True},
        "anchors": {"octave_scales": [1.0], "strides": "grid", "center_offset": 0.0, "rounding": "integer"},
    },
    "postprocess": {
        "score_thresh": 0.2, "detections_per_img": 20, "clip": "after_nms", "drop_empty": True, "bound_shrinking": True,
    },
    "data": {"min_size": 160, "max_size": 224},
    "train": {"epochs": 3, "ema": {"decay": 0.9}, "loss_images": 0},
}  # fmt: skip
"""Every setting that moved after format 1 differs from its default."""


def tiny_resnet(_: str, norm: Callable[[int], nn.Module]) -> Any:
    """A ResNet of one bottleneck block per layer, 2 to 16 channels wide, so that a checkpoint is small."""

    def layer(inputs: int, planes: int, stride: int) -> nn.Sequential:
        shortcut = nn.Sequential(nn.Conv2d(inputs, 4 * planes, 1, stride, bias=False), norm(4 * planes))
        return nn.Sequential(Bottleneck(inputs, planes, stride, shortcut, norm_layer=norm))

    layers = {f"layer{i}": layer(4 if i == 1 else 4 * 2 ** (i - 1), 2**i, min(i, 2)) for i in range(1, 5)}
    modules = nn.ModuleDict(
        {
            "conv1": nn.Conv2d(3, 4, 7, 2, 3, bias=False), "bn1": norm(4), "relu": nn.ReLU(),
            "maxpool": nn.MaxPool2d(3, 2, 1), **layers,
        }
    )  # fmt: skip
    return SimpleNamespace(**modules, modules=modules.modules, fc=SimpleNamespace(in_features=64))


def image() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """(96, 120, 3) uint8 RGB: noise, the same on every machine."""
    return np.random.default_rng(0).integers(0, 256, (96, 120, 3), dtype=np.uint8)


def digest(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names and values of tensors."""
    summed = hashlib.sha256()
    for name, tensor in weights.items():
        summed.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return summed.hexdigest()


def main(folder: Path) -> None:
    """Write checkpoint.pt, config.yaml and expected.json."""
    # of that commit, whose modules have other names than today's
    config_module, checkpoint, predict, models, structures = map(
        importlib.import_module,
        ("detector.config", "detector.engine.checkpoint", "detector.engine.predict", "detector.models",
         "detector.structures"),
    )  # fmt: skip
    importlib.import_module("detector.models.backbone")._torchvision_resnet = tiny_resnet  # type: ignore[attr-defined]
    torch.manual_seed(0)
    config = config_module.config_from_dict(SETTINGS, "make_format_1.py")
    model = models.build_model(config.model, 2)
    model.cls_subnet.predictor.weight.data.mul_(3)  # scores on both sides of the threshold
    model.cls_subnet.predictor.bias.data.fill_(-1.5)
    model.box_subnet.predictor.weight.data.mul_(5)
    ema = dict(model.state_dict())  # the same tensors, stored once
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = checkpoint.TrainState(
        config, structures.Categories((3, 7), ("cat", "d\u00f6g")), model.state_dict(), step=7, ema=ema,
        optimizer=optimizer.state_dict(), scaler={}, best_ap=0.25, unlogged=torch.ones(1, 5),
        versions={"torch": "2.15.0"}, micro_batch=2,
    )  # fmt: skip
    checkpoint.save_checkpoint(state, folder / "checkpoint.pt")
    (folder / "config.yaml").write_text(config.to_yaml())
    loaded = checkpoint.load_checkpoint(folder / "checkpoint.pt")
    found = predict.Predictor(loaded, device=torch.device("cpu"))(image())
    expected = {
        "model": digest(loaded.model), "ema": digest(ema), "boxes": found.boxes.tolist(),
        "scores": found.scores.tolist(), "labels": found.labels.tolist(),
    }  # fmt: skip
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
