"""The whole detector against torchvision's, with the same random weights."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection import retinanet_resnet50_fpn, retinanet_resnet50_fpn_v2
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, box_iou

from detector.anchors import pyramid_grids
from detector.assign.max_iou import MaxIoUAssigner
from detector.config import BoxLossKind, HeadConfig, ModelConfig
from detector.inference.postprocess import postprocess
from detector.losses import RetinaNetLoss
from detector.models import RetinaNet, build_model
from detector.structures import Detections, Targets

CLASSES = 7
ANCHORS: dict[str, Any] = {
    "sizes": [[float(x), float(int(x * 2 ** (1 / 3))), float(int(x * 2 ** (2 / 3)))] for x in (32, 64, 128, 256, 512)],
    "octave_scales": [1.0],
}
COMPAT: dict[str, Any] = {"anchor_spacing": "grid", "anchor_center_offset": 0.0, "anchor_rounding": "integer"}


class Pair(NamedTuple):
    """torchvision's detector and ours, with the same weights."""

    reference: Any
    ours: RetinaNet
    box: BoxLossKind
    tower_step: int
    """Number of our modules per convolution of a tower."""


class Unchanged(nn.Module):
    """Replaces torchvision's transform: images and detections stay unchanged."""

    def __init__(self, sizes: list[tuple[int, int]]) -> None:
        super().__init__()
        self.sizes = sizes

    def forward(self, images: Tensor, targets: Any) -> tuple[ImageList, Any]:
        return ImageList(images, self.sizes), targets

    def postprocess(self, result: Any, sizes: Any, original_sizes: Any) -> Any:
        return result


def randomize(model: Any, seed: int) -> None:
    """Set weights for which every layer matters and there are hundreds of detections of all classes."""
    torch.manual_seed(seed)
    images = torch.randn(2, 3, 128, 128)
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            nn.init.uniform_(norm.weight, 0.4, 0.8)  # a deep random network explodes with 1
            nn.init.normal_(norm.bias, std=0.2)
            norm.momentum = 1.0
        model.train()
        model.backbone(images)  # statistics as they would be, then disturbed
        model.eval()
        for norm in norms:
            mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
            mean.add_(torch.randn_like(mean) * 0.2 * var.sqrt())
            var.mul_(torch.empty_like(var).uniform_(0.7, 1.4))
        classes, boxes = model.head.classification_head, model.head.regression_head
        for module in [*classes.conv.modules(), *boxes.conv.modules()]:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.GroupNorm):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
        finest = model.backbone(images)["0"]
        for predictor, tower, level, spread in (
            (classes.cls_logits, classes.conv, -3.0, 1.0),
            (boxes.bbox_reg, boxes.conv, 0.0, 0.3),
        ):
            predictor.bias.zero_()
            out = predictor(tower(finest))
            factor = spread / out.std(dim=(0, 2, 3))
            predictor.weight.mul_(factor[:, None, None, None])
            predictor.bias.copy_(level - factor * out.mean(dim=(0, 2, 3)))


def freeze_batch_norms(module: nn.Module) -> None:
    """BatchNorm2d to FrozenBatchNorm2d, as torchvision builds its first RetinaNet with weights."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.num_features)
            frozen.load_state_dict(child.state_dict())
            setattr(module, name, frozen)
        else:
            freeze_batch_norms(child)


def our_name(key: str, tower_step: int) -> str:
    """Convert torchvision's name of a tensor to ours."""
    key = key.replace("backbone.body.", "backbone.").replace("backbone.fpn.", "fpn.")
    key = re.sub(r"inner_blocks\.(\d)\.0", r"lateral.\1", key)
    key = re.sub(r"layer_blocks\.(\d)\.0", r"output.\1", key)
    key = key.replace("extra_blocks.", "")
    key = key.replace("head.classification_head.", "cls_subnet.").replace("head.regression_head.", "box_subnet.")
    key = key.replace("cls_logits", "predictor").replace("bbox_reg", "predictor")
    return re.sub(r"conv\.(\d)\.(\d)", lambda m: f"tower.{int(m[1]) * tower_step + int(m[2])}", key)


