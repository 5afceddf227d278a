"""A detector small enough to train in seconds, images to train it on, and processes of its own to train it in."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torch import Tensor

from detector.checkpoint import TrainState, load_checkpoint
from detector.config import Config
from detector.config_yaml import load_config
from detector.models.resnet import ARCHITECTURES, Architecture

REPO = Path(__file__).resolve().parents[1]

CLASSES = {"square": 7, "disc": 3, "bar": 90}
"""Name and category id, with gaps and out of order, as real files have them."""

COLOURS = {"square": (220, 40, 40), "disc": (40, 200, 60), "bar": (50, 80, 230)}

TIMING = ("images_per_s", "data_wait", "memory_gb")
"""What two equal runs may log differently."""


class TinyData(NamedTuple):
    """Annotation files, each beside its folder of images."""

    train: Path
    val: Path


def write_coco(
    annotations: Path,
    num_images: int,
    *,
    seed: int,
    objects: int = 3,
    classes: Mapping[str, int] = CLASSES,
    sizes: Sequence[tuple[int, int]] = ((96, 128), (128, 96), (100, 100)),
    suffix: str = ".png",
) -> Path:
    """Images of coloured rectangles on noise, and their COCO file; up to `objects` in each. Images lie in the
    folder named like the file. Image ids are 10, 20, 30, ...
    """
    rng = np.random.default_rng(seed)
    folder = images_of(annotations)
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    records: list[dict[str, Any]] = []
    for i in range(num_images):
        height, width = sizes[i % len(sizes)]
        image = rng.integers(90, 150, (height, width, 3), dtype=np.uint8)
        image_id = 10 * (i + 1)
        for _ in range(int(rng.integers(min(1, objects), objects + 1))):
            name = str(rng.choice(list(classes)))
            w, h = (int(side) for side in rng.integers(28, 60, 2))
            x, y = int(rng.integers(0, width - w)), int(rng.integers(0, height - h))
            image[y : y + h, x : x + w] = COLOURS.get(name, (240, 240, 40))
            box = {"image_id": image_id, "category_id": classes[name], "bbox": [x, y, w, h], "area": w * h}
            records.append({"id": len(records) + 1, "iscrowd": 0, **box})
        file_name = f"{image_id:04d}{suffix}"
        Image.fromarray(image).save(folder / file_name)
        images.append({"id": image_id, "file_name": file_name, "width": width, "height": height})
    categories = [{"id": i, "name": name} for name, i in classes.items()]
    annotations.write_text(json.dumps({"images": images, "annotations": records, "categories": categories}))
    return annotations


def images_of(annotations: Path) -> Path:
    """The folder that `write_coco` puts the images in."""
    return annotations.with_suffix("")


def write_tiny_data(folder: Path) -> TinyData:
    """11 images to train on (three steps of four, the last of three) and 5 to evaluate on."""
    return TinyData(write_coco(folder / "train.json", 11, seed=1), write_coco(folder / "val.json", 5, seed=2))


def write_config(path: Path, data: TinyData, **settings: Any) -> Path:
    """A YAML config of a tiny run; `settings` are keys with `__` for the dot, as `train__epochs=3`."""
    values: dict[str, Any] = {
        "model": {
            "backbone": "resnet18", "backbone_weights": "none", "norm": "gn", "fpn_channels": 32, "head": {"depth": 1},
            "anchors": {"sizes": [16.0, 32.0, 64.0, 128.0, 256.0]}, "pad": "batch_max_32",
        },
        "data": {
            "train": {"images": str(images_of(data.train)), "annotations": str(data.train)},
            "val": {"images": str(images_of(data.val)), "annotations": str(data.val)},
            "min_size": 64, "max_size": 96, "num_workers": 0, "verify": "none",
        },
        "train": {
            "epochs": 2, "batch_size": 4, "precision": "fp32", "compile": False, "device": "cpu", "log_every": 1,
            "images_every_epochs": 0, "loss_images": 0,
        },
        "optim": {"lr": 0.01, "lr_batch_size": 4, "warmup_steps": 2},
    }  # fmt: skip
    for key, value in settings.items():
        *sections, name = key.split("__")
        place = values
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
    path.write_text(yaml.safe_dump(values))
    return path


def tiny_config(folder: Path, data: TinyData, **settings: Any) -> Config:
    """The same, read."""
    return load_config(write_config(folder / "tiny.yaml", data, **settings))


WHOLE = ARCHITECTURES["resnet18"]
SHORT = Architecture(bottleneck=False, blocks=(1, 1, 1, 1))
"""ResNet-18 with one block in each layer, which halves the time of a tiny run."""


# ---- processes --------------------------------------------------------------------------------------------------

_PROCESSES = multiprocessing.get_context("forkserver")

PRELOADED = [
    "tools.train", "tools.eval", "detector.training.train", "detector.evaluation.score", "hotcoco", "torchvision",
    "torch.utils.tensorboard", "torch._dynamo",
]  # fmt: skip
"""What takes long to import, loaded once by the server that test processes are forked from."""


def start_tool(tool: str, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> ForkServerProcess:
    """`tools/TOOL.py ARGV` as a process of its own, with one thread, writing to `log`.

    It is forked from a server that has imported the package but computed nothing, because importing torch takes longer
    than all that such a process has to do.
    """
    return start_process(_run_tool, (tool, list(argv)), log, env)


def start_process(
    target: Callable[..., None], arguments: tuple[Any, ...], log: Path, env: Mapping[str, str] | None = None
) -> ForkServerProcess:
    """A function of a module as a process of its own, with one thread, writing to `log`."""
    _PROCESSES.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPO))
        forkserver.ensure_running()
    short = ARCHITECTURES["resnet18"] is SHORT
    process = _PROCESSES.Process(target=_as_process, args=(target, arguments, log, dict(env or {}), short))
    process.start()
    return process


def _as_process(
    target: Callable[..., None], arguments: tuple[Any, ...], log: Path, env: dict[str, str], short: bool
) -> None:
    os.environ.update(env)
    if short:
        ARCHITECTURES["resnet18"] = SHORT
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # workers of a fork server would import everything again
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    target(*arguments)
    sys.stdout.flush()


def _run_tool(tool: str, argv: list[str]) -> None:
    module = __import__(f"tools.{tool}", fromlist=["main"])
    sys.exit(module.main(argv))


def wait(processes: Sequence[ForkServerProcess], log: Path, *, seconds: float = 120) -> list[int]:
    """Exit codes (minus the signal where one killed it); a process that takes too long is killed and fails the test."""
    until = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    late = [p for p in processes if p.exitcode is None]
    for process in late:
        process.kill()
        process.join()
    assert not late, f"{len(late)} of {len(processes)} processes hang after {seconds} s:\n{log.read_text()[-3000:]}"
    return [int(p.exitcode or 0) for p in processes]


def wait_for(what: Callable[[], bool], process: ForkServerProcess, log: Path, *, seconds: float = 60) -> None:
    """Until something is so, while the process runs."""
    until = time.monotonic() + seconds
    while not what():
        assert process.is_alive(), f"ended with {process.exitcode}:\n{log.read_text()[-3000:]}"
        assert time.monotonic() < until, f"not so after {seconds} s:\n{log.read_text()[-3000:]}"
        time.sleep(0.002)


def ranks(world_size: int) -> list[dict[str, str]]:
    """What torchrun sets for each of several processes on this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }
        for rank in range(world_size)
    ]  # fmt: skip


# ---- reading runs --------------------------------------------------------------------------------------------


def last_checkpoint(run: Path) -> TrainState:
    """What a run ended with."""
    return load_checkpoint(run / "checkpoints" / "last.pt")


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of a checkpoint: weights, averages and the optimizer's."""
    found = {f"model.{k}": v for k, v in state.model.items()}
    found.update({f"ema.{k}": v for k, v in (state.ema or {}).items()})
    for number, values in (state.optimizer or {"state": {}})["state"].items():
        found.update({f"optimizer.{number}.{k}": v for k, v in values.items() if isinstance(v, Tensor)})
    return found


def differing(one: TrainState, other: TrainState) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    a, b = tensors_of(one), tensors_of(other)
    return [k for k in sorted({*a, *b}) if k not in a or k not in b or not torch.equal(a[k], b[k])]


def records(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]
