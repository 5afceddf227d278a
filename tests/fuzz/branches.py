"""Which branches of some modules are taken: both ways of every conditional jump of their bytecode.

coverage.py is no dependency of this project, and sys.monitoring needs a later Python than the oldest supported one.
"""

from __future__ import annotations

import contextlib
import dis
import importlib
import itertools
import sys
from collections.abc import Iterable, Iterator
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any, NamedTuple


class _Jump(NamedTuple):
    """A conditional jump: where it leads if it falls through, and if it jumps."""

    line: int
    falls_to: int
    jumps_to: int


class BranchTracer:
    """Collects the branches that are taken in some modules while `tracing`.

    Args:
        modules: their full names.
    """

    def __init__(self, modules: Iterable[str]) -> None:
        self.jumps: dict[str, dict[int, _Jump]] = {}
        self.names: dict[CodeType, str] = {}
        for name in modules:
            for code in _codes_of(importlib.import_module(name)):
                key = f"{name}:{code.co_qualname}:{code.co_firstlineno}"
                self.names[code] = key
                self.jumps[key] = _jumps_of(code)
        self._taken: set[tuple[str, int, bool]] = set()

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Trace within the block."""
        sys.settrace(self._on_call)
        try:
            yield
        finally:
            sys.settrace(None)

    def _on_call(self, frame: FrameType, event: str, _: Any) -> Any:
        key = self.names.get(frame.f_code)
        if key is None:
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        jumps, before = self.jumps[key], -1

        def on_opcode(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal before
            if event == "opcode":
                jump, now = jumps.get(before), frame.f_lasti
                if jump is not None and now in (jump.falls_to, jump.jumps_to):
                    self._taken.add((key, before, now == jump.jumps_to))
                before = now
            return on_opcode

        return on_opcode

    def taken(self) -> list[tuple[str, int, bool]]:
        """The branches taken so far."""
        return sorted(self._taken)

    def add(self, taken: Iterable[tuple[str, int, bool]]) -> None:
        """Add branches that another process has taken."""
        self._taken.update((key, offset, jumped) for key, offset, jumped in taken)

    def by_module(self) -> dict[str, tuple[int, int]]:
        """The branches taken, and all branches, of each module."""
        counts: dict[str, tuple[int, int]] = {}
        for key, jumps in self.jumps.items():
            module = key.partition(":")[0]
            taken = sum((key, offset, jumped) in self._taken for offset in jumps for jumped in (False, True))
            before = counts.get(module, (0, 0))
            counts[module] = before[0] + taken, before[1] + 2 * len(jumps)
        return counts

    def not_taken(self) -> list[str]:
        """Module, function and line of every branch that was not taken."""
        return [
            f"{key.rpartition(':')[0]}, line {jump.line}: {'jumps' if jumped else 'falls through'}"
            for key, jumps in self.jumps.items()
            for offset, jump in jumps.items()
            for jumped in (False, True)
            if (key, offset, jumped) not in self._taken
        ]


def _codes_of(module: ModuleType) -> Iterator[CodeType]:
    """All functions, methods, lambdas and comprehensions of a module."""
    seen: set[CodeType] = set()
    left: list[Any] = list(vars(module).values())
    visited: set[int] = set()
    while left:
        value = left.pop()
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, type) and value.__module__ == module.__name__:
            left += vars(value).values()
        elif isinstance(value, dict | list | tuple | set):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, property | staticmethod | classmethod):
            left += [value.fget] if isinstance(value, property) else [value.__func__]
        elif isinstance(value, FunctionType) and value.__module__ == module.__name__:
            left += [value.__code__, *(cell.cell_contents for cell in value.__closure__ or ())]
        elif isinstance(value, CodeType) and value not in seen and value.co_filename == module.__file__:
            seen.add(value)
            left += [constant for constant in value.co_consts if isinstance(constant, CodeType)]
            yield value


def _jumps_of(code: CodeType) -> dict[int, _Jump]:
    instructions = list(dis.get_instructions(code))
    jumps, line = {}, code.co_firstlineno
    for instruction, following in itertools.pairwise(instructions):
        line = instruction.starts_line if isinstance(instruction.starts_line, int) else line
        conditional = instruction.opname.startswith(("POP_JUMP", "JUMP_IF", "FOR_ITER"))
        if conditional and isinstance(instruction.argval, int):
            jumps[instruction.offset] = _Jump(line, following.offset, instruction.argval)
    return jumps
