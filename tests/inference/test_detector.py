"""The network in its form for inference against the original."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from detector.config import ModelConfig, Precision
from detector.inference.detector import Detector, inference_copy
from detector.inference.postprocess import postprocess
from detector.models import RetinaNet, build_model
from detector.models.convolution import FrozenBatchNorm2d
from tests.emulated_gpu import GPU, emulated_gpu

BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d)
SETTINGS: dict[str, Any] = {
    "score_thresh": 0.05, "topk_candidates": 200, "nms_thresh": 0.5, "detections_per_img": 50,
    "clip": "before_nms", "drop_empty": False, "bound_shrinking": False,
}  # fmt: skip


def model_with_statistics(norm: str, *, backbone: str = "resnet18") -> RetinaNet:
    """A model with non-trivial normalization statistics and some class scores above the threshold."""
    torch.manual_seed(0)
    config = {"backbone": backbone, "norm": norm, "trainable_layers": 5, "fpn_channels": 32, "head": {"depth": 1}}
    model = build_model(ModelConfig.model_validate(config, strict=False), 3).eval()
    for module in model.modules():
        if isinstance(module, BATCH_NORMS):
            for name, low, high in (("weight", 0.4, 0.8), ("bias", -0.2, 0.2), ("running_mean", -0.1, 0.1)):
                nn.init.uniform_(getattr(module, name), low, high)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
    nn.init.normal_(model.cls_subnet.predictor.weight, std=2.0)
    return model


def image_batch(batch: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (batch, 3, 96, 128), dtype=torch.uint8, generator=random)
    return images.contiguous(memory_format=torch.channels_last), torch.tensor(
        [[96, 128 - seed], [90, 101 + seed]][:batch]
    )


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
@pytest.mark.parametrize("norm", ["frozen_bn", "bn", "sync_bn", "gn"])
def test_folding_normalizations_keeps_the_features(norm: str, backbone: str) -> None:
    model = model_with_statistics(norm, backbone=backbone).double()
    images = torch.randn(1, 3, 65, 96, dtype=torch.float64)
    expected = model.backbone(images)
    model.backbone.fold_norms()
    assert not [m for m in model.get_submodule("backbone").modules() if isinstance(m, BATCH_NORMS)]
    for found, feature in zip(model.backbone(images), expected, strict=True):
        torch.testing.assert_close(found, feature, rtol=1e-10, atol=1e-10)


def test_normalizations_in_training_mode_are_not_folded() -> None:
    model = model_with_statistics("bn").train()
    model.backbone.fold_norms()
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.get_submodule("backbone").modules())


def test_a_copy_does_not_change_the_model() -> None:
    model = model_with_statistics("frozen_bn").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    copied = inference_copy(model, torch.bfloat16)
    assert copied.backbone.dtype == torch.bfloat16
    assert copied.pixel_mean.dtype == torch.float32
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("norm", ["frozen_bn", "gn"])
def test_a_copy_in_low_precision_gives_nearly_the_same_logits(norm: str) -> None:
    model = model_with_statistics(norm)
    images, sizes = image_batch(2)
    with torch.no_grad():
        expected = model(images, sizes).all_cls_logits()
        found = inference_copy(model, torch.bfloat16)(images, sizes).all_cls_logits()
    assert found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * (
        expected - expected.mean()
    ).norm()  # the logits themselves have 8 bits


def check_graphs(precision: Precision, device: torch.device) -> None:
    model = model_with_statistics("frozen_bn").to(device)
    model.to(memory_format=torch.channels_last)
    detector = Detector(model, SETTINGS, precision=precision, device=device)
    rounding = 0.0 if precision == "fp32" else 0.02  # the library's algorithms round differently
    for attempt in range(4):  # plain, captured, replayed
        for batch in (2, 1):
            images, sizes = image_batch(batch, seed=attempt)
            images = images.to(device)
            with torch.no_grad():
                outputs = detector.model(images, sizes.to(device))
            expected = postprocess(outputs, sizes, **SETTINGS)
            found = detector(images, sizes)
            for side in range(32, 32 + 65 * 32, 32):  # more sizes than the anchor cache holds
                detector.model.anchors_of(torch.empty(1, 3, side, 32, device=device))
            assert min(map(len, found)) > 5
            for ours, plain in zip(found, expected, strict=True):  # in any order, where scores are nearly equal
                near = (ours.boxes[:, None] - plain.boxes[None]).abs().amax(dim=2) < 0.1 + 2 * rounding
                same = near & ((ours.scores[:, None] - plain.scores[None]).abs() < 1e-3 + rounding)
                assert float(same.any(dim=1).float().mean()) > 0.9
                assert float(same.any(dim=0).float().mean()) > 0.9


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_captured_graph_gives_the_networks_detections(precision: Precision) -> None:
    check_graphs(precision, torch.device("cuda"))


def test_an_emulated_graph_gives_the_networks_detections() -> None:
    with emulated_gpu():
        check_graphs("fp32", GPU)
