"""The measures of the scoreboard: what each is, its goal, and where its figure comes from.

Must not run for long: a figure that takes more than seconds is read from the file that its suite leaves in build/.

    number  names the measure for good
    goal    of the first release that is called trustworthy
    source  returns the figure, or None where nobody has measured it
"""

from __future__ import annotations

import ast
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tests import failing_calls, test_security_rows
from tests.driven import Driven
from tests.stamp import stamp
from xenbackend.blkif import features
from xenbackend.units import PAGE

BUILD = Path(__file__).parents[2] / "build"
KIB, MIB = 1 << 10, 1 << 20
_FORMATS = (
    "test_qcow-",
    "test_qcow2-",
    "test_vhd-",
    "-vdi-",
    "-vmdk-",
    "-vhdx-",
)  # in the names of what `make test-fuzz` leaves


@dataclass(frozen=True, slots=True)
class Figure:
    """A number, and when and of which commit it was measured."""

    value: float
    date: str
    commit: str


Source = Callable[[Path], Figure | None]


@dataclass(frozen=True, slots=True)
class Measure:
    """One line of the board; `is_most`: the goal is the most that it may be, else the least."""

    number: str
    what: str
    goal: float
    source: Source
    is_most: bool = False

    def reaches(self, figure: Figure) -> bool:
        """Return whether a figure is as good as its goal."""
        return figure.value <= self.goal if self.is_most else figure.value >= self.goal


# what can be measured at once


def _now(value: float) -> Figure:
    return Figure(value, **stamp())


def _rings(_: Path) -> Figure:
    return _now(features.MAX_QUEUES * (1 << features.MAXIMA.max_ring_order))


def _largest_request(_: Path) -> Figure:
    return _now(features.MAX_SEGMENTS * PAGE / MIB)


def _memory_of_an_idle_disk(_: Path) -> Figure:
    """Measure a worker with a guest that asks for nothing: its pages, but for those that it shares with others."""
    with tempfile.TemporaryDirectory() as directory, Driven(Path(directory)) as driven:
        driven.connect("ram:1M").read(0, 8)
        rollup = Path(f"/proc/{driven.worker.process.pid}/smaps_rollup").read_text()
        driven.disconnect()
        driven.worker.end()
    own = sum(int(rollup.split(f"Private_{each}:")[1].split()[0]) for each in ("Clean", "Dirty"))
    return _now(own * KIB / MIB)


def _rows_with_a_test(_: Path) -> Figure:
    """Count rows of tables A to D that have a test, or a reason that does not wait for one."""
    waiting = test_security_rows.waiting()
    tables = [row for row in test_security_rows.rows() if row[0] != "R"]
    return _now(round(100 * sum(row not in waiting for row in tables) / len(tables), 1))