def v1() -> Pair:
    reference = retinanet_resnet50_fpn(weights=None, weights_backbone=None, num_classes=CLASSES)
    randomize(reference, 0)
    freeze_batch_norms(reference)
    overwrite_eps(reference, 0.0)  # as torchvision does for its weights
    config = ModelConfig.model_validate(
        {
            "norm": "frozen_bn", "trainable_layers": 5, "anchors": ANCHORS,
            "compat": {**COMPAT, "norm_eps": 0.0, "p6_from": "p5"},
        },
        strict=False,
    )  # fmt: skip
    ours = build_model(config, CLASSES)
    ours.load_state_dict({our_name(key, 2): value for key, value in reference.state_dict().items()})
    return Pair(reference.eval(), ours.eval(), "l1", 2)


def v2() -> Pair:
    reference = retinanet_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=CLASSES)
    randomize(reference, 1)
    config = ModelConfig.model_validate(
        {"norm": "bn", "trainable_layers": 5, "head": {"norm": "gn"}, "anchors": ANCHORS, "compat": COMPAT},
        strict=False,
    )
    ours = build_model(config, CLASSES)
    ours.load_state_dict({our_name(key, 3): value for key, value in reference.state_dict().items()})
    return Pair(reference.eval(), ours.eval(), "giou", 3)


@pytest.fixture(scope="module", params=[v1, v2], ids=["v1", "v2"])
def pair(request: pytest.FixtureRequest) -> Pair:
    torch.manual_seed(0)  # independent of earlier tests in this process
    made: Pair = request.param()
    return made


def padded_images(sizes: list[tuple[int, int]], padded: tuple[int, int]) -> Tensor:
    """Normalised images, zero where padded."""
    random = torch.Generator().manual_seed(0)
    batch = torch.zeros(len(sizes), 3, *padded)
    for image, (height, width) in zip(batch, sizes, strict=True):
        image[:, :height, :width] = torch.randn(3, height, width, generator=random)
    return batch


@pytest.mark.parametrize(
    ("sizes", "padded"),
    [
        ([(128, 128)], (128, 128)),
        ([(224, 301)], (224, 320)),  # no multiple of 128: uneven strides
        ([(97, 130), (160, 101)], (161, 131)),  # odd padded sizes, which neither uses, must agree too
    ],
)
def test_detections_equal_torchvisions(pair: Pair, sizes: list[tuple[int, int]], padded: tuple[int, int]) -> None:
    images = padded_images(sizes, padded)
    pair.reference.transform = Unchanged(sizes)
    with torch.no_grad():
        expected = pair.reference(images)
        found = postprocess(
            pair.ours.forward_normalized(images),
            torch.tensor(sizes),
            score_thresh=0.05,
            topk_candidates=1000,
            nms_thresh=0.5,
            detections_per_img=300,
        )
    for ours, reference in zip(found, expected, strict=True):
        assert len(reference["boxes"]) >= 200
        assert len(reference["labels"].unique()) == CLASSES
        assert len(ours) == pytest.approx(len(reference["boxes"]), rel=0.01)
        assert compare(ours, reference)[0] <= 0.01 * len(ours)  # near-ties of non-maximum suppression


def compare(ours: Detections, reference: dict[str, Tensor]) -> tuple[int, float, float]:
    """Match detections one to one within 1e-3 px and 1e-5: number of unmatched ones, largest errors of the others."""
    free = torch.ones(len(reference["boxes"]), dtype=torch.bool)
    unmatched, box_error, score_error = 0, 0.0, 0.0
    for box, score, label in zip(ours.boxes, ours.scores, ours.labels, strict=True):
        distance = (reference["boxes"] - box).abs().amax(dim=1)
        off = (reference["scores"] - score).abs()
        fits = free & (distance <= 1e-3) & (off <= 1e-5) & (reference["labels"] == label)
        if not fits.any():
            unmatched += 1
            continue
        match = int(torch.where(fits, distance, torch.inf).argmin())
        free[match] = False
        box_error, score_error = max(box_error, distance[match].item()), max(score_error, off[match].item())
    return unmatched, box_error, score_error


