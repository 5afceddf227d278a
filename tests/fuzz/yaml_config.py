"""YAML configs, their bases and overrides."""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path
from typing import Any

import yaml

from detector.config import Config, resolve_data_paths
from detector.config_errors import ALIASES, all_keys
from detector.config_yaml import config_from_dict, load_config, to_yaml, with_model_of
from tests.fuzz.mutations import ODD_NUMBERS, ODD_TEXTS, encoded, mutate, mutate_bytes, odd_value

MODULES = ("detector.yaml_text", "detector.config_yaml", "detector.config_errors", "detector.config_formats")
REGRESSIONS: tuple[str, ...] = ()

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TOKENS = (
    b": ", b"- ", b"\n", b"  ", b"&a ", b"*a", b"<<: *a", b"!!int ", b"!!python/name:os.system ", b"[", b"]", b"{",
    b"}", b"|\n", b">\n", b"? ", b"# ", b"---\n", b"...\n", b"%YAML 1.1\n", b'"\\ud800"', b'"\\0"', b"'", b"\t",
    b"\x00", b"~", b"_base_: base0.yaml\n", b"\xef\xbb\xbf", b"\x85", b"=", b"1e999", b"!", b"@", b"`",
)  # fmt: skip
ODD_VALUES = (
    *ODD_TEXTS, *map(repr, ODD_NUMBERS), "[", "[1", "{a: 1}", "!!bool maybe", "!!float x", "&x", "*x", "adamw", "null",
)  # fmt: skip
TAGS = ("!!int", "!!float", "!!bool", "!!null", "!!str", "!!set", "!!timestamp", "!x", "!!python/tuple")


def prepare(folder: Path) -> None:
    """Nothing is shared."""


@functools.cache
def _texts() -> tuple[str, ...]:
    """The recipes, with absolute bases."""
    texts = []
    for path in sorted(CONFIGS.rglob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        bases = yaml.safe_load(text).get("_base_", [])
        absolute = [str(path.parent / base) for base in ([bases] if isinstance(bases, str) else bases)]
        lines = [line for line in text.splitlines(keepends=True) if not line.startswith("_base_")]
        texts.append("".join([f"_base_: {json.dumps(absolute)}\n" * bool(absolute), *lines]))
    return tuple(texts)


@functools.cache
def _settings() -> dict[str, Any]:
    values: dict[str, Any] = json.loads(Config().model_dump_json())
    values["data"]["train"] = {"images": "images", "annotations": "train.json"}
    values["data"]["augment"] = [{"HorizontalFlip": {"p": 0.5}}, {"OneOf": {"transforms": [{"Blur": {"p": 0.1}}]}}]
    values["train"]["ema"] = {"decay": 0.9}
    return values


def _tree(rng: random.Random) -> str:
    """The settings or a part of them, with mistakes."""
    values = _settings()
    kept = {key: value for key, value in values.items() if rng.random() < 0.6}
    if rng.random() < 0.2:
        kept[rng.choice(list(ALIASES))] = odd_value(rng)
    changed = mutate(rng, kept, rng.choice([0, 0, 1, 1, 2, 10]))
    return str(yaml.dump(changed, allow_unicode=rng.random() < 0.5, default_flow_style=rng.choice([None, False, True])))


def _bomb(rng: random.Random) -> str:
    """Aliases of aliases, as lists, mappings, merges or keys."""
    form = rng.choice(["[{0}]", "{{<<: [{0}]}}", "{{a: {1}}}", "{{? [{0}] : 1}}"])
    width, lines = rng.choice([1, 2, 9, 30]), [f"a0: &a0 {rng.choice(['[x, y]', '{x: 1}', 'text', 'x' * 1000])}"]
    for k in range(1, rng.choice([2, 5, 12, 60, 500])):
        aliases = ", ".join([f"*a{k - 1}"] * width)
        lines.append(f"a{k}: &a{k} " + form.format(aliases, f"*a{k - 1}"))
    return "\n".join(lines) + "\n"


def _changed_lines(rng: random.Random, text: str) -> str:
    lines = text.splitlines() or [""]
    for _ in range(rng.choice([1, 1, 2, 5])):
        k = rng.randrange(len(lines))
        kind = rng.randrange(8)
        key, sign, value = lines[k].partition(":")
        if kind == 0:
            lines.insert(k, lines[k])
        elif kind == 1 and len(lines) > 1:
            del lines[k]
        elif kind == 2:
            lines[k] = " " * rng.randrange(6) + lines[k].lstrip()
        elif kind == 3 and sign:
            lines[k] = f"{key}: {rng.choice(ODD_VALUES)}"
        elif kind == 4 and sign:
            lines[k] = f"{key}: {json.dumps(rng.choice(ODD_TEXTS))}"
        elif kind == 5 and sign:
            lines[k] = f"{key[: len(key) - 1]}{rng.choice(['', 's', '_x'])}:{value}"
        elif kind == 6 and sign:
            lines[k] = f"{key}: {rng.choice(TAGS)}{value}"
        else:
            lines[k] = lines[k] + rng.choice(["[" * 50, "- " * 50, " #", "\\", "  x: 1", " 9" * 3000, ": : :"])
    return "\n".join(lines) + "\n"


def _text(rng: random.Random, bases: list[str]) -> str:
    kind = rng.random()
    text = _tree(rng) if kind < 0.5 else rng.choice(_texts()) if kind < 0.93 else _bomb(rng)
    if rng.random() < 0.3:
        text = _changed_lines(rng, text)
    if rng.random() < 0.03:
        text += _bomb(rng)
    if "_base_" not in text and bases and rng.random() < 0.7:
        odd = rng.choice(["missing.yaml", ".", "\x1b.yaml", "x" * 300, "\ud800", 7, {"a": 1}, [[1]]])
        base = odd if rng.random() < 0.1 else rng.choice([bases, bases[0]])
        text = f"_base_: {json.dumps(base)}\n{text}"
    return text


def make(rng: random.Random, folder: Path) -> Path:
    """A config, up to four bases, and overrides."""
    names = [f"base{k}.yaml" for k in range(rng.choice([0, 0, 1, 4]))]
    for k, name in enumerate(names):
        others = names if rng.random() < 0.05 else names[k + 1 :]  # rarely in a circle
        (folder / name).write_bytes(encoded(rng, _text(rng, others)))
    data = encoded(rng, _text(rng, names))
    if rng.random() < 0.15:
        data = mutate_bytes(rng, data, tokens=TOKENS)
    (folder / "main.yaml").write_bytes(data)
    keys = [*all_keys(), "x", "model.norm_eps", "data.train.images", "data.augment.0", ""]
    overrides = [f"{rng.choice(keys)}={rng.choice(ODD_VALUES)}" for _ in range(rng.choice([0] * 8 + [1, 3]))]
    (folder / "overrides.json").write_text(json.dumps(overrides))
    return folder / "main.yaml"


def use(path: Path) -> str:
    """Read the config; what is read survives its own YAML and its own JSON."""
    config = load_config(path, json.loads((path.parent / "overrides.json").read_text()))
    text = to_yaml(resolve_data_paths(config))
    (path.parent / "again.yaml").write_text(text, encoding="utf-8")
    again = load_config(path.parent / "again.yaml")
    assert to_yaml(again) == text
    assert to_yaml(config_from_dict(json.loads(again.model_dump_json()), "a checkpoint")) == text
    with_model_of(config, Config())
    return "read"
