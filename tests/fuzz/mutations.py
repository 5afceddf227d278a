"""Odd values, and changes to parsed JSON, to text and to bytes, drawn from a random generator."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

ODD_TEXTS = (
    "", " ", "x\n", "\x1b[2J\x1b]0;title\x07", "\u202egpj.exe", "\ud800", "a\0b", "=1+1", "@SUM(A1)", "../../x",
    "/dev/zero", "C:\\x", "é" * 300, "x" * 20_000, "null", "1e999", "-", "%s%n{0}", "<b>", "[red]", "a\tb\r\n",
    "\ufeff", "\u2028", "猫", "~", "!!int", "nan", "𝔘" * 50, "'", '"', "\\", "{}", "$HOME", ".", "..", "a/" * 3000,
)  # fmt: skip
ODD_NUMBERS = (
    0, -1, 1, 2, 255, 2**31 - 1, 2**31, -(2**31) - 1, 2**53, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30, 10**400,
    0.5, -0.0, 1e-320, 1e-8, 1.0, 7.0, 1e15, 1e100, 1.8e308, float("inf"), float("-inf"), float("nan"),
)  # fmt: skip


def odd_value(rng: random.Random) -> Any:
    """A value that a field does not expect."""
    kind = rng.randrange(10)
    if kind < 3:
        return rng.choice(ODD_TEXTS)
    if kind < 6:
        return rng.choice(ODD_NUMBERS)
    if kind == 6:
        return rng.choice([None, True, False])
    if kind == 7:
        return [rng.choice([*ODD_TEXTS, *ODD_NUMBERS, None]) for _ in range(rng.choice([0, 1, 2, 3, 4, 5, 50]))]
    if kind == 8:
        return {str(rng.choice([*ODD_TEXTS, k])): rng.choice(ODD_NUMBERS) for k in range(rng.choice([0, 1, 3, 30]))}
    value: Any = rng.choice([None, 1, "x"])
    for _ in range(rng.choice([2, 10, 40, 100])):
        value = {"a": value} if rng.random() < 0.3 else [value]
    return value


def mutate(rng: random.Random, value: Any, times: int) -> Any:
    """Change parsed JSON in some places; the value itself stays as it is."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        value = _mutate_once(rng, value)
    return value


def _mutate_once(rng: random.Random, value: Any) -> Any:
    places: list[tuple[Any, Any]] = []
    left = [value]
    while left and len(places) < 20_000:
        item = left.pop()
        if isinstance(item, dict | list):
            keys = list(item) if isinstance(item, dict) else list(range(len(item)))
            places += [(item, key) for key in keys]
            left += [item[key] for key in keys]
    if not places or rng.random() < 0.01:
        return odd_value(rng)
    container, key = rng.choice(places)
    change = rng.choice(_CHANGES)
    change(rng, container, key, places)
    return value


def _replace(rng: random.Random, container: Any, key: Any, _: Any) -> None:
    container[key] = odd_value(rng)


def _delete(_: random.Random, container: Any, key: Any, __: Any) -> None:
    del container[key]


def _copy(rng: random.Random, container: Any, key: Any, places: Any) -> None:
    other, place = rng.choice(places)
    if len(json.dumps(other[place])) < 100_000:
        container[key] = json.loads(json.dumps(other[place]))


def _add(rng: random.Random, container: Any, key: Any, _: Any) -> None:
    if isinstance(container, dict):
        container[rng.choice([*ODD_TEXTS, str(key) + "x", str(key).upper()])] = odd_value(rng)
    else:
        container.insert(rng.randrange(len(container) + 1), odd_value(rng))


def _rename(rng: random.Random, container: Any, key: Any, _: Any) -> None:
    if isinstance(container, dict):
        container[rng.choice([str(key)[:-1], str(key) + "s", str(key).title(), *ODD_TEXTS])] = container.pop(key)


def _repeat(rng: random.Random, container: Any, key: Any, _: Any) -> None:
    if isinstance(container[key], list) and len(container[key]) < 1000:
        container[key] = container[key] * rng.choice([2, 3, 50])
    elif isinstance(container[key], str):
        container[key] = (container[key] * rng.choice([2, 200]))[:50_000]


def _retype(rng: random.Random, container: Any, key: Any, _: Any) -> None:
    item = container[key]
    if isinstance(item, int | float):
        container[key] = rng.choice(
            [str(item), [item], float(item) if abs(item) < 1e300 else 0.5, -item, item * 2, item + 1]
        )
    elif isinstance(item, str):
        container[key] = rng.choice([item.encode("unicode_escape").decode(), [item], item.upper(), item + "\n", 7])
    else:
        container[key] = json.dumps(item)[:1000]


_CHANGES: tuple[Callable[[random.Random, Any, Any, Any], None], ...] = (
    _replace, _replace, _delete, _copy, _add, _rename, _repeat, _retype, _retype,
)  # fmt: skip


def json_text(rng: random.Random, value: Any) -> str:
    """JSON of a value, sometimes with a key twice, numbers that no parser likes, or a syntax error."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 1]))
    if rng.random() < 0.08 and isinstance(value, dict) and value:
        key = rng.choice(list(value))
        text = text.rstrip()[:-1] + f", {json.dumps(key)}: {json.dumps(rng.choice([[], value[key], 1]))}}}"
    if rng.random() < 0.05:
        text = text.replace(rng.choice(["1", "0", "2"]), rng.choice(["9" * 5000, "1e999", "NaN", "-Infinity", "01"]), 1)
    if rng.random() < 0.02:
        text = "[" * rng.choice([10, 1000, 100_000]) + text
    return text


def encoded(rng: random.Random, text: str) -> bytes:
    """Text as bytes, mostly UTF-8."""
    encoding = rng.choice(["utf-8"] * 60 + ["utf-8-sig", "utf-16", "utf-32", "latin-1"])
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def mutate_bytes(rng: random.Random, data: bytes, *, tokens: tuple[bytes, ...] = ()) -> bytes:
    """Change, remove, repeat or insert some bytes."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5, 20])):
        place = rng.randrange(len(changed) + 1)
        length = rng.choice([1, 1, 2, 8, 64, 1000])
        kind = rng.randrange(6)
        if kind == 0 and changed:
            changed[min(place, len(changed) - 1)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del changed[place : place + length]
        elif kind == 2:
            changed[place:place] = changed[place : place + length] * rng.choice([1, 2, 10])
        elif kind == 3:
            changed[place:place] = rng.choice(tokens) if tokens else rng.randbytes(min(length, 8))
        elif kind == 4:
            changed[place : place + min(length, 8)] = rng.randbytes(min(length, 8))
        elif rng.random() < 0.3:
            del changed[place:]
    return bytes(changed)
