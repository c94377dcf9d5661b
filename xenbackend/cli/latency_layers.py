"""`xenbackend latency DISK --layers`: how long each layer of a chain takes within an interval, by operation.

Must not run all the time: it is an order, since it makes work for the worker.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from typing import Any

from xenbackend.cli import waiting
from xenbackend.cli.columns import print_rows
from xenbackend.cli.histogram import Histogram
from xenbackend.cli.output import print_json
from xenbackend.client import LayerTimes, Measured, Times
from xenbackend.disks import parse_disk
from xenbackend.errors import printable
from xenbackend.units import format_duration, format_size

_HEAD = ("layer", "operation", "requests", "mean size", "mean", "50 % <", "99 % <")
FIGURES = range(2, len(_HEAD))  # aligned right


def run(args: argparse.Namespace) -> int:
    """Order, wait and print. Raises: ServiceError; ConfigError."""
    args.timeout = None
    if args.end:
        return _end(args)
    args.verb = "measure"
    measured = waiting.order(args, lambda client: client.measure(args.vbd, args.interval))
    vbd = str(parse_disk(args.vbd))
    if args.json:
        print_json({"order": measured.order, "vbd": vbd, **measured.values, "layers": values(measured.layers)})
    else:
        before, rows, behind = parts(vbd, measured)
        print(before)
        print_rows(rows, [(place,) for place in range(len(_HEAD))], folds=0, right=FIGURES)
        print(behind)
    return 0


def _end(args: argparse.Namespace) -> int:
    """End what somebody else has ordered, who gets his answer now."""
    args.verb = "end_measure"
    done = waiting.order(args, lambda client: client.end_measure(args.vbd))
    vbd = str(parse_disk(args.vbd))
    if args.json:
        print_json({"order": done.order, "vbd": vbd})
    else:
        print(f"{vbd}: no measurement is running")
    return 0


def values(layers: Sequence[LayerTimes]) -> list[dict[str, Any]]:
    """Return the values for --json."""
    return [
        {"layer": each.layer, "operations": {name: _values(times) for name, times in each.operations.items()}}
        for each in layers
    ]


def _values(times: Times) -> dict[str, Any]:
    histogram = _histogram(times)
    return {"requests": histogram.samples, "bytes": times.bytes, **histogram.as_json()}


def parts(vbd: str, measured: Measured) -> tuple[str, list[tuple[str, ...]], str]:
    """Return a line about the disk, a row for each operation of each layer below the headings, and a remark."""
    rows = [_HEAD, *(row for each in measured.layers for row in _rows(each))]
    remark = f"measured for {measured.seconds:g} s; a layer's time has that of the layers below it in it"
    return f"{vbd}  {printable(measured.chain)}", rows, remark


def _rows(layer: LayerTimes) -> Iterator[tuple[str, ...]]:
    name = printable(layer.layer)
    if not layer.operations:
        yield (name, "-", "0", "-", "-", "-", "-")
    for operation, times in layer.operations.items():
        histogram = _histogram(times)
        bounds = [_time(histogram.bound_ns(fraction)) for fraction in (0.5, 0.99)]
        size = format_size(round(times.bytes / histogram.samples))
        yield (name, operation, str(histogram.samples), size, _time(histogram.mean_ns), *bounds)
        name = ""


def _histogram(times: Times) -> Histogram:
    return Histogram(times.histogram, times.sum_ns, None)


def _time(nanoseconds: float | None) -> str:
    return "-" if nanoseconds is None else format_duration(nanoseconds / 1e9)
