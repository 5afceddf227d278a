"""The project speaks the field's language: no word of its old dialect in code, messages, tests, documents or
configs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

DIALECT = {
    "picture": "image",
    r"\btold\b": "reported, logged",
    r"(?<!\.)\btells?\b": "report, log",  # but a method, as of files, may have this name
    r"\btelling\b": "reporting",
    r"\bsaid\b": "stated, reported",
    r"\bsay(s|ing)?\b": "state, report, contain",
    r"\bspeaks?\b": "report",
    r"\blook(s|ed|ing)? at\b": "check, inspect, process",
    r"\bgo(es|ing)? away\b": "disappear, be missing",
    r"\bgone\b": "missing, removed",
    r"\bgo(es|ing)? on\b": "continue, resume",
    r"\bby turns\b": "alternately",
    r"\bso many\b": "N, that number of",
    r"\btaken? over\b": "loaded, transferred",
    r"\bmend(s|ed|ing)?\b": "fix",
    r"\blearnt\b": "learned",
    r"\bholds? (of )?the (class )?loss\b": "dominate the loss",
    r"\bloss holders?\b": "loss concentration",
    r"\bhopeless\b": "unpromising, pruned",
    r"\bthinned\b": "subsampled",
    r"\bwrongness\b": "one_minus_pt",
    r"\b(mine|theirs)\b": "ours, peer",
    r"\beveryones?\b": "all",
    r"\bafresh\b": "from scratch",
    r"\banew\b": "again",
}
"""Patterns over lower-case text whose underscores are spaces, and what to write instead."""

ALLOWED: dict[tuple[str, str], str] = {
    ("tests/test_words.py", ""): "lists the words",
    ("CHANGELOG.md", "`looked_at` is now"): "the old names of keys that changed",
}
"""(file, text within the line): the reason. At most 15."""

SUFFIXES = (".py", ".md", ".yaml", ".yml", ".toml", ".cff", ".txt")


def texts() -> list[Path]:
    """The files that git tracks, or would, and that hold prose or code."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.split("\0")
    paths = [ROOT / name for name in names if name.endswith(SUFFIXES) or name.startswith(".ci/")]
    return [path for path in paths if path.is_file() and "node_modules" not in path.parts]


def words_of(line: str) -> str:
    """Lower case, with the parts of snake_case and CamelCase names apart."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", line)
    return apart.replace("_", " ").lower()


@pytest.mark.parametrize("path", texts(), ids=lambda path: str(path.relative_to(ROOT)))
def test_no_word_of_the_dialect_is_left(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if any(file == name and text in line for file, text in ALLOWED):
            continue
        words = words_of(line)
        found += [
            f"{name}:{number}: {match[0]!r} (write {instead}): {line.strip()[:100]}"
            for pattern, instead in DIALECT.items()
            if (match := re.search(pattern, words))
        ]
    assert not found, "\n".join(found)


def test_exceptions_are_few_used_and_reasoned() -> None:
    assert len(ALLOWED) <= 15
    for (name, text), reason in ALLOWED.items():
        assert reason
        assert text in (ROOT / name).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "line", ["num_pictures = 1", "# it says so", "class PictureCache:", "went on, as told", "it goes on", "LossHolders"]
)
def test_the_dialect_is_recognized(line: str) -> None:
    assert any(re.search(pattern, words_of(line)) for pattern in DIALECT)


@pytest.mark.parametrize("line", ["essay", "image_cache", "the category of the image", "a golden run", "foretold"])
def test_ordinary_words_are_not(line: str) -> None:
    assert not any(re.search(pattern, words_of(line)) for pattern in DIALECT)
