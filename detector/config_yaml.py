"""YAML to `Config`: files, `_base_`, and `key=value` overrides.

A config is read as: the files named by `_base_`, then the file itself, then `key=value` overrides. Mappings merge,
lists replace, null removes a key. Two things are never replaced silently: a section by a value, or a value by a section
(`optim=adamw optim.lr=0.1`), and the settings of a section by the same section left empty in a file, because that is
what remains when all its lines are commented out. (Sections that may be absent, such as data.val and train.ema, are
removed by an empty one; any section by `section=null` on the command line.) An override of a text setting, such as a
path, is not parsed as YAML. Old keys (`detector.config_formats`) are accepted. After merging, the mistakes of all
sources are reported together.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from detector.cli import package_folder
from detector.config import NOT_PART_OF_THE_MODEL, AnySection, Config, Section
from detector.config_errors import ConfigTree, field_at, first_source, may_be_null, section_type, shown, validated
from detector.config_formats import FORMAT, MOVED, KeyPath, require_known, upgraded
from detector.errors import ConfigError


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file with its bases, apply `key=value` overrides, and validate the result.

    Raises:
        ConfigError: all mistakes together.
    """
    return _validated_with(_read_file(path, ()), overrides)


def with_overrides(config: Config, overrides: Iterable[str]) -> Config:
    """Apply `key=value` overrides to a config.

    Raises:
        ConfigError: all mistakes together.
    """
    return _validated_with(ConfigTree(json.loads(config.model_dump_json()), {}, []), overrides)


def config_from_dict(values: Mapping[str, Any], source: str) -> Config:
    """Validate the settings in a checkpoint, of the current or an older format.

    Raises:
        ConfigError: all mistakes, naming `source`.
    """
    return validated(ConfigTree(upgraded(dict(values)), {(): source}, []))


def to_yaml(config: Config) -> str:
    """The complete config as YAML, from which `load_config` reads an equal one."""
    values = {"format": FORMAT, **json.loads(config.model_dump_json())}
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def with_model_of(config: Config, checkpoint: Config) -> Config:
    """Fill in the settings of the network that were not written in a config from a checkpoint's config.

    These are the settings of `model` and `postprocess`, and the image sizes if none of them was written. So a config
    with only data and training settings can fine-tune or evaluate any network.

    Raises:
        ConfigError: the result is inconsistent.
    """
    own = {key: getattr(config.model, key) for key in NOT_PART_OF_THE_MODEL}
    model = _filled_in(config.model, checkpoint.model).model_copy(update=own)
    sizes = {key: getattr(checkpoint.data, key) for key in ("min_size", "max_size", "eval_min_size")}
    data = config.data if config.data.model_fields_set & set(sizes) else config.data.model_copy(update=sizes)
    postprocess = _filled_in(config.postprocess, checkpoint.postprocess)
    filled = config.model_copy(update={"model": model, "postprocess": postprocess, "data": data})
    return config_from_dict(json.loads(filled.model_dump_json()), "the config and the checkpoint's model together")


def _filled_in(section: AnySection, defaults: AnySection) -> AnySection:
    """A section with the settings of another one where nobody wrote any."""
    written: dict[str, Any] = {}
    for key in section.model_fields_set:
        value = getattr(section, key)
        written[key] = _filled_in(value, getattr(defaults, key)) if isinstance(value, Section) else value
    return defaults.model_copy(update=written)


def _validated_with(tree: ConfigTree, overrides: Iterable[str]) -> Config:
    for override in overrides:
        _apply_override(tree, override)
    return validated(tree)


COMMAND_LINE = "command line"


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and booleans: `1e-3` is a number; `no`, `on`, `010`, `1:30` and `2017-1-1` are text."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


_REDEFINED = ("bool", "int", "float", "timestamp")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] not in _REDEFINED]
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
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list(_first))


