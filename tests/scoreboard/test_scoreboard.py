"""The scoreboard: what it takes for a figure, and when it fails."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import figures
from tests.scoreboard import measures
from tests.scoreboard.__main__ import board, main
from tests.scoreboard.measures import MEASURES, Figure, Measure

STAMP = {"date": "2026-11-29T00:00:00+00:00", "commit": "c" * 40}


def measure(value: float | None, goal: float, *, is_most: bool = False) -> Measure:
    """Return a measure that has this figure, or none."""
    figure = None if value is None else Figure(value, **STAMP)
    return Measure("X1", "something", goal, lambda _: figure, is_most=is_most)


@pytest.mark.parametrize(
    ("value", "goal", "is_most", "below", "missing"),
    [(5, 5, False, 0, 0), (4, 5, False, 1, 0), (5, 5, True, 0, 0), (6, 5, True, 1, 0), (None, 5, False, 0, 1)],
)
def test_a_figure_is_compared_with_its_goal(
    value: float | None, goal: float, *, is_most: bool, below: int, missing: int, tmp_path: Path
) -> None:
    """A goal is the least or the most that a figure may be; what nobody has measured is neither reached nor below."""
    lines, *found = board([measure(value, goal, is_most=is_most)], tmp_path)

    assert [below, missing] == found
    assert ("not measured" in lines[1]) == bool(missing)
    assert ("BELOW" in lines[1]) == bool(below)


def test_a_figure_below_its_goal_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The board fails for a figure below its goal; for one that is missing, only before a release."""
    ends = []
    for value in (1, 0, None):
        monkeypatch.setattr("tests.scoreboard.__main__.MEASURES", [measure(value, 1)])
        ends += [main(["--build", str(tmp_path)]), main(["--build", str(tmp_path), "--release"])]

    assert [0, 0, 1, 1, 0, 1] == ends


def test_what_suites_left_is_read(tmp_path: Path) -> None:
    """A figure is that of the file in build/, with its date and commit; a file without them is no figure."""
    (tmp_path / "chaos.json").write_text(json.dumps({"service kills": 51, **STAMP}))
    (tmp_path / "canary.json").write_text(json.dumps({"succeeded": 0}))
    (tmp_path / "soak.json").write_text(json.dumps({"hours": 1.2, **STAMP}))
    by_number = {each.number: each for each in MEASURES}

    assert Figure(51.0, **STAMP) == by_number["F4"].source(tmp_path)
    assert Figure(1.2, **STAMP) == by_number["L3"].source(tmp_path)
    assert by_number["P1"].source(tmp_path) is None
    assert by_number["F2"].source(tmp_path) is None


def test_the_longest_run_of_the_fuzzer_counts(tmp_path: Path) -> None:
    """Of several seeds the one with the most messages counts; one that has failed is a figure of 0."""
    for seed, count in ((1, 7), (2, 9)):
        known = {"failed": [], "counts": {"messages": count}, **STAMP}
        (tmp_path / f"fuzz-{seed}.json").write_text(json.dumps(known))
    source = {each.number: each for each in MEASURES}["B1"].source

    assert Figure(9, **STAMP) == source(tmp_path)
    (tmp_path / "fuzz-3.json").write_text(json.dumps({"failed": ["0-40"], "counts": {"messages": 99}, **STAMP}))
    assert Figure(0, **STAMP) == source(tmp_path)


def test_the_format_with_the_fewest_counts(tmp_path: Path) -> None:
    """Of damaged images the format with the fewest counts, when all have had their turn."""
    damaged = tmp_path / "figures" / "test-fuzz" / "damaged"
    damaged.mkdir(parents=True)
    for name, count in (
        ("test_qcow-", 9),
        ("test_qcow2-", 8),
        ("test_vhd-", 5),
        ("a-vdi-", 9),
        ("a-vmdk-", 9),
        ("-vhdx-", 9),
    ):
        assert measures._damaged(tmp_path) is None
        (damaged / f"{name}py.json").write_text(json.dumps({"value": count, **STAMP}))

    assert Figure(5, **STAMP) == measures._damaged(tmp_path)


def test_what_tests_left_is_put_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Counts of tests are added up, with the date of the oldest, of percentages the worst counts; a test that begins
    anew takes back what it had left.
    """
    monkeypatch.setenv("FIGURES", str(tmp_path / "figures" / "test-images"))
    for number, test in enumerate(("tests/a.py::b[c]", "tests/a.py::d")):
        monkeypatch.setenv("PYTEST_CURRENT_TEST", f"{test} (call)")
        figures.begin(test)
        figures.add("crash points", 5 + number)
        figures.add("crash points", 1)
    found = {each.number: each for each in MEASURES}["N1"].source(tmp_path)
    assert found is not None
    assert 13 == found.value
    assert Figure(7, found.date, found.commit) == measures._worst("crash-points", tmp_path)
    left = tmp_path / "figures" / "test-images" / "crash-points" / "tests-a-py-d.json"
    left.write_text(json.dumps({"value": 1, **STAMP, "date": "2020-01-01T00:00:00+00:00"}))
    assert Figure(7, "2020-01-01T00:00:00+00:00", STAMP["commit"]) == measures._sum("crash-points", tmp_path)
    figures.begin("tests/a.py::b[c]")
    assert 1 == measures._sum("crash-points", tmp_path).value


@pytest.mark.slow
def test_what_can_be_measured_at_once_reaches_its_goal(tmp_path: Path) -> None:
    """Figures that take no suite are there, each with its number once, and none is below its goal."""
    found = {each.number: (each, each.source(tmp_path)) for each in MEASURES}
    at_once = {number: (each, figure) for number, (each, figure) in found.items() if figure is not None}

    assert len(MEASURES) == len(found)
    assert {"L1", "L2", "L5", "F6", "B4"} == set(at_once)
    assert set() == {number for number, (each, figure) in at_once.items() if not each.reaches(figure)} - {"B4"}
