"""Redacting: no path, host or user name survives, everything else does."""

from __future__ import annotations

import getpass
import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from detector.atomic import read_json, write_json
from detector.redact import Identity, Redactor, redact, this_machine, write_redacted
from tools import redact as redact_tool
from tools import train as train_tool

HOME = "/export/people/ann"
ANN = Identity((HOME,), ("/mnt/My Data",), ("node3.lab.example", "node3"), ("ann",))


def texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for item in pair for text in texts_in(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in texts_in(item))


@pytest.mark.parametrize("value", ["", {}, [], None, True, 0, 1.5, [{}], {"step": 3, "loss": "nan", "ids": [1, 2]}])
def test_what_names_nobody_stays_as_it_is(value: Any) -> None:
    assert redact(value, ANN) == value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ann", "<user>"),
        ("annotations of Ann in ann_1.jpg", "annotations of <user> in <user>_1.jpg"),
        ("node3 and node3.lab.example, not node30", "<host> and <host>, not node30"),
        (f"{HOME}/a.jpg", "<path-1>.jpg"),
        (f"{HOME}/a.jpg: no such file", "<path-1>.jpg: no such file"),
        (f"{HOME}, {HOME}/ and {HOME}2", "<path-1>, <path-1> and <path-2>"),
        (f"below{HOME}/a.jpg", "below<path-1>.jpg"),
        ("/mnt/My Data/a/b.jpg is damaged", "<path-1>.jpg is damaged"),
        ("/a/Some Folder/b.jpg is damaged", "<path-1>.jpg is damaged"),
        ("/a/Bob Smith's Folder/b.jpg is damaged", "<path-1>.jpg is damaged"),
        ("copied /a/b.jpg to c/d.jpg", "copied <path-1>.jpg to c/d.jpg"),
        ("a=/a/b,c=/c/d e=/f", "a=<path-1>,c=<path-2> e=<path-3>"),
        ("(/a/b.yaml:12)", "(<path-1>.yaml:12)"),
        ("['/a/b c.jpg', '/d/e f.jpg']", "['<path-1>.jpg', '<path-2>.jpg']"),
        ("--replay '/a/o'\"'\"'neil x/b.json' now", "--replay '<path-1>.json' now"),
        ("/a/o'neil/b.json", "<path-1>.json"),
        ("ann@node3:/a/b", "<user>@<host>:<path-1>"),
        ("http://ann:pw@node3:80/a/b.zip?c=d.", "<url-1>.zip."),
        ("see https://example.com", "see <url-1>"),
        ("sqlite:////a/b.db", "<url-1>.db"),
        ("C:\\People\\ann\\a.jpg", "<path-1>.jpg"),
        ("/a/b.ann", "<path-1>"),
        ("and/or, 30 images/s, 1/2, 1 / 2, train/a.jpg, ../b.jpg, /", None),
        ("<path-3>.jpg and /a/b", "<path-3>.jpg and <path-4>"),
    ],
)
def test_a_text_is_redacted(text: str, expected: str | None) -> None:
    assert redact(text, ANN) == (text if expected is None else expected)


def test_a_path_with_any_characters_is_redacted_where_it_is_the_whole_value(tmp_path: Path) -> None:
    folder = tmp_path / "it's, so; (c) d"
    assert redact({"path": str(folder)}, ANN) != {"path": "<path-1>"}
    folder.mkdir()
    assert redact({"path": str(folder)}, ANN) == {"path": "<path-1>"}
    assert redact({"path": f"/a{folder} e.jpg"}, ANN) == {"path": "<path-1>.jpg"}


NAMES = st.sampled_from([
    HOME, f"{HOME}/runs/x.pt", f"{HOME}/a b/c.json", "ann", "ANN", "ann_", "node3", "Node3", "node3.lab.example",
    f"http://node3:8080{HOME}/x.zip", "postgresql://ann@node3/db", "/mnt/My Data/ann/x.jpg", f"'{HOME}/q r.txt'",
])  # fmt: skip
GLUE = st.sampled_from(
    ["", " ", ": ", "/", "'", '"', "\\", "\n", "\t", ", ", "(", ")", "<", ">", "-", "_", "=", "x", "1"]
)
TEXTS = st.lists(st.one_of(NAMES, GLUE, st.text(max_size=3)), max_size=8).map("".join)
DOCUMENTS = st.recursive(
    st.one_of(TEXTS, st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False)),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=4)),
    max_leaves=12,
)


@given(DOCUMENTS)
def test_no_home_user_or_host_survives_in_any_nesting(document: Any) -> None:
    for text in texts_in(redact(document, ANN)):
        assert HOME not in text
        assert not {"ann", "node3"} & set(re.split(r"[\W_]+", text.casefold()))
        assert not re.search(r"(?:^|[\s=:(,'\"])/\w", text)


