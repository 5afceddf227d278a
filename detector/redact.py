"""Take paths, URLs, host names and user names out of files that are sent to others, such as nonfinite.json.

Every path and URL becomes a placeholder, the same one wherever it occurs: `<path-3>.jpg`. What remains is what explains
a fault: numbers, names of settings and modules, image ids and paths relative to a data folder.
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import shlex
import socket
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import yaml

from detector.atomic import write_text
from detector.errors import RunError
from detector.files import os_error_text, read_bytes
from detector.json_text import JsonError, parse_json
from detector.text import cut, printable
from detector.yaml_text import Dumper, parse_yaml

MAX_BYTES = 2**26
"""Size of a file to redact; takes one to three minutes."""
TEXT_SUFFIXES = (".csv", ".log", ".md", ".tsv", ".txt")
SUFFIXES = (".json", ".jsonl", ".yaml", ".yml", *TEXT_SUFFIXES)

_ENDS = r"""\s"<>|`"""
"""Characters at which a path or URL in a sentence ends."""
_FOLDER_WORD = rf"(?:[^{_ENDS}':;,/]|(?<=\w)'(?=\w)){{1,80}}"
_REST = rf"""(?:
    [^{_ENDS}':;,]
    | (?<=\w)'(?=\w)                              # an apostrophe
    | [;,] (?! [\s/"'] | [\w.]{{0,40}}= | $)
    | : (?! [\s/"'] | \d+(?![\w.]) | $)           # but no line number
    | (?<![.!?)]) (?<!\.\w\w) (?<!\.\w\w\w) (?<!\.\w\w\w\w)  # a space before up to three words of a folder
      [ ] (?= {_FOLDER_WORD} (?:[ ]{_FOLDER_WORD}){{0,2}} (?<=[\w.)-]) / \S )
)*"""
_START = r"(?<![\w.~/)\]}%])"
"""Not within a relative path, a fraction or `images/s`."""
_BRACKETS = {")": "(", "]": "[", "}": "{"}
_NEVER = r"(?!)"
_SUFFIX = re.compile(r"(?<=[^/\\.])\.[A-Za-z0-9]{1,12}$")


_WORD_START, _WORD_END = r"(?<! [^\W_])", r"(?! [^\W_])"
"""Unlike for `\\b`, `_` is no part of a word: file names join words by it."""


class Identity(NamedTuple):
    """What a machine and its user are recognized by. Create it with `this_machine`."""

    homes: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    """Other folders whose names may contain spaces: within a sentence, only known folders are found as a whole."""
    hosts: tuple[str, ...] = ()
    users: tuple[str, ...] = ()


def this_machine() -> Identity:
    """Names of this host and user, the home, the working directory and the folder for temporary files."""
    home = os.path.expanduser("~")
    homes = {home, os.path.realpath(home)}
    folders = {os.environ.get("PWD", ""), tempfile.gettempdir()}
    users = {os.environ.get(name, "") for name in ("LOGNAME", "USER", "USERNAME", "SUDO_USER")}
    users.add(Path(home).name if os.path.isabs(home) else "")
    with contextlib.suppress(OSError):  # a working directory that was removed
        folders.add(os.getcwd())
    with contextlib.suppress(OSError, KeyError, ImportError):  # a user id without a name
        users.add(getpass.getuser())
    host = socket.gethostname()
    hosts = {host, host.partition(".")[0], socket.getfqdn()}
    return Identity(
        tuple(sorted(homes)),
        tuple(sorted(folders)),
        tuple(sorted(name for name in hosts if "localhost" not in name)),
        tuple(sorted(users)),
    )


