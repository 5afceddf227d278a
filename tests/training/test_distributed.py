"""Several processes, or several passes, in place of one: the same weights."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models import resnet18

from detector.atomic import read_json
from detector.config_yaml import load_config
from detector.datasets.loader import DetectionDataset, collate
from detector.datasets.opening import read_coco
from detector.datasets.sampling import SampleKey
from detector.evaluation.score import score_checkpoint
from detector.losses import build_loss
from detector.losses.retinanet import Normalizers
from detector.models import build_model
from detector.training.train import train
from detector.weights.backbone_weights import load_backbone_weights
from tests.tiny import (
    REPO,
    TinyData,
    differing,
    images_of,
    last_checkpoint,
    ranks,
    records,
    start_process,
    start_tool,
    wait,
    wait_for,
    write_coco,
    write_config,
)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("weights"))


def write_backbone(folder: Path) -> Path:
    """A ResNet-18 that nobody trained, but whose batch norms have the statistics of their inputs."""
    path = folder / "resnet18.pt"
    torch.manual_seed(0)
    model = resnet18().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # the plain mean
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(4, 3, 64, 64))
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> TinyData:
    return write_many(tmp_path_factory.mktemp("many"))


def write_many(folder: Path) -> TinyData:
    """77 images, every second one without objects: 20 steps of four, one of them of a single image."""
    annotations = write_coco(folder / "train.json", 77, seed=5)
    content = json.loads(annotations.read_text())
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] % 20]
    annotations.write_text(json.dumps(content))
    return TinyData(annotations, annotations)


def one_epoch(folder: Path, many: TinyData, **settings: Any) -> Path:
    defaults = {
        "data__val": None, "train__epochs": 1, "data__min_size": [32, 48], "optim__warmup_steps": 5, "optim__lr": 0.01,
        "optim__clip_grad_norm": 4.0,
    }  # fmt: skip
    return write_config(folder / "c.yaml", many, **(defaults | settings))


def run_in_processes(config: Path, out: Path, log: Path, *more: str, world_size: int = 2) -> None:
    argv = ["--config", str(config), "--output-dir", str(out), *more]
    codes = wait([start_tool("train", argv, log, env) for env in ranks(world_size)], log)
    assert codes == [0] * world_size, log.read_text()[-4000:]


def norm_settings(norm: str, backbone: Path) -> dict[str, Any]:
    if norm == "gn":
        return {"model__norm": "gn"}
    return {"model__norm": "frozen_bn", "model__backbone_weights": str(backbone), "model__trainable_layers": 5}


def weights_before(config: Path) -> dict[str, Tensor]:
    """The trained ones of what a run starts from."""
    settings = load_config(config)
    torch.manual_seed(settings.train.seed)
    model = build_model(settings.model, 3)
    load_backbone_weights(model.get_submodule("backbone"), settings.model.backbone, settings.model.backbone_weights)
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def allowed(weights: Tensor) -> Tensor:
    """Differences: 1e-4 of an entry or, near zero, 1e-5 of its tensor's largest or of 0.02 (young biases are tiny)."""
    return 1e-4 * weights.abs() + 1e-5 * max(float(weights.abs().max()), 0.02)


def assert_same_weights(one: Path, other: Path, config: Path) -> None:
    """And all must have moved much further than they may differ."""
    a, b, before = last_checkpoint(one).model, last_checkpoint(other).model, weights_before(config)
    assert a.keys() == b.keys()
    size = {k: float(v.abs().max().clamp(min=1e-3)) for k, v in a.items()}
    for k in a:
        off = (a[k] - b[k]).abs()
        assert (off <= allowed(b[k])).all(), f"{k}: {float(off.max())}"
    way = [float((a[k] - v).abs().max()) / size[k] for k, v in before.items()]
    assert np.median(way) > 3e-4, f"hardly anything moved ({np.median(way):.2g}), so nothing was compared"


def assert_same_records(one: Path, other: Path) -> None:
    """The log of each shows whole steps, whoever did which part."""
    for a, b in zip(records(one), records(other), strict=True):
        assert a == pytest.approx(b, rel=1e-3)


@pytest.mark.slow
@pytest.mark.usefixtures("whole_network")
@pytest.mark.parametrize(("norm", "seed"), [("frozen_bn", 3), ("gn", 0)])
def test_two_processes_give_the_same_weights_as_one_after_20_steps(
    norm: str, seed: int, many: TinyData, backbone: Path, tmp_path: Path
) -> None:
    """The network as it is, with seeds whose runs meet no kink of a ReLU (docs/results.md); the next test has none to
    meet, at any seed.
    """
    config = one_epoch(tmp_path, many, **norm_settings(norm, backbone), train__seed=seed)
    assert_same_weights(*trained_both_ways(train_as_it_is, config, 2, ()), config)


