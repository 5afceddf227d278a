"""Other backbones and other levels than C3 to C5 and P3 to P7 need nothing but their own numbers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detector.anchors import STRIDES, AnchorGenerator, best_anchor_iou, pyramid_grids
from detector.boxes import pairwise_iou
from detector.config import ModelConfig
from detector.inference.detector import inference_copy
from detector.inference.postprocess import postprocess, postprocess_batched
from detector.losses import RetinaNetLoss
from detector.models import RetinaNet, build_model
from detector.models.convolution import FrozenBatchNorm2d, fold_norm, normed_conv
from detector.models.fpn import FeaturePyramid
from detector.models.heads import Subnet
from detector.structures import Targets

CLASSES = 3


class FiveLayers(nn.Module):
    """A stem and C2 to C5, one convolution each."""

    channels = (8, 12, 16, 20)
    strides = (4, 8, 16, 32)
    checkpointing = False

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 6, *self.channels)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1, bias=False) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(FrozenBatchNorm2d(b) for b in widths[1:])

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def fold_norms(self) -> None:
        for number in range(len(self.convs)):
            fold_norm(self, f"convs.{number}", f"norms.{number}")

    def forward(self, images: Tensor) -> list[Tensor]:
        outputs = [images]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            outputs.append(normed_conv(conv, norm, outputs[-1], relu=True))
        return outputs[2:]


def model_with(backbone: Any, *, num_extra_levels: int, p6_from: Any = "c5") -> RetinaNet:
    """A RetinaNet around a backbone, with random statistics and some scores above the threshold."""
    fpn = FeaturePyramid(
        backbone.channels, 16, in_strides=backbone.strides, num_extra_levels=num_extra_levels, p6_from=p6_from,
        relu_before_p7=True,
    )  # fmt: skip
    anchors = AnchorGenerator(
        [4 * stride for stride in fpn.strides], [1.0, 1.5], ratios=[0.5, 1.0, 2.0], spacing="fixed", center_offset=0.5,
        rounding="none", strides=fpn.strides,
    )  # fmt: skip
    subnets = [Subnet(16, n, num_anchors=anchors.num_per_cell, depth=1, channels=16, norm="none") for n in (CLASSES, 4)]
    model = RetinaNet(
        backbone, fpn, cls_subnet=subnets[0], box_subnet=subnets[1], anchors=anchors, pixel_mean=(120.0, 120.0, 120.0),
        pixel_std=(60.0, 60.0, 60.0),
    )  # fmt: skip
    nn.init.normal_(model.cls_subnet.predictor.weight, std=0.3)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            nn.init.uniform_(module.weight, 0.7, 1.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def batch() -> tuple[Tensor, Tensor]:
    images = torch.randint(0, 256, (2, 3, 128, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return images, torch.tensor([[128, 180], [100, 192]])


@pytest.fixture
def model() -> RetinaNet:
    """P2 to P6 of a backbone with C2 to C5."""
    torch.manual_seed(0)
    return model_with(FiveLayers(), num_extra_levels=1)


def test_a_second_backbone_gives_levels_of_its_own_strides(model: RetinaNet) -> None:
    images, sizes = batch()
    assert model.fpn.strides == (4, 8, 16, 32, 64)
    assert [key for key in model.fpn.state_dict() if key.startswith("p")] == ["p6.weight", "p6.bias"]
    outputs = model(images, sizes)
    grids = [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]
    assert model.grids_of(images) == grids
    assert [logits.shape for logits in outputs.cls_logits] == [(2, 6 * h * w, CLASSES) for h, w in grids]
    assert [len(anchors) for anchors in outputs.level_anchors()] == [6 * h * w for h, w in grids]
    first = outputs.level_anchors()[0][:6]
    torch.testing.assert_close((first[:, :2] + first[:, 2:]) / 2, torch.full((6, 2), 2.0))  # half a stride


def test_a_second_backbone_is_trained(model: RetinaNet) -> None:
    images, sizes = batch()
    boxes = torch.tensor([[[20.0, 20.0, 60.0, 70.0]], [[100.0, 10.0, 116.0, 26.0]]])
    targets = Targets(boxes, torch.tensor([[0], [2]]), torch.zeros(2, 0, 4))
    outputs = model(images, sizes)
    losses = RetinaNetLoss()(outputs, targets)
    torch.autograd.backward(losses["loss_cls"] + losses["loss_box"])
    assert losses["loss_box"] > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_detections_of_a_second_backbone_lie_in_the_image(model: RetinaNet) -> None:
    images, sizes = batch()
    with torch.no_grad():
        outputs = model.eval()(images, sizes)
    found = postprocess(outputs, sizes)
    batched = postprocess_batched(
        outputs, sizes, score_thresh=0.05, topk_candidates=1000, nms_thresh=0.5, detections_per_img=100
    ).unpack(sizes, None)
    for one, other, (height, width) in zip(found, batched, sizes.tolist(), strict=True):
        assert len(one) == len(other) > 10
        torch.testing.assert_close(one.scores, other.scores)
        assert (one.boxes >= 0).all()
        assert (one.boxes <= torch.tensor([width, height, width, height])).all()


def test_an_inference_copy_of_a_second_backbone_is_folded_and_computes_the_same(model: RetinaNet) -> None:
    images, sizes = batch()
    with torch.no_grad():
        expected = model.eval()(images, sizes).all_cls_logits()
        model.backbone.fold_norms()
        torch.testing.assert_close(model(images, sizes).all_cls_logits(), expected, rtol=1e-4, atol=1e-4)
        copied = inference_copy(model, torch.bfloat16)
        found = copied(images, sizes).all_cls_logits()
    assert not [m for m in copied.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert copied.backbone.dtype == found.dtype == torch.bfloat16
    assert (found.float() - expected).norm() < 0.05 * (expected - expected.mean()).norm()


@pytest.mark.parametrize(("num_extra_levels", "levels"), [(0, "P3..P5"), (1, "P3..P6"), (3, "P3..P8")])
@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_a_pyramid_has_any_number_of_levels(num_extra_levels: int, levels: str, p6_from: str) -> None:
    config = ModelConfig.model_validate({"backbone": "resnet18", "norm": "bn"}, strict=False)
    model = model_with(build_model(config, 1).backbone, num_extra_levels=num_extra_levels, p6_from=p6_from).eval()
    assert model.fpn.strides == tuple(8 * 2**level for level in range(3 + num_extra_levels)), levels
    size = (130, 257)
    with torch.no_grad():
        outputs = model.forward_normalized(torch.randn(1, 3, *size))
    grids = pyramid_grids(size, model.fpn.strides)
    assert [logits.shape[1] for logits in outputs.cls_logits] == [6 * h * w for h, w in grids]
    boxes = torch.tensor([[5.0, 5.0, 40.0, 30.0], [0.0, 0.0, 250.0, 120.0]])
    torch.testing.assert_close(
        best_anchor_iou(model.anchors, boxes, size), pairwise_iou(boxes, outputs.anchors).amax(dim=1)
    )


def test_the_default_levels_are_p3_to_p7() -> None:
    model = build_model(ModelConfig.model_validate({"backbone": "resnet18", "norm": "bn"}, strict=False), 1)
    assert model.fpn.strides == model.anchors.strides == STRIDES
    assert [key for key in model.fpn.state_dict() if key.startswith("p")] == [
        "p6.weight", "p6.bias", "p7.weight", "p7.bias",
    ]  # fmt: skip