def test_comparison_detects_a_shifted_box_and_a_wrong_class() -> None:
    """The test above relies on this."""
    boxes = torch.tensor([[0.0, 0.0, 5.0, 5.0], [9.0, 9.0, 20.0, 20.0]])
    ours = Detections(boxes, torch.tensor([0.9, 0.8]), torch.tensor([0, 1]))
    reference = {"boxes": boxes, "scores": ours.scores, "labels": ours.labels}
    assert compare(ours, reference)[0] == 0
    assert compare(ours, {**reference, "boxes": boxes + 0.002})[0] == 2
    assert compare(ours, {**reference, "labels": torch.tensor([0, 0])})[0] == 1
    assert compare(ours, {**reference, "scores": ours.scores + 2e-5})[0] == 2
    assert (
        compare(ours, {key: value[:1].repeat(2, *[1] * (value.dim() - 1)) for key, value in reference.items()})[0] == 1
    )


def random_objects(n: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    low = torch.rand(n, 2, generator=random) * torch.tensor([size[1] * 0.6, size[0] * 0.6])
    high = low + 8 + torch.rand(n, 2, generator=random) * torch.tensor([size[1] * 0.4, size[0] * 0.4])
    return torch.cat([low, high.minimum(torch.tensor([size[1], size[0]]))], dim=1), torch.randint(
        0, CLASSES, (n,), generator=random
    )


@pytest.mark.parametrize("counts", [[0], [6], [5, 0, 9]])
def test_losses_and_gradients_of_all_parameters_equal_torchvisions(pair: Pair, counts: list[int]) -> None:
    size = (96, 128)
    images = padded_images([size] * len(counts), size)
    objects = [random_objects(n, size, seed) for seed, n in enumerate(counts)]
    pair.reference.transform = Unchanged([size] * len(counts))
    pair.reference.zero_grad()
    pair.reference.training = True  # of the outermost module only: losses instead of detections, statistics as they are
    try:
        expected = pair.reference(images, [{"boxes": boxes, "labels": labels} for boxes, labels in objects])
    finally:
        pair.reference.training = False
    torch.autograd.backward(expected["classification"] + expected["bbox_regression"])

    targets = Targets(
        pad_sequence([boxes for boxes, _ in objects], batch_first=True),
        pad_sequence([labels for _, labels in objects], batch_first=True, padding_value=-1),
        torch.zeros(len(counts), 0, 4),
    )
    pair.ours.zero_grad()
    outputs = pair.ours.forward_normalized(images)
    found = RetinaNetLoss(box=pair.box, normalizer="per_image", assigner=MaxIoUAssigner(low_quality_matches=True))(
        outputs, targets
    )
    torch.autograd.backward(found["loss_cls"] + found["loss_box"])

    torch.testing.assert_close(found["loss_cls"], expected["classification"], rtol=1e-5, atol=0)
    torch.testing.assert_close(found["loss_box"], expected["bbox_regression"], rtol=1e-5, atol=0)
    own = dict(pair.ours.named_parameters())
    for name, parameter in pair.reference.named_parameters():
        ours, reference = own.pop(our_name(name, pair.tower_step)).grad, parameter.grad
        assert ours is not None, name
        assert reference is not None, name
        assert (reference.norm() > 0) == (sum(counts) > 0 or "regression_head" not in name), name
        assert (ours - reference).norm() <= 1e-3 * reference.norm(), name
    assert not own


def small_config(**settings: Any) -> ModelConfig:
    values = {"backbone": "resnet18", "backbone_weights": "none", "norm": "bn", "fpn_channels": 16, **settings}
    return ModelConfig.model_validate({"head": {"depth": 1}, **values}, strict=False)


@pytest.mark.parametrize("size", [(1, 1), (32, 96), (128, 256), (33, 190), (161, 99), (224, 320)])
@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_pyramid_grids_are_those_of_the_real_feature_maps(size: tuple[int, int], p6_from: str) -> None:
    model = build_model(small_config(compat={"p6_from": p6_from}), 2).eval()
    with torch.no_grad():
        features = model.fpn(model.backbone(torch.zeros(1, 3, *size)))
        outputs = model.forward_normalized(torch.zeros(1, 3, *size))
    assert [tuple(f.shape[-2:]) for f in features] == pyramid_grids(size)
    assert outputs.all_cls_logits().shape == (1, len(outputs.anchors), 2)
    assert outputs.all_box_deltas().shape == (1, len(outputs.anchors), 4)


def test_every_output_belongs_to_its_own_anchor() -> None:
    """A single bright spot changes the logits of the anchors around it most."""
    torch.manual_seed(0)
    model = build_model(small_config(head={"depth": 0}), 1).eval()
    with torch.no_grad():
        plain = model.forward_normalized(torch.zeros(1, 3, 256, 384))
        spot = torch.zeros(1, 3, 256, 384)
        spot[..., 60:68, 300:308] = 5.0
        change = (model.forward_normalized(spot).cls_logits[0] - plain.cls_logits[0]).abs().amax(dim=(0, 2))
    anchors = plain.anchors[: len(change)]
    center = (anchors[:, :2] + anchors[:, 2:]) / 2
    x, y = ((center * change[:, None]).sum(dim=0) / change.sum()).tolist()
    assert abs(x - 304) < 24
    assert abs(y - 64) < 24


def test_padding_is_zero_after_normalization_whatever_its_values_were() -> None:
    model = build_model(small_config(), 2)
    images = torch.full((2, 3, 32, 64), 200, dtype=torch.uint8)
    sizes = torch.tensor([[32, 64], [10, 20]])
    normalized = model.normalize(images, sizes)
    expected = (200 - torch.tensor([123.675, 116.28, 103.53])) / torch.tensor([58.395, 57.12, 57.375])
    torch.testing.assert_close(normalized[0], expected[:, None, None].expand(3, 32, 64))
    torch.testing.assert_close(normalized[1, :, :10, :20], expected[:, None, None].expand(3, 10, 20))
    assert not normalized[1, :, 10:].any()
    assert not normalized[1, :, :, 20:].any()
    assert torch.equal(model.normalize(images.float(), sizes), normalized)
    last = images.contiguous(memory_format=torch.channels_last)
    assert model.normalize(last, sizes).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.normalize(last, sizes), normalized)


