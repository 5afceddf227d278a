"""docs/security.md: every promise has tests, and the package keeps what it promises of its own code and releases."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import json
import re
import runpy
import socket
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from detector.datasets.problems import group, problem, write_problems
from detector.reports import loss_analysis
from detector.reports.loss_statistics import HARDEST, TableRow
from detector.yaml_text import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
SOURCES = sorted([*(ROOT / "detector").rglob("*.py"), *(ROOT / "tools").rglob("*.py"), ROOT / ".ci" / "sbom"])


# --- promises and their tests


class Promise(NamedTuple):
    """A row of a table of docs/security.md."""

    text: str
    tests: tuple[str, ...]
    """Ids such as tests/test_text.py::test_no_spreadsheet_runs_a_cell."""


def rows(header: str) -> Iterator[list[str]]:
    """The cells of all rows of the tables whose header is `header`."""
    inside = False
    for line in DOCUMENT.splitlines():
        if line == header:
            inside = True
        elif not line.startswith("|"):
            inside = False
        elif inside and not line.startswith("|--"):
            yield [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


PROMISES = [Promise(text, tuple(re.findall(r"`([^`]*)`", tests))) for text, tests in rows("| promise | tests |")]
IDS = re.findall(r"`(tests/[^`\s]*)`", DOCUMENT)
NOT_IN_EVERY_RUN = {"slow", "long", "gpu", "skip", "skipif", "xfail", "shared"}


def functions_of(path: Path) -> dict[str, set[str]]:
    """The test functions of a file, and the names of their pytest marks, of the file's, and of their fixtures."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    of_file = [node.value for node in tree.body if isinstance(node, ast.Assign) and "pytestmark" in ast.dump(node)]
    return {
        node.name: {argument.arg for argument in node.args.args}.union(
            *(re.findall(r"pytest\.mark\.(\w+)", ast.unparse(mark)) for mark in (*of_file, *node.decorator_list))
        )
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }


def test_the_document_makes_promises_about_every_kind_of_input() -> None:
    assert len(PROMISES) > 30
    assert len({promise.text for promise in PROMISES}) == len(PROMISES)
    assert {test for promise in PROMISES for test in promise.tests} <= set(IDS)


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.text[:60])
def test_a_promise_has_a_test_that_every_change_must_pass(promise: Promise) -> None:
    assert promise.text
    marks = []
    for test in promise.tests:
        path, _, name = test.partition("::")
        functions = functions_of(ROOT / path)
        assert name in functions, f"{path} has no {name}"
        marks.append(functions[name] & NOT_IN_EVERY_RUN)
    assert set() in marks, f"none of {promise.tests} runs in .ci/run"


@pytest.mark.parametrize("test", sorted(set(IDS)))
def test_every_test_that_the_document_names_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert (ROOT / path).exists()
    assert not name or name in functions_of(ROOT / path)


@pytest.mark.parametrize(("figure", "constant"), [row[1:] for row in rows("| bound | figure | constant |")])
def test_the_document_states_the_bounds_of_the_code(figure: str, constant: str) -> None:
    module, _, name = constant.strip("`").rpartition(".")
    assert figure == f"{getattr(importlib.import_module(module), name):,}"


def test_tables_have_no_cell_that_a_spreadsheet_runs(tmp_path: Path) -> None:
    name = "=1+cmd"
    write_problems(tmp_path / "problems.tsv", group([problem("missing image", name, name)]))
    table = [TableRow("class", name, 2.0, "positive", 1.0, -0.5, (0.1,) * len(HARDEST), None, 0.0)]
    loss_analysis._write_csv(table, tmp_path / "loss.csv")
    for path, separator in ((tmp_path / "problems.tsv", "\t"), (tmp_path / "loss.csv", ",")):
        texts = [cell for line in path.read_text().splitlines() for cell in line.split(separator) if "cmd" in cell]
        assert texts
        assert not [cell for cell in texts if cell.lstrip('"')[0] in "=+-@"]


# --- calls that could run code from data

FORBIDDEN = {
    "eval", "exec", "compile", "__import__",
    "os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "shell=True",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open", "joblib.load",
    "torch.load", "torch.jit.load", "torch.hub.load", "numpy.load",
    "yaml.load", "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "yaml.Loader", "yaml.FullLoader",
    "yaml.UnsafeLoader", "extractall", "shutil.unpack_archive", "tarfile.open", "tempfile.mktemp",
}  # fmt: skip
"""What detector/ and tools/ must not use. Two of them are harmless with an argument: see `is_harmless`."""

