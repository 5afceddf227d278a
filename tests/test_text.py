"""Text of any origin is harmless and short in what is printed, at a bounded cost."""

from __future__ import annotations

from typing import Any

import pytest

from detector.text import (
    MAX_MESSAGE,
    MAX_NAME,
    as_many_as_fit,
    cut,
    printable,
    printable_lines,
    shortened,
    shown,
    spreadsheet_cell,
)


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("", ""), ("cat", "cat"), ("cat\n", "cat\\n"), ("\x1b[2J", "\\x1b[2J"), ("\ud800", "\\ud800"),
        ("\u202egnp.exe", "\\u202egnp.exe"), ("\u2066", "\\u2066"), ("a\0b", "a\\x00b"), ("\x85", "\\x85"),
        ("\u2028", "\\u2028"), ("\ufeff", "\\ufeff"), ("\U000e0041", "\\U000e0041"), ("\\n", "\\n"),
        ("Fuß 猫", "Fuß 猫"),
    ],
)  # fmt: skip
def test_characters_that_control_a_terminal_or_hide_are_escaped(text: str, safe: str) -> None:
    assert printable(text) == safe
    assert printable(printable(text)) == safe


@pytest.mark.parametrize("text", ["traffic\u00a0light", "信号\u3000機", "می\u200cخواهم", "👩\u200d🚀"])
def test_spaces_and_joiners_that_names_need_are_kept(text: str) -> None:
    assert printable(text) == text


def test_lines_and_tabs_of_a_message_are_kept_and_nothing_else() -> None:
    assert printable_lines("a\n\tb\r\x1b") == "a\n\tb\\r\\x1b"


@pytest.mark.parametrize("text", ["x" * 10**7, "\x1b" * 10**5, "猫" * 10**5, "\ud800" * 10**5, "x" * MAX_MESSAGE])
def test_a_message_has_at_most_four_kilobytes(text: str) -> None:
    assert 0 < len(printable_lines(text).encode()) <= MAX_MESSAGE
    assert 0 < len(printable(text)) <= MAX_NAME
    assert printable(printable(text)) == printable(text)


@pytest.mark.parametrize("limit", [0, 1, 10, 40, 200])
def test_shortened_text_keeps_its_limit(limit: int) -> None:
    for length in (0, limit, limit + 1, 10_000):
        assert len(shortened("x" * length, limit)) <= limit
    assert shortened("x" * limit, limit) == "x" * limit


def test_shortened_text_shows_its_ends_and_how_much_is_missing() -> None:
    assert shortened("a" * 1000 + "b" * 1000, 120) == "a" * 57 + "...(1,925 characters left out)..." + "b" * 18


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"), (True, "true"), (False, "false"), (3, "3"), (-1.5, "-1.5"), (float("nan"), "nan"), ("", "''"),
        ("it's", '"it\'s"'), ("a\x1b", "'a\\x1b'"), ([], "[]"), ({}, "{}"), ((), "()"),
        ([1, "a", None], '[1, "a", null]'),
        ({"a": {"b": [True]}}, '{"a": {"b": [true]}}'), (list(range(20)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        ([[[[1]]]], "[[[[...]]]]"), (10**100, "an integer of 333 bits"), (b"ab", "b'ab'"),
        (object(), "a value of type object"),
        ("x" * 99, "'" + "x" * 58 + "…"),
    ],
)  # fmt: skip
def test_values_are_shown_as_in_json(value: Any, text: str) -> None:
    assert shown(value) == text


def tower(levels: int) -> Any:
    value: Any = ()
    for _ in range(levels):
        value = (value, value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        tower(60), [tower(60)], {"a": tower(60)}, {"x" * 10**6: "y" * 10**6}, "x" * 10**7, 10**4000,
        [[0] * 10**6] * 10**6, b"x" * 10**7,
    ],
    ids=["tuples", "in a list", "in a dict", "long texts", "10 MB", "4,000 digits", "10^12 numbers", "bytes"],
)  # fmt: skip
def test_a_value_whose_repr_has_no_end_is_shown_in_short(value: Any) -> None:
    assert len(shown(value)) <= 60


@pytest.mark.parametrize(
    ("text", "cell"),
    [("", ""), ("cat", "cat"), ("=1+1", "'=1+1"), ("-cat", "'-cat"), ("@x", "'@x"), ("+1", "'+1"), (" =1", "' =1"),
     ("a\tb\n", "a\\tb\\n"), ("\t=1", "\\t=1")],
)  # fmt: skip
def test_no_spreadsheet_runs_a_cell(text: str, cell: str) -> None:
    assert spreadsheet_cell(text) == cell


@pytest.mark.parametrize(("count", "text"), [(0, ""), (1, "0"), (4, "0, 1, 2, 3"), (5, "0, 1, ... (2 more), 4")])
def test_many_words_are_cut(count: int, text: str) -> None:
    assert cut([str(k) for k in range(count)], 3) == text


@pytest.mark.parametrize(
    ("lines", "kept"),
    [([], []), (["a"], ["a"]), (["x" * 30] * 3, ["x" * 30] * 3), (["x" * 30] * 9, ["x" * 30] * 2 + ["  and 7 more"])],
)
def test_lines_that_do_not_fit_are_counted(lines: list[str], kept: list[str]) -> None:
    assert as_many_as_fit(lines, 100) == kept
