"""Learning rate, parameter groups, averaging and precision, against the formulas."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from detector import precision as precision_module
from detector.config import OptimConfig
from detector.models import RetinaNet
from detector.models import build_model as build
from detector.precision import resolve_precision
from detector.training.ema import Ema
from detector.training.optim import build_optimizer, current_lr, lr_factor, scaled_lr, set_lr, warmup_of
from tests.tiny import TinyData, tiny_config

PLAIN = OptimConfig(warmup_steps=0)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert lr_factor(0, 1, PLAIN) == 1.0


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1.0), (59_999, 1.0), (60_000, 0.1), (79_999, 0.1), (80_000, 0.01), (89_999, 0.01)],
)
def test_the_rate_falls_where_the_paper_lets_it_fall(step: int, factor: float) -> None:
    assert lr_factor(step, 90_000, PLAIN) == pytest.approx(factor)


def test_the_warm_up_is_a_straight_line() -> None:
    config = OptimConfig(warmup_steps=500, warmup_factor=0.001, milestones=())
    factors = [lr_factor(step, 10_000, config) for step in range(502)]
    assert factors[0] == pytest.approx(0.001)
    assert factors[250] == pytest.approx(0.5005)
    assert factors[500] == factors[501] == 1.0
    rises = [b - a for a, b in itertools.pairwise(factors[:501])]
    assert max(rises) == pytest.approx(min(rises))


def test_a_warm_up_longer_than_the_run_is_clamped_to_it() -> None:
    config = OptimConfig(warmup_steps=500, milestones=())
    assert warmup_of(config, 20) == 20
    assert lr_factor(10, 20, config) == pytest.approx(0.001 + 0.999 / 2)


@given(step=st.integers(0, 999), final=st.floats(0, 1))
def test_a_cosine_is_a_cosine(step: int, final: float) -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=0, final_lr_factor=final)
    expected = final + (1 - final) * (1 + math.cos(math.pi * step / 1000)) / 2
    assert lr_factor(step, 1000, config) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "batch_size", "lr", "message"),
    [
        ({}, 16, 0.01, "learning rate 0.01"),
        ({}, 4, 0.0025, "0.01 x 4 / 16 = 0.0025"),
        ({}, 64, 0.04, "0.01 x 64 / 16 = 0.04"),
        ({"name": "adamw", "lr": 1e-4}, 4, 5e-5, "0.0001 x sqrt(4 / 16) = 5e-05"),
        ({"scale_lr": False}, 4, 0.01, "learning rate 0.01"),
    ],
)
def test_the_rate_is_scaled_to_the_batch_and_explains_how(
    settings: dict[str, Any], batch_size: int, lr: float, message: str
) -> None:
    value, text = scaled_lr(OptimConfig(**settings), batch_size)
    assert value == pytest.approx(lr)
    assert message in text


@pytest.fixture(scope="module")
def model(data: TinyData, tmp_path_factory: pytest.TempPathFactory) -> RetinaNet:
    config = tiny_config(tmp_path_factory.mktemp("c"), data, model__norm="bn", model__head={"depth": 1, "norm": "gn"})
    return build(config.model, 3)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_norms_and_biases_are_not_decayed_and_the_backbone_has_its_own_rate(name: Any, model: RetinaNet) -> None:
    config = OptimConfig(name=name, weight_decay=0.05, backbone_lr_factor=0.1)
    optimizer = build_optimizer(model, config, lr=1.0)
    set_lr(optimizer, 0.5)
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    assert len(group_of) == sum(len(group["params"]) for group in optimizer.param_groups)
    modules = dict(model.named_modules())
    kinds = set()
    for full, parameter in model.named_parameters():
        group = group_of[id(parameter)]
        module, kind = full.rpartition(".")[::2]
        plain = kind == "bias" or isinstance(modules[module], nn.BatchNorm2d | nn.GroupNorm)
        assert group["weight_decay"] == (0.0 if plain else 0.05), full
        assert group["lr"] == pytest.approx(0.05 if full.startswith("backbone.") else 0.5), full
        kinds.add((plain, full.startswith("backbone.")))
    assert len(kinds) == 4


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_the_logged_rate_is_that_of_the_heads(factor: float, model: RetinaNet) -> None:
    optimizer = build_optimizer(model, OptimConfig(backbone_lr_factor=factor), lr=1.0)
    set_lr(optimizer, 0.5)
    assert current_lr(optimizer) == 0.5


def test_norms_and_biases_are_decayed_on_demand(model: RetinaNet) -> None:
    optimizer = build_optimizer(model, OptimConfig(norm_bias_decay=True), lr=1.0)
    assert {group["weight_decay"] for group in optimizer.param_groups} == {1e-4}


def test_the_fused_optimizer_does_what_the_plain_one_does() -> None:
    """Also on weights that lie channels last in memory: it must not pair a weight with another one's gradient."""
    torch.manual_seed(0)
    fused = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Flatten()).to(memory_format=torch.channels_last)
    plain = copy.deepcopy(fused)
    config = OptimConfig(name="adamw", weight_decay=0.05, norm_bias_decay=True)
    ours = build_optimizer(fused, config, lr=0.1)
    reference = torch.optim.AdamW(plain.parameters(), lr=0.1, betas=config.betas, weight_decay=0.05, foreach=False)
    for _ in range(5):
        images = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
        for model, optimizer in ((fused, ours), (plain, reference)):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_frozen_parameters_are_not_given_to_the_optimizer(data: TinyData, model: RetinaNet) -> None:
    backbone: Any = model.backbone
    frozen = {id(p) for p in backbone.parameters()}
    for p in backbone.parameters():
        p.requires_grad_(False)
    try:
        optimizer = build_optimizer(model, OptimConfig(), lr=1.0)
    finally:
        for p in backbone.parameters():
            p.requires_grad_(True)
    assert not frozen & {id(p) for group in optimizer.param_groups for p in group["params"]}


def test_the_average_follows_its_formula_and_copies_counters() -> None:
    linear, norm = nn.Linear(1, 1), nn.BatchNorm1d(1)
    model = nn.Sequential(linear, norm)
    ema = Ema(model, decay=0.9)
    expected = float(linear.weight.detach())
    for step in range(1, 200):
        with torch.no_grad():
            linear.weight.fill_(float(step % 7))
            model.load_state_dict({**model.state_dict(), "1.num_batches_tracked": torch.tensor(step)})
        ema.update(model, step)
        keep = min(0.9, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * (step % 7)
    averaged = ema.model.state_dict()
    assert float(averaged["0.weight"]) == pytest.approx(expected, rel=1e-4)
    assert int(averaged["1.num_batches_tracked"]) == 199
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert not ema.model.training


def test_auto_precision_is_bf16_only_where_the_processor_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for has_it, precision in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(precision_module, "_cpu_has_bf16", lambda has_it=has_it: has_it)
        assert resolve_precision("auto", cpu) == precision
        assert resolve_precision("fp16", cpu) == "fp16"