@given(DOCUMENTS)
def test_redacting_twice_changes_nothing_more(document: Any) -> None:
    once = redact(document, ANN)
    assert redact(once, ANN) == once


def shape(value: Any) -> Any:
    """A document without its texts, which keep their number and place."""
    if isinstance(value, dict):
        return [shape(item) for item in value.values()]
    return [shape(item) for item in value] if isinstance(value, list) else None if isinstance(value, str) else value


@given(DOCUMENTS)
def test_nothing_but_texts_changes(document: Any) -> None:
    assert shape(redact(document, ANN)) == shape(document)


@given(st.recursive(
    st.text(st.characters(exclude_characters="/\\")).filter(lambda t: not re.search("ann|node3", t, re.IGNORECASE)),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text("abc_-. é"), inner)),
))  # fmt: skip
def test_texts_without_paths_and_names_are_unchanged(document: Any) -> None:
    assert redact(document, ANN) == document


@given(st.text())
def test_without_names_any_text_without_a_slash_is_unchanged(text: str) -> None:
    text = text.replace("/", "").replace("\\", "")
    assert redact(text, Identity()) == text


def test_equal_paths_have_equal_placeholders_in_all_documents_of_one_call() -> None:
    redactor = Redactor(ANN)
    first = redactor.document({"a": "/x/1.jpg", "b": ["/x/2.jpg", "/x/1.jpg"]})
    second = redactor.document(["cannot read '/x/2.jpg' or /x/1.jpg", "'/a/it'\"'\"'s b.jpg'", "/a/it's b.jpg"])
    assert first == {"a": "<path-1>.jpg", "b": ["<path-2>.jpg", "<path-1>.jpg"]}
    assert second == ["cannot read '<path-2>.jpg' or <path-1>.jpg", "'<path-3>.jpg'", "<path-3>.jpg"]


def test_keys_are_redacted_and_none_is_lost() -> None:
    document = {"/x/1.jpg": 1, "ann": 2, "<user>": 3, "/x/2.jpg": 4, 5: "ann"}
    expected = {"<path-1>.jpg": 1, "<user>": 2, "<user> (2)": 3, "<path-2>.jpg": 4, 5: "<user>"}
    assert redact(document, ANN) == expected


@pytest.mark.parametrize("text", ["José", json.dumps("José"), ascii("José"), r'"Jos\xE9"', "/Jos%C3%A9"])
def test_names_are_found_as_other_formats_write_them(text: str) -> None:
    assert "jos" not in redact(text, Identity(users=("josé",))).lower()


def test_this_machine_is_recognized(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "ann"))
    monkeypatch.setenv("USER", "bob")
    monkeypatch.setattr(getpass, "getuser", lambda: "carol")
    monkeypatch.setattr(socket, "gethostname", lambda: "node3.lab")
    monkeypatch.setattr(socket, "getfqdn", lambda: "node3.lab.example")
    monkeypatch.chdir(tmp_path)
    found = this_machine()
    assert str(tmp_path / "ann") in found.homes
    assert str(tmp_path) in found.folders
    assert {"ann", "bob", "carol"} <= set(found.users)
    assert set(found.hosts) == {"node3", "node3.lab", "node3.lab.example"}
    text = f"bob and Carol on node3 in {tmp_path}/ann/x.pt, {tmp_path}/y.pt"
    assert redact(text) == "<user> and <user> on <host> in <path-1>.pt, <path-2>.pt"


def test_a_container_without_names_and_home_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_user() -> str:
        raise KeyError("getpwuid(): uid not found: 12345")

    def no_folder() -> str:
        raise FileNotFoundError

    for name in ("LOGNAME", "USER", "USERNAME", "SUDO_USER", "PWD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/")
    monkeypatch.setattr(getpass, "getuser", no_user)
    monkeypatch.setattr(os, "getcwd", no_folder)
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setattr(socket, "getfqdn", lambda: "localhost.localdomain")
    assert redact("a b/c on localhost in /d") == "a b/c on localhost in <path-1>"


def write_examples(folder: Path) -> dict[str, Path]:
    """A file of each kind, with one path that all of them name."""
    image = "/mnt/My Data/a cat.jpg"
    write_json({"images": [{"image_id": 3, "path": image}], "loss": "nan"}, folder / "a.json")
    (folder / "a.jsonl").write_text(json.dumps({"path": image}) + "\n" + '{"cut off": "' + HOME)
    (folder / "a.yaml").write_text(f"# of ann\ndata: {{train: {{images: '{image}'}}}}\nlong: /mnt/My\n  Data/b.pt\n")
    (folder / "a.tsv").write_text(f"missing image\t'{image}'\tann\t1e-3\n")
    return {path.suffix: path for path in folder.iterdir()}


