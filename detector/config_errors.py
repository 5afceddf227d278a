"""Config validation: every error with its full key, its source and the nearest valid key."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from detector.config import Config
from detector.config_formats import KeyPath
from detector.errors import ConfigError
from detector.text import MAX_MESSAGE, as_many_as_fit, printable, shown


class ConfigTree(NamedTuple):
    """Settings before validation."""

    values: Any
    sources: dict[KeyPath, str]
    """Where each key was written: "file:line" or "command line"."""
    mistakes: list[tuple[KeyPath, str]]
    """Errors found while reading: empty values, a section and a value under the same key."""


# Names of the same setting in other programs.
ALIASES = {
    "learning_rate": "optim.lr", "base_lr": "optim.lr", "lr0": "optim.lr", "optimizer": "optim", "solver": "optim",
    "wd": "optim.weight_decay", "lr_scheduler": "optim.schedule", "scheduler": "optim.schedule",
    "warmup": "optim.warmup_steps", "warmup_iters": "optim.warmup_steps", "grad_clip": "optim.clip_grad_norm",
    "clip_grad": "optim.clip_grad_norm", "imgsz": "data.min_size", "img_size": "data.min_size",
    "image_size": "data.min_size", "input_size": "data.min_size", "size": "data.min_size",
    "workers": "data.num_workers", "batch": "train.batch_size", "ims_per_batch": "train.batch_size",
    "samples_per_gpu": "train.micro_batch", "accumulate": "train.micro_batch",
    "accumulation_steps": "train.micro_batch", "max_epochs": "train.epochs", "num_epochs": "train.epochs",
    "amp": "train.precision", "fp16": "train.precision", "dtype": "train.precision", "random_seed": "train.seed",
    "patience": "train.early_stop_patience", "early_stopping": "train.early_stop_patience", "model_ema": "train.ema",
    "focal_alpha": "loss.alpha", "focal_gamma": "loss.gamma", "conf": "postprocess.score_thresh",
    "conf_thres": "postprocess.score_thresh", "score_threshold": "postprocess.score_thresh",
    "iou": "postprocess.nms_thresh", "iou_thres": "postprocess.nms_thresh", "nms_threshold": "postprocess.nms_thresh",
    "max_det": "postprocess.detections_per_img", "pretrained": "model.backbone_weights",
    "weights": "model.backbone_weights", "arch": "model.backbone", "freeze_at": "model.trainable_layers",
    "frozen_stages": "model.trainable_layers", "aspect_ratios": "model.anchors.ratios",
    "scales": "model.anchors.octave_scales", "anchor_sizes": "model.anchors.sizes", "dataset": "data",
    "transforms": "data.augment", "augmentation": "data.augment", "flip": "data.hflip", "maxdets": "eval.max_dets",
    "eval_period": "eval.every_epochs", "prior": "model.head.prior_prob", "img_prefix": "data.train.images",
    "ann_file": "data.train.annotations", "load_from": "train.init_from",
}  # fmt: skip
MAX_MISTAKES = 60
"""More than fit into a message."""
CLASS_COUNT_KEYS = {"num_classes", "nc", "n_classes", "classes", "class_names", "names"}


def all_keys(section: type[BaseModel] = Config, at: KeyPath = ()) -> dict[str, bool]:
    """Every valid key, and whether it is a section."""
    keys: dict[str, bool] = {}
    for name, field in section.model_fields.items():
        nested = section_type(field.annotation)
        keys[".".join((*at, name))] = nested is not None
        if nested is not None:
            keys.update(all_keys(nested, (*at, name)))
    return keys


def field_at(path: KeyPath) -> FieldInfo | None:
    """The schema's field of a key; None if the key is unknown."""
    section: type[BaseModel] | None = Config
    field = None
    for name in path:
        field = section.model_fields.get(name) if section is not None else None
        section = section_type(field.annotation) if field is not None else None
    return field


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type; None if the field is a setting."""
    types = [t for t in (annotation, *get_args(annotation)) if isinstance(t, type)]
    return next((t for t in types if issubclass(t, BaseModel)), None)


def may_be_null(field: FieldInfo) -> bool:
    """Whether null is one of a field's values."""
    return type(None) in get_args(field.annotation)


def first_source(path: KeyPath, sources: Mapping[KeyPath, str]) -> str:
    """Where a key was written, else the first key within it, else the nearest section around it."""
    if path in sources:
        return sources[path]
    inside = next((where for key, where in sources.items() if key[: len(path)] == path), None)
    return inside or _source(path, "", sources)


def key_text(path: KeyPath) -> str:
    """A key as it appears in messages."""
    return printable(".".join(path), 100)


