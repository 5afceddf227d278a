"""YAML to `Config`: files, `_base_`, and `key=value` overrides."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from detector.config import NOT_PART_OF_THE_MODEL, AnySection, Config, Section
from detector.config_errors import (
    KeyPath,
    _field,
    _first_source,
    _may_be_null,
    _needs_a_value,
    _nested_section,
    _show,
    _Tree,
    _validate,
)
from detector.errors import ConfigError


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file with its bases, apply `key=value` overrides, and validate the whole.

    Raises:
        ConfigError: every mistake found, together.
    """
    tree = _Tree({}, {}, [])
    _merge(tree, _read_file(path, ()))
    for override in overrides:
        _apply_override(tree, override)
    return _validate(tree)


def to_yaml(config: Config) -> str:
    """The complete config as YAML, which `load_config` reads back to an equal one."""
    values = json.loads(config.model_dump_json())
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """The same config after `key=value` overrides.

    Raises:
        ConfigError: every mistake found, together.
    """
    tree = _Tree(json.loads(config.model_dump_json()), {}, [])
    for override in overrides:
        _apply_override(tree, override)
    return _validate(tree)


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Validate settings that were stored in a checkpoint.

    Raises:
        ConfigError: every mistake found, naming `source`.
    """
    return _validate(_Tree(dict(values), {(): source}, []))


def with_model_of(config: Config, checkpoint: Config) -> Config:
    """The same config, but what nobody wrote down of the model, its post-processing and the size of pictures (all three
    numbers or none) is a checkpoint's.

    So a config that only names data and training fine-tunes, or scores, a network of any build as it is meant.

    Raises:
        ConfigError: what is written down and the rest do not go together.
    """
    own = {key: getattr(config.model, key) for key in NOT_PART_OF_THE_MODEL}
    model = _filled(config.model, checkpoint.model).model_copy(update=own)
    sizes = {key: getattr(checkpoint.data, key) for key in ("min_size", "max_size", "eval_min_size")}
    data = config.data if config.data.model_fields_set & set(sizes) else config.data.model_copy(update=sizes)
    postprocess = _filled(config.postprocess, checkpoint.postprocess)
    filled = config.model_copy(update={"model": model, "postprocess": postprocess, "data": data})
    return config_from_dict(json.loads(filled.model_dump_json()), "the config and the checkpoint's model together")


def _filled(mine: AnySection, theirs: AnySection) -> AnySection:
    said: dict[str, Any] = {}
    for key in mine.model_fields_set:
        value = getattr(mine, key)
        said[key] = _filled(value, getattr(theirs, key)) if isinstance(value, Section) else value
    return theirs.model_copy(update=said)


COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: `1e-3` is a number; `no`, `on`, `010`, `1:30` and `2017-1-1` are words."""


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for more than a word."""


_RESOLVED_ANEW = ("bool", "int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in _RESOLVED_ANEW]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\d[\d_]*\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))"
        r"|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
):
    for _reader_or_writer in (_Loader, _Dumper):
        _reader_or_writer.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first)
        )


def _parse_yaml(text: str, source: str, at: KeyPath = ()) -> _Tree:
    """What stands in a text, which is about the key `at`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = _Tree(yaml.load(text, Loader=_Loader), {}, [])
        if node is not None:
            _note_lines(node, at, source, tree)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(
            f"{where}: the YAML is broken: {problem}; look for a missing colon, space or bracket"
        ) from None
    return tree


def _note_lines(node: yaml.Node, at: KeyPath, source: str, tree: _Tree) -> None:
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            _note_lines(item, (*at, str(place)), source, tree)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = (*at, str(key.value))
        here = f"{source}:{key.start_mark.line + 1}"
        if path in tree.sources:
            raise ConfigError(f"{here}: `{'.'.join(path)}` stands twice, first at {tree.sources[path]}; remove one")
        if isinstance(value, yaml.ScalarNode) and not value.value and not value.style and _needs_a_value(path):
            told = f"{here}: `{'.'.join(path)}` is left empty; give it a value, or delete the line (null, written out, is the default)"
            tree.mistakes.append((path, told))
        tree.sources[path] = here
        _note_lines(value, path, source, tree)


