"""ResNets and their layers against torchvision's; frozen stages; recomputed activations."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import Bottleneck
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

from detector.config import Backbone, Norm
from detector.models.convolution import FrozenBatchNorm2d, GroupNorm
from detector.models.resnet import ARCHITECTURES, STAGES, ResNet

NAMES = get_args(Backbone)
NORMS = get_args(Norm)


def resnet(name: str = "resnet18", norm: Norm = "bn", eps: float = 1e-5, trainable: int = 5) -> ResNet:
    return ResNet(name, norm=norm, norm_eps=eps, num_trainable_layers=trainable)


def torchvision_resnet(name: str) -> Any:
    if name == "resnext101_32x4d":  # which torchvision has no name for
        return torchvision.models.ResNet(Bottleneck, [3, 4, 23, 3], groups=32, width_per_group=4)
    return torchvision.models.get_model(name, weights=None)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_features_equal_torchvisions(name: str) -> None:
    torch.manual_seed(0)
    reference = torchvision_resnet(name).eval()
    for module in reference.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.get_buffer("running_mean"), std=0.1)
            nn.init.uniform_(module.get_buffer("running_var"), 0.5, 1.5)
            nn.init.uniform_(module.weight, 0.3, 0.7)
    ours = resnet(name).eval()
    keys = ours.load_state_dict(reference.state_dict(), strict=False)
    assert not keys.missing_keys
    assert all(key.startswith("fc.") for key in keys.unexpected_keys)
    images = torch.randn(1, 3, 65, 96)
    nodes = {"layer2": "c3", "layer3": "c4", "layer4": "c5"}
    with torch.no_grad():
        expected = create_feature_extractor(reference, nodes)(images)
        found = ours(images)
    for feature, reference_feature, channels in zip(found, expected.values(), ours.channels, strict=True):
        assert feature.shape[1] == channels
        assert torch.equal(feature, reference_feature)


def test_the_config_offers_every_architecture() -> None:
    assert {*NAMES} == {*ARCHITECTURES}


@pytest.mark.parametrize("name", NAMES)
def test_every_architecture_has_torchvisions_parameters_in_its_order(name: str) -> None:
    with torch.device("meta"):
        ours, reference = resnet(name), torchvision_resnet(name)
    expected = [(k, v.shape) for k, v in reference.state_dict().items() if not k.startswith("fc.")]
    assert [(k, v.shape) for k, v in ours.state_dict().items()] == expected
    wide = 512 if name in ("resnet18", "resnet34") else 2048
    assert ours.channels == (wide // 4, wide // 2, wide)


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnext50_32x4d"])
def test_a_seed_gives_the_weights_and_the_next_random_numbers_of_torchvision(name: str) -> None:
    torch.manual_seed(3)
    ours, next_ours = resnet(name), torch.rand(3)
    torch.manual_seed(3)
    reference, next_reference = torchvision_resnet(name), torch.rand(3)
    expected = reference.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in ours.state_dict().items())
    assert torch.equal(next_ours, next_reference)


@pytest.mark.parametrize("shape", [(0, 5, 3, 4), (2, 5, 3, 4)])
def test_frozen_batch_norm_equals_torchvisions(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    trained = nn.BatchNorm2d(5)
    trained(torch.randn(8, 5, 4, 4) * 3 + 1)
    nn.init.normal_(trained.weight)
    nn.init.normal_(trained.bias)
    ours, reference = FrozenBatchNorm2d(5, eps=1e-3), TorchvisionFrozenBatchNorm2d(5, eps=1e-3)
    assert [(k, v.tolist()) for k, v in ours.state_dict().items()] == [
        (k, v.tolist()) for k, v in reference.state_dict().items()
    ]
    for norm in (ours, reference):
        norm.load_state_dict(trained.state_dict())  # which also has num_batches_tracked
    x = torch.randn(shape)
    assert torch.equal(ours(x), reference(x))
    assert not list(ours.parameters())
    assert repr(ours) == repr(reference)


@pytest.mark.parametrize("norm", NORMS)
def test_every_norm_is_used_throughout_with_its_eps(norm: Norm) -> None:
    kinds = {
        "frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d, "sync_bn": nn.SyncBatchNorm, "gn": GroupNorm
    }  # fmt: skip
    norms = [m for name, m in resnet(norm=norm, eps=1e-3).named_modules() if "bn" in name or "downsample.1" in name]
    assert len(norms) == 20
    assert {type(m) for m in norms} == {kinds[norm]}
    assert all(m.eps == 1e-3 for m in norms)


@pytest.mark.parametrize("norm", ["bn", "frozen_bn", "gn"])
@pytest.mark.parametrize("trainable", range(6))
def test_frozen_stages_get_no_gradients_and_the_others_do(trainable: int, norm: Norm) -> None:
    torch.manual_seed(0)
    backbone = resnet(norm=norm, trainable=trainable).train()
    total = sum((f.square().mean() for f in backbone(torch.randn(2, 3, 64, 64))), torch.zeros(()))
    if total.requires_grad:
        torch.autograd.backward(total)
    assert total.requires_grad == (trainable > 0)
    frozen = STAGES[: 5 - trainable]
    for name, parameter in backbone.named_parameters():
        stage = name.split(".")[0] if name.startswith("layer") else "stem"
        assert parameter.requires_grad == (stage not in frozen), name
        assert (parameter.grad is None) == (stage in frozen), name


@pytest.mark.parametrize("trainable", [0, 3, 5])
def test_frozen_stages_keep_their_statistics_during_training(trainable: int) -> None:
    backbone = resnet(trainable=trainable)
    before = {k: v.clone() for k, v in backbone.named_buffers() if "running" in k}
    assert backbone.eval().train() is backbone
    backbone(torch.randn(2, 3, 64, 64))
    for name, value in backbone.named_buffers():
        if "running" in name:
            stage = name.split(".")[0] if name.startswith("layer") else "stem"
            assert torch.equal(value, before[name]) == (stage in STAGES[: 5 - trainable]), name


def test_frozen_batch_norm_never_changes() -> None:
    backbone = resnet(norm="frozen_bn")
    before: dict[str, Tensor] = {k: v.clone() for k, v in backbone.named_buffers()}
    backbone.train()(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(v, before[k]) for k, v in backbone.named_buffers())
    assert not [k for k, _ in backbone.named_parameters() if "bn" in k]


def test_evaluation_mode_reaches_every_stage() -> None:
    backbone = resnet(trainable=3).train().eval()
    assert not any(m.training for m in backbone.modules())


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_recomputed_activations_give_the_same_gradients_from_less_memory(name: str) -> None:
    torch.manual_seed(0)
    backbone = resnet(name, norm="gn")
    images = torch.randn(1, 3, 64, 96)
    gradients, kept = [], []
    for checkpointing in (False, True):
        backbone.checkpointing = checkpointing
        backbone.zero_grad()
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = backbone(images)
        kept.append(sum(sizes))
        torch.stack([feature.square().mean() for feature in outputs]).sum().backward()  # type: ignore[no-untyped-call]
        gradients.append([p.grad.clone() for p in backbone.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.5 * kept[0]


def test_group_norm_is_defined_for_a_single_value_per_group_and_else_equals_torchs() -> None:
    norm = GroupNorm(32, 32)
    nn.init.normal_(norm.bias)
    torch.testing.assert_close(norm(torch.randn(1, 32, 1, 1)), norm.bias.view(1, 32, 1, 1), atol=1e-3, rtol=0)
    x = torch.randn(2, 32, 3, 5)
    assert torch.equal(norm(x), nn.functional.group_norm(x, 32, norm.weight, norm.bias, norm.eps))
