"""Make text from files harmless and short in everything that is printed, logged or written.

Class names, file names, keys and error messages come from files that other people made. They may contain terminal
escape sequences, line breaks, lone surrogates, right-to-left overrides, spreadsheet formulas, or ten megabytes.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from itertools import islice
from typing import Any

MAX_NAME = 200
"""Characters of a name that messages show."""
MAX_MESSAGE = 4000
"""Bytes of an error message that are printed, as UTF-8."""

_FORMULA = ("=", "+", "-", "@")
_MAX_INTEGER_BITS = 256
_MAX_ITEMS = 8
_MAX_LEVELS = 3
_MAX_PART = 100
"""Characters of a text within a value that is shown."""


def printable(text: str, limit: int = MAX_NAME) -> str:
    """Escape line breaks, control characters, bidirectional overrides and lone surrogates, and shorten to a limit.

    Applied to its own result, it changes nothing.
    """
    return shortened(_escaped(shortened(text, limit)), limit)


def printable_lines(text: str, limit: int = MAX_MESSAGE) -> str:
    """Like `printable`, but keep line breaks and tabs, for messages of several lines; the limit is in bytes."""
    text = _escaped(shortened(text, limit), keep="\n\t")
    characters = limit
    while len(short := shortened(text, characters)) > limit or len(short.encode()) > limit:
        characters = characters * 4 // 5
    return short


def shortened(text: str, limit: int) -> str:
    """Replace the middle of a longer text by the number of characters left out."""
    if len(text) <= limit:
        return text
    room = limit - 45  # for both ends; the rest is for the words between them
    if room < 20:
        return text[: max(0, limit - 1)] + "…" * (limit > 0)
    head, tail = room - room // 4, room // 4
    return f"{text[:head]}...({len(text) - head - tail:,} characters left out)...{text[-tail:]}"


def _escaped(text: str, keep: str = "") -> str:
    if text.isprintable():
        return text
    return "".join(c if c in keep or _is_harmless(c) else ascii(c)[1:-1] for c in text)


def _is_harmless(character: str) -> bool:
    # Persian and Indic words need the joiners; names copied from documents contain wide and non-breaking spaces
    return character.isprintable() or character in "\u200c\u200d" or unicodedata.category(character) == "Zs"


def shown(value: object, limit: int = 60) -> str:
    """Format a value from a file for a message, of bounded cost and length; booleans and null as in JSON and YAML.

    The repr of a few nested containers that share their parts can be of any length, so it is never computed.
    """
    text = _brief(value, _MAX_LEVELS)
    return text if len(text) <= limit else text[: limit - 1] + "…"


_Container = dict[Any, object] | list[object] | tuple[object, ...] | set[object] | frozenset[object]


def _brief(value: object, levels: int) -> str:
    if isinstance(value, str):
        value = value if len(value) <= _MAX_PART else value[:_MAX_PART] + "…"
        return repr(value) if levels == _MAX_LEVELS else _escaped(json.dumps(value, ensure_ascii=False))
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and value.bit_length() > _MAX_INTEGER_BITS:  # Python refuses to print vast ones
        return f"an integer of {value.bit_length():,} bits"
    if isinstance(value, int | float | complex):
        return str(value)
    if isinstance(value, bytes | bytearray):
        return repr(bytes(value[:_MAX_PART]))
    if isinstance(value, dict | list | tuple | set | frozenset):
        return _brief_container(value, levels)
    return f"a value of type {type(value).__name__}"


def _brief_container(value: _Container, levels: int) -> str:
    left, right = "[]" if isinstance(value, list) else "()" if isinstance(value, tuple) else "{}"
    if levels == 0:
        return f"{left}...{right}" if value else left + right
    items = [
        f"{_brief(key, levels - 1)}: {_brief(value[key], levels - 1)}" if isinstance(value, dict)
        else _brief(key, levels - 1)
        for key in islice(value, _MAX_ITEMS)
    ]  # fmt: skip
    return left + ", ".join([*items, *["..."] * (len(value) > _MAX_ITEMS)]) + right


def spreadsheet_cell(text: str, limit: int = 1000) -> str:
    """Make text safe as a cell of a CSV or TSV file: spreadsheets would run one that starts with =, +, - or @."""
    text = printable(text, limit)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) else text


def cut(words: Sequence[str], limit: int) -> str:
    """Join words by commas; of many, the first ones and the last, with the number of the others."""
    if len(words) <= limit + 1:
        return ", ".join(words)
    return f"{', '.join(words[: limit - 1])}, ... ({len(words) - limit:,} more), {words[-1]}"


def as_many_as_fit(lines: Sequence[str], limit: int = MAX_MESSAGE) -> list[str]:
    """Return the first lines that fit into a limit of bytes, and how many more there are."""
    sizes = [len(line.encode(errors="backslashreplace")) + 1 for line in lines]
    if sum(sizes) <= limit:
        return list(lines)
    more = "  and {:,} more"
    used, count = len(more) + 20, 0
    while count < len(lines) and used + sizes[count] <= limit:
        used += sizes[count]
        count += 1
    return [*lines[:count], more.format(len(lines) - count)]
