"""Numerical faults planted into training: always at the same batch, so that they appear again when it is repeated."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from detector.datasets.coco import CocoDataset
from detector.losses.retinanet import RetinaNetLoss
from detector.models.resnet import Architecture
from detector.models.retinanet import RetinaNet

NARROW = Architecture(bottleneck=False, blocks=(1, 1, 1, 1), channels=(32, 32, 32, 64, 128))
"""A ResNet-18 with one narrow block per layer: a CPU computes fp16 very slowly."""

QUICK: dict[str, Any] = {
    "data__val": None, "data__min_size": 32, "data__max_size": 48, "train__epochs": 1, "train__batch_size": 2,
    "train__log_every": 4,
}  # fmt: skip
"""Settings of a run of six steps of two images."""

Kind = Literal["weight", "buffer", "target", "module output", "class loss", "gradient of the loss", "gradient"]

IMAGE = 40
"""The image whose target is NaN."""


class Explosive(torch.autograd.Function):
    """Changes nothing, but has no finite gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * torch.nan


class Fault:
    """A fault in the batch of a step of the first run, and in every repetition of it.

    Args:
        patch: undoes it.
        kind: of the fault; "target" is in `IMAGE` instead of the batch of a certain step.
        step: of the first run.
    """

    def __init__(self, patch: pytest.MonkeyPatch, kind: Kind, *, step: int) -> None:
        self.kind, self.step = kind, step
        self.always = False
        """Whether it is in every batch."""
        self.forward_passes = 0
        self.batch: int | None = None
        self.active = False
        tensors, loss, objects = RetinaNet.forward_tensors, RetinaNetLoss.forward, CocoDataset.objects

        def forward_tensors(model: RetinaNet, images: Tensor, image_sizes: Tensor) -> Any:
            self._enter(model, images)
            logits, deltas = tensors(model, images, image_sizes)
            if self.active and self.kind == "gradient":
                logits = (*logits[:2], Explosive.apply(logits[2]), *logits[3:])
            return logits, deltas

        def losses(self_: RetinaNetLoss, *arguments: Any, **named: Any) -> dict[str, Tensor]:
            parts = loss(self_, *arguments, **named)
            if self.active and self.kind == "class loss":
                parts["loss_cls"] = parts["loss_cls"] * torch.nan
            if self.active and self.kind == "gradient of the loss":
                parts["loss_cls"] = Explosive.apply(parts["loss_cls"])
            return parts

        def objects_of(dataset: CocoDataset, index: int) -> Any:
            found = objects(dataset, index)
            if self.kind == "target" and dataset.image_ids[index] == IMAGE:
                found.boxes[-1, 2] = np.nan
            return found

        patch.setattr(RetinaNet, "forward_tensors", forward_tensors)
        patch.setattr(RetinaNetLoss, "forward", losses)
        patch.setattr(CocoDataset, "objects", objects_of)

    def _enter(self, model: RetinaNet, images: Tensor) -> None:
        checksum = int(images.long().sum())
        if self.forward_passes == self.step:
            self.batch = checksum
        self.active = checksum == self.batch or self.always
        self.forward_passes += 1
        if not self.active:
            return
        with torch.no_grad():
            if self.kind == "weight":
                model.get_parameter("fpn.lateral.1.weight")[0, 3] = torch.nan
            if self.kind == "buffer":
                model.pixel_std.view(-1)[1] = torch.nan
            if self.kind == "module output":
                model.get_parameter("backbone.layer3.0.conv2.weight").fill_(3e38)