def test_training_and_evaluation_give_the_same_outputs_without_batch_statistics() -> None:
    torch.manual_seed(0)
    model = build_model(small_config(norm="gn"), 2)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        training, evaluation = model.train().forward_normalized(images), model.eval().forward_normalized(images)
    assert torch.equal(training.all_cls_logits(), evaluation.all_cls_logits())


def test_every_anchor_starts_with_the_prior_score() -> None:
    model = build_model(small_config(head={"depth": 2, "prior_prob": 0.03}), 5).eval()
    with torch.no_grad():
        scores = model.forward_normalized(torch.zeros(1, 3, 128, 128)).all_cls_logits().sigmoid()
    torch.testing.assert_close(scores, torch.full_like(scores, 0.03), rtol=0.1, atol=0)


def test_an_empty_batch_of_objects_reaches_every_parameter_with_finite_gradients() -> None:
    model = build_model(small_config(), 2)
    outputs = model.forward_normalized(torch.randn(2, 3, 64, 64))
    targets = Targets(torch.zeros(2, 0, 4), torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 4))
    losses = RetinaNetLoss()(outputs, targets)
    torch.autograd.backward(losses["loss_cls"] + losses["loss_box"])
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name  # DDP waits for every one of them
        assert parameter.grad.isfinite().all(), name
    assert not any(p.grad.any() for p in model.box_subnet.parameters() if p.grad is not None)


