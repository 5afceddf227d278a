"""Parse YAML of any origin within a budget of size, depth and aliases, and write YAML that reads back the same.

YAML 1.2's numbers and booleans: `1e-3` is a number; `no`, `on`, `010`, `1:30` and `2017-1-1` are text. An alias stands
for a copy, so nine lines of nine aliases each stand for 400 million values: what counts is the size after expansion.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError
from yaml.reader import ReaderError

from detector.errors import ConfigError
from detector.text import printable, shown

MAX_CHARACTERS = 2**17
"""Length of a text, of which PyYAML reads 100,000 per second. 13,000 class weights, of V3Det, have 92,000."""
MAX_EXPANDED = 2**18
"""Characters and values after aliases are replaced by what they stand for."""
MAX_DEPTH = 32
"""Levels of mappings and lists; a recipe has up to ten."""

MAX_DIGITS = 40

_PREFIX = "tag:yaml.org,2002:"
_NULL = r"~|null|Null|NULL|"
_BOOL = r"true|True|TRUE|false|False|FALSE"
_INT = r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+"
_FLOAT = (
    r"[-+]?(?:\d[\d_]*\.\d*(?:[eE][-+]?\d+)?|\.\d+(?:[eE][-+]?\d+)?|\d+[eE][-+]?\d+|\.(?:inf|Inf|INF))"
    r"|\.(?:nan|NaN|NAN)"
)


class ParsedYaml(NamedTuple):
    """A YAML text."""

    values: Any
    node: yaml.Node | None
    """The same with the line of every key; None for an empty text."""


class _Loader(yaml.SafeLoader):
    """Reads null, booleans, integers, floats, text, lists and mappings with scalar keys; nothing else."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Compose a node, unless it is nested too deeply."""
        if self.depth > MAX_DEPTH:
            event: Any = self.peek_event()  # type: ignore[no-untyped-call]
            _refuse(f"lists and sections must be nested at most {MAX_DEPTH} deep", event.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


def _scalar(kind: str, pattern: str, convert: Callable[[str], Any]) -> Callable[[_Loader, yaml.Node], Any]:
    def construct(loader: _Loader, node: yaml.Node) -> Any:
        text = loader.construct_scalar(node)  # type: ignore[arg-type]  # refuses other nodes
        if not re.fullmatch(pattern, text):
            _refuse(f"!!{kind} must not stand before {shown(text)}", node.start_mark)
        return convert(text) if kind != "int" else _integer(text, node)

    return construct


def _integer(text: str, node: yaml.Node) -> int:
    digits = text.replace("_", "")
    if len(digits) > MAX_DIGITS:
        _refuse(f"an integer must have at most {MAX_DIGITS} digits, got {len(digits):,}", node.start_mark)
    return int(digits, 16 if digits.startswith("0x") else 10)


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))


def _unknown_tag(_: _Loader, node: yaml.Node) -> NoReturn:
    _refuse(f"the tag {printable(node.tag)} is not supported; remove it", node.start_mark)


def _refuse(problem: str, mark: yaml.Mark) -> NoReturn:
    raise ConstructorError(None, None, problem, mark)


_REDEFINED = ("bool", "int", "float", "timestamp", "value")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.removeprefix(_PREFIX) not in _REDEFINED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _kind, _pattern, _first in (
    ("bool", _BOOL, "tTfF"), ("int", _INT, "-+0123456789"), ("float", _FLOAT, "-+.0123456789"),
):  # fmt: skip
    for _class in (_Loader, Dumper):
        _class.add_implicit_resolver(_PREFIX + _kind, re.compile(f"^(?:{_pattern})$"), list(_first))
_Loader.yaml_constructors = {
    _PREFIX + "null": _scalar("null", _NULL, lambda _: None),
    _PREFIX + "bool": _scalar("bool", _BOOL, lambda text: text.lower() == "true"),
    _PREFIX + "int": _scalar("int", _INT, int),
    _PREFIX + "float": _scalar("float", rf"{_FLOAT}|[-+]?\d[\d_]*", _float),
    _PREFIX + "str": _Loader.construct_yaml_str,
    _PREFIX + "seq": _Loader.construct_yaml_seq,
    _PREFIX + "map": _Loader.construct_yaml_map,
    None: _unknown_tag,
}  # fmt: skip


