"""Rows, tables and JSON from samples."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO

from rich.console import Console

from xenbackend.bench.disturbance import Usage
from xenbackend.bench.plan import WORKS, Sample
from xenbackend.bench.report import Spread, _short, as_json, legend, summarise, table
from xenbackend.bench.session import NEVER_LOOKS, Measured

QUIET = Usage(foreign=0.05, kernel=0.0, interrupts=0.0, stolen=0.0, programs=[], autogroup=False)
LOUD = replace(QUIET, foreign=0.84, programs=[("make", 0.8), ("\x1b[31mrogue", 0.04)], autogroup=True)


def sample(
    requests: int, cpu: float = 0.5, busy: float = 0.2, rested: float | None = None, loops: float | None = None
) -> Sample:
    """A sample of one second."""
    return Sample(requests, 1.0, cpu, busy, p50=10_000, p99=20_000, p999=3_000_000, rested=rested, loops=loops)


def text_of(*measured: Measured, is_disturbed: bool = False) -> str:
    """What people see of one workload's table."""
    console = Console(width=132, record=True, file=StringIO())
    console.print(table(summarise(measured), is_disturbed=is_disturbed))
    text = console.export_text()
    console.file.close()
    return text


OURS = Measured(WORKS[1], "aio:{file}", [sample(200_000), sample(400_000), sample(300_000)])
THEIRS = Measured(WORKS[1], "nbdkit", [sample(100_000), sample(100_000), sample(300_000, busy=1.0)])


def test_ratios_are_taken_within_rounds() -> None:
    """Ratios are taken within a round, so that drift of the machine affects both sides; their median is reported."""
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
    """Each workload is compared with its own first target."""
    other = Measured(WORKS[3], "aio:{file}", [sample(50_000)] * 3)

    assert [1, 2, 1] == [row.speed_ratio.median for row in summarise([OURS, THEIRS, other])]


def test_table_and_legend() -> None:
    """The table has median, spread and ratio, and marks where the load generator was the limit."""
    measured = [OURS, Measured(WORKS[1], "nbdkit", [sample(100_000, busy=1.0)] * 3)]
    rows, text = summarise(measured), text_of(*measured)

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
    assert "the load generator was the limit" in legend(rows, QUIET)
    assert "the load generator was the limit" not in legend(rows[:1], QUIET)


def test_a_disturbed_session_says_so() -> None:
    """The report of a disturbed session marks its ratios and names the disturbing programs."""
    rows = summarise([OURS])

    assert "?: no conclusion is possible, because other programs used 0.84 CPUs (at most 0.1)." in legend(rows, LOUD)
    assert "Other programs, in CPUs: make 0.80, " in legend(rows, LOUD)
    assert "\x1b" not in legend(rows, LOUD)  # a program may call itself anything
    assert ("2.00x?", "0.50x?") == tuple(
        part for part in text_of(OURS, THEIRS, is_disturbed=True).split() if "?" in part
    )
    assert "?" not in text_of(OURS, THEIRS) + legend(rows, QUIET)


def test_autogroup_is_told() -> None:
    """If Linux shares the CPUs by session, the legend warns that nice values of other sessions have no effect."""
    assert "the nice value of a program in another session has no effect" in legend(summarise([OURS]), LOUD)
    assert "session is" not in legend(summarise([OURS]), QUIET)


def test_what_the_load_came_from_is_told() -> None:
    """The legend names the language of each load generator; fio has none of ours."""
    measured = [replace(OURS, client="C"), replace(THEIRS, client="Python"), Measured(WORKS[1], "fio", [sample(1)] * 3)]

    assert "Load generator in C: aio:{file}.\nLoad generator in Python: nbdkit." in legend(summarise(measured), QUIET)


def test_whether_our_workers_looked_is_told() -> None:
    """The legend says whether our workers polled before they slept, as that matters at depth 1."""
    steady = Measured(
        WORKS[0], "aio:{file}", [sample(100, rested=0.0), sample(100, rested=0.9), sample(100, rested=0.0)]
    )
    resting = Measured(WORKS[1], "log:", [sample(100, rested=0.4)] * 3)
    never = Measured(WORKS[1], "log:" + NEVER_LOOKS, [sample(100, rested=0.0)] * 3)

    assert "looked for requests before they slept, each time" in legend(summarise([steady, never]), QUIET)
    assert "or because the kernel does not tell what it costs: 40% of rr4k by log:." in legend(
        summarise([steady, resting, never]), QUIET
    )
    assert "looked" not in legend(summarise([never, THEIRS]), QUIET)


def test_what_loops_lost_is_against_the_same_chain_without_looks() -> None:
    """What the loops beside a chain lost is compared, by round, with the same chain without polling."""
    looking = Measured(WORKS[1], "aio:{file}", [sample(100, loops=1.0), sample(100, loops=0.9), sample(100, loops=1.9)])
    never = Measured(WORKS[1], "aio:{file}" + NEVER_LOOKS, [sample(100, loops=loops) for loops in (1.0, 1.0, 2.0)])
    ours, theirs = summarise([looking, never])

    assert (1.0, 0.0, 0.1) == tuple(round(each, 6) for each in (ours.loops.median, ours.lost.least, ours.lost.greatest))
    assert 0.05 == round(ours.lost.median, 6)
    assert theirs.lost is None
    assert {"loops", "lost", "5.0%", "1.00"} <= {*text_of(looking, never).split()}
    assert not {"loops", "lost", "calls"} & {*text_of(OURS, THEIRS).split()}


def test_calls_are_shown_where_they_were_counted() -> None:
    """System calls are shown for targets for which they were counted."""
    text = text_of(replace(OURS, calls=1.254), THEIRS)

    assert {"calls", "1.25"} <= {*text.split()}
    assert "system calls per request" in legend(summarise([replace(OURS, calls=1.0)]), QUIET)


def test_notes_are_told() -> None:
    """Notes say what could not be measured, and why."""
    assert "there is no C limit: why" in legend(summarise([OURS]), QUIET, ["there is no C limit: why"])


def test_json_is_complete() -> None:
    """JSON has the machine, the verdict, and for each row all figures, including those that the table leaves out."""
    measured = [replace(OURS, client="C", calls=1.5), THEIRS]
    result = json.loads(json.dumps(as_json(summarise(measured), LOUD, ["a note"])))

    assert {"name", "cpu", "cpus", "kernel", "python", "autogroup"} == result["machine"].keys()
    assert ("disturbed", ["other programs used 0.84 CPUs (at most 0.1)"]) == (result["verdict"], result["disturbances"])
    assert ("undisturbed", []) == tuple(as_json([], QUIET)[key] for key in ("verdict", "disturbances"))
    assert (0.84, "make", ["a note"]) == (
        result["cpus_used_by"]["foreign"],
        result["programs"][0]["name"],
        result["notes"],
    )
    assert ("rr4k", "nbdkit", None) == tuple(result["rows"][1][key] for key in ("work", "target", "calls"))
    assert ("C", 1.5) == tuple(result["rows"][0][key] for key in ("client", "calls"))
    assert {"median": 2, "least": 1, "greatest": 4} == result["rows"][1]["speed_ratio"]


def test_short_rates() -> None:
    """Rates take about four characters."""
    assert ["912", "38.1k", "1.05M", "123k"] == [_short(rate) for rate in (912, 38_120, 1_051_000, 123_400)]
