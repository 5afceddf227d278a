"""Config validation: every mistake with its full key, its source and the nearest valid key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from detector.config import Config
from detector.errors import ConfigError

# ---- reading YAML -----------------------------------------------------------------------------------------------

KeyPath = tuple[str, ...]


class _Tree(NamedTuple):
    values: Any
    sources: dict[KeyPath, str]  # of every key, "file:line" or COMMAND_LINE
    mistakes: list[tuple[KeyPath, str]]  # of keys that say nothing, or that cannot be what two sources say of them


# ---- telling mistakes -------------------------------------------------------------------------------------------

# What the same thing is called elsewhere.
ALIASES = {
    "learning_rate": "optim.lr", "base_lr": "optim.lr", "lr0": "optim.lr", "optimizer": "optim", "solver": "optim",
    "wd": "optim.weight_decay", "lr_scheduler": "optim.schedule", "scheduler": "optim.schedule",
    "warmup": "optim.warmup_steps", "warmup_iters": "optim.warmup_steps", "grad_clip": "optim.clip_grad_norm",
    "clip_grad": "optim.clip_grad_norm", "imgsz": "data.min_size", "img_size": "data.min_size",
    "image_size": "data.min_size", "input_size": "data.min_size", "size": "data.min_size", "workers": "data.num_workers",
    "batch": "train.batch_size", "ims_per_batch": "train.batch_size", "samples_per_gpu": "train.micro_batch",
    "accumulate": "train.micro_batch", "accumulation_steps": "train.micro_batch", "max_epochs": "train.epochs",
    "num_epochs": "train.epochs", "amp": "train.precision", "fp16": "train.precision", "dtype": "train.precision",
    "random_seed": "train.seed", "patience": "train.early_stop_patience", "early_stopping": "train.early_stop_patience",
    "model_ema": "train.ema", "focal_alpha": "loss.alpha", "focal_gamma": "loss.gamma", "conf": "postprocess.score_thresh",
    "conf_thres": "postprocess.score_thresh", "score_threshold": "postprocess.score_thresh",
    "iou": "postprocess.nms_thresh", "iou_thres": "postprocess.nms_thresh", "nms_threshold": "postprocess.nms_thresh",
    "max_det": "postprocess.detections_per_img", "pretrained": "model.backbone_weights", "weights": "model.backbone_weights",
    "arch": "model.backbone", "freeze_at": "model.trainable_layers", "frozen_stages": "model.trainable_layers",
    "aspect_ratios": "model.anchors.ratios", "scales": "model.anchors.octave_scales", "anchor_sizes": "model.anchors.sizes",
    "dataset": "data", "transforms": "data.augment", "augmentation": "data.augment", "flip": "data.hflip",
    "maxdets": "eval.max_dets", "eval_period": "eval.every_epochs", "prior": "model.head.prior_prob",
    "img_prefix": "data.train.images", "ann_file": "data.train.annotations", "load_from": "train.init_from",
}  # fmt: skip
CLASS_COUNT_KEYS = {"num_classes", "nc", "n_classes", "classes", "class_names", "names"}


def _all_keys(section: type[BaseModel] = Config, at: KeyPath = ()) -> dict[str, bool]:
    """Every valid key, and whether it is a section."""
    keys: dict[str, bool] = {}
    for name, field in section.model_fields.items():
        nested = _nested_section(field.annotation)
        keys[".".join((*at, name))] = nested is not None
        if nested is not None:
            keys.update(_all_keys(nested, (*at, name)))
    return keys


def _suggest(path: KeyPath) -> str:
    name, full = path[-1], ".".join(path)
    if name.lower() in CLASS_COUNT_KEYS:
        return "the classes are read from data.train's annotations and are never set; remove it"
    keys = _all_keys()
    same_name = [key for key in keys if key.rpartition(".")[2] == name]
    if same_name:
        return f"did you mean {' or '.join(same_name)}?"
    siblings = {key.rpartition(".")[2]: key for key in keys if key.rpartition(".")[0] == ".".join(path[:-1])}
    near = difflib.get_close_matches(name, siblings, n=1, cutoff=0.75)
    if near:
        return f"did you mean {siblings[near[0]]}?"
    if name.lower() in ALIASES:
        return f"did you mean {ALIASES[name.lower()]}?"
    near = difflib.get_close_matches(full, keys, n=1, cutoff=0.6)
    if near:
        return f"did you mean {near[0]}?"
    return f"valid keys here: {', '.join(sorted(siblings))}" if siblings else "remove it"


def _source(path: KeyPath, message: str, sources: Mapping[KeyPath, str]) -> str:
    """Where the keys below this one were written that the message names, or the key itself, or the nearest section around."""
    named = set(re.findall(r"\w+(?:\.\w+)*", message))
    inside = {
        where: None
        for key, where in sources.items()
        if key[: len(path)] == path and ".".join(key[len(path) :]) in named
    }
    if inside:
        return ", ".join(inside)
    return next((sources[path[:end]] for end in range(len(path), -1, -1) if path[:end] in sources), "defaults")


def _first_source(path: KeyPath, sources: Mapping[KeyPath, str]) -> str:
    """Where a key was written, or the first that stands in it, or the nearest section around."""
    inside = next((where for key, where in sources.items() if key[: len(path)] == path), None)
    return inside or _source(path, "", sources)


def _validate(tree: _Tree) -> Config:
    values = _without_nulls(tree.values, Config)
    lines = [f"  {mistake}" for _, mistake in tree.mistakes]
    try:
        # By way of JSON, pydantic's strict mode takes lists for tuples but still no text for numbers.
        config = Config.model_validate_json(json.dumps(values, default=str))
    except ValidationError as invalid:
        lines += [
            f"  {'.'.join(path) or 'config'}: {message}  [{_source(path, message, tree.sources)}]"
            for path, message in _mistakes(invalid, values)
            if path not in {told for told, _ in tree.mistakes}
        ]
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
        raise ConfigError("\n".join([f"the config has {count}:", *lines])) from None
    return config


def _mistakes(invalid: ValidationError, values: dict[str, Any]) -> list[tuple[KeyPath, str]]:
    """What is wrong with which key, once for each."""
    mistakes: list[tuple[KeyPath, str]] = []
    wrong: dict[tuple[KeyPath, str], list[str]] = {}  # a union complains once for each of its members
    for error in invalid.errors():
        path = _written_path(error["loc"], values, error["type"])
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            mistakes.append((path, f"unknown key; {_suggest(path)}"))
        elif error["type"] == "value_error":
            mistakes.append((path, message))
        elif error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
            continue  # long enough, but its items are wrong, which is told by itself
        elif error["type"] in ("model_type", "dict_type"):
            wrong.setdefault((path, _show(error["input"])), []).append(_section_wanted(path))
        elif error["type"] in ("too_short", "too_long"):
            wrong.setdefault((path, _show(error["input"])), []).append(_length_wanted(error["ctx"]))
        else:
            wrong.setdefault((path, _show(error["input"])), []).append(message[0].lower() + message[1:])
    lists = {path[:-1] for path, _ in wrong if path[-1].isdigit()}  # whose items are told
    for (path, got), messages in wrong.items():
        if path in lists:
            continue
        first, *others = dict.fromkeys(messages)
        expected = " or ".join([first, *(text.removeprefix("input should be ") for text in others)])
        mistakes.append((path, f"{expected}, got {got}"))
    return mistakes


def _section_wanted(path: KeyPath) -> str:
    field = _field(path)
    section = _nested_section(field.annotation) if field is not None else None
    if section is None:  # a transform, or its arguments
        return "must be a mapping, {} or {name: value, ...}"
    required = [name for name, inside in section.model_fields.items() if inside.is_required()]
    return (
        f"must be a section with {', '.join(required)}"
        if required
        else "must be a section ({} is one with all defaults)"
    )


def _length_wanted(ctx: Mapping[str, Any]) -> str:
    few = "min_length" in ctx
    return f"input should be a list of at {'least' if few else 'most'} {ctx['min_length' if few else 'max_length']}"


def _without_nulls(values: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """Null removes a key; it stays where it is a value of its own (loss.alpha), and where text must stand, which tells.

    A default in place of text would not be what was meant: null for the weights of the backbone would be ImageNet's.
    """
    kept = {}
    for key, value in values.items():
        field = section.model_fields.get(key)
        nested = field and _nested_section(field.annotation)
        if value is None and field is not None and not _may_be_null(field) and field.annotation is not str:
            continue
        kept[key] = _without_nulls(value, nested) if nested and isinstance(value, dict) else value
    return kept


def _field(path: KeyPath) -> FieldInfo | None:
    """What the schema says of a key; None of one that it does not know."""
    section: type[BaseModel] | None = Config
    field = None
    for name in path:
        field = section.model_fields.get(name) if section is not None else None
        section = _nested_section(field.annotation) if field is not None else None
    return field


def _needs_a_value(path: KeyPath) -> bool:
    """Whether a key is a setting, and one that says nothing of itself about null."""
    field = _field(path)
    return field is not None and not (
        _may_be_null(field) or field.annotation is str or _nested_section(field.annotation)
    )


def _may_be_null(field: FieldInfo) -> bool:
    return type(None) in get_args(field.annotation)


def _nested_section(annotation: Any) -> type[BaseModel] | None:
    types = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type)]
    return next((t for t in types if issubclass(t, BaseModel)), None)


def _written_path(loc: tuple[int | str, ...], values: Any, problem: str) -> KeyPath:
    """The part of a pydantic location that was written by the user (unions add the names of their members)."""
    path: KeyPath = ()
    for part in loc:
        if (isinstance(values, dict) and part in values) or (
            isinstance(values, list) and isinstance(part, int) and part < len(values)
        ):
            values = values[part]  # type: ignore[index]
        elif problem != "missing" or part != loc[-1]:
            continue
        path = (*path, str(part))
    return path


def _show(value: Any) -> str:
    text = json.dumps(value, default=str) if not isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
