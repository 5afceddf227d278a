"""Parse JSON of any origin: a key written twice, nesting without end and vast numbers are errors with a place.

Python's own parser keeps the last of two equal keys silently, which would lose half of a file that was merged by hand.
"""

from __future__ import annotations

import gc
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable
from typing import Any

from detector.text import cut, printable, shown

MAX_SEARCHED = 20_000_000
"""Characters in which the place of a repeated key is searched; a slower second pass."""

MAX_UNPACKED_RATIO = 100
"""Size of unpacked gzip data, in multiples of the packed size. Annotations are packed to a tenth or less."""

_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:]', re.DOTALL)


class JsonError(ValueError):
    """Text that is no JSON. The message states what is wrong and where."""


class RepeatedKeyError(JsonError):
    """An object that has a key twice."""


class _RepeatedKeyError(ValueError):
    def __init__(self, keys: list[str]) -> None:
        counts = Counter(keys)
        self.key, self.keys = next(key for key in counts if counts[key] > 1), list(counts)


def parse_json(raw: bytes, *, convert: Callable[[dict[str, Any]], Any] | None = None) -> Any:
    """Parse the content of a JSON file.

    Args:
        raw: UTF-8, UTF-16 or UTF-32 with or without a byte order mark; compressed with gzip or not.
        convert: called with every object, innermost first; its result takes the object's place.

    Raises:
        JsonError: the text is no JSON, an object has a key twice, or a number or the nesting is beyond all bounds.
    """

    def without_repeated_keys(pairs: list[tuple[str, Any]]) -> Any:
        entry = dict(pairs)
        if len(entry) < len(pairs):
            raise _RepeatedKeyError([key for key, _ in pairs])
        return entry if convert is None else convert(entry)

    if raw.startswith(b"\x1f\x8b"):
        raw = _unpacked(raw)
    try:
        text = raw.decode(json.detect_encoding(raw)).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise JsonError(f"no text in {error.encoding} at byte {error.start:,}: {error.reason}") from None
    del raw  # with a large file, the bytes, the text and the objects need not all be in memory
    # Collecting garbage among millions of new objects, none of which is garbage, doubles the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return json.loads(text, object_pairs_hook=without_repeated_keys)
    except _RepeatedKeyError as repeated:
        raise RepeatedKeyError(
            f"the key {shown(repeated.key)} stands twice in one object{_place_of(repeated.key, text)}, whose keys are "
            f"{cut([shown(key, 30) for key in repeated.keys], 6)}; remove or rename one of the two"
        ) from None
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and re.match(r"\s*[{\[]", error.doc[error.pos : error.pos + 99]):
            raise JsonError("one JSON object per line (JSON Lines, such as a manifest), not one document") from None
        near = printable(error.doc[max(0, error.pos - 30) : error.pos + 30])
        raise JsonError(f"{error.msg} at line {error.lineno}, column {error.colno}, near: {near}") from None
    except RecursionError:
        raise JsonError("lists and objects are nested too deeply") from None
    except ValueError:  # what is left: int() refuses thousands of digits
        raise JsonError("a number has thousands of digits") from None
    finally:
        if collecting:
            gc.enable()


def _unpacked(raw: bytes) -> bytes:
    """Unpack gzip, at most to `MAX_UNPACKED_RATIO` times its size."""
    limit = MAX_UNPACKED_RATIO * len(raw)
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            unpacked = file.read(limit + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise JsonError(f"gzip data that are damaged or cut off ({printable(str(error))})") from None
    if len(unpacked) > limit:
        raise JsonError(f"gzip data that unpack to more than {MAX_UNPACKED_RATIO} times their size")
    return unpacked


def _place_of(key: str, text: str) -> str:
    """Where an object that has the key twice repeats it; empty where that is not found soon."""
    objects: list[bool] = []  # for each open list or object, whether the key has been seen in it
    before = ""
    for token in _TOKEN.finditer(text, 0, MAX_SEARCHED):
        kind = token[0]
        if kind in "{[":
            objects.append(False)
        elif kind in "}]":
            objects.pop()
        elif kind == ":" and _is_key(before, key):
            if objects[-1]:
                position = token.start()
                line_start = text.rfind("\n", 0, position) + 1
                return f" (line {text.count(chr(10), 0, position) + 1}, column {position - line_start + 1})"
            objects[-1] = True
        before = kind
    return ""


def _is_key(token: str, key: str) -> bool:
    return json.loads(token) == key if "\\" in token else token[1:-1] == key
