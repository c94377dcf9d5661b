"""`xenbackend latency DISK --layers`: how long each layer of a chain takes within an interval, by operation.

Must not be asked for all the time: it is an order, since the worker has more to do meanwhile.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from typing import Any

from xenbackend.cli import waiting
from xenbackend.cli.latency import FRACTIONS, Histogram
from xenbackend.cli.output import print_json
from xenbackend.counters import BUCKETS
from xenbackend.errors import printable
from xenbackend.units import format_duration, format_size

_HEAD = ("layer", "operation", "requests", "mean size", "mean", "50 % <", "99 % <")


def run(args: argparse.Namespace) -> int:
    """Order, wait and print. Raises: ServiceError; ConfigError."""
    args.verb, args.timeout = "measure", None
    measured = waiting.order(args, lambda client: client.measure(str(args.vbd), args.interval))
    found = measured.values
    if args.json:
        print_json({"order": measured.order, "vbd": str(args.vbd), **found, "layers": values(found["layers"])})
    else:
        print("\n".join(lines(str(args.vbd), found)))
    return 0


def values(layers: list[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return what scripts get."""
    return [
        {"layer": each["layer"], "operations": {name: _values(times) for name, times in each["operations"].items()}}
        for each in layers
    ]


def _values(times: Mapping[str, Any]) -> dict[str, Any]:
    histogram = _histogram(times)
    return {
        "requests": histogram.samples,
        "bytes": times["bytes"],
        "mean_ns": None if histogram.mean_ns is None else round(histogram.mean_ns),
        "bounds_ns": {f"p{fraction * 100:g}": histogram.bound_ns(fraction) for fraction in FRACTIONS},
        "buckets": [{"below_ns": 1 << place, "count": histogram.buckets[place]} for place in histogram.filled()],
    }


def lines(vbd: str, measured: Mapping[str, Any]) -> Iterator[str]:
    """Yield what the disk is, and a line for each operation of each layer, in columns."""
    yield f"{vbd}  {printable(measured['chain'])}"
    rows = [_HEAD, *(row for each in measured["layers"] for row in _rows(each))]
    widths = [max(len(row[place]) for row in rows) for place in range(len(_HEAD))]
    for row in rows:
        left = [word.ljust(width) for word, width in zip(row[:2], widths, strict=False)]
        yield "  ".join([*left, *(word.rjust(width) for word, width in zip(row[2:], widths[2:], strict=True))])
    yield f"measured for {measured['seconds']:g} s; a layer's time has that of the layers below it in it"


def _rows(layer: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    name = printable(layer["layer"])
    if not layer["operations"]:
        yield (name, "-", "0", "-", "-", "-", "-")
    for operation, times in layer["operations"].items():
        histogram = _histogram(times)
        bounds = [_time(histogram.bound_ns(fraction)) for fraction in (0.5, 0.99)]
        size = format_size(round(times["bytes"] / histogram.samples))
        yield (name, operation, str(histogram.samples), size, _time(histogram.mean_ns), *bounds)
        name = ""


def _histogram(times: Mapping[str, Any]) -> Histogram:
    buckets = tuple(times["buckets"].get(str(place), 0) for place in range(BUCKETS))
    return Histogram(buckets, times["sum_ns"], None)


def _time(nanoseconds: float | None) -> str:
    return "-" if nanoseconds is None else format_duration(nanoseconds / 1e9)
