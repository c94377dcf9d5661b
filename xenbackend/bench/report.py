"""Samples turned into rows, a table for people, and JSON for scripts.

Must not measure. Every figure is the median over the rounds; the least and the greatest stand beside it where the
machine's noise matters.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from xenbackend.bench.plan import Sample, Work
from xenbackend.bench.session import Measured
from xenbackend.units import format_duration

if TYPE_CHECKING:
    from rich.table import Table

_CLIENT_BOUND = 0.97  # a load generator that is busier than this was the limit
_DISTURBED = 0.1  # CPUs busy with other things; more of that and a session proves little


@dataclass(frozen=True, slots=True)
class Spread:
    """The median of the rounds, the least and the greatest."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True, slots=True)
class Row:
    """One workload on one target. Units: requests per second, 10**6 bytes per second, microseconds, ns.

    `speed_ratio` is our first chain's rate divided by this target's, and `cpu_ratio` its CPU time per request likewise;
    both are taken within each round. `client_busy` is the share of the time in which the load generator did not wait.
    """

    work: Work
    target: str
    rate: Spread
    megabytes: float
    cpu_us: Spread
    p50: int
    p99: int
    p999: int
    client_busy: float
    speed_ratio: Spread
    cpu_ratio: Spread


def summarise(measured: Sequence[Measured]) -> list[Row]:
    """Return a row per workload and target; the first target of a workload is what the others are compared with."""
    firsts: dict[str, Sequence[Sample]] = {}
    for each in measured:
        firsts.setdefault(each.work.name, each.samples)
    return [_row(each, firsts[each.work.name]) for each in measured]


def _row(measured: Measured, first: Sequence[Sample]) -> Row:
    samples = measured.samples
    rate = _spread([sample.rate for sample in samples])
    pairs = list(zip(first, samples, strict=True))
    return Row(
        work=measured.work,
        target=measured.target,
        rate=rate,
        megabytes=rate.median * measured.work.length / 1e6,
        cpu_us=_spread([sample.cpu_us for sample in samples]),
        p50=int(median(sample.p50 for sample in samples)),
        p99=int(median(sample.p99 for sample in samples)),
        p999=int(median(sample.p999 for sample in samples)),
        client_busy=median(sample.client_busy for sample in samples),
        speed_ratio=_spread([ours.rate / theirs.rate for ours, theirs in pairs]),
        cpu_ratio=_spread([ours.cpu_us / theirs.cpu_us for ours, theirs in pairs]),
    )


def _spread(values: list[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def table(rows: Sequence[Row]) -> Table:
    """Return the table of one workload's rows."""
    from rich import box
    from rich.table import Table

    title = rows[0].work.title
    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("target", overflow="fold")
    for heading in ("requests/s", "min-max", "MB/s", "CPU us", "p50", "p99", "p99.9", "speed", "min-max", "CPU"):
        result.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        mark = " *" if row.client_busy > _CLIENT_BOUND else ""
        result.add_row(
            row.target,
            f"{_short(row.rate.median)}{mark}",
            f"{_short(row.rate.least)}-{_short(row.rate.greatest)}",
            f"{row.megabytes:.0f}",
            f"{row.cpu_us.median:.3g}",
            *(format_duration(latency / 1e9) for latency in (row.p50, row.p99, row.p999)),
            *_ratios(row, is_first=row is rows[0]),
        )
    return result


def _ratios(row: Row, *, is_first: bool) -> tuple[str, str, str]:
    if is_first:
        return "1", "", "1"
    speed = row.speed_ratio
    return f"{speed.median:.2f}x", f"{speed.least:.2f}-{speed.greatest:.2f}", f"{row.cpu_ratio.median:.2f}x"


def legend(rows: Sequence[Row], foreign: float) -> str:
    """Return what a reader of the tables has to know."""
    lines = [
        "speed: requests/s of the first row divided by this row's; CPU: CPU time per request likewise, less is better.",
        "CPU us: user and system time of the backend process per request, its kernel workers included.",
        "Medians over the rounds; only figures of one session compare, for the machine drifts.",
    ]
    if any(row.client_busy > _CLIENT_BOUND for row in rows):
        lines.append("*: the load generator was the limit; the backend may be faster.")
    if foreign > _DISTURBED:
        lines.append(f"Other programs used {foreign:.1f} CPUs meanwhile: rates and latencies are not to be trusted.")
    return "\n".join(lines)


def as_json(rows: Sequence[Row], foreign: float) -> dict[str, Any]:
    """Return everything for scripts, with what identifies the machine."""
    machine = {
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
    return {
        "machine": machine,
        "foreign_cpus": foreign,
        "rows": [{**asdict(row), "work": row.work.name} for row in rows],
    }


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - read up to the line
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")


def _short(rate: float) -> str:
    """Return a rate in four characters or so: ``912``, ``38.1k``, ``1.05M``."""
    for suffix, step in (("M", 1e6), ("k", 1e3)):
        if rate >= step:
            return f"{rate / step:.3g}{suffix}" if rate < 1000 * step else f"{rate / step:.0f}{suffix}"
    return f"{rate:.0f}"
