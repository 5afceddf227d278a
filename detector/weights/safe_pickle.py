"""Read pickles from untrusted sources without running anything in them.

A pickle is a program: it can name any importable function and have it called. Here its operations are interpreted by
this file alone. They build plain containers; the names in `FUNCTIONS` stand for a few functions of this file, those in
`INERT` for a stand-in without behaviour, and any other name is an error. Nothing is imported, and no container of the
pickle is ever printed, hashed or compared: with shared parts, each of these could take time without end. The number of
operations and of copied bytes is bounded.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pickle import UnpicklingError
from typing import Any, BinaryIO

from torch import Tensor

from detector.text import printable
from detector.weights.pickle_names import (
    ALLOWED_NAMES,
    FUNCTIONS,
    STORAGE_NAMES,
    Budget,
    EmptyArray,
    InertObject,
    Name,
    NumpyDtype,
    Storage,
    StoredTensor,
    checked_key,
    excerpt,
    is_whole,
    numpy_array,
    tensor_of,
)

MAX_PICKLE_OPERATIONS = 1_000_000
"""Operations of one pickle, and the largest index of its memo. A detector's has about ten thousand."""

_IN_PROGRESS = object()
_MARK = object()
_VALUES = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
    "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
"""Operations whose argument is the value."""


def unpickle(file: BinaryIO, budget: Budget, *, storages: bool = False) -> Any:
    """Read one pickle from a file as it stands in it, to be converted by `to_plain`.

    Args:
        file: positioned at the start of the pickle; afterwards, after its end.
        budget: for copies.
        storages: whether the pickle may refer to `Storage`s; otherwise all data is in it.

    Raises:
        UnpicklingError: a name outside the lists, an operation that makes no sense, or a size beyond the limits;
            damaged files raise many other errors.
    """
    machine = _Machine(budget, storages=storages)
    for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
        if count > MAX_PICKLE_OPERATIONS:
            raise UnpicklingError(f"it has more than {MAX_PICKLE_OPERATIONS:,} operations")
        machine.step(operation.name, argument)
    return machine.pop()


class _Machine:
    """Interprets the operations of a pickle, by their names in `pickletools`."""

    def __init__(self, budget: Budget, *, storages: bool) -> None:
        self.budget, self.storages = budget, storages
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, operation: str, argument: Any) -> None:
        """Run one operation."""
        push = self.stack.append
        if operation in _VALUES:
            push(argument)
            return
        match operation:
            case "PUT" | "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self.remember(len(self.memo) if operation == "MEMOIZE" else argument)
            case "GET" | "BINGET" | "LONG_BINGET":
                push(self.memo[argument])
            case "MARK":
                push(_MARK)
            case "POP":
                self.stack.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                push(self.top())
            case "NONE":
                push(None)
            case "NEWTRUE" | "NEWFALSE":
                push(operation == "NEWTRUE")
            case "EMPTY_LIST" | "LIST":
                push([] if operation == "EMPTY_LIST" else self.pop_to_mark())
            case "EMPTY_TUPLE" | "TUPLE":
                push(() if operation == "EMPTY_TUPLE" else tuple(self.pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(operation[-1]))]
                push(tuple(reversed(items)))
            case "EMPTY_DICT":
                push({})
            case "DICT":
                push(_with_items({}, self.pop_to_mark()))
            case "EMPTY_SET" | "FROZENSET":
                push(set() if operation == "EMPTY_SET" else set(map(checked_key, self.pop_to_mark())))
            case "APPEND" | "APPENDS":
                items = [self.pop()] if operation == "APPEND" else self.pop_to_mark()
                self.extend(items)
            case "SETITEM" | "SETITEMS":
                items = [self.pop(), self.pop()][::-1] if operation == "SETITEM" else self.pop_to_mark()
                _with_items(self.top(), items)
            case "ADDITEMS":
                items = self.pop_to_mark()
                if not isinstance(self.top(), set):
                    raise ValueError(f"items must be added to a set, got {excerpt(self.top())}")
                self.top().update(map(checked_key, items))
            case "GLOBAL" | "STACK_GLOBAL":
                module, name = argument.split(" ", 1) if operation == "GLOBAL" else [self.pop(), self.pop()][::-1]
                push(_allowed(module, name))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                push(self.call(function, arguments))
            case "NEWOBJ_EX":
                _, arguments, function = self.pop(), self.pop(), self.pop()
                push(self.call(function, arguments))
            case "INST":
                push(self.call(_allowed(*argument.split(" ", 1)), tuple(self.pop_to_mark())))
            case "OBJ":
                function, *items = self.pop_to_mark()
                push(self.call(function, tuple(items)))
            case "BUILD":
                self.build(self.pop())
            case "PERSID" | "BINPERSID":
                push(self.storage(argument if operation == "PERSID" else self.pop()))
            case "PROTO" | "FRAME" | "STOP":
                pass
            case _:  # EXT1, NEXT_BUFFER, ...
                raise UnpicklingError(f"it references data outside the file by {operation}")

    def pop(self) -> Any:
        """Take the last value."""
        if not self.stack or self.stack[-1] is _MARK:
            raise ValueError("an operation lacks a value")
        return self.stack.pop()

    def top(self) -> Any:
        """The last value."""
        value = self.pop()
        self.stack.append(value)
        return value

    def pop_to_mark(self) -> list[Any]:
        """Take all values after the last mark, and the mark."""
        items = []
        while self.stack and self.stack[-1] is not _MARK:
            items.append(self.stack.pop())
        if not self.stack:
            raise ValueError("an operation lacks a mark")
        self.stack.pop()
        items.reverse()
        return items

    def extend(self, items: list[Any]) -> None:
        """Append values to the list on the stack."""
        target = self.top()
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, InertObject):  # a list's subclass
            raise ValueError(f"values must be appended to a list, got {excerpt(target)}")

    def remember(self, index: int) -> None:
        """Store the last value in the memo."""
        if index > MAX_PICKLE_OPERATIONS:
            raise UnpicklingError(f"it has more than {MAX_PICKLE_OPERATIONS:,} memo entries")
        self.memo[index] = self.top()

    def call(self, function: Any, arguments: Any) -> Any:
        """Call a stand-in."""
        if not isinstance(function, Name) or function.text not in FUNCTIONS or not isinstance(arguments, tuple):
            name = printable(function.text) if isinstance(function, Name) else excerpt(function)
            raise UnpicklingError(f"it calls {name}, which is no function on the list of allowed names")
        return FUNCTIONS[function.text](arguments, self.budget)

    def build(self, state: Any) -> None:
        """Set the state of the last value; attributes of containers and of inert objects are dropped."""
        target = self.top()
        if isinstance(target, EmptyArray):
            _, shape, dtype, fortran, data = state
            target.array = numpy_array(dtype, data, shape, self.budget, fortran=bool(fortran))
        elif isinstance(target, NumpyDtype):
            order = state[1] if isinstance(state, tuple) and len(state) > 1 else None
            if not isinstance(order, str) or order not in ("<", ">", "|", "="):
                raise UnpicklingError(f"the byte order of an array must be < or >, got {excerpt(order)}")
            target.order = ">" if order == ">" else "<"
        elif not isinstance(target, InertObject | OrderedDict):
            raise ValueError(f"state must be set of an object, got {excerpt(target)}")

    def storage(self, reference: Any) -> Storage:
        """Check a reference to data outside the pickle."""
        if not self.storages or not isinstance(reference, tuple) or len(reference) not in (5, 6):
            raise UnpicklingError(f"it references data outside the file, {excerpt(reference)}")
        tag, kind, key, _, numel, *view = reference
        dtype = STORAGE_NAMES.get(kind.text) if isinstance(kind, Name) else None
        wrong = not isinstance(tag, str) or tag != "storage" or dtype is None or not isinstance(key, str)
        if wrong or not is_whole((numel,)) or any(part is not None for part in view):
            raise UnpicklingError("it references data of an unknown kind")
        assert dtype is not None
        return Storage(key, dtype, numel)


