"""The data that `status` and `top` show: the service's answers at one moment, and what happened between two of them.

Must not print. Rates and latencies are those of the time between two pictures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from xenbackend import counters
from xenbackend.cli.arguments import duration
from xenbackend.cli.histogram import counted_between
from xenbackend.client import Client, Disk, File, Layer, Service
from xenbackend.errors import printable

SAMPLE_S = 1.0  # between the two pictures from which rates are computed
SHORTEST_S = 1.0  # between two pictures of --watch: workers update their counters once a second
RATES = ("reads", "writes", "read_bytes", "written_bytes")
_COUNTED = (*RATES, "latency_samples", "latency_ns")
_AGES = ((86400, "d"), (3600, "h"), (60, "m"), (1, "s"))
_WAITS = {"storage": "its storage has not answered for {}", "key": "its key has taken {} to derive so far"}


@dataclass(frozen=True, slots=True)
class Speed:
    """The speed of one disk between two pictures. None: not known, as for the first, or if no request was timed."""

    rates: dict[str, float] | None = None  # by RATES, per second
    mean_ns: float | None = None
    p99_ns: int | None = None  # the upper bound of a bucket, a power of two


@dataclass(frozen=True, slots=True)
class Picture:
    """The answers of the service at one moment."""

    service: Service
    disks: list[Disk]
    at: float  # by the monotonic clock


def look(args: argparse.Namespace) -> Picture:
    """Ask the service for a picture. Raises: ServiceError, also for a disk that it does not serve."""
    client = Client(args.socket)
    disks = client.disks(*args.vbds, looks=True)  # first: it refuses an invalid name without the service
    return Picture(client.service(), disks, time.monotonic())


def speeds(before: Picture, after: Picture) -> dict[str, Speed]:
    """Return the speed of each disk of the later picture between the two."""
    former = {each.node: each for each in before.disks}
    seconds = after.at - before.at
    return {each.node: speed(former.get(each.node), each, seconds) for each in after.disks}


def speed(before: Disk | None, after: Disk, seconds: float) -> Speed:
    """Return a disk's speed between two descriptions of it; unknown if its counters were reset between them.

    The service may have been exchanged between them for one that counts other things, too.
    """
    if before is None or seconds <= 0:
        return Speed()
    moved = {each: after.counters[each] - before.counters[each] for each in _COUNTED}
    buckets = counted_between(before, after)
    if min(*(moved[each] for each in RATES), *buckets) < 0:
        return Speed()
    rates = {each: moved[each] / seconds for each in RATES}
    samples = moved["latency_samples"]
    if samples <= 0 or not sum(buckets):
        return Speed(rates)
    return Speed(rates, moved["latency_ns"] / samples, counters.percentile_ns(buckets, 0.99))


def condition(known: Disk) -> str:
    """Return a disk's condition in one word: ``paused``, the reason why it is not served normally, or our state."""
    return "paused" if known.paused else known.reason or known.state


def remarks(known: Disk) -> list[str]:
    """Return the sentences about a disk that a person should read."""
    paused = [f"paused by {known.paused_by or 'an administrator'}"] if known.paused else []
    under_way = [f"{each.verb} is under way, order {each.order}" for each in known.under_way]
    old = [f"its worker runs {known.worker_version or 'another version'}"] if known.needs_upgrade else []
    waits = [_WAITS[known.waits_for].format(age(0, known.waits_s or 0))] if known.waits_for in _WAITS else []
    files = [_describe_file(each) for each in known.files if each.now in ("other", "gone")]
    walls = [f"its worker is not behind these walls: {', '.join(known.no_walls)}"] if known.no_walls else []
    needs = [f"its drivers need, and have: {', '.join(known.needs)}"] if known.needs else []
    seconds = known.braked_s
    braked = (
        [f"its guest writes to xenstore all the time, so it is only looked at every {seconds:.0f} s"] if seconds else []
    )
    counted = [_describe_figures(each) for each in known.layers if any(each.figures.values())]
    every = (*paused, *under_way, known.error, *waits, *braked, *counted, *files, *old, *walls, *needs)
    return [printable(each) for each in every if each]


def _describe_figures(layer: Layer) -> str:
    """Return a layer's figures, such as ``throttle: waiting 12, held 300``."""
    driver = layer.layer.partition(":")[0]
    return f"{driver}: {', '.join(f'{name} {value}' for name, value in layer.figures.items())}"


def _describe_file(file: File) -> str:
    if file.now == "gone":
        return f"{file.file} is no longer the name of a file; the disk is served from the file that had it"
    return f"{file.file} now leads to another file: {file.difference}; the disk is served from the former one"


def errors(known: Disk) -> int:
    """Return how many requests of a disk failed or broke a rule since it was attached."""
    return known.counters["errors"] + known.counters["guest_errors"]


def age(since: float | None, now: float) -> str:
    """Return how long ago a time was: ``45s``, ``3h``; a dash if it is not known."""
    if since is None:
        return "-"
    seconds = max(0.0, now - since)
    step, letter = next((each for each in _AGES if seconds >= each[0]), _AGES[-1])
    return f"{seconds / step:.0f}{letter}"


def service_line(picture: Picture) -> str:
    """Return a line about the service."""
    service, count = picture.service, len(picture.disks)
    old = sum(each.needs_upgrade for each in picture.disks)
    stale = f"; {old} of {count} need upgrade: xenbackend upgrade" if old else ""
    up = age(service.since, time.time())
    disks = f"{count} disk{'s' * (count != 1)}"
    return f"service {service.version or '?'}, process {service.pid}, up {up}: {disks}{stale}"


def _rate(key: str) -> Callable[[Disk, Speed], Any]:
    return lambda _, moved: -moved.rates[key] if moved.rates else 0


SORTS: dict[str, Callable[[Disk, Speed], Any]] = {
    "disk": lambda known, _: (known.domid, known.node),
    "guest": lambda known, _: known.guest,
    "state": lambda known, _: condition(known),
    "reads": _rate("reads"),
    "writes": _rate("writes"),
    "read-bytes": _rate("read_bytes"),
    "written-bytes": _rate("written_bytes"),
    "latency": lambda _, moved: -(moved.mean_ns or 0),
    "errors": lambda known, _: -errors(known),
    "restarts": lambda known, _: -known.restarts,
    "age": lambda known, _: known.worker_since or 0,
    "chain": lambda known, _: known.chain,
}


def arranged(args: argparse.Namespace, before: Picture, after: Picture) -> list[tuple[Disk, Speed]]:
    """Return the disks with their speeds, in the order of --sort."""
    moved = speeds(before, after)
    rows = [(each, moved[each.node]) for each in after.disks]
    return sorted(rows, key=lambda row: (SORTS[args.sort](*row), SORTS["disk"](*row)))


def interval(text: str) -> float:
    """Parse the seconds between two pictures. Raises: argparse.ArgumentTypeError, also if less than SHORTEST_S."""
    seconds = duration(text)
    if seconds < SHORTEST_S:
        raise argparse.ArgumentTypeError(f"{text} is too short: workers update their counters only once a second")
    return seconds
