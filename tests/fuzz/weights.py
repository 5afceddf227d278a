"""Weight files of every format: torch's two, pickles, NumPy's, safetensors."""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from detector.config import HeadConfig, ModelConfig
from detector.models import build_model
from detector.weights.foreign import import_detector, is_foreign
from detector.weights.import_facts import ImportOptions
from detector.weights.pickle_names import EmptyArray, InertObject, Name, NumpyDtype, Storage
from detector.weights.safe_load import read_content, tensors_in
from tests.fuzz.mutations import ODD_TEXTS, mutate_bytes, odd_value
from tests.fuzz.pickles import archive_of, changed_archive, program, records_of
from tests.fuzz.server import is_harmless

MODULES = (
    "detector.weights.safe_load", "detector.weights.safe_pickle", "detector.weights.pickle_names",
    "detector.weights.torch_file", "detector.weights.zip_records", "detector.weights.foreign",
    "detector.weights.architecture", "detector.weights.name_maps", "detector.weights.output_classes",
    "detector.weights.from_torchvision", "detector.weights.from_detectron2", "detector.weights.from_mmdetection",
)  # fmt: skip
REGRESSIONS: tuple[str, ...] = ()

MARKERS = (
    "head.classification_head.cls_logits.weight", "head.cls_score.weight", "bbox_head.retina_cls.weight",
    "layer1.0.conv1.weight", "backbone.body.conv1.weight", "neck.lateral_convs.0.conv.weight", "pixel_mean",
    "head.bbox_subnet.0.weight", "anchor_generator.cell_anchors.0", "backbone.bottom_up.stem.conv1.weight",
    "head.classification_head.conv.99999999999999999999.0.weight", "a.num_batches_tracked",
)  # fmt: skip
CONFIG_TEXT = (
    "model = dict(backbone=dict(style='caffe'), bbox_head=dict(anchor_generator=dict(octave_base_scale=4, "
    "scales_per_octave=3, ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]), bbox_coder=dict(target_means=[0, 0, "
    "0, 0], target_stds=[1, 1, 1, 1])), test_cfg=dict(nms_pre=1000, score_thr=0.05, max_per_img=100))\n"
    "test_pipeline = [dict(scale=(1333, 800), mean=[1, 2, 3], std=[1, 1, 1], to_rgb=True)]"
)
FRAMEWORKS: dict[str, dict[str, Tensor]] = {}
"""A whole detector as torchvision, mmdetection and detectron2 name it."""
FILES: dict[str, bytes] = {}
"""The files of these detectors; their constant weights are compressed."""