def _allowed(module: Any, name: Any) -> Name:
    if not isinstance(module, str) or not isinstance(name, str):
        raise UnpicklingError(f"names must be text, got {excerpt(name)}")
    module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)
    full_name = f"{module}.{name}"
    if full_name not in ALLOWED_NAMES:
        raise UnpicklingError(f"it references {printable(full_name)}, which is not on the list of allowed names")
    return Name(full_name)


def _with_items(target: Any, items: list[Any]) -> Any:
    if len(items) % 2:
        raise ValueError("a key lacks a value")
    if isinstance(target, dict):
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[checked_key(key)] = value
    elif not isinstance(target, InertObject):  # a dict's subclass
        raise ValueError(f"items must be set in a dict, got {excerpt(target)}")
    return target


def to_plain(
    content: Any, make_tensor: Callable[[StoredTensor], Tensor], converted: dict[int, Any] | None = None
) -> Any:
    """Copy unpickled content into plain dicts, lists and tuples, with tensors; shared containers stay shared.

    Args:
        content: the result of `unpickle`.
        make_tensor: makes a tensor from its storage.
        converted: results for parts of the content, by id.

    Raises:
        RecursionError: a container contains itself, or is nested too deeply.
    """
    converted = {} if converted is None else converted
    if isinstance(content, StoredTensor):
        return make_tensor(content)
    if isinstance(content, EmptyArray):
        if content.array is None:
            raise UnpicklingError("an array must be filled, got one without data")
        return tensor_of(content.array)
    if not isinstance(content, dict | list) and type(content) is not tuple:
        return content
    if id(content) in converted:
        if converted[id(content)] is _IN_PROGRESS:
            raise RecursionError
        return converted[id(content)]
    converted[id(content)] = _IN_PROGRESS
    plain: Any
    if isinstance(content, Mapping):
        plain = {key: to_plain(value, make_tensor, converted) for key, value in content.items()}
    else:
        plain = [to_plain(value, make_tensor, converted) for value in content]
        plain = tuple(plain) if isinstance(content, tuple) else plain
    converted[id(content)] = plain
    return plain
