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
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from detector.cli import package_folder
from detector.config import NOT_PART_OF_THE_MODEL, AnySection, Config, Section
from detector.config_errors import ConfigTree, field_at, first_source, key_text, may_be_null, section_type, validated
from detector.config_formats import FORMAT, MOVED, KeyPath, require_known, upgraded
from detector.errors import ConfigError
from detector.files import os_error_reason, read_bytes
from detector.text import printable, shown
from detector.yaml_text import MAX_CHARACTERS, MAX_DEPTH, Dumper, is_bounded, parse_yaml


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """Read a YAML file with its bases, apply `key=value` overrides, and validate the result.

    Raises:
        ConfigError: all mistakes together.
    """
    return _validated_with(_read_file(path, (), []), overrides)


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
    values = dict(values)
    if not is_bounded(values):
        raise ConfigError(f"{source}: its config is too large, or nested too deeply")
    return validated(ConfigTree(upgraded(values), {(): source}, []))


def to_yaml(config: Config) -> str:
    """The complete config as YAML, from which `load_config` reads an equal one."""
    values = {"format": FORMAT, **json.loads(config.model_dump_json())}
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=110)


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
MAX_FILES = 100
"""Files that a config may be read from. Bases that each name two bases would otherwise be read 2^n times."""


def _parse_yaml(text: str, source: str, at: KeyPath = ()) -> ConfigTree:
    """Parse a YAML text that holds the value of the key `at`."""
    values, node = parse_yaml(text, source)
    tree = ConfigTree(values, {}, [])
    if node is not None:
        _note_lines(node, at, source, tree)
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
            raise ConfigError(f"{here}: `{key_text(path)}` is set twice, first at {tree.sources[path]}; remove one")
        if isinstance(value, yaml.ScalarNode) and not value.value and not value.style and _requires_value(path):
            tree.mistakes.append(
                (path, f"{here}: `{key_text(path)}` has no value; add one, or delete the line (`null` is the default)")
            )
        tree.sources[path] = here
        _note_lines(value, path, source, tree)


def _requires_value(path: KeyPath) -> bool:
    """Whether a key is a setting for which null is neither a value nor, as for text, invalid in any case."""
    field = field_at(path)
    return field is not None and not (may_be_null(field) or field.annotation is str or section_type(field.annotation))


def _recipe_hint(path: Path) -> str:
    """Where the recipe of this name is that comes with the package, if there is one."""
    name = path.parts[-2:] if path.parent.name == "_base_" else path.parts[-1:]
    recipes = sorted(package_folder("configs").rglob("*.yaml"))
    recipe = next((recipe for recipe in recipes if recipe.parts[-len(name) :] == name), None)
    return f"; the recipe of this name is {recipe}" if recipe is not None else ""


def _read_text(path: Path, parents: tuple[Path, ...]) -> str:
    named = f" (named by `_base_` in {parents[-1]})" if parents else ""
    try:
        return read_bytes(path, limit=4 * MAX_CHARACTERS).decode("utf-8-sig")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name[:255], [p.name for p in path.parent.glob("*.y*ml")], n=1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else _recipe_hint(path)
        raise ConfigError(f"config file {printable(str(path))} does not exist{named}{hint}") from None
    except OSError as error:
        reason = os_error_reason(error)
        raise ConfigError(f"config file {printable(str(path))} cannot be read: {reason}{named}") from None
    except UnicodeDecodeError as error:
        where = f"byte {error.start:,}: {error.reason}"
        raise ConfigError(f"config file {path} cannot be read: it must be UTF-8 text, got {where}") from None


def _read_file(path: Path, parents: tuple[Path, ...], files: list[Path]) -> ConfigTree:
    """Read a file and its bases; `files` collects all that were read."""
    resolved = Path(os.path.realpath(path)) if "\0" not in str(path) else path
    if resolved in parents:
        chain = " -> ".join(str(parent) for parent in (*parents, resolved))
        raise ConfigError(f"{path}: `_base_` is circular: {printable(chain, 1000)}")
    files.append(resolved)
    if len(files) > MAX_FILES:
        raise ConfigError(f"{path}: a config must be read from at most {MAX_FILES} files; `_base_` names more")
    parsed = _parse_yaml(_read_text(path, parents), printable(str(path)))
    values: Any = parsed.values if parsed.values is not None else {}
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: a config must be a mapping of sections (model:, data:, ...), got {shown(values)}")
    values = upgraded(_text_keys(values))
    require_known(values.pop("format", FORMAT), f"config {path}")
    bases = values.pop("_base_", [])
    if isinstance(bases, str):
        bases = [bases]
    if not isinstance(bases, list) or not all(isinstance(b, str) for b in bases):
        raise ConfigError(f"{path}: `_base_` must be a path or a list of paths, got {shown(bases)}")
    tree = ConfigTree({}, {}, [])
    for base in bases:
        _merge(tree, _read_file(path.parent / base, (*parents, resolved), files))
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
            for inside in _paths_in(before, path):
                into.sources.pop(inside, None)
            into.sources[path] = where
            old[key] = value

    merge(into.values, new.values, ())
    into.sources.update(new.sources)
    into.mistakes.extend(new.mistakes)


def _paths_in(value: Any, at: KeyPath) -> Iterator[KeyPath]:
    """The path of a value and of everything in it."""
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _paths_in(item, (*at, str(key)))


def _irreplaceable(path: KeyPath, before: Any, before_at: str, value: Any, where: str) -> str | None:
    """Why a value may not replace an earlier one silently; None if it may."""
    key = key_text(path)
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
    if len(parts) > MAX_DEPTH or any(0xD800 <= ord(c) < 0xE000 for c in override):  # bytes that are not UTF-8
        tree.mistakes.append(((), f"override must be key=value, in UTF-8, got {shown(override, 100)}"))
        return
    is_text = field is not None and field.annotation in (str, str | None)
    if not sign or not all(parts) or not (text if is_text else text.partition("#")[0]).strip():
        message = f"override must be key=value, for example train.epochs=3, got {shown(override, 100)}"
        if sign and all(parts):
            message += "; use null as the value for the default, or for none where a setting may be absent"
        tree.mistakes.append((parts, message))
        return
    parsed = ConfigTree(None if text == "null" else text, {}, [])
    if not is_text:
        parsed = _parse_yaml(text, f"override {printable(key)}", parts)
    nested: Any = _text_keys(parsed.values)
    for part in reversed(parts):
        nested = {part: nested}
    keys = (MOVED.get(parts, parts), *parsed.sources)
    _merge(tree, ConfigTree(upgraded(nested), dict.fromkeys(keys, COMMAND_LINE), parsed.mistakes))
