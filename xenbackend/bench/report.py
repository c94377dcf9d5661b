"""Turns samples into rows, a table for people, and JSON for scripts.

Must not measure. Every figure is the median over the rounds, with the minimum and maximum beside it if the machine's
noise matters.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from xenbackend.bench.disturbance import Usage
from xenbackend.bench.plan import Sample, Work
from xenbackend.bench.session import NEVER_LOOKS, Measured
from xenbackend.errors import printable
from xenbackend.units import format_duration

if TYPE_CHECKING:
    from rich.table import Table

_CLIENT_BOUND = 0.97  # a load generator that is busier than this was the limit
_RESTED = 0.01  # the share of the time without polling above which the reader is told


@dataclass(frozen=True, slots=True)
class Spread:
    """The median, minimum and maximum over the rounds."""

    median: float
    least: float
    greatest: float


@dataclass(frozen=True, slots=True)
class Row:
    """One workload on one target. Units: requests per second, 10**6 bytes per second, microseconds, ns.

    `speed_ratio` is the rate of the first target divided by that of this one, and `cpu_ratio` is the same quotient for
    the CPU time per request; both are computed within each round. `client_busy` is the share of the time in which the
    load generator did not wait.

    client   the language of the load generator, empty if the target generates its own load
    calls    system calls per request, if they were counted
    rested   the share of the time in which a worker of ours did not poll for requests before it slept
    loops    how many CPUs the loops beside it got
    lost     the share of CPU time that they lost, compared with the same chain without polling
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
    client: str
    calls: float | None
    rested: float | None
    loops: Spread | None
    lost: Spread | None


def summarise(measured: Sequence[Measured]) -> list[Row]:
    """Return a row per workload and target; the others are compared with the first target of a workload."""
    firsts: dict[str, Sequence[Sample]] = {}
    for each in measured:
        firsts.setdefault(each.work.name, each.samples)
    by_name = {(each.work.name, each.target): each.samples for each in measured}
    return [
        _row(each, firsts[each.work.name], by_name.get((each.work.name, each.target + NEVER_LOOKS)))
        for each in measured
    ]


def _row(measured: Measured, first: Sequence[Sample], without_looks: Sequence[Sample] | None) -> Row:
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
        client=measured.client,
        calls=measured.calls,
        rested=median(rested) if (rested := [each.rested for each in samples if each.rested is not None]) else None,
        loops=_spread(loops) if (loops := [each.loops for each in samples if each.loops is not None]) else None,
        lost=_lost(samples, without_looks) if without_looks else None,
    )


def _lost(samples: Sequence[Sample], without_looks: Sequence[Sample]) -> Spread | None:
    pairs = [(one.loops, two.loops) for one, two in zip(samples, without_looks, strict=True)]
    lost = [1 - mine / theirs for mine, theirs in pairs if mine is not None and theirs]
    return _spread(lost) if lost else None


def _spread(values: list[float]) -> Spread:
    return Spread(median(values), min(values), max(values))


def table(rows: Sequence[Row], *, is_disturbed: bool = False) -> Table:
    """Return the table of one workload's rows. `is_disturbed`: mark the ratios, since they prove nothing."""
    from rich import box
    from rich.table import Table

    title = rows[0].work.title
    result = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    result.add_column("target", overflow="fold")
    headings = ["requests/s", "min-max", "MB/s", "CPU us", "p50", "p99", "p99.9", "speed", "min-max", "CPU"]
    counted, beside = any(row.calls is not None for row in rows), any(row.loops is not None for row in rows)
    headings += ["calls"] * counted + ["loops", "lost"] * beside
    for heading in headings:
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
            *_ratios(row, is_first=row is rows[0], mark="?" if is_disturbed else ""),
            *([] if not counted else ["" if row.calls is None else f"{row.calls:.2f}"]),
            *([] if not beside else _beside(row)),
        )
    return result


def _ratios(row: Row, *, is_first: bool, mark: str) -> tuple[str, str, str]:
    if is_first:
        return "1", "", "1"
    speed = row.speed_ratio
    return f"{speed.median:.2f}x{mark}", f"{speed.least:.2f}-{speed.greatest:.2f}", f"{row.cpu_ratio.median:.2f}x{mark}"