BUILTINS = {"eval", "exec", "compile", "__import__"}


def is_harmless(name: str, call: ast.Call | None) -> bool:
    """Whether a call of torch.load or numpy.load reads no pickles."""
    if call is None:
        return False
    given = {keyword.arg: getattr(keyword.value, "value", None) for keyword in call.keywords}
    if name == "torch.load":
        return given.get("weights_only") is True
    return (
        name == "numpy.load" and len(call.args) < 3 and None not in given and given.get("allow_pickle", False) is False
    )


def dangers(source: str) -> list[tuple[int, str]]:
    """Line and name of every use of what is in `FORBIDDEN`, under whatever name it was imported."""
    tree = ast.parse(source)
    imported: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first = alias.name.partition(".")[0]
                imported[alias.asname or first] = alias.name if alias.asname else first
        elif isinstance(node, ast.ImportFrom) and not node.level:
            imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}

    def full_name(node: ast.expr) -> str:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            return imported.get(node.id, node.id if node.id in BUILTINS else "")
        if isinstance(node, ast.Attribute):
            prefix = full_name(node.value)
            return f"{prefix}.{node.attr}" if prefix else node.attr * (node.attr == "extractall")
        return ""

    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = [(name, node) for node in ast.walk(tree) if isinstance(node, ast.expr) and (name := full_name(node))]
    used = [
        (node.lineno, name)
        for name, node in found
        if name.removeprefix("builtins.") in FORBIDDEN and not is_harmless(name, calls.get(id(node)))
    ]
    shells = [
        (call.lineno, "shell=True")
        for call in calls.values()
        for keyword in call.keywords
        if keyword.arg == "shell" and getattr(keyword.value, "value", None) is not False
    ]
    return sorted(used + shells)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_uses_nothing_that_runs_code_from_data(path: Path) -> None:
    assert dangers(path.read_text(encoding="utf-8")) == []


def test_the_document_lists_what_the_package_does_not_use() -> None:
    listed = [name for names, _ in rows("| never used | instead |") for name in re.findall(r"`([^`]*)`", names)]
    assert sorted(listed) == sorted(FORBIDDEN)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("eval(x)", "eval"),
        ("map(eval, x)", "eval"),
        ("import builtins\nbuiltins.exec(x)", "builtins.exec"),
        ("import os as o\no.system(x)", "os.system"),
        ("from os import popen as p\np(x)", "os.popen"),
        ("import subprocess\nsubprocess.run(x, shell=True)", "shell=True"),
        ("run(x, shell=shell)", "shell=True"),
        ("import pickle\npickle.load(x)", "pickle.load"),
        ("from pickle import loads as f\nf(x)", "pickle.loads"),
        ("import torch\ntorch.load(x)", "torch.load"),
        ("import torch\ntorch.load(x, weights_only=False)", "torch.load"),
        ("import torch\nf = torch.load", "torch.load"),
        ("import numpy as np\nnp.load(x, allow_pickle=True)", "numpy.load"),
        ("import numpy as np\nnp.load(x, None, True)", "numpy.load"),
        ("import numpy as np\nnp.load(x, **options)", "numpy.load"),
        ("import yaml\nyaml.load(x, yaml.SafeLoader)", "yaml.load"),
        ("import yaml\nclass A(yaml.Loader): ...", "yaml.Loader"),
        ("archive.extractall(x)", "extractall"),
        ("def f():\n  import tarfile\n  tarfile.open(x)", "tarfile.open"),
    ],
)
def test_a_dangerous_use_is_found(source: str, name: str) -> None:
    assert [found for _, found in dangers(source)] == [name]


@pytest.mark.parametrize(
    "source",
    [
        "",
        "model.eval()",
        "import re\nre.compile(x)",
        "import torch\ntorch.load(x, weights_only=True)",
        "import torch\ntorch.compile(x)",
        "import numpy as np\nnp.load(x)\nnp.load(x, allow_pickle=False)",
        "import yaml\nyaml.safe_load(x)\nclass A(yaml.SafeLoader): ...",
        "import subprocess\nsubprocess.run([x], shell=False)",
        "import json\njson.load(x)",
        "class A:\n  eval: int = 3",
    ],
)
def test_a_harmless_use_is_not_reported(source: str) -> None:
    assert dangers(source) == []