def _parse_yaml(text: str, source: str, at: KeyPath = ()) -> ConfigTree:
    """Parse a YAML text that holds the value of the key `at`."""
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = ConfigTree(yaml.load(text, Loader=_Loader), {}, [])
        if node is not None:
            _note_lines(node, at, source, tree)
    except (yaml.YAMLError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark is not None else source
        problem = getattr(error, "problem", None) or "cannot be read"
        raise ConfigError(f"{where}: invalid YAML: {problem}; check for a missing colon, space or bracket") from None
    return tree


def _note_lines(node: yaml.Node, at: KeyPath, source: str, tree: ConfigTree) -> None:
    """Record the line of every key below `at`."""
    if isinstance(node, yaml.SequenceNode):
        for place, item in enumerate(node.value):
            _note_lines(item, (*at, str(place)), source, tree)
    if not isinstance(node, yaml.MappingNode):
        return
    for key, value in node.value:
        path = (*at, str(key.value))
        path = MOVED.get(path, path)
        here = f"{source}:{key.start_mark.line + 1}"
        if path in tree.sources:
            raise ConfigError(f"{here}: `{'.'.join(path)}` is set twice, first at {tree.sources[path]}; remove one")
        if isinstance(value, yaml.ScalarNode) and not value.value and not value.style and _requires_value(path):
            tree.mistakes.append(
                (path, f"{here}: `{'.'.join(path)}` has no value; add one, or delete the line (`null` is the default)")
            )
        tree.sources[path] = here
        _note_lines(value, path, source, tree)


def _requires_value(path: KeyPath) -> bool:
    """Whether a key is a setting for which null is neither a value nor, as for text, invalid in any case."""
    field = field_at(path)
    return field is not None and not (may_be_null(field) or field.annotation is str or section_type(field.annotation))


def _recipe_hint(path: Path) -> str:
    """Where the recipe of this name is that comes with the package, if there is one."""
    name = Path(*path.parts[-2:]) if path.parent.name == "_base_" else Path(path.name)
    recipe = next(iter(sorted(package_folder("configs").rglob(str(name)))), None)
    return f"; the recipe of this name is {recipe}" if recipe is not None else ""


def _read_file(path: Path, parents: tuple[Path, ...]) -> ConfigTree:
    resolved = path.resolve()
    if resolved in parents:
        raise ConfigError(f"{path}: `_base_` is circular: {' -> '.join(map(str, (*parents, resolved)))}")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else _recipe_hint(path)
        named = f" (named by `_base_` in {parents[-1]})" if parents else ""
        raise ConfigError(f"config file {path} does not exist{named}{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read: {error}") from None
    parsed = _parse_yaml(text, str(path))
    values: Any = parsed.values if parsed.values is not None else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config must be a mapping of sections (model:, data:, ...), got {values!r:.60}")
    values = upgraded(_text_keys(values))
    require_known(values.pop("format", FORMAT), f"config {path}")
    bases = values.pop("_base_", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: `_base_` must be a path or a list of paths, got {bases!r}")
    tree = ConfigTree({}, {}, [])
    for base in bases:
        _merge(tree, _read_file(path.parent / base, (*parents, resolved)))
    _merge(tree, parsed._replace(values=values))
    return tree


def _text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _text_keys(item) for key, item in value.items()}
    return [_text_keys(item) for item in value] if isinstance(value, list) else value


def _merge(into: ConfigTree, new: ConfigTree) -> None:
    def merge(old: dict[str, Any], values: dict[str, Any], at: KeyPath) -> None:
        for key, value in values.items():
            path, before = (*at, key), old.get(key)
            if isinstance(value, dict) and isinstance(before, dict):
                merge(before, value, path)
                continue
            where = first_source(path, new.sources)
            mistake = None
            if before is not None:
                mistake = _irreplaceable(path, before, first_source(path, into.sources), value, where)
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


def _irreplaceable(path: KeyPath, before: Any, before_at: str, value: Any, where: str) -> str | None:
    """Why a value may not replace an earlier one silently; None if it may."""
    key = ".".join(path)
    if value is None:
        field = field_at(path)
        required = field is not None and section_type(field.annotation) is not None and not may_be_null(field)
        if required and where != COMMAND_LINE:
            return (
                f"{where}: `{key}` must not be empty (null), which would discard its settings at {before_at}; delete "
                "the line, or write below it what should change"
            )
    elif isinstance(value, dict) != isinstance(before, dict):
        remedy = "remove one (part of a section is set by its own key, as train.epochs=3)"
        field = field_at(path)
        if isinstance(value, bool) and field is not None and may_be_null(field):
            remedy = "{} turns the section on with the settings given elsewhere and the defaults, null turns it off"
        return (
            f"`{key}` must be a section or a value, not both, got {shown(before)} [{before_at}] and then "
            f"{shown(value)} [{where}]; {remedy}"
        )
    return None


def _apply_override(tree: ConfigTree, override: str) -> None:
    key, sign, text = override.partition("=")
    parts = tuple(key.strip().split("."))
    field = field_at(parts)
    is_text = field is not None and field.annotation in (str, str | None)
    if not sign or not all(parts) or not (text if is_text else text.partition("#")[0]).strip():
        message = f"override must be key=value, for example train.epochs=3, got {override!r}"
        if sign and all(parts):
            message += "; use null as the value for the default, or for none where a setting may be absent"
        tree.mistakes.append((parts, message))
        return
    parsed = ConfigTree(None if text == "null" else text, {}, [])
    if not is_text:
        parsed = _parse_yaml(text, f"override {key}", parts)
    nested: Any = _text_keys(parsed.values)
    for part in reversed(parts):
        nested = {part: nested}
    keys = (MOVED.get(parts, parts), *parsed.sources)
    _merge(tree, ConfigTree(upgraded(nested), dict.fromkeys(keys, COMMAND_LINE), parsed.mistakes))
