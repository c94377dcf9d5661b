"""Measures how long each layer of a chain takes, by operation.

Must not be in a chain that nobody measures: it costs a third of a microsecond for each request and layer.

A timer is above a layer: it sees the requests that the layer is given and gives back. So a layer's time includes that
of the layers below it. Timers come and go while requests are in flight; a request whose beginning a timer has not seen
is not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from time import monotonic_ns
from typing import Any

from xenbackend.block.driver import Filter, NoOptions
from xenbackend.block.request import Op, Request

BUCKETS = 48  # as in the counters' histogram: number n counts requests that took from 2^(n-1) to 2^n ns


@dataclass(slots=True)
class Times:
    """The times of one operation at one layer."""

    bytes: int = 0
    sum_ns: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * BUCKETS)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, without empty buckets."""
        filled = {str(place): count for place, count in enumerate(self.buckets) if count}
        return {"bytes": self.bytes, "sum_ns": self.sum_ns, "buckets": filled}


class Timed(Filter):
    """A timer above a layer."""

    name = "timed"

    def __init__(self, layer: str, clock: Callable[[], int] = monotonic_ns) -> None:
        """Time the layer with the text `layer`; `clock` returns ns."""
        super().__init__(NoOptions())
        self.layer = layer
        self.times = tuple(Times() for _ in Op)
        self._clock = clock
        self._begun: dict[Request, int] = {}

    def submit(self, batch: list[Request]) -> None:
        """Note when these requests begin, and pass them on."""
        self._begun.update(dict.fromkeys(batch, self._clock()))
        super().submit(batch)

    def on_complete(self, batch: list[Request]) -> None:
        """Count the requests that are done, and pass them on."""
        now = self._clock()
        for request in batch:
            begun = self._begun.pop(request, None)
            if begun is not None:
                times, passed = self.times[request.op], now - begun
                times.bytes += request.length
                times.sum_ns += passed
                times.buckets[min(passed.bit_length(), BUCKETS - 1)] += 1
        self.complete(batch)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, without operations that did not occur."""
        done = {op.name.lower(): times for op, times in zip(Op, self.times, strict=True) if any(times.buckets)}
        return {"layer": self.layer, "operations": {name: times.as_json() for name, times in done.items()}}


def parse_times(values: Any) -> list[Mapping[str, Any]]:
    """Check that `values` are those of `Timed.as_json` for each layer, and return them. Raises: ValueError if not."""
    if not isinstance(values, list):
        raise ValueError("not a list of layers")
    for each in values:
        if not isinstance(each, dict) or set(each) != {"layer", "operations"} or not isinstance(each["layer"], str):
            raise ValueError("not what a timer says")
        if not isinstance(each["operations"], dict) or not set(each["operations"]) <= _OPERATIONS:
            raise ValueError("not of operations")
        for times in each["operations"].values():
            _check(times)
    return values


_OPERATIONS = {each.name.lower() for each in Op}
_PLACES = {str(place) for place in range(BUCKETS)}


def _check(times: Any) -> None:
    if not isinstance(times, dict) or set(times) != {"bytes", "sum_ns", "buckets"}:
        raise ValueError("not the times of an operation")
    buckets = times["buckets"]
    if not isinstance(buckets, dict) or not set(buckets) <= _PLACES:
        raise ValueError("not the buckets of a histogram")
    counts = (times["bytes"], times["sum_ns"], *buckets.values())
    if any(type(each) is not int or not 0 <= each < 1 << 64 for each in counts):
        raise ValueError("not counts")
    if not any(buckets.values()):
        raise ValueError("of no request at all")
