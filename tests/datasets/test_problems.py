"""Findings: the one record behind the printed table, the list of problems, and the decision to refuse a dataset."""

from __future__ import annotations

from pathlib import Path

from detector.datasets.problems import KINDS, Finding, examples, from_json, group, problem, table, write_problems


def some() -> tuple[Finding, ...]:
    problems = [problem("box of zero size", f"annotation {k}", f"[1, 2, 0, {k}]") for k in range(5)]
    problems.insert(2, problem("missing image", "image 3 (a\tb.jpg)", "no such file"))
    problems.append(problem("unusable area", "annotation 1", "area -1", action="area 0 used"))
    return group(problems, {"box of zero size": " (at most 7)"})


def test_without_problems_there_are_no_findings_and_no_list(tmp_path: Path) -> None:
    assert group([]) == ()
    assert table(()) == examples(()) == ""
    (tmp_path / "problems.tsv").write_text("from an earlier attempt")
    write_problems(tmp_path / "problems.tsv", ())
    assert not (tmp_path / "problems.tsv").exists()


def test_problems_are_grouped_by_kind_in_the_order_of_severity() -> None:
    findings = some()
    assert [finding.kind for finding in findings] == ["missing image", "box of zero size", "unusable area"]
    assert [finding.severity for finding in findings] == ["error", "warning", "note"]
    assert [len(finding.problems) for finding in findings] == [1, 5, 1]
    order = [about.severity for about in KINDS.values()]
    assert order == sorted(order, key=["fatal", "error", "warning", "note"].index)
    assert all(about.remedy for about in KINDS.values() if about.severity == "error")


def test_the_table_lists_errors_first_with_their_action_under_skip() -> None:
    lines = table(some(), refused=True).splitlines()
    assert [line.split()[0] for line in lines] == ["errors", "1", "handled", "5", "1"]
    assert lines[1].split("  ")[-1].strip() == "image and its annotations left out"
    assert lines[3].endswith("box dropped (at most 7)")
    assert table(some()).splitlines()[0].strip() == "handled"


def test_examples_are_the_first_problems_of_each_kind() -> None:
    text = examples(some())
    assert "image 3 (a\\tb.jpg): no such file" in text
    assert "annotation 2: [1, 2, 0, 2]" in text
    assert "annotation 3" not in text
    assert "... and 2 more" in text


def test_every_problem_is_a_line_of_the_list(tmp_path: Path) -> None:
    write_problems(tmp_path / "new" / "problems.tsv", some())
    rows = [line.split("\t") for line in (tmp_path / "new" / "problems.tsv").read_text().splitlines()]
    assert [row[0] for row in rows] == ["missing image", *["box of zero size"] * 5, "unusable area"]
    assert rows[0] == ["missing image", "image 3 (a\\tb.jpg)", "no such file", "image and its annotations left out"]
    assert rows[-1][-1] == "area 0 used"


def test_findings_survive_json() -> None:
    from detector.datasets.problems import to_json

    assert from_json(to_json(some())) == some()
    assert from_json(to_json(())) == ()