def _calls_that_can_fail(_: Path) -> Figure:
    """Count the calls of the kernel in a worker's code that the table of failing calls has, or excuses."""
    found: set[str] = set()
    for room in ("worker", "kernel", "loop", "block"):
        for file in (BUILD.parent / "xenbackend" / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                    name = ast.unparse(node.func)
                    if name.partition(".")[0] in ("os", "fcntl", "mmap") and name.count(".") == 1:
                        found.add(name)
    known = found & {*failing_calls.CALLS, *failing_calls.EXEMPT}
    return _now(round(100 * len(known) / len(found), 1))


# what suites have left


def _left(file: str, key: str, build: Path) -> Figure | None:
    """Return a number that a suite has left in a file, or None where it has not."""
    path = build / file
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        return Figure(float(found[key]), found["date"], found["commit"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fuzzed(key: str, build: Path) -> Figure | None:
    """Return the count of the longest run of the ring fuzzer, whatever its seed; 0 where one has failed."""
    runs = []
    for path in build.glob("fuzz-*.json"):
        found = json.loads(path.read_text())
        count = 0 if found["failed"] else found["counts"].get(key, 0)
        runs.append(Figure(count, found["date"], found["commit"]))
    if any(not run.value for run in runs):
        return min(runs, key=lambda run: run.value)
    return max(runs, key=lambda run: run.value, default=None)


def _damaged(build: Path) -> Figure | None:
    """Return how many damaged images the format with the fewest has borne, once all have had their turn."""
    left = _of_tests("damaged", build)
    formats = [[found for name, found in left.items() if part in name] for part in _FORMATS]
    if not all(formats):
        return None
    return min((found for each in formats for found in each), key=lambda found: found.value)


def _of_tests(measure: str, build: Path) -> dict[str, Figure]:
    """Return what each test has left of a measure (`tests/figures.py`): of what it left in several suites, the most."""
    left: dict[str, Figure] = {}
    for path in build.glob(f"figures/*/{measure}/*.json"):
        found = json.loads(path.read_text())
        figure = Figure(found["value"], found["date"], found["commit"])
        if path.name not in left or figure.value > left[path.name].value:
            left[path.name] = figure
    return left


def _sum(measure: str, build: Path) -> Figure | None:
    """Return the sum over tests, with the date and the commit of the oldest."""
    left = _of_tests(measure, build).values()
    oldest = min(left, key=lambda figure: figure.date, default=None)
    return oldest and replace(oldest, value=sum(figure.value for figure in left))


def _worst(measure: str, build: Path) -> Figure | None:
    """Return the largest that a test has left."""
    return max(_of_tests(measure, build).values(), key=lambda figure: figure.value, default=None)


_chaos = partial(partial, _left, "chaos.json")
_canary = partial(partial, _left, "canary.json")


MEASURES = (
    Measure("L1", "slots of all rings, in pages (order 4 on 4 rings)", 64, _rings),
    Measure("L2", "largest request, MiB", 1, _largest_request),
    Measure("L3", "hours of 128 disks under verified load", 1, partial(_left, "soak.json", "hours")),
    Measure("L4", "requests verified in one soak", 1e8, _chaos("requests verified")),
    Measure("L5", "memory of an idle disk, MiB", 24, _memory_of_an_idle_disk, is_most=True),
    Measure("F1", "workers killed under verified load, without an error", 1000, _chaos("kills without an error")),
    Measure("F2", "kill to first answer, ms, 99 %", 500, _chaos("kill to first answer, ms, 99 %"), is_most=True),
    Measure("F3", "states of the exhaustive exploration", 2.2e6, partial(_sum, "states")),
    Measure("F4", "services killed under verified load", 50, _chaos("service kills")),
    Measure("F5", "times that xenstored went away under load", 100, _chaos("times that xenstore went away")),
    Measure("F6", "calls of the kernel made to fail, or with a reason, %", 100, _calls_that_can_fail),
    Measure("F7", "times that the disk was full and had room again", 1000, partial(_sum, "full-disks")),
    Measure("F8", "flushes that failed and were not acknowledged", 1e4, partial(_sum, "failed-flushes")),
    Measure("F9", "connections with requests in flight, all flat", 1e5, partial(_fuzzed, "episodes")),
    Measure("B1", "hostile ring messages", 1e8, partial(_fuzzed, "messages")),
    Measure("B2", "damaged images of each format", 1e5, _damaged),
    Measure("B3", "xenstore values and walks of states", 1e6, partial(_sum, "values-and-walks")),
    Measure("B4", "rows of known attacks with a test or a reason, %", 100, _rows_with_a_test),
    Measure("B5", "answers whose padding was looked at", 1e8, partial(_fuzzed, "messages")),
    # Fired from Python, so less than 10^6 times a second; what comes while the port is masked counts once anyhow.
    Measure(
        "B6", "CPU for a port that fires in vain, % of a core", 5, partial(_worst, "storm-of-events"), is_most=True
    ),
    Measure("B7", "log of a hostile guest, KiB per hour", 64, partial(_worst, "log-of-an-hour"), is_most=True),
    Measure("B8", "branches of ring, journal and formats covered, %", 100, partial(_left, "branches.json", "percent")),
    Measure("N1", "crash points replayed", 1e5, partial(_sum, "crash-points")),
    # By reads under load and at the end; a sector that is wrong ends the run, which leaves no figures then.
    Measure("N2", "acknowledged sectors verified after kills", 1e9, _chaos("sectors verified")),
    Measure("N3", "operations without an anomaly", 1e8, _chaos("requests verified")),
    # Of QCOW2 by qemu-img; VHD, VDI and QCOW version 1 have no checker of others that is installed here.
    Measure("N4", "crash states that other checkers accept", 1e4, partial(_sum, "checked-by-others")),
    Measure("P1", "escapes of a worker that succeed", 0, _canary("succeeded"), is_most=True),
)