def validated(tree: ConfigTree) -> Config:
    """Validate settings.

    Raises:
        ConfigError: all errors, those found while reading included.
    """
    values = _without_nulls(tree.values, Config)
    lines = [f"  {mistake}" for _, mistake in tree.mistakes]
    reported = {path for path, _ in tree.mistakes}
    try:
        # From JSON, pydantic's strict mode accepts lists for tuples but still no text for numbers.
        config = Config.model_validate_json(json.dumps(values))
    except ValidationError as invalid:
        for path, message in _mistakes(invalid, values):
            if path not in reported:
                named = len(lines) < MAX_MISTAKES  # each needs a search; only the first ones are shown
                where = _source(path, message, tree.sources) if named else ""
                lines.append(f"  {key_text(path) or 'config'}: {printable(message, 600)}  [{where}]")
    if lines:
        count = "1 mistake" if len(lines) == 1 else f"{len(lines):,} mistakes"
        raise ConfigError("\n".join(as_many_as_fit([f"the config has {count}:", *lines], MAX_MESSAGE - 100))) from None
    return config


def _without_nulls(values: dict[str, Any], section: type[BaseModel]) -> dict[str, Any]:
    """Remove null keys, which then have their default.

    Null stays where it is a value (loss.alpha), and where text is required, so that validation reports it: the default
    of model.backbone_weights, ImageNet's, is hardly meant by null.
    """
    kept = {}
    for key, value in values.items():
        field = section.model_fields.get(key)
        nested = field and section_type(field.annotation)
        if value is None and field is not None and not may_be_null(field) and field.annotation is not str:
            continue
        kept[key] = _without_nulls(value, nested) if nested and isinstance(value, dict) else value
    return kept


def _mistakes(invalid: ValidationError, values: dict[str, Any]) -> list[tuple[KeyPath, str]]:
    """(key, message) of every invalid key, once each."""
    mistakes: list[tuple[KeyPath, str]] = []
    wrong: dict[tuple[KeyPath, str], list[str]] = {}  # pydantic reports a union once for each of its members
    for error in invalid.errors():
        path = _written_path(error["loc"], values, error["type"])
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "extra_forbidden":
            mistakes.append((path, f"unknown key; {_suggestion(path) if len(mistakes) < MAX_MISTAKES else ''}"))
        elif error["type"] == "value_error":
            mistakes.append((path, message))
        elif error["type"] == "too_short" and len(error["input"]) >= error["ctx"]["min_length"]:
            continue  # long enough, but some items are invalid, which is reported for each of them
        else:
            wrong.setdefault((path, shown(error["input"])), []).append(
                _expectation(path, error["type"], error, message)
            )
    lists = {path[:-1] for path, _ in wrong if path and path[-1].isdigit()}  # whose items are reported
    for (path, got), messages in wrong.items():
        if path in lists:
            continue
        first, *others = dict.fromkeys(messages)
        expected = " or ".join([first, *(text.removeprefix("input should be ") for text in others)])
        mistakes.append((path, f"{expected}, got {got}"))
    return mistakes


def _expectation(path: KeyPath, kind: str, error: Any, message: str) -> str:
    """What a value should be."""
    if kind in ("too_short", "too_long"):
        bound = ("least", "min_length") if kind == "too_short" else ("most", "max_length")
        return f"input should be a list of at {bound[0]} {error['ctx'][bound[1]]}"
    if kind not in ("model_type", "dict_type"):
        return message[0].lower() + message[1:]
    field = field_at(path)
    section = section_type(field.annotation) if field is not None else None
    if section is None:  # a transform, or its arguments
        return "must be a mapping, {} or {name: value, ...}"
    required = [name for name, inside in section.model_fields.items() if inside.is_required()]
    return f"must be a section with {', '.join(required)}" if required else "must be a section ({} has all defaults)"


def _suggestion(path: KeyPath) -> str:
    """The nearest valid key to an unknown one."""
    name, full = path[-1][:100], ".".join(path)[:200]
    if name.lower() in CLASS_COUNT_KEYS:
        return "the classes are read from data.train's annotations and are never set; remove it"
    keys = all_keys()
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
    """Where the keys below `path` that the message names were written, else the key itself, or a section around it."""
    named = set(re.findall(r"\w+(?:\.\w+)*", message))
    inside = {
        where: None
        for key, where in sources.items()
        if key[: len(path)] == path and ".".join(key[len(path) :]) in named
    }
    if inside:
        return ", ".join(inside)
    return next((sources[path[:end]] for end in range(len(path), -1, -1) if path[:end] in sources), "defaults")


def _written_path(loc: tuple[int | str, ...], values: Any, problem: str) -> KeyPath:
    """The part of a pydantic location that the user wrote (for unions, pydantic adds the names of their members)."""
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