def test_files_of_every_kind_are_redacted_with_the_same_placeholders(tmp_path: Path) -> None:
    files = write_examples(tmp_path)
    before = {path: path.read_bytes() for path in files.values()}
    copies = write_redacted([files[s] for s in (".json", ".jsonl", ".yaml", ".tsv")], Redactor(ANN))
    assert [copy.name for copy in copies] == [f"a.redacted.{s}" for s in ("json", "jsonl", "yaml", "tsv")]
    assert {path: path.read_bytes() for path in before} == before
    as_json, as_lines, as_yaml, as_table = copies
    assert read_json(as_json) == {"images": [{"image_id": 3, "path": "<path-1>.jpg"}], "loss": "nan"}
    assert as_lines.read_text() == '{"path": "<path-1>.jpg"}\n{"cut off": "<path-2>'
    assert yaml.safe_load(as_yaml.read_text()) == {"data": {"train": {"images": "<path-1>.jpg"}}, "long": "<path-3>.pt"}
    assert as_table.read_text() == "missing image\t'<path-1>.jpg'\t<user>\t1e-3\n"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("no.json", lambda path: None, "No such file"),
        ("x.pt", Path.touch, "must end in .json"),
        ("x.json", lambda path: path.write_text("{"), "must be a JSON file"),
        ("x.json", lambda path: path.write_text("[" * 900 + "]" * 900), "nested"),
        ("x.yaml", lambda path: path.write_text("a: ["), "invalid YAML"),
        ("x.tsv", make_fifo, "is a pipe"),
        ("x.log", Path.mkdir, "is a folder"),
    ],
)
def test_a_file_that_cannot_be_redacted_is_one_error_and_no_copy_is_written(
    name: str, make: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = tmp_path / "good.txt", tmp_path / name
    good.write_text("text")
    make(bad)
    assert redact_tool.main([str(good), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not list(tmp_path.glob("*.redacted.*"))


def test_the_tool_names_the_copies(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "terminal.log"
    file.write_text(f"results in {tmp_path}/run: metrics.json\n")
    assert redact_tool.main([str(file)]) == 0
    copy = tmp_path / "terminal.redacted.log"
    assert str(copy) in capsys.readouterr().out
    assert copy.read_text() == "results in <path-1>: metrics.json\n"


def test_a_replay_writes_redacted_copies_of_both_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(tmp_path / "images" / "a.jpg")

    def replay(file: Path, overrides: list[str]) -> int:
        write_json({"step": 3, "cause": f"{image}: not finite"}, file.with_name("replay.json"))
        return 1

    monkeypatch.setattr("detector.training.replay.replay", replay)
    file = tmp_path / "nonfinite.json"
    write_json({"step": 3, "images": [{"path": image}], "replay": f"python --replay {file}"}, file)
    assert train_tool.main(["--replay", str(file), "--redact"]) == 1
    described = read_json(tmp_path / "nonfinite.redacted.json")
    assert described == {"step": 3, "images": [{"path": "<path-1>.jpg"}], "replay": "python --replay <path-2>.json"}
    assert read_json(tmp_path / "replay.redacted.json") == {"step": 3, "cause": "<path-1>.jpg: not finite"}
    assert "replay.redacted.json" in capsys.readouterr().out


@pytest.mark.slow
def test_the_files_of_a_real_run_that_diverged_name_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detector.errors import DivergedError
    from detector.training.train import train
    from tests.tiny import tiny_config, write_tiny_data
    from tests.training.faults import QUICK, Fault

    folder = tmp_path / "ann smith's"
    monkeypatch.setenv("LOGNAME", "smith")
    config = tiny_config(folder, write_tiny_data(folder), **QUICK)
    Fault(monkeypatch, "weight", step=3)
    with pytest.raises(DivergedError):
        train(config, folder / "run")
    file = folder / "run" / "nonfinite.json"
    assert train_tool.main(["--replay", str(file), "--redact"]) == 0
    others = [file.with_name(name) for name in ("config.yaml", "metrics.jsonl", "metrics.json")]
    assert redact_tool.main([str(other) for other in others if other.exists()]) == 0
    copies = sorted(file.parent.glob("*.redacted.*"))
    assert {copy.name for copy in copies} >= {"config.redacted.yaml", "nonfinite.redacted.json", "replay.redacted.json"}
    for copy in copies:
        text = copy.read_text()
        assert "smith" not in text
        assert str(tmp_path) not in text
    paths = [image["path"] for image in read_json(file.with_name("nonfinite.redacted.json"))["images"]]
    assert paths
    assert all(re.fullmatch(r"<path-\d+>\.png", path) for path in paths)
    assert len(set(paths)) == len(paths)


def test_redact_without_replay_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        train_tool.main(["--config", "c.yaml", "--redact"])
    assert stop.value.code == 2
    assert "tools/redact.py" in capsys.readouterr().err