def _read_file(path: Path, parents: tuple[Path, ...]) -> _Tree:
    resolved = path.resolve()
    if resolved in parents:
        raise ConfigError(f"{path}: `_base_` leads back to itself: {' -> '.join(map(str, (*parents, resolved)))}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        named = f" (named by `_base_` in {parents[-1]})" if parents else ""
        raise ConfigError(f"config file {path} does not exist{named}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    parsed = _parse_yaml(text, str(path))
    values: Any = parsed.values if parsed.values is not None else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config must be a mapping of sections (model:, data:, ...), got {values!r:.60}")
    values = _text_keys(values)
    bases = values.pop("_base_", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: `_base_` must be a path or a list of paths, got {bases!r}")
    tree = _Tree({}, {}, [])
    for base in bases:
        _merge(tree, _read_file(path.parent / base, (*parents, resolved)))
    _merge(tree, parsed._replace(values=values))
    return tree


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list) else value


def _merge(into: _Tree, new: _Tree) -> None:
    def merge(old: dict[str, Any], values: dict[str, Any], at: KeyPath) -> None:
        for key, value in values.items():
            path, before = (*at, key), old.get(key)
            if isinstance(value, dict) and isinstance(before, dict):
                merge(before, value, path)
                continue
            where = _first_source(path, new.sources)
            mistake = None
            if before is not None:
                mistake = _irreplaceable(path, before, _first_source(path, into.sources), value, where)
            if mistake is not None:
                into.mistakes.append((path, mistake))
                continue
            for stale in [p for p in into.sources if p[: len(path)] == path]:
                del into.sources[stale]
            into.sources[path] = where
            old[key] = value

    merge(into.values, new.values, ())
    into.sources.update(new.sources)
    into.mistakes.extend(new.mistakes)


def _irreplaceable(path: KeyPath, before: Any, said_at: str, value: Any, where: str) -> str | None:
    """Why a setting that somebody wrote down may not be lost to another, if nobody asked to remove it."""
    key = ".".join(path)
    if value is None:
        field = _field(path)
        required = field is not None and _nested_section(field.annotation) is not None and not _may_be_null(field)
        if required and where != COMMAND_LINE:
            return (
                f"{where}: `{key}` must not be empty (null), because that would wipe everything that {said_at} says of it; "
                "delete the line, or name below it what should change"
            )
    elif isinstance(value, dict) != isinstance(before, dict):
        remedy = "remove one (part of a section is set by its own key, as train.epochs=3)"
        field = _field(path)
        if isinstance(value, bool) and field is not None and _may_be_null(field):
            remedy = "{} has the section with what it says elsewhere or by default, null has it not"
        return (
            f"`{key}` must be a section or a value, not both, got {_show(before)} [{said_at}] and then {_show(value)} "
            f"[{where}]; {remedy}"
        )
    return None


def _apply_override(tree: _Tree, override: str) -> None:
    key, sign, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    field = _field(parts)
    is_text = field is not None and field.annotation in (str, str | None)
    if not sign or not all(parts) or not (text if is_text else text.partition("#")[0]).strip():
        told = f"override must be key=value, for example train.epochs=3, got {override!r}"
        null = (
            "; null in place of a value means the default or, where there is one, none" if sign and all(parts) else ""
        )
        tree.mistakes.append((parts, told + null))
        return
    parsed = _Tree(None if text == "null" else text, {}, [])
    if not is_text:
        parsed = _parse_yaml(text, f"override {key}", parts)
    nested: Any = _text_keys(parsed.values)
    for part in reversed(parts):
        nested = {part: nested}
    _merge(tree, _Tree(nested, dict.fromkeys((parts, *parsed.sources), COMMAND_LINE), parsed.mistakes))
