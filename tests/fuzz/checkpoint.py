"""Checkpoints of this program: everything in them, and the file that holds it."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.checkpoint import TrainState, load_checkpoint, save_checkpoint
from detector.config import Config
from detector.config_yaml import config_from_dict
from detector.errors import CheckpointError
from detector.inference.predictor import model_of
from detector.models import build_model
from detector.models.resnet import ARCHITECTURES
from detector.structures import Categories
from tests.fuzz.mutations import ODD_TEXTS, mutate, mutate_bytes, odd_value
from tests.fuzz.pickles import changed_archive
from tests.fuzz.server import is_harmless
from tests.fuzz.weights import compressed
from tests.tiny import SHORT

MODULES = (
    "detector.checkpoint", "detector.weights.safe_load", "detector.weights.safe_pickle",
    "detector.weights.pickle_names", "detector.weights.torch_file", "detector.weights.zip_records",
)  # fmt: skip
REGRESSIONS: tuple[str, ...] = ()

SETTINGS = {"model": {"backbone": "resnet18", "norm": "gn", "fpn_channels": 32, "head": {"depth": 1}}}
CONTENTS: dict[str, dict[str, Any]] = {}
"""The content of a checkpoint with a whole network, and of one with a few numbers."""
FILES: dict[str, bytes] = {}
"""The files of both."""


def prepare(folder: Path) -> None:
    """Save two checkpoints."""
    torch.set_num_threads(1)
    ARCHITECTURES["resnet18"] = SHORT
    config = config_from_dict(SETTINGS, "x")
    network = {k: torch.full_like(v, 0.25) for k, v in build_model(config.model, 3).state_dict().items()}
    few = {f"layer{k}.weight": torch.ones(3, 4) for k in range(3)}
    for name, weights in (("whole", network), ("few", few)):
        state = TrainState(
            config, Categories((1, 5, 90), ("cat", "dog", "bird")), weights, 12, ema=weights, best_ap=0.5,
            optimizer={"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.1, "params": [0]}]},
            unlogged=torch.ones(2, 5), versions={"torch": "2"}, alpha=[0.25] * 3, skipped_steps=[3],
            origin=["weights of x"],
        )  # fmt: skip
        save_checkpoint(state, folder / f"{name}.pt")
        FILES[name] = compressed((folder / f"{name}.pt").read_bytes())
        CONTENTS[name] = torch.load(folder / f"{name}.pt", weights_only=True)


def _content(rng: random.Random) -> dict[Any, Any]:
    """What a checkpoint holds, with mistakes."""
    content: dict[Any, Any] = dict(CONTENTS["whole" if rng.random() < 0.06 else "few"])
    for _ in range(rng.choice([0, 1, 1, 2, 4])):
        kind = rng.randrange(9)
        if kind == 0:
            content["config"] = json.dumps(mutate(rng, json.loads(CONTENTS["few"]["config"]), rng.choice([1, 2, 5])))
        elif kind == 1:
            content["config"] = rng.choice([*ODD_TEXTS, "{}", "[" * 5000, '{"a": 1, "a": 2}', 3, None, b"{}"])
        elif kind == 2:
            content["categories"] = mutate(rng, CONTENTS["few"]["categories"], rng.choice([1, 2, 5]))
        elif kind == 3:
            content[rng.choice(list(content))] = odd_value(rng)
        elif kind == 4:
            content.pop(rng.choice(list(content)))
        elif kind == 5:
            content[rng.choice([*ODD_TEXTS, "config ", 3, None])] = odd_value(rng)
        elif kind == 6:
            content["format"] = rng.choice([0, 1, 2, 3, 10**30, True, "2", None, 1.0])
        else:
            part = rng.choice(["model", "ema", "optimizer", "versions", "unlogged"])
            content[part] = _changed(rng, content.get(part))
    return content


def _changed(rng: random.Random, part: Any) -> Any:
    if not isinstance(part, dict) or not part:
        return rng.choice([torch.zeros(3), torch.ones(2, 5), {"a": torch.ones(1)}, 3, None])
    part = dict(part)
    key = rng.choice(list(part))
    value = rng.choice(
        [torch.zeros(0), torch.zeros(3, 4), torch.full((3, 4), torch.nan), "x", None, {}, odd_value(rng)]
    )
    part[rng.choice([key, key, *ODD_TEXTS, 7])] = value
    if rng.random() < 0.3:
        part.pop(key, None)
    return part


def make(rng: random.Random, folder: Path) -> Path:
    """A checkpoint."""
    file = io.BytesIO()
    if rng.random() < 0.08:
        data = FILES["whole"]
    else:
        torch.save(_content(rng), file, _use_new_zipfile_serialization=rng.random() < 0.95)
        data = compressed(file.getvalue())
    if data.startswith(b"PK") and rng.random() < 0.3:
        data = changed_archive(rng, data)
    if rng.random() < 0.25:
        data = mutate_bytes(rng, data)
    path = folder / "last.pt"
    path.write_bytes(data)
    return path


def use(path: Path) -> str:
    """Load the checkpoint; what is loaded can be saved, and its network built if its weights fit."""
    state = load_checkpoint(path)
    assert isinstance(state.config, Config)
    assert all(isinstance(value, Tensor) for value in state.weights.values())
    assert all(is_harmless(text) for text in (*state.categories.names, *state.origin))
    save_checkpoint(state, path.with_name("again.pt"))
    again = load_checkpoint(path.with_name("again.pt"))
    assert (again.step, again.categories, again.config == again.config) == (state.step, state.categories, True)
    error = _why_no_network(state)
    assert is_harmless(error)
    assert len(error.encode()) < 4096
    return "loaded without a network" if error else "loaded"


def _why_no_network(state: TrainState) -> str:
    try:
        model_of(state, torch.device("cpu"))
    except CheckpointError as error:
        return str(error)
    return ""
