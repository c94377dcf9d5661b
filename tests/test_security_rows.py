"""Every known attack has a test marked with its row, or a line that says why it has none."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache

from tests.sources import PROJECT, TESTS, in_one_process, nodes_of

ROOT = PROJECT
pytestmark = in_one_process
_ROW = re.compile(r"^\| ([ABCDR]\d+) \| (.+) \|$", re.MULTILINE)
_REASON = re.compile(r"^- \*\*([ABCDR]\d+)\*\* (\S.*)$", re.MULTILINE)


@cache
def rows() -> dict[str, str]:
    """Return what each row is about."""
    return dict(_ROW.findall((ROOT / "docs/security-rows.md").read_text()))


@cache
def reasons() -> dict[str, str]:
    """Return why rows have no test."""
    return dict(_REASON.findall((ROOT / "SECURITY.md").read_text()))


def waiting() -> set[str]:
    """Return the rows that could have a test but have none yet."""
    text = (ROOT / "SECURITY.md").read_text()
    return {name for name, _ in _REASON.findall(text.partition("No test has them yet:")[2])}


@cache
def marked() -> dict[str, list[str]]:
    """Return each row's tests, as places."""
    found = defaultdict(list)
    for file in sorted(TESTS.rglob("test_*.py")):
        if "mark.rows(" not in file.read_text():
            continue
        for node in nodes_of(file):
            for mark in getattr(node, "decorator_list", ()):
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.rows":
                    for name in mark.args:
                        found[ast.literal_eval(name)].append(f"{file.relative_to(ROOT)}::{node.name}")
    return dict(found)


def test_the_rows_are_there() -> None:
    """The tables have the expected number of rows, and each row is a sentence."""
    counts = {letter: sum(name.startswith(letter) for name in rows()) for letter in "RABCD"}

    assert {"R": 24, "A": 32, "B": 17, "C": 13, "D": 11} == counts
    assert all(what.endswith(".") for what in rows().values())


def test_a_row_has_a_test_or_a_reason() -> None:
    """A row has either tests or a line in SECURITY.md, never both, so that the line goes when a test comes."""
    assert [] == [row for row in rows() if (row in marked()) == (row in reasons())]


def test_a_mark_names_a_row() -> None:
    """Every mark of a test, and every reason, names an existing row."""
    assert set() == (set(marked()) | set(reasons())) - set(rows())