def train_as_it_is(config: Path, out: Path, settings: Sequence[str]) -> None:
    """One of the ways to train that are compared with themselves."""
    train(load_config(config, settings), out)


def train_without_kinks(config: Path, out: Path, settings: Sequence[str]) -> None:
    """With a unit and a pooling whose slopes do not jump, so that a rounding error stays as small as it was."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "relu", lambda x, inplace=False: F.elu(x))
        patch.setattr(
            F, "max_pool2d", lambda x, size, stride, padding, *_, **__: F.avg_pool2d(x, size, stride, padding)
        )
        train(load_config(config, settings), out)


def train_in_double(config: Path, out: Path, settings: Sequence[str]) -> None:
    """All but the losses, which are fp32 by themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("detector.training.setup.build_model", lambda *a: build_model(*a).double())
        train(load_config(config, settings), out)


def trained_both_ways(
    way: Callable[[Path, Path, Sequence[str]], None], config: Path, world_size: int, settings: Sequence[str]
) -> tuple[Path, Path]:
    """In one process with whole batches; and with the settings, in several processes."""
    one, other, log = config.parent / "one", config.parent / "other", config.parent / "log"
    codes = wait([start_process(way, (config, other, settings), log, env) for env in ranks(world_size)], log)
    assert codes == [0] * world_size, log.read_text()[-4000:]
    way(config, one, ())
    return one, other


@pytest.mark.parametrize(
    ("seed", "norm", "normalizer", "world_size", "settings"),
    [
        (0, "gn", "global", 2, ("data.cache_gb=0.001",)),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                (0, "frozen_bn", "global", 2, ()),
                (1, "frozen_bn", "global", 2, ()),
                (0, "frozen_bn", "per_image", 2, ("train.micro_batch=1",)),
                (0, "gn", "per_image", 2, ("train.micro_batch=1",)),
                (0, "gn", "global", 1, ("train.micro_batch=1",)),
                (0, "gn", "global", 1, ("train.micro_batch=3",)),
            ]
        ),
    ],
)
def test_without_kinks_processes_and_parts_give_the_same_weights_with_any_seed(
    seed: int,
    norm: str,
    normalizer: str,
    world_size: int,
    settings: Sequence[str],
    many: TinyData,
    backbone: Path,
    tmp_path: Path,
) -> None:
    """In fp32 and at the full rate, with seeds whose runs part where a ReLU's input is rounded to its other side.

    Half of the images are empty, so often a process has no objects; in one step it has no image at all.
    """
    chosen = {"loss__normalizer": normalizer, "train__seed": seed}
    config = one_epoch(tmp_path, many, **norm_settings(norm, backbone), **chosen)
    one, other = trained_both_ways(train_without_kinks, config, world_size, settings)
    assert last_checkpoint(one).step == last_checkpoint(other).step == 20
    assert_same_weights(one, other, config)
    assert_same_records(one, other)
    if "data.cache_gb=0.001" in settings:
        log = (tmp_path / "log").read_text()
        assert re.search(r"memory for \d\d of 77 images, resized", log), "one cache for both"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("norm", "normalizer", "settings"),
    [("frozen_bn", "global", ()), ("gn", "per_image", ("train.micro_batch=1",)), ("frozen_bn", "per_image", ())],
)
def test_in_double_precision_two_processes_end_within_1e_7_of_one_at_the_full_rate(
    norm: str, normalizer: str, settings: Sequence[str], many: TinyData, backbone: Path, tmp_path: Path
) -> None:
    """The network as it is: no input of a ReLU is as near to zero as these rounding errors."""
    config = one_epoch(tmp_path, many, **norm_settings(norm, backbone), loss__normalizer=normalizer)
    one, other = (last_checkpoint(run).model for run in trained_both_ways(train_in_double, config, 2, settings))
    before = weights_before(config)
    for name, weights in one.items():
        off = float((weights - other[name]).abs().max() / weights.abs().max().clamp(min=1e-3))
        assert off < 1e-7, f"{name}: {off}"
    assert np.median([float((one[k] - v).abs().max()) for k, v in before.items()]) > 1e-4, "hardly anything moved"


