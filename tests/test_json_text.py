"""JSON of any origin: equal keys, depth and vast numbers are errors with a place."""

from __future__ import annotations

import gc
import gzip
import json
from typing import Any

import pytest

from detector.json_text import JsonError, parse_json


@pytest.mark.parametrize("value", [None, [], {}, {"a": [1, 2.5, "b"], "c": {"a": None}}, "é\U0001f600", [True]])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_json_in_every_unicode_encoding_is_read(value: Any, encoding: str) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=False).encode(encoding)) == value


def test_objects_are_converted_innermost_first() -> None:
    assert parse_json(b'{"a": {"b": 1}, "c": {}}', convert=lambda entry: list(entry)) == ["a", "c"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"a": 1, "a": 2}', "the key 'a' stands twice in one object (line 1, column 13), whose keys are 'a'; remove"),
        ('{"a": 1,\n "b": {"a": "a", "c": [{"a": 1}]},\n  "a": 2}', "the key 'a' stands twice in one object (line 3,"),
        ('[{"x": 1}, {"x": {"x": 1}, "y": ":\\""\n, "x": 2}]', "the key 'x' stands twice in one object (line 2"),
        ('{"a\\u0062": 1, "ab": 2}', "the key 'ab' stands twice"),
        ('{"\\u001b[2J": 1, "\\u001b[2J": 2}', "the key '\\x1b[2J' stands twice"),
        ("", "Expecting value at line 1, column 1"),
        ('{"a": [1,\n2', "Expecting ',' delimiter at line 2, column 2, near: {\"a\": [1,\\n2"),
        ("\x1b[31m", "Expecting value at line 1, column 1, near: \\x1b[31m"),
        ("[" * 100_000, "lists and objects are nested too deeply"),
        ('{"a":' * 100_000, "lists and objects are nested too deeply"),
        ("9" * 5000, "a number has thousands of digits"),
    ],
)  # fmt: skip
def test_an_error_states_what_is_wrong_and_where(text: str, problem: str) -> None:
    with pytest.raises(JsonError) as caught:
        parse_json(text.encode())
    assert str(caught.value).startswith(problem)
    assert len(str(caught.value)) < 500


def test_bytes_that_are_no_text_are_an_error() -> None:
    with pytest.raises(JsonError, match="no text in utf-8 at byte 2: invalid continuation byte"):
        parse_json(b'["\xe9"]')


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(enabled: bool) -> None:
    before = gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        parse_json(b"[1]")
        with pytest.raises(JsonError):
            parse_json(b"[")
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_packed_with_gzip_is_unpacked(encoding: str) -> None:
    assert parse_json(gzip.compress('{"a": "é"}'.encode(encoding))) == {"a": "é"}


@pytest.mark.parametrize(
    ("packed", "problem"),
    [
        (gzip.compress(b"[" + b" " * 10**7 + b"]"), "gzip data that unpack to more than 100 times their size"),
        (gzip.compress(b"[1, 2, 3]")[:-9], "gzip data that are damaged or cut off"),
        (b"\x1f\x8bnothing", "gzip data that are damaged or cut off"),
    ],
)
def test_gzip_data_that_are_damaged_or_vast_are_an_error(packed: bytes, problem: str) -> None:
    with pytest.raises(JsonError, match=problem):
        parse_json(packed)


@pytest.mark.parametrize("lines", [b'{"a": 1}\n{"a": 2}\n', b"[1]\r\n[2]\r\n"])
def test_one_object_per_line_is_named(lines: bytes) -> None:
    with pytest.raises(JsonError, match="one JSON object per line"):
        parse_json(lines)
    with pytest.raises(JsonError, match="Extra data"):
        parse_json(lines.splitlines()[0] + b" x")