def parse_yaml(text: str, source: str) -> ParsedYaml:
    """Parse YAML of any origin.

    Args:
        text: of one document.
        source: the file, or another name for messages.

    Raises:
        ConfigError: the text is no YAML, beyond the budget, or holds anything but what JSON can; names the line.
    """
    if len(text) > MAX_CHARACTERS:
        raise ConfigError(f"{source}: YAML must have at most {MAX_CHARACTERS:,} characters, got {len(text):,}")
    loader = _Loader("")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return ParsedYaml(None, None)
        _check(node, {})
        copy = yaml.compose(text, Loader=_Loader) if "<<" in text else node  # merging changes the nodes
        return ParsedYaml(loader.construct_document(node), copy)
    except ReaderError as error:
        position = int(error.position)
        place = f"{source}:{text.count(chr(10), 0, position) + 1}"
        character = ascii(text[position : position + 1])
        raise ConfigError(f"{place}: invalid YAML: the character {character} must not stand in it; remove it") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}" if mark is not None else source
        about = error.context if isinstance(error, ComposerError) else None
        problem = printable(", ".join(filter(None, (about, error.problem))) or "cannot be read", 300)
        own = isinstance(error, ConstructorError | ComposerError)
        remedy = "" if own else "; check for a missing colon, space or bracket"
        raise ConfigError(f"{place}: invalid YAML: {problem}{remedy}") from None
    except (yaml.YAMLError, OverflowError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        # PyYAML's own conversions, such as of \UFFFFFFFF, fail with Python's errors, which have no mark.
        place = source if isinstance(error, yaml.YAMLError) else f"{source}:{loader.get_mark().line + 1}"
        raise ConfigError(f"{place}: invalid YAML: {printable(str(error), 300)}") from None
    finally:
        loader.dispose()


class _Size(NamedTuple):
    """What a node becomes."""

    expanded: int
    """Characters and values."""
    depth: int


def _check(node: yaml.Node, known: dict[int, _Size | None]) -> _Size:
    """Measure a node and everything in it once, and check all text; `known` has the sizes by id, None while unknown."""
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value or not _encodable(node.value):
            _refuse(f"text must not have zero bytes or lone surrogates, got {shown(node.value)}", node.start_mark)
        return _Size(1 + len(node.value), 0)
    if id(node) in known:
        size = known[id(node)]
        if size is None:
            _refuse("a list or section must not contain itself", node.start_mark)
        return size
    known[id(node)] = None
    parts: list[_Size] = []
    for item in node.value:
        for part in item if isinstance(node, yaml.MappingNode) else (item,):
            parts.append(_check(part, known))
        if isinstance(node, yaml.MappingNode) and not isinstance(item[0], yaml.ScalarNode):
            _refuse("a key must be text or a number, not a list or section", item[0].start_mark)
    size = _Size(1 + sum(part.expanded for part in parts), 1 + max((part.depth for part in parts), default=0))
    if size.expanded > MAX_EXPANDED or size.depth > MAX_DEPTH:
        _refuse(
            f"with its aliases (*name) expanded, a text must have at most {MAX_EXPANDED:,} characters and {MAX_DEPTH} "
            "levels, got more; use fewer aliases",
            node.start_mark,
        )
    known[id(node)] = size
    return size


def is_bounded(value: Any) -> bool:
    """Whether parsed JSON is within the budget of YAML: lists and mappings that do not share their parts."""
    level, expanded = [value], 0
    for _ in range(MAX_DEPTH + 1):
        expanded += sum(1 + len(item) if isinstance(item, str) else 1 for item in level)
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [part for item in containers for part in (item.values() if isinstance(item, dict) else item)]
        if not containers or expanded > MAX_EXPANDED:
            break
    return not containers and expanded <= MAX_EXPANDED


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