def test_gradients_of_the_parts_of_a_batch_add_up_to_those_of_the_whole(many: TinyData, tmp_path: Path) -> None:
    """What accumulation and processes rest on; in double precision, where rounding hides nothing."""
    config = load_config(one_epoch(tmp_path, many))
    coco = read_coco(many.train, images_of(many.train), verify="none", progress=False)
    dataset = DetectionDataset(coco, max_size=96)
    samples = [dataset[SampleKey(0, index, 64, (96, 96))] for index in range(17, 21)]  # the third has no objects
    torch.manual_seed(0)
    model, loss = build_model(config.model, 3).double(), build_loss(config)

    def gradients(size: int) -> dict[str, Tensor]:
        batches = [collate(samples[start : start + size]) for start in range(0, 4, size)]
        assignments = [loss.assign(model.anchors_of(batch.images), batch.targets) for batch in batches]
        parts = [loss.normalizers(a, torch.tensor(size)) for a in assignments]
        normalizers = Normalizers(*(torch.stack(part).sum() for part in zip(*parts, strict=True)))
        model.zero_grad()
        for batch, assignment in zip(batches, assignments, strict=True):
            images = model.normalize(batch.images, batch.image_sizes).double()
            outputs = model.forward_normalized(images)
            losses = loss(outputs, batch.targets, assignment=assignment, normalizers=normalizers)
            (losses["loss_cls"] + losses["loss_box"]).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    whole = gradients(4)
    for size in (2, 1):
        for name, gradient in gradients(size).items():
            error = float((gradient - whole[name]).abs().max() / whole[name].abs().max())
            assert error < 1e-10, f"parts of {size}, {name}: {error}"


def test_accumulating_small_batches_gives_the_same_weights_as_one_large_batch(many: TinyData, tmp_path: Path) -> None:
    """Other parts: above."""
    config = one_epoch(tmp_path, many)
    train_without_kinks(config, tmp_path / "whole", ())
    train_without_kinks(config, tmp_path / "parts", ["train.micro_batch=2"])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", config)
    assert_same_records(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_two_processes_evaluate_save_and_stop_as_one(data: TinyData, tmp_path: Path) -> None:
    """A signal to only the second of them stops both before the same step; resumed, they end as if left alone."""
    config = write_config(tmp_path / "c.yaml", data, train__epochs=3, data__test=split_of(data), optim__lr=0.002)
    log = tmp_path / "log"
    run_in_processes(config, tmp_path / "whole", log)
    train(load_config(config), tmp_path / "one")
    one, two = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in ("one", "whole"))
    assert two["test"]["AP"] == pytest.approx(one["test"]["AP"], abs=0.01)
    assert two["AP"] == pytest.approx(one["AP"], abs=0.01)
    losses = [[r["loss"] for r in records(tmp_path / run) if "split" in r] for run in ("one", "whole")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2), "of the val set, of which each has seen a half"

    cut = tmp_path / "cut"
    argv = ["--config", str(config), "--output-dir", str(cut)]
    processes = [start_tool("train", argv, log, env) for env in ranks(2)]
    wait_for(lambda: (cut / "metrics.jsonl").exists() and bool(records(cut)), processes[0], log)
    assert processes[1].pid is not None
    os.kill(processes[1].pid, signal.SIGTERM)
    assert wait(processes, log) == [128 + signal.SIGTERM] * 2, log.read_text()[-3000:]
    assert 0 < last_checkpoint(cut).step < 9
    run_in_processes(config, cut, log, "--resume", "auto")
    assert differing(last_checkpoint(cut), last_checkpoint(tmp_path / "whole")) == []


@pytest.mark.slow
def test_with_batch_norm_two_processes_score_the_model_that_they_save(data: TinyData, tmp_path: Path) -> None:
    """Running statistics are each process's own; the images of each must be evaluated with those of the first."""
    settings = {"model__norm": "bn", "model__head": {"depth": 1}, "postprocess__score_thresh": 0.0}
    config = write_config(tmp_path / "c.yaml", data, train__epochs=8, optim__lr=0.02, eval__every_epochs=8, **settings)
    run_in_processes(config, tmp_path / "two", tmp_path / "log")
    written = read_json(tmp_path / "two" / "metrics.json")
    scored = score_checkpoint(
        load_config(config), tmp_path / "two/checkpoints/best.pt", split="val", output_dir=tmp_path / "scored"
    ).to_json()
    assert written["AR@100"] > 0, "nothing was found, so nothing was compared"
    del written["per_class"], scored["per_class"]
    assert written == pytest.approx(scored)


def split_of(data: TinyData) -> dict[str, str]:
    return {"images": str(images_of(data.val)), "annotations": str(data.val)}


@pytest.mark.slow
@pytest.mark.usefixtures("whole_network")
def test_torchrun_starts_the_tool(many: TinyData, tmp_path: Path) -> None:
    config = one_epoch(tmp_path, many)
    out = tmp_path / "two"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-addr", "127.0.0.1",
        "--master-port", ranks(1)[0]["MASTER_PORT"], str(REPO / "tools/train.py"), "--config", str(config),
        "--output-dir", str(out),
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    train(load_config(config), tmp_path / "one")
    assert_same_weights(tmp_path / "one", out, config)
    assert done.stdout.count("epoch 1.00 step 20/20") == 1, "only the first process prints"