class Redactor:
    """Replaces paths and names; the same path gets the same placeholder in everything that one redactor processes.

    Applied to its own result, it changes nothing.

    Args:
        identity: what is replaced besides absolute paths and URLs.
    """

    def __init__(self, identity: Identity) -> None:
        hosts, users = _alternatives(identity.hosts), _alternatives(identity.users)
        self._pattern = re.compile(_pattern(identity, hosts, users), re.VERBOSE | re.MULTILINE)
        self._names = re.compile(rf"{_WORD_START} (?: {hosts} | {users} ) {_WORD_END}", re.VERBOSE | re.IGNORECASE)
        self._numbers: dict[str, int] = {}
        self._reserved = 0

    def text(self, text: str) -> str:
        """Redact a text of any length."""
        self._reserve(text)
        while (redacted := self._pattern.sub(self._replacement, text)) != text:
            text = redacted  # what is left and right of a placeholder may form a path with it
        return text

    def document(self, value: Any) -> Any:
        """Redact all texts in nested lists, tuples and dicts, including keys; other values stay as they are.

        Two keys that become equal are numbered.
        """
        for text in _texts(value):
            self._reserve(text)
        return self._document(value)

    def _document(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._path(value) if _is_path(value) else self.text(value)
        if isinstance(value, list):
            return [self._document(item) for item in value]
        if isinstance(value, tuple):
            return tuple(self._document(item) for item in value)
        if not isinstance(value, dict):
            return value
        redacted: dict[Any, Any] = {}
        for key, item in value.items():
            unique = name = self._document(key)
            number = 1
            while unique in redacted:
                number += 1
                unique = f"{name} ({number})"
            redacted[unique] = self._document(item)
        return redacted

    def _replacement(self, match: re.Match[str]) -> str:
        kind, found = str(match.lastgroup), match[0]
        if kind == "placeholder":
            return found
        if kind in ("host", "user"):
            return f"<{kind}>"
        path = found.rstrip(".,:;!?")
        for _ in range(4):  # brackets that the sentence closes
            if path.endswith(tuple(_BRACKETS)) and path.count(path[-1]) > path.count(_BRACKETS[path[-1]]):
                path = path[:-1].rstrip(".,:;!?")
        if not path.strip("/"):
            return found
        return (self._path if kind == "path" else self._url)(path) + found[len(path) :]

    def _path(self, path: str) -> str:
        path = path.replace("'\"'\"'", "'").rstrip("/") or path
        return f"<path-{self._number(path)}>{self._suffix(path)}"

    def _url(self, url: str) -> str:
        try:
            path = urlsplit(url).path
        except ValueError:
            path = ""
        return f"<url-{self._number(url)}>{self._suffix(path)}"

    def _suffix(self, path: str) -> str:
        suffix = _SUFFIX.search(path)
        return suffix[0] if suffix is not None and not self._names.search(suffix[0]) else ""

    def _number(self, place: str) -> int:
        if place not in self._numbers:
            self._reserved += 1
            self._numbers[place] = self._reserved
        return self._numbers[place]

    def _reserve(self, text: str) -> None:
        """Keep the numbers of placeholders that a text has already."""
        for number in re.findall(r"<(?:path|url)-(\d{1,9})>", text):
            self._reserved = max(self._reserved, int(number))


def redact(document: Any, identity: Identity | None = None) -> Any:
    """Redact a text, or all texts in nested lists and dicts; see `Redactor`.

    Args:
        document: text or JSON-like values.
        identity: what is replaced besides absolute paths and URLs; None: what belongs to this machine and user.
    """
    return Redactor(this_machine() if identity is None else identity).document(document)


def write_redacted(files: Sequence[Path], redactor: Redactor) -> list[Path]:
    """Write a redacted copy `NAME.redacted.SUFFIX` of every file, with the same placeholders in all of them.

    Returns:
        The copies.

    Raises:
        RunError: a file cannot be read or written, is of no kind in `SUFFIXES`, or is damaged; no copy is written.
    """
    contents = [_redacted(file, redactor) for file in files]
    copies = [file.with_name(f"{file.stem}.redacted{file.suffix}") for file in files]
    for copy, content in zip(copies, contents, strict=True):
        write_text(content, copy)
    return copies


def _redacted(file: Path, redactor: Redactor) -> str:
    name, suffix = printable(str(file)), file.suffix.lower()
    if suffix not in SUFFIXES:
        raise RunError(f"a file to redact must end in {cut(SUFFIXES, len(SUFFIXES))}, got {name}")
    try:
        raw = read_bytes(file, limit=MAX_BYTES)
    except OSError as error:
        raise RunError(os_error_text(error, file)) from None
    text = raw.decode("utf-8-sig", "surrogateescape")
    try:
        if suffix == ".json":
            return json.dumps(redactor.document(parse_json(raw)), indent=1) + "\n"
        if suffix in (".yaml", ".yml"):
            values = redactor.document(parse_yaml(text, name).values)
            return yaml.dump(values, Dumper=Dumper, sort_keys=False, default_flow_style=None, width=110)
        if suffix == ".jsonl":
            return "\n".join(_redacted_line(line, redactor) for line in text.split("\n"))
        return redactor.text(text)
    except JsonError as error:
        raise RunError(f"{name} must be a JSON file, got {error}; it may be damaged") from None
    except RecursionError:
        raise RunError(f"{name} must not be nested that deeply; redact it by hand") from None


def _redacted_line(line: str, redactor: Redactor) -> str:
    """Redact a line of a .jsonl file; the last one of a killed process may be incomplete."""
    try:
        return json.dumps(redactor.document(parse_json(line.encode("utf-8", "surrogateescape"))))
    except JsonError:
        return redactor.text(line)


def _is_path(text: str) -> bool:
    """Whether a text as a whole is an absolute path, which may contain any characters."""
    if not text.startswith("/") or "\n" in text or ": " in text or " /" in text:
        return False
    return _SUFFIX.search(text) is not None or os.path.lexists(text)


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for item in pair for text in _texts(item))
    elif isinstance(value, list | tuple):
        yield from (text for item in value for text in _texts(item))


def _pattern(identity: Identity, hosts: str, users: str) -> str:
    """What is replaced, in groups named by kind; `hosts` and `users` are patterns of names."""
    homes, folders = (_alternatives(filter(os.path.isabs, some)) for some in (identity.homes, identity.folders))
    return rf"""
        (?P<placeholder> <(?: path-\d+ | url-\d+ | host | user )> )
        | (?P<url> [A-Za-z][A-Za-z0-9+.-]{{1,20}}:// [^{_ENDS}']+ )
        | (?P<path>
            (?<=') / (?: '"'"' | [^'\n] )+? (?= ' (?!"'"') | :\s )  # quoted, also as by shlex.quote
            | (?<=") / [^"\n]+? (?= " | :\s )
            | (?: (?:{homes}) | {_START} (?: (?:{folders}) (?![\w-]) | //? (?= [\w.@$+~-] ) ) ) {_REST}
            | {_WORD_START} [A-Za-z]:\\ [^{_ENDS}']+
        )
        | (?P<host> {_WORD_START} (?i:{hosts}) {_WORD_END} )
        | (?P<user> {_WORD_START} (?i:{users}) {_WORD_END} )
    """


def _alternatives(names: Iterable[str]) -> str:
    """A pattern of any of the names but the root folder, also as JSON, Python, a shell and a URL write them."""
    spellings: set[str] = set()
    for name in names:
        name = name.rstrip("/")
        spellings |= {
            name, ascii(name)[1:-1], json.dumps(name)[1:-1], quote(name), shlex.quote(name).strip("'"),
        }  # fmt: skip
    return "|".join(map(re.escape, sorted(spellings - {""}, key=lambda name: (-len(name), name)))) or _NEVER
