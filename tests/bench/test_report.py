"""Rows, tables and JSON from samples."""

from __future__ import annotations

import json
from io import StringIO

from rich.console import Console

from xenbackend.bench.plan import WORKS, Sample
from xenbackend.bench.report import Spread, _short, as_json, legend, summarise, table
from xenbackend.bench.session import Measured


def sample(requests: int, cpu: float = 0.5, busy: float = 0.2) -> Sample:
    """A sample of one second."""
    return Sample(requests, 1.0, cpu, busy, p50=10_000, p99=20_000, p999=3_000_000)


OURS = Measured(WORKS[1], "aio:{file}", [sample(200_000), sample(400_000), sample(300_000)])
THEIRS = Measured(WORKS[1], "nbdkit", [sample(100_000), sample(100_000), sample(300_000, busy=1.0)])


def test_ratios_are_taken_within_rounds() -> None:
    """The machine's drift meets both sides of a round, so a ratio is that of a round, and its median is reported."""
    ours, theirs = summarise([OURS, THEIRS])

    assert Spread(300_000, 200_000, 400_000) == ours.rate
    assert Spread(2, 1, 4) == theirs.speed_ratio
    assert Spread(0.5, 0.25, 1) == theirs.cpu_ratio
    assert Spread(1, 1, 1) == ours.speed_ratio


def test_units_of_a_row() -> None:
    """Rates are requests and 10**6 bytes per second, CPU time is microseconds per request."""
    row = summarise([THEIRS])[0]

    assert (409.6, 5.0, 10_000, 3_000_000) == (row.megabytes, row.cpu_us.median, row.p50, row.p999)


def test_each_workload_has_its_own_first() -> None:
    """What others are compared with is the first target of the same workload."""
    other = Measured(WORKS[3], "aio:{file}", [sample(50_000)] * 3)

    assert [1, 2, 1] == [row.speed_ratio.median for row in summarise([OURS, THEIRS, other])]


def test_table_and_legend() -> None:
    """A reader sees the median, the spread, the ratio, and where the load generator was the limit."""
    rows = summarise([OURS, Measured(WORKS[1], "nbdkit", [sample(100_000, busy=1.0)] * 3)])
    console = Console(width=132, record=True, file=StringIO())
    console.print(table(rows))
    text = console.export_text()
    console.file.close()

    for part in (
        "4 KiB random read, depth 32",
        "aio:{file}",
        "300k",
        "200k-400k",
        "100k *",
        "3.00x",
        "2.00-4.00",
        "3 ms",
    ):
        assert part in text
    assert "the load generator was the limit" in legend(rows, 0)
    assert "the load generator was the limit" not in legend(rows[:1], 0)


def test_a_disturbed_session_says_so() -> None:
    """Figures that were taken while others used the machine carry a warning."""
    rows = summarise([OURS])

    assert "Other programs used 0.8 CPUs" in legend(rows, 0.8)
    assert "Other programs" not in legend(rows, 0.05)


def test_json_is_complete() -> None:
    """A script finds the machine, and per row everything that the table has and the table leaves out."""
    text = json.dumps(as_json(summarise([OURS, THEIRS]), 0.25))
    result = json.loads(text)

    assert {"cpu", "cpus", "kernel", "python"} == result["machine"].keys()
    assert ("rr4k", "nbdkit", 0.25) == (result["rows"][1]["work"], result["rows"][1]["target"], result["foreign_cpus"])
    assert {"median": 2, "least": 1, "greatest": 4} == result["rows"][1]["speed_ratio"]


def test_short_rates() -> None:
    """Rates take four characters or so."""
    assert ["912", "38.1k", "1.05M", "123k"] == [_short(rate) for rate in (912, 38_120, 1_051_000, 123_400)]