def prepare(folder: Path) -> None:
    """Build a small detector."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    settings = ModelConfig(backbone="resnet18", norm="frozen_bn", fpn_channels=16, head=HeadConfig(depth=1))
    own = build_model(settings, 3)
    with torch.device("meta"):  # loads what takes long, before the cases do
        build_model(settings, 3)
    weights = {name: torch.full_like(value, 0.5, dtype=torch.float16) for name, value in own.state_dict().items()}
    FRAMEWORKS["torchvision"] = _renamed(
        weights, (r"^backbone\.", "backbone.body."), (r"^fpn\.lateral\.(\d)\.", r"backbone.fpn.inner_blocks.\1.0."),
        (r"^fpn\.output\.(\d)\.", r"backbone.fpn.layer_blocks.\1.0."), (r"^fpn\.p", "backbone.fpn.extra_blocks.p"),
        (r"^cls_subnet\.predictor", "head.classification_head.cls_logits"),
        (r"^box_subnet\.predictor", "head.regression_head.bbox_reg"),
        (r"^cls_subnet\.tower\.0", "head.classification_head.conv.0.0"),
        (r"^box_subnet\.tower\.0", "head.regression_head.conv.0.0"),
    )  # fmt: skip
    FRAMEWORKS["mmdet"] = _renamed(
        weights, (r"^fpn\.lateral\.(\d)\.", r"neck.lateral_convs.\1.conv."), (r"^fpn\.p6\.", "neck.fpn_convs.3.conv."),
        (r"^fpn\.output\.(\d)\.", r"neck.fpn_convs.\1.conv."), (r"^fpn\.p7\.", "neck.fpn_convs.4.conv."),
        (r"^cls_subnet\.predictor", "bbox_head.retina_cls"), (r"^box_subnet\.predictor", "bbox_head.retina_reg"),
        (r"^cls_subnet\.tower\.0", "bbox_head.cls_convs.0.conv"),
        (r"^box_subnet\.tower\.0", "bbox_head.reg_convs.0.conv"),
    )  # fmt: skip
    FRAMEWORKS["detectron2"] = _renamed(
        weights, (r"^backbone\.(conv1|bn1)", r"backbone.bottom_up.stem.\1"), (r"stem\.bn1", "stem.conv1.norm"),
        (r"^backbone\.layer1", "backbone.bottom_up.res2"), (r"^backbone\.layer2", "backbone.bottom_up.res3"),
        (r"^backbone\.layer3", "backbone.bottom_up.res4"), (r"^backbone\.layer4", "backbone.bottom_up.res5"),
        (r"\.bn(\d)\.", r".conv\1.norm."), (r"downsample\.0", "shortcut"), (r"downsample\.1", "shortcut.norm"),
        (r"^fpn\.(lateral|output)\.0", r"backbone.fpn_\g<1>3"), (r"^fpn\.(lateral|output)\.1", r"backbone.fpn_\g<1>4"),
        (r"^fpn\.(lateral|output)\.2", r"backbone.fpn_\g<1>5"), (r"^fpn\.p", "backbone.top_block.p"),
        (r"^cls_subnet\.predictor", "head.cls_score"), (r"^box_subnet\.predictor", "head.bbox_pred"),
        (r"^cls_subnet\.tower\.0", "head.cls_subnet.0"), (r"^box_subnet\.tower\.0", "head.bbox_subnet.0"),
    )  # fmt: skip

    for name, tensors in FRAMEWORKS.items():
        file = io.BytesIO()
        torch.save(tensors, file)
        FILES[name] = compressed(file.getvalue())


def _renamed(weights: dict[str, Tensor], *rules: tuple[str, str]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        for pattern, new in rules:
            name = re.sub(pattern, new, name)
        renamed[name] = value
    return renamed


def _odd_tensor(rng: random.Random) -> Any:
    shape = [rng.choice([0, 1, 2, 3, 4, 16]) for _ in range(rng.randrange(6))]
    dtype = rng.choice([torch.float32] * 4 + [torch.float16, torch.int64, torch.bool, torch.complex64, torch.uint8])
    tensor = torch.ones(shape).to(dtype)
    kind = rng.randrange(8)
    if kind == 0:
        return tensor.expand(rng.choice([2, 10**6]), *shape)
    if kind == 1 and tensor.dim() > 1:
        return tensor.transpose(0, 1)
    if kind == 2 and dtype.is_floating_point:
        return tensor * rng.choice([float("nan"), float("inf"), 1e30])
    return rng.choice([torch.nn.Parameter(tensor.float()), tensor.to(torch.bfloat16)]) if kind == 3 else tensor


def _changed_detector(rng: random.Random) -> dict[Any, Any]:
    """A whole detector of which a part may be missing, of another shape, or renamed."""
    weights: dict[Any, Any] = dict(FRAMEWORKS[rng.choice(sorted(FRAMEWORKS))])
    part = rng.choice(["", "running_", "norm", "fpn", "cls", "bbox", "tower", "conv1", rng.choice(sorted(weights))])
    for name in [name for name in weights if part and part in name]:
        change = rng.choice(["drop", "rename", "shape", "nan"])
        value = weights.pop(name)
        if change == "rename":
            weights[name.replace("0", "1")] = value
        elif change != "drop":
            weights[name] = value[:1] if change == "shape" else value * float("nan")
    if rng.random() < 0.2:
        weights[f"anchor_generator.cell_anchors.{rng.randrange(6)}"] = torch.ones(rng.choice([3, 9]), 4)
    return weights


def _content(rng: random.Random) -> Any:
    """Named tensors as other programs save them, with mistakes."""
    if rng.random() < 0.2:
        weights = _changed_detector(rng)
    else:
        weights = {rng.choice(MARKERS): _odd_tensor(rng) for _ in range(rng.choice([0, 1, 4, 10]))}
    for _ in range(rng.choice([0, 0, 1, 3])):
        key = rng.choice([*weights, *ODD_TEXTS, "module.a", "a", 3, None])
        weights[key] = rng.choice([_odd_tensor(rng), odd_value(rng)])
    for _ in range(rng.choice([0, 0, 0, 1])):
        if weights:
            del weights[rng.choice(list(weights))]
    content: Any = weights
    if rng.random() < 0.3:
        meta: dict[str, Any] = {
            "config": CONFIG_TEXT.replace(rng.choice(["4", "[", "1", "8"]), rng.choice(["9" * 5000, "(", "x", ""]), 1)
        }
        meta["mmdet_version"] = rng.choice(["2.1", "1.0", 3, [1]])
        meta["CLASSES"] = rng.choice([["a", "b", "c"], ("a", "a", "b"), ["", "b", "c"], 3, ODD_TEXTS[:3]])
        content = {rng.choice(["state_dict", "model", "params"]): weights, "meta": meta, "epoch": 3}
    return rng.choice([odd_value(rng), [content], {"model": odd_value(rng)}]) if rng.random() < 0.05 else content


def _arrays(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _arrays(value) for key, value in content.items()}
    if not isinstance(content, Tensor):
        return content
    small = content if content.numel() < 10**6 or not content.dim() else content[:1]  # as arrays, all would be written
    return small.detach().float().numpy()


def _saved(rng: random.Random, suffix: str, content: Any) -> bytes:
    file = io.BytesIO()
    flat = (
        {str(k).encode("ascii", "replace").decode(): v for k, v in content.items()} if isinstance(content, dict) else {}
    )
    tensors = {
        k: v.detach().contiguous().clone() for k, v in flat.items() if isinstance(v, Tensor) and v.numel() < 10**6
    }
    if suffix == ".npz":
        arrays: dict[str, Any] = {k.replace("file", "f"): v.float().numpy() for k, v in tensors.items()}
        arrays = {k: v for k, v in arrays.items() if "/" not in k and "\x00" not in k}
        (np.savez if rng.random() < 0.5 else np.savez_compressed)(file, **arrays)
        return file.getvalue()
    if suffix == ".safetensors":
        return safetensors.torch.save({k: v for k, v in tensors.items() if not v.is_complex()})  # not in 0.5
    if suffix == ".pkl" and rng.random() < 0.8:
        return pickle.dumps(_arrays(content), protocol=rng.randrange(6))
    torch.save(content, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    data = file.getvalue()
    return compressed(data)


def compressed(data: bytes) -> bytes:
    """A large zip file, in which constant weights need not fill a disk."""
    large = len(data) > 10**6 and data.startswith(b"PK")
    return archive_of(records_of(data), method=zipfile.ZIP_DEFLATED) if large else data


def make(rng: random.Random, folder: Path) -> Path:
    """A weight file and how to read it."""
    suffix = rng.choice([".pt", ".pth", ".pth", ".pkl", ".npz", ".safetensors"])
    if suffix in (".pt", ".pth") and rng.random() < 0.08:
        data = FILES[rng.choice(sorted(FILES))]
    else:
        data = program(rng) if suffix == ".pkl" and rng.random() < 0.5 else _saved(rng, suffix, _content(rng))
    if data.startswith(b"PK\x03") and rng.random() < 0.3:
        data = changed_archive(rng, data)
    if rng.random() < 0.25:
        data = mutate_bytes(rng, data)
    path = folder / f"weights{suffix}"
    path.write_bytes(data)
    options = {
        "mmap": rng.random() < 0.5,
        "source": rng.choice([None, None, None, "torchvision", "detectron2", "mmdet"]),
        "categories": rng.choice([None, None, "a,b,c", "a,b,c", "a,b,c", "a,,b", "missing.json", "a" * 300]),
    }
    (folder / "options.json").write_text(json.dumps(options))
    return path


def use(path: Path) -> str:
    """Read the file, and import it as a detector if it looks like one."""
    options: dict[str, Any] = json.loads((path.parent / "options.json").read_text())
    content = read_content(path, mmap=options.pop("mmap"))
    _check_types(content)
    if is_foreign(content) or options["source"] is not None:
        imported = import_detector(path, content, ImportOptions(**options))
        assert all(bool(torch.isfinite(value).all()) for value in imported.weights.values())
        assert all(is_harmless(line) for line in imported.notes)
        return "imported"
    tensors_in(content, path)
    return "read"


def _check_types(content: Any) -> None:
    """Nothing but plain values is made."""
    plain = (
        str,
        bytes,
        bytearray,
        int,
        float,
        complex,
        type(None),
        Tensor,
        InertObject,
        Name,
        EmptyArray,
        NumpyDtype,
        Storage,
    )
    left, seen = [content], set()
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if type(item) in (dict, list, tuple, set, frozenset):
            left += [*item, *item.values()] if isinstance(item, dict) else item
        else:
            assert isinstance(item, plain), type(item)
