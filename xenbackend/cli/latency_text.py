"""A histogram of latencies as lines for people.

Must not ask anybody.
"""

from __future__ import annotations

from collections.abc import Iterator

from xenbackend.cli.histogram import FRACTIONS, Histogram
from xenbackend.client import Disk
from xenbackend.errors import printable
from xenbackend.units import format_duration

_WIDTH = 40  # of the longest bar


def lines(known: Disk, histogram: Histogram) -> Iterator[str]:
    """Yield a line about the disk, a line for each bucket, and a summary."""
    when = "since it was attached" if histogram.seconds is None else f"in {histogram.seconds:.1f} s"
    yield f"{known.vbd}  {printable(known.chain)}"
    if not histogram.samples:
        yield f"no request was timed {when}"
        return
    most = max(histogram.buckets)
    for place in histogram.filled():
        count = histogram.buckets[place]
        bar = "#" * (-(-count * _WIDTH // most))
        low, high = (_time(each) for each in (1 << place >> 1, 1 << place))
        share = 100 * count / histogram.samples
        yield f"{low:>8} to {high:>8}  {count:>9}  {share:5.1f} %  {bar}".rstrip()
    bounds = ", ".join(f"{fraction * 100:g} % < {_time(histogram.bound_ns(fraction))}" for fraction in FRACTIONS)
    timed = f"{histogram.samples} request{'s' * (histogram.samples != 1)}"
    yield f"{timed} timed {when}: mean {_time(histogram.mean_ns)}; {bounds}"


def _time(nanoseconds: float | None) -> str:
    return "-" if nanoseconds is None else format_duration(nanoseconds / 1e9)
