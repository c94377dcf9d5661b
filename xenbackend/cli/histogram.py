"""Latencies of a disk's requests within an interval, as a histogram.

Must not print or draw: `latency_text` and `latency_plot` do.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from xenbackend import counters
from xenbackend.client import Disk
from xenbackend.errors import XenbackendError

FRACTIONS = (0.5, 0.9, 0.99, 0.999)


@dataclass(frozen=True, slots=True)
class Histogram:
    """Latencies of a sample of requests.

    buckets   element n counts those that took from 2^(n-1) to 2^n ns
    sum_ns    sum of all of them
    seconds   of the interval; None: since the disk was attached
    """

    buckets: tuple[int, ...]
    sum_ns: int
    seconds: float | None

    @property
    def samples(self) -> int:
        """The number of requests."""
        return sum(self.buckets)

    @property
    def mean_ns(self) -> float | None:
        """The mean; None if there are no requests."""
        return self.sum_ns / self.samples if self.samples else None

    def bound_ns(self, fraction: float) -> int | None:
        """Return an upper bound, in ns, for the latencies of this fraction of the requests; None if there are none."""
        return counters.percentile_ns(self.buckets, fraction) if self.samples else None

    def filled(self) -> range:
        """Return the buckets from the first to the last one that is not empty."""
        places = [place for place, count in enumerate(self.buckets) if count]
        return range(places[0], places[-1] + 1) if places else range(0)

    def as_json(self) -> dict[str, Any]:
        """Return its mean, bounds and buckets for --json, under the names of docs/json.md."""
        return {
            "mean_ns": None if self.mean_ns is None else round(self.mean_ns),
            "bounds_ns": {f"p{fraction * 100:g}": self.bound_ns(fraction) for fraction in FRACTIONS},
            "buckets": [{"below_ns": 1 << place, "count": self.buckets[place]} for place in self.filled()],
        }


def counted_between(before: Disk, after: Disk) -> tuple[int, ...]:
    """Return what each bucket has counted between two answers; negative if the counters were reset between them."""
    # services of two releases may have different numbers of buckets
    pairs = zip_longest(after.latency_histogram, before.latency_histogram, fillvalue=0)
    return tuple(new - old for new, old in pairs)


def difference(before: Disk, after: Disk, seconds: float) -> Histogram:
    """Return the latencies between two answers of the service. Raises: XenbackendError, if counters were reset."""
    buckets = counted_between(before, after)
    sum_ns = after.counters["latency_ns"] - before.counters["latency_ns"]
    if min(sum_ns, *buckets) < 0:
        raise XenbackendError(f"{after.vbd} was attached again meanwhile; repeat the command")
    return Histogram(buckets, sum_ns, seconds)