# --- releases

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_no_supported_torch_has_the_fault_of_its_unpickler() -> None:
    """CVE-2026-24747: before 2.10.0, files could corrupt memory in spite of `weights_only`."""
    torch = next(r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "torch")
    assert not any(torch.specifier.contains(version) for version in ("2.0", "2.6.0", "2.9.1", "2.9.99"))
    pinned = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    assert torch.specifier.contains(pinned.removeprefix("torch=="))


@pytest.fixture(scope="module")
def bill() -> dict[str, Any]:
    """The output of .ci/sbom, made without network."""

    def no_network(*arguments: object) -> None:
        raise AssertionError("the bill of materials must be made without network")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", no_network)
        patch.setattr(socket, "getaddrinfo", no_network)
        document: dict[str, Any] = json.loads(json.dumps(sbom("bill_of_materials")()))
    return document


def sbom(function: str) -> Any:
    return runpy.run_path(str(ROOT / ".ci" / "sbom"))[function]


def packages(bill: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {canonicalize_name(c["name"]): c for c in bill["components"] if c["type"] == "library"}


def test_the_bill_of_materials_lists_the_installed_packages_with_versions_and_urls(bill: dict[str, Any]) -> None:
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", bill["metadata"]["timestamp"])
    assert bill["metadata"]["component"]["version"] == PROJECT["version"]
    listed = packages(bill)
    assert canonicalize_name(PROJECT["name"]) not in listed
    for name, component in listed.items():
        assert component["version"] == importlib.metadata.version(name)
        assert component["purl"] == f"pkg:pypi/{name}@{component['version'].replace('+', '%2B')}"
    python = next(c for c in bill["components"] if c["type"] == "platform")
    assert python["version"] == ".".join(map(str, sys.version_info[:3]))


def test_the_bill_of_materials_states_licenses_where_packages_do(bill: dict[str, Any]) -> None:
    licenses = {name: component.get("licenses", []) for name, component in packages(bill).items()}
    for entry in (entry for some in licenses.values() for entry in some):
        assert entry.get("expression") or entry["license"]["name"]
    assert all(licenses[name] for name in ("torch", "numpy", "pillow", "pydantic", "pyyaml"))
    assert sum(map(bool, licenses.values())) > 0.9 * len(licenses)


def test_the_bill_of_materials_has_the_graph_of_requirements(bill: dict[str, Any]) -> None:
    refs = [bill["metadata"]["component"]["bom-ref"], *(c["bom-ref"] for c in bill["components"])]
    graph = {entry["ref"]: set(entry["dependsOn"]) for entry in bill["dependencies"]}
    assert len(set(refs)) == len(refs)
    assert set(graph) == set(refs) - {"python"}
    assert set().union(*graph.values()) <= set(refs)
    listed = packages(bill)
    own = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert {listed[name]["purl"] for name in own} <= graph[refs[0]]
    assert listed["torch"]["purl"] in graph[listed["torchvision"]["purl"]]
    assert {listed[name]["scope"] for name in own} == {"required"}
    assert listed["pydantic-core"]["scope"] == "required"
    assert listed["pytest"]["scope"] == "excluded"
    assert listed["optuna"]["scope"] == "optional"


def test_the_bill_of_materials_is_printed_or_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, file = sbom("main"), tmp_path / "sbom.json"
    monkeypatch.setattr(sys, "argv", ["sbom"])
    assert main() == 0
    printed = json.loads(capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["sbom", str(file)])
    assert main() == 0
    assert json.loads(file.read_text())["components"] == printed["components"]


def test_known_vulnerabilities_are_searched_every_week_with_no_more_than_read_access() -> None:
    text = (ROOT / ".github" / "workflows" / "audit.yml").read_text()
    workflow = parse_yaml(text, "audit.yml").values
    assert workflow["permissions"] == {"contents": "read"}
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", workflow["on"]["schedule"][0]["cron"])
    assert "workflow_dispatch" in workflow["on"]
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    assert any("pip-audit --requirement constraints.txt" in step.get("run", "") for step in steps)
    parts = [*steps, *workflow["jobs"].values()]
    assert not [part for part in parts if "continue-on-error" in part or "permissions" in part]
    assert "audit" not in (ROOT / ".ci" / "run").read_text()


def test_the_policy_leads_to_a_private_report_and_to_the_promises() -> None:
    policy = (ROOT / "SECURITY.md").read_text()
    assert "docs/security.md" in policy
    assert "Report a vulnerability" in policy
    assert "@" not in policy
    assert len(policy.splitlines()) <= 30
