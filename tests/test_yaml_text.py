"""YAML of any origin: what aliases, depth, numbers and tags may cost, and errors that name the line."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml

from detector.errors import ConfigError
from detector.yaml_text import MAX_CHARACTERS, MAX_DEPTH, MAX_EXPANDED, Dumper, is_bounded, parse_yaml


def bomb(levels: int, width: int, kind: str = "list") -> str:
    lines = ["a0: &a0 [x, x]" if kind == "list" else "a0: &a0 {x: 1}"]
    for i in range(1, levels):
        items = ", ".join([f"*a{i - 1}"] * width)
        lines.append(f"a{i}: &a{i} {{<<: [{items}]}}" if kind == "merge" else f"a{i}: &a{i} [{items}]")
    return "\n".join(lines)


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n"])
def test_an_empty_text_has_no_values(text: str) -> None:
    assert parse_yaml(text, "x").values is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("-1.5", -1.5), (".5", 0.5), ("1_000", 1000), ("0x1F", 31), ("-.inf", -math.inf), ("+7", 7),
        ("no", "no"), ("on", "on"), ("010", "010"), ("1:30", "1:30"), ("2017-01-01", "2017-01-01"), ("=", "="),
        ("true", True), ("FALSE", False), ("~", None), ("null", None), ("", None), ("!!str 3", "3"), ("!!int '3'", 3),
        ("!!float 3", 3.0), ("!!float 1_0", 10.0), ("!!bool true", True), ("!!null ''", None), ("'1'", "1"),
        ("&a [1, 2]", [1, 2]), ("{a: &x [1], b: *x}", {"a": [1], "b": [1]}),
        ("{a: &x {p: 1}, b: {<<: *x, q: 2}}", {"a": {"p": 1}, "b": {"p": 1, "q": 2}}),
    ],
)  # fmt: skip
def test_a_value_is_that_of_yaml_1_2(text: str, value: Any) -> None:
    found = parse_yaml(text, "x").values
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\nb: !!int abc", "x:2: invalid YAML: !!int must not stand before 'abc'"),
        ("a: !!int ''", "x:1: invalid YAML: !!int must not"),
        ('a: 1\nb: "\\UFFFFFFFF"', "x:2: invalid YAML: "),
        ('b: "\\U00110000"', "x:1: invalid YAML: "),
        (f"%YAML 1.{'9' * 5000}\n---\na: 1", "x:1: invalid YAML: "),
        ("a: !!int 010", "x:1: invalid YAML: !!int must not"),
        ("a: !!bool maybe", "x:1: invalid YAML: !!bool must not stand before 'maybe'"),
        ("a: !!float 0x1f", "x:1: invalid YAML: !!float must not"),
        ("a: !!null 3", "x:1: invalid YAML: !!null must not"),
        ("a: !!timestamp 3", "x:1: invalid YAML: the tag tag:yaml.org,2002:timestamp is not supported"),
        ("a: !!binary 3", "x:1: invalid YAML: the tag"),
        ("a: !!set {b}", "x:1: invalid YAML: the tag"),
        ("a: !!python/name:os.system", "x:1: invalid YAML: the tag"),
        ("a: !!int [1]", "x:1: invalid YAML: expected a scalar node"),
        ("a: !!map [1]", "x:1: invalid YAML: expected a mapping node"),
        ("a: " + "9" * 5000, "x:1: invalid YAML: an integer must have at most 40 digits, got 5,000"),
        ("a: 0x" + "f" * 5000, "x:1: invalid YAML: an integer must have at most 40 digits, got 5,002"),
        ('a: 1\n\nb: "\\0"', "x:3: invalid YAML: text must not have zero bytes or lone surrogates"),
        ('"\\ud800": 1', "x:1: invalid YAML: text must not have zero bytes or lone surrogates"),
        ("a: 1\n? [b]\n: 2", "x:2: invalid YAML: a key must be text or a number"),
        ("a: 1\nb: \x07", "x:2: invalid YAML: the character '\\x07' must not stand in it"),
        ("a: &x\n  b: *x", "x:1: invalid YAML: a list or section must not contain itself"),
        ("a: *b", "x:1: invalid YAML: found undefined alias 'b'"),
        ("a: {<<: 3}", "x:1: invalid YAML: expected a mapping or list of mappings for merging"),
        ("a\n---\nb", "x:2: invalid YAML: expected a single document in the stream, but found another document"),
        ("a: &x 1\nb: &x 2", "x:2: invalid YAML: found duplicate anchor 'x'; first occurrence, second occurrence"),
        ("[" * 40 + "]" * 40, f"x:1: invalid YAML: lists and sections must be nested at most {MAX_DEPTH} deep"),
        ("- " * 40, "x:1: invalid YAML: lists and sections must be nested at most"),
        ("[" * 100_000, "x:1: invalid YAML: lists and sections must be nested at most"),
        ("x" * (MAX_CHARACTERS + 1), "x: YAML must have at most 131,072 characters, got 131,073"),
    ],
)  # fmt: skip
def test_what_no_config_needs_is_an_error_with_its_line(text: str, problem: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_yaml(text, "x")
    assert str(caught.value).startswith(problem)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("kind", ["list", "merge"])
def test_aliases_count_as_what_they_stand_for(kind: str) -> None:
    parse_yaml(bomb(4, 4, kind), "x")
    with pytest.raises(ConfigError, match=r"with its aliases \(\*name\) expanded, a text must have at most 262,144"):
        parse_yaml(bomb(9, 9, kind), "x")


def test_a_chain_of_aliases_counts_as_nested() -> None:
    with pytest.raises(ConfigError, match="and 32 levels, got more"):
        parse_yaml(bomb(40, 1), "x")


def test_aliases_of_a_long_text_count_with_its_length() -> None:
    with pytest.raises(ConfigError, match=r"with its aliases \(\*name\) expanded"):
        parse_yaml(f"a: &x {'x' * 10_000}\nb: [{', '.join(['*x'] * 30)}]", "x")


@pytest.mark.parametrize("text", ["1e-3", "no", "010", "1:30", "0x1f", "null", "=", "~", "<<", ".inf", "2017-1-1"])
def test_text_that_looks_like_another_value_survives_its_own_yaml(text: str) -> None:
    assert parse_yaml(yaml.dump({"a": text}, Dumper=Dumper), "x").values == {"a": text}


@pytest.mark.parametrize(
    ("value", "bounded"),
    [
        (None, True), ([], True), ({"a": [{"b": "c"}]}, True), ({"a": "x" * MAX_EXPANDED}, False),
        ([0] * MAX_EXPANDED, False),
    ],
)  # fmt: skip
def test_parsed_json_has_the_same_budget(value: Any, bounded: bool) -> None:
    assert is_bounded(value) == bounded


@pytest.mark.parametrize(("levels", "bounded"), [(MAX_DEPTH, True), (MAX_DEPTH + 1, False), (100_000, False)])
def test_parsed_json_has_the_same_depth(levels: int, bounded: bool) -> None:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    assert is_bounded(value) == bounded