@pytest.mark.parametrize("channels", [None, 32])
@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("norm", ["none", "gn"])
def test_heads_of_any_depth_and_width_are_built(depth: int, channels: int | None, norm: Any) -> None:
    head = HeadConfig(depth=depth, channels=channels, norm=norm)
    model = build_model(small_config(fpn_channels=32, head=head.model_dump()), 3)
    assert len([m for m in model.cls_subnet.tower if isinstance(m, nn.Conv2d)]) == depth
    assert all((m.bias is None) == (norm == "gn") for m in model.cls_subnet.tower if isinstance(m, nn.Conv2d))
    assert model.cls_subnet.predictor.out_channels == 27
    assert model.box_subnet.predictor.out_channels == 36


def test_relu_before_p7_is_optional() -> None:
    torch.manual_seed(0)
    model = build_model(small_config(), 2).eval()
    features = [torch.randn(1, c, s, s) for c, s in zip((128, 256, 512), (16, 8, 4), strict=True)]
    with torch.no_grad():
        with_relu = model.fpn(features)
        model.fpn.relu_before_p7 = False
        without = model.fpn(features)
    assert all(torch.equal(a, b) for a, b in zip(with_relu[:4], without[:4], strict=True))
    assert not torch.equal(with_relu[4], without[4])


def test_the_compared_boxes_and_scores_vary(pair: Pair) -> None:
    """Random weights must give boxes that differ from their anchors, and scores that differ from each other."""
    images = padded_images([(128, 128)], (128, 128))
    with torch.no_grad():
        outputs = pair.ours.forward_normalized(images)
        found = postprocess(outputs, torch.tensor([[128, 128]]))[0]
    assert outputs.all_box_deltas().abs().mean() > 0.05
    assert found.scores.std() > 0.01
    assert box_iou(found.boxes, outputs.anchors).amax(dim=1).median() < 0.95


@pytest.mark.parametrize("shape", [(64, 32), (96, 64), (32, 96), (160, 32), (256, 128), (192, 96)])
@pytest.mark.parametrize("p6_from", ["c5", "p5"])
def test_narrow_images_in_bf16_give_the_features_and_gradients_of_fp32(p6_from: str, shape: tuple[int, int]) -> None:
    """P6 or P7 is computed from one or two columns of cells there, for which oneDNN would use uninitialized memory."""
    torch.manual_seed(0)
    config = small_config(fpn_channels=256, head={}, compat={"p6_from": p6_from})
    fpn = build_model(config, 1).fpn
    features = [torch.randn(2, c, -(-shape[0] // s), -(-shape[1] // s)) for c, s in ((128, 8), (256, 16), (512, 32))]
    results = []
    for low in (False, True):
        for _ in range(3):
            dirty = [torch.full((size,), 1e30) for size in (64, 1000, 9216, 40000, 200000)]
            del dirty
            fpn.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=low):
                levels = fpn(features)
            torch.autograd.backward(sum(level.float().square().sum() for level in levels))
        gradients = [p.grad.clone() for p in fpn.parameters() if p.grad is not None]
        results.append([*(level.detach().float() for level in levels), *gradients])
    for exact, low_precision in zip(*results, strict=True):
        assert (exact - low_precision).abs().max() <= 0.1 * exact.abs().max()


@pytest.mark.parametrize("shape", [(64, 16), (128, 32), (32, 48)])
def test_a_backbone_in_bf16_gives_the_features_of_fp32_for_the_narrowest_images(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    backbone = build_model(ModelConfig(backbone="resnet18", backbone_weights="none", norm="gn"), 1).backbone
    images = torch.randn(2, 3, *shape)
    with torch.no_grad():
        exact = backbone(images)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            low_precision = backbone(images)
    for a, b in zip(exact, low_precision, strict=True):
        assert (a - b).abs().max() <= 0.1 * a.abs().max()
