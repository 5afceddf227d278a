"""The compiled training step against the plain one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from detector.anchors import pyramid_grids
from detector.losses import RetinaNetLoss, build_loss
from detector.models import RetinaNet, build_model
from detector.structures import HeadOutputs, Targets
from detector.training.compile import compile_step
from tests.tiny import TinyData, tiny_config

CPU = torch.device("cpu")
SIZE = (96, 128)


def batch(count: int, device: torch.device) -> Targets:
    """Of two images, the first with `count` objects, some of which an ignore region covers."""
    random = torch.Generator().manual_seed(count)
    length = max(8, count) if count else 0
    boxes, labels, ignore = torch.zeros(2, length, 4), torch.full((2, length), -1), torch.zeros(2, 8, 4)
    corner = torch.rand(count, 2, generator=random) * 60
    boxes[0, :count] = torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=random) * 28], dim=1)
    labels[0, :count] = torch.randint(0, 3, (count,), generator=random)
    ignore[0, 0] = torch.tensor([5.0, 5.0, 80.0, 70.0])
    return Targets(*(t.to(device) for t in (boxes, labels, ignore)))


def losses_and_gradients(model: RetinaNet, loss: RetinaNetLoss, count: int, device: torch.device) -> list[Tensor]:
    """Matches, losses and gradients of random outputs."""
    targets = batch(count, device)
    images = torch.randint(0, 256, (2, 3, *SIZE), dtype=torch.uint8, device=device)
    random = torch.Generator().manual_seed(0)
    anchors = model.anchors_of(images)
    counts = [h * w * 9 for h, w in pyramid_grids(SIZE)]
    width = 3 + (model.activation == "softmax")
    logits = [(torch.randn(2, n, width, generator=random) - 2).to(device).requires_grad_() for n in counts]
    deltas = [(torch.randn(2, n, 4, generator=random) * 0.3).to(device).requires_grad_() for n in counts]
    assignment = loss.assign(anchors, targets)
    parts = loss(HeadOutputs(tuple(logits), tuple(deltas), anchors, model.activation), targets, assignment=assignment)
    (parts["loss_cls"] + parts["loss_box"]).backward()
    gradients = [x.grad for x in (*logits, *deltas) if x.grad is not None]
    return [assignment.matched, parts["loss_cls"].detach(), parts["loss_box"].detach(), *gradients]


def compare(settings: dict[str, Any], backend: str, device: torch.device, data: TinyData, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, data, **settings)
    model, loss = build_model(config.model, 3).to(device), build_loss(config).to(device)
    counts = (0, 20)
    expected = [losses_and_gradients(model, loss, count, device) for count in counts]
    loss = build_loss(config).to(device)  # a new one, which nothing was compiled for
    compile_step(model, loss, backend=backend, fullgraph=True)
    for count, plain in zip(counts, expected, strict=True):
        found = losses_and_gradients(model, loss, count, device)
        assert torch.equal(found[0], plain[0])
        for actual, reference in zip(found[1:], plain[1:], strict=True):
            torch.testing.assert_close(actual, reference, rtol=1e-4, atol=1e-6)


SETTINGS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "a loss that asks for the quality of boxes": {"loss__cls": "varifocal"},
    "a loss that chooses examples": {"loss__cls": "ohem"},
    "softmax": {"model__head__activation": "softmax"},
    "alpha by class": {"loss__alpha": [0.2, 0.3, 0.4]},
    "giou, low-quality matches": {"loss__box": "giou", "matching__low_quality_matches": True},
    "per image": {"loss__normalizer": "per_image"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_one_graph_each_computes_what_the_plain_step_does(
    settings: dict[str, Any], data: TinyData, tmp_path: Path
) -> None:
    """Captured, which a break in a graph would make an error; code is not generated, which takes minutes. (The network
    is compiled in test_train.)"""
    compare(settings, "eager", CPU, data, tmp_path)


GENERATED = {name: settings for name, settings in SETTINGS.items() if settings.get("loss__cls") != "ohem"}


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.parametrize("settings", GENERATED.values(), ids=GENERATED)
def test_generated_code_computes_what_the_plain_step_does(
    settings: dict[str, Any], data: TinyData, tmp_path: Path
) -> None:
    """A CPU's code, of the operations that a GPU's is made of."""
    compare(settings, "inductor", CPU, data, tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("settings", GENERATED.values(), ids=GENERATED)
def test_a_gpus_generated_code_computes_what_the_plain_step_does(
    settings: dict[str, Any], data: TinyData, tmp_path: Path
) -> None:
    compare(settings, "inductor", torch.device("cuda"), data, tmp_path)