def _beside(row: Row) -> tuple[str, str]:
    return "" if row.loops is None else f"{row.loops.median:.2f}", "" if row.lost is None else f"{row.lost.median:.1%}"


def legend(rows: Sequence[Row], usage: Usage, notes: Sequence[str] = ()) -> str:
    """Return the explanations that a reader of the tables needs."""
    lines = [
        (
            "speed: requests/s of the first row divided by this row's; CPU: the same for CPU time per request, where "
            "less is better."
        ),
        "CPU us: user and system time of the backend process per request, its kernel workers included.",
        "Medians over the rounds; compare only figures of one session, as the machine's speed drifts.",
    ]
    if any(row.client_busy > _CLIENT_BOUND for row in rows):
        lines.append("*: the load generator was the limit; the backend may be faster than shown.")
    if any(row.calls is not None for row in rows):
        lines.append("calls: system calls per request, counted in rounds of their own.")
    if any(row.loops is not None for row in rows):
        lines.append(
            "loops: CPUs that the loops beside it got; lost: how much less than beside the same chain, whose worker "
            "never looks."
        )
    lines += [*_clients(rows), *notes, *_looking(rows), *_others(usage)]
    return "\n".join(lines)


def _clients(rows: Sequence[Row]) -> list[str]:
    by_client: dict[str, list[str]] = {}
    for row in rows:
        if row.client and row.target not in by_client.setdefault(row.client, []):
            by_client[row.client].append(row.target)
    return [f"Load generator in {client}: {', '.join(targets)}." for client, targets in by_client.items()]


def _looking(rows: Sequence[Row]) -> list[str]:
    """Return a line about whether our workers polled for requests before they slept, none without workers of ours."""
    ours = [row for row in rows if row.rested is not None and not row.target.endswith(NEVER_LOOKS)]
    rested = [row for row in ours if row.rested is not None and row.rested > _RESTED]
    if not ours:
        return []
    if not rested:
        return ["Our workers looked for requests before they slept, each time that they meant to."]
    which = ", ".join(f"{row.rested:.0%} of {row.work.name} by {row.target}" for row in rested)
    why = "because it cost too much, or because the kernel does not tell what it costs"
    return [f"Our workers did not look for requests before they slept, {why}: {which}."]


def _others(usage: Usage) -> list[str]:
    lines = []
    if usage.programs:
        names = ", ".join(f"{printable(name)} {cpus:.2f}" for name, cpus in usage.programs)
        lines.append(f"Other programs, in CPUs: {names}.")
    if usage.autogroup:
        lines.append(
            "Linux shares the CPUs by session here (autogroup): the nice value of a program in another session has "
            "no effect."
        )
    if usage.disturbances:
        lines.append(f"?: no conclusion is possible, because {' and '.join(usage.disturbances)}.")
    return lines


def as_json(rows: Sequence[Row], usage: Usage, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return everything for scripts, including facts that identify the machine."""
    machine = {
        "name": platform.node(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "autogroup": usage.autogroup,
    }
    return {
        "machine": machine,
        "verdict": "disturbed" if usage.disturbances else "undisturbed",
        "disturbances": usage.disturbances,
        "cpus_used_by": {
            "foreign": usage.foreign,
            "kernel": usage.kernel,
            "interrupts": usage.interrupts,
            "stolen": usage.stolen,
        },
        "programs": [{"name": name, "cpus": cpus} for name, cpus in usage.programs],
        "notes": list(notes),
        "rows": [{**asdict(row), "work": row.work.name} for row in rows],
    }


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - read only as far as that line
        return next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "")


def _short(rate: float) -> str:
    """Return a rate in about four characters: ``912``, ``38.1k``, ``1.05M``."""
    for suffix, step in (("M", 1e6), ("k", 1e3)):
        if rate >= step:
            return f"{rate / step:.3g}{suffix}" if rate < 1000 * step else f"{rate / step:.0f}{suffix}"
    return f"{rate:.0f}"
