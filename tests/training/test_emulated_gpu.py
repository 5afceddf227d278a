"""GPU-only code on an emulated GPU (tests/emulated_gpu.py): results of a CPU, one device per operation, no wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from detector.errors import ConfigError
from detector.training.train import train
from tests.conftest import Run
from tests.emulated_gpu import GPU, TwoDevicesError, emulated_gpu
from tests.tiny import TIMING, TinyData, images_of, tiny_config
from tools import analyze_loss, predict
from tools import eval as evaluate

RUNS: dict[str, dict[str, Any]] = {
    "as usual": {},
    "averaged weights, parts, adamw, clipping": {
        "train__ema": {}, "train__micro_batch": 2, "optim__name": "adamw", "optim__lr": 1e-4,
        "optim__clip_grad_norm": 1.0,
        "loss__alpha": [0.2, 0.3, 0.4],
    },
    "giou, low-quality matches, per image": {
        "loss__box": "giou", "matching__low_quality_matches": True, "loss__normalizer": "per_image",
    },
    "softmax, weights of classes": {"model__head__activation": "softmax", "loss__alpha": [0.2, 0.3, 0.4]},
    "focal star, weights of classes": {"loss__cls": "focal_star", "loss__alpha": [0.2, 0.3, 0.4]},
    "varifocal": {"loss__cls": "varifocal"},
    "ghm": {"loss__cls": "ghm"},
    "ohem": {"loss__cls": "ohem"},
    "bootstrap": {"loss__cls": "bootstrap"},
}  # fmt: skip
SLOW = ("focal star, weights of classes", "varifocal", "ghm", "bootstrap")
"""Runs like others of these, for the slow suite."""

MAY_WAIT = {
    "LogWindow.record", "NonfiniteSteps.notice", "Run.save",  # to log, to save
    "first_loss_check",  # once
    "ClassLoss.forward",  # OHEM and bootstrapping choose examples image by image
}  # fmt: skip


def records(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in (*TIMING, "per_class", "split")} for line in lines]


@pytest.mark.parametrize(
    "settings",
    [pytest.param(settings, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, settings in RUNS.items()],
)
def test_a_run_learns_what_it_learns_on_a_cpu_and_waits_only_to_log(
    settings: dict[str, Any], data: TinyData, tmp_path: Path
) -> None:
    settings = {
        "train__epochs": 1, "train__log_every": 2, "train__loss_every_epochs": 1, "postprocess__score_thresh": 0.0,
        **settings,
    }  # fmt: skip
    train(tiny_config(tmp_path, data, train__device="cpu", **settings), tmp_path / "cpu")
    with emulated_gpu() as gpu:
        train(tiny_config(tmp_path, data, train__device="cuda", **settings), tmp_path / "gpu")
    expected, found = records(tmp_path / "cpu"), records(tmp_path / "gpu")
    assert len(found) == len(expected) == 3
    for actual, reference in zip(found, expected, strict=True):
        assert actual == pytest.approx(reference, rel=1e-3, abs=1e-5)
    steps = [wait for wait in gpu.waits if "validate" not in wait and "open_run" not in wait and "train" in wait]
    assert any("LogWindow.record" in wait for wait in steps)
    shapes = [wait for wait in steps if not MAY_WAIT & set(wait)]
    assert {wait[-2:] for wait in shapes} <= {("AnchorGenerator.forward", "to")}
    assert len(shapes) <= 3  # the anchors of a new shape
    assert sum("Run.snapshot" in wait for wait in gpu.waits) == 3  # one a save, one for the best


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_in_half_the_precision_it_learns_nearly_the_same(precision: str, data: TinyData, tmp_path: Path) -> None:
    settings = {
        "train__epochs": 1,
        "train__precision": precision,
        "eval__precision": precision,
        "train__micro_batch": "auto",
    }
    for device in ("cpu", "cuda"):
        with emulated_gpu():
            train(tiny_config(tmp_path, data, train__device=device, **settings), tmp_path / device)
    expected, found = (records(tmp_path / device)[-1] for device in ("cpu", "cuda"))
    assert found["loss"] == pytest.approx(expected["loss"], rel=0.02)


def test_what_is_done_with_a_network_is_done_on_a_gpu_too(whole: Run, data: TinyData, tmp_path: Path) -> None:
    checkpoint = str(whole.out / "checkpoints" / "best.pt")
    for device in ("cpu", "cuda"):
        scored, found, looked = (str(tmp_path / device / name) for name in ("scored", "found", "looked"))
        named = ["--config", str(whole.config), "--checkpoint", checkpoint]
        settings = [f"train.device={device}", "postprocess.score_thresh=0", "eval.precision=fp32"]
        with emulated_gpu() as gpu:
            assert evaluate.main([*named, "--output-dir", scored, *settings]) == 0
            assert analyze_loss.main([*named, "--output-dir", looked, *settings]) == 0
            inputs = ["--checkpoint", checkpoint, "--device", device, "--score-thresh", "0", str(images_of(data.val))]
            assert predict.main([*inputs, "--output-dir", found]) == 0
        assert bool(gpu.waits) == (device == "cuda")

    def read(name: str) -> list[Any]:
        return [json.loads((tmp_path / device / name).read_text()) for device in ("cpu", "cuda")]

    for name in ("scored/metrics.json", "looked/loss.json"):
        actual, reference = map(numbers, read(name))
        assert actual == pytest.approx(reference, rel=1e-3, abs=1e-4)
    for name, near in (("scored/detections.json", 0.1), ("found/detections.json", 3.0)):  # in fp32, in what is fastest
        actual, reference = read(name)
        assert len(actual) == len(reference) > 100
        known: dict[Any, list[Any]] = {}
        for found in reference:
            known.setdefault((found["image_id"], found["category_id"]), []).append(found["bbox"])
        alike = [
            any(
                box == pytest.approx(found["bbox"], abs=near)
                for box in known.get((found["image_id"], found["category_id"]), [])
            )
            for found in actual
        ]
        assert sum(alike) > 0.95 * len(alike)


def numbers(content: Any) -> list[float]:
    """All of a JSON file, in order."""
    if isinstance(content, dict | list):
        parts = content.values() if isinstance(content, dict) else content
        return [number for part in parts for number in numbers(part)]
    return [float(content)] if isinstance(content, int | float) else []


def test_what_cannot_be_compiled_is_an_error(data: TinyData, tmp_path: Path) -> None:
    with emulated_gpu(), pytest.raises(ConfigError, match=r"train\.compile must be auto or false .* got true: Triton"):
        train(tiny_config(tmp_path, data, train__device="cuda", train__compile=True), tmp_path / "out")


def test_the_pretence_refuses_what_a_gpu_refuses_and_sees_who_waits() -> None:
    with emulated_gpu() as gpu:
        x = torch.arange(3.0, device="cuda", requires_grad=True)
        assert x.device == x.exp().device == GPU
        assert torch.ones(3).device.type == "cpu"
        for mixed in (
            lambda: x + torch.ones(3),
            lambda: torch.cat([x, torch.ones(3)]),
            lambda: torch.ones(3)[x.long()],
        ):
            with pytest.raises(TwoDevicesError):
                mixed()  # type: ignore[no-untyped-call]
        torch.autograd.backward((x * 2.0 + torch.tensor(1.0)).sum())
        assert x.grad is not None
        assert x.grad.is_cuda
        assert not gpu.waits
        for waits in (
            lambda: float(x.detach().sum()),
            lambda: torch.tensor([1.0], device=GPU),
            lambda: x.new_tensor([1.0]),
            lambda: torch.repeat_interleave(x.detach().long()),
            lambda: x.detach().clone().index_put_((x > 0,), torch.ones(2, device=GPU)),
            lambda: x[x > 1],
            lambda: torch.nonzero(x),
            x.cpu,
            x.tolist,
            lambda: bool(x.any()),
        ):
            gpu.waits.clear()
            waits()
            assert len(gpu.waits) == 1
