"""What is measured: the workloads, the places that they touch, and what one measurement yields.

Must not open a file or start a process.

A bench file is stamped: each sector of 512 bytes begins with its own number, so that every read can be checked for
little. Reads touch the first half only and writes the second, so that no write of ours unstamps what a read checks.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.units import SECTOR

PLACES = 1 << 16  # how many places a random workload visits before it begins again
_SEED = 20091110  # a workload visits the same places in every run, round and target


class BenchError(XenbackendError):
    """A measurement is void: a backend died, stalled, refused or answered with wrong data."""


@dataclass(frozen=True, slots=True)
class Work:
    """One workload: `depth` requests of `length` bytes are kept in flight.

    Where it is `fresh`, each measurement has an empty image of its own.
    """

    name: str
    title: str
    write: bool
    random: bool
    length: int
    depth: int
    fresh: bool = False


WORKS = (
    Work("rr4k-1", "4 KiB random read, depth 1", write=False, random=True, length=4096, depth=1),
    Work("rr4k", "4 KiB random read, depth 32", write=False, random=True, length=4096, depth=32),
    Work("rw4k-1", "4 KiB random write, depth 1", write=True, random=True, length=4096, depth=1),
    Work("rw4k", "4 KiB random write, depth 32", write=True, random=True, length=4096, depth=32),
    # the longest direct request, of 11 segments: a frontend without indirect ones has no longer one
    Work("sr44k", "44 KiB sequential read, depth 32", write=False, random=False, length=44 << 10, depth=32),
    Work("sr64k", "64 KiB sequential read, depth 32", write=False, random=False, length=64 << 10, depth=32),
    Work("sw64k", "64 KiB sequential write, depth 32", write=True, random=False, length=64 << 10, depth=32),
    Work("sr1m", "1 MiB sequential read, depth 32", write=False, random=False, length=1 << 20, depth=32),
    Work("sw1m", "1 MiB sequential write, depth 32", write=True, random=False, length=1 << 20, depth=32),
    Work("fw4k", "4 KiB random first write, depth 32", write=True, random=True, length=4096, depth=32, fresh=True),
    Work("fw64k", "64 KiB first write, depth 32", write=True, random=False, length=64 << 10, depth=32, fresh=True),
)  # fmt: skip
DEPTH = max(work.depth for work in WORKS)
LENGTH = max(work.length for work in WORKS)
SMALLEST = 2 * DEPTH * LENGTH  # bytes; a smaller disk would have two requests in flight for one place


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one target. Units: seconds, latencies in ns.

    `backend_cpu` is what the process that serves used, user and system, with its kernel threads. `client_busy` is the
    share of the time in which the load generator did not wait: near 1 it was the limit, and the rate is a lower bound.
    `rested` is the share of the measurement, warm-up included, in which a worker of ours did not look for requests
    before it slept, because that cost too much or nobody could tell; None for others. `loops` is how many CPUs the
    loops beside it got; None without any.
    """

    requests: int
    seconds: float
    backend_cpu: float
    client_busy: float
    p50: int
    p99: int
    p999: int
    rested: float | None = None
    loops: float | None = None

    @property
    def rate(self) -> float:
        """Return requests per second."""
        return self.requests / self.seconds

    @property
    def cpu_us(self) -> float:
        """Return the backend's CPU time per request in microseconds."""
        return self.backend_cpu / self.requests * 1e6


def select_works(names: list[str], *, read_only: bool, image: bool = False) -> list[Work]:
    """Return the workloads with these names in their usual order, all of them without names.

    Args:
        names: what was asked for.
        read_only: leave out those that write.
        image: also those that need an empty image.

    Raises: ConfigError for a name that is none, or when nothing is left that may be run.
    """
    known = [work.name for work in WORKS]
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is not a workload; there are {', '.join(known)}")
    if not image and any(work.fresh and work.name in names for work in WORKS):
        raise ConfigError("a first write needs an empty image to write to; say of which format by --image")
    chosen = [
        work
        for work in WORKS
        if (work.name in names or not names) and not (work.write and read_only) and (image or not work.fresh)
    ]
    if not chosen:
        raise ConfigError("only writing workloads were chosen, and this disk may only be read")
    return chosen


def half(work: Work, size: int) -> tuple[int, int]:
    """Return the first byte and the length in bytes of the part of a disk of `size` bytes that a workload touches."""
    length = size // 2 // LENGTH * LENGTH
    return (length if work.write else 0), length


def places(work: Work, size: int) -> list[int]:
    """Return the first sectors of the requests of a workload on a disk of `size` bytes, in their order.

    Raises: ConfigError when the disk is smaller than `SMALLEST`.
    """
    if size < SMALLEST:
        raise ConfigError(f"a disk of {size} bytes is too small to measure; it takes {SMALLEST} bytes")
    start, length = half(work, size)
    count = length // work.length
    step = work.length // SECTOR
    order: range | list[int] = range(count)
    if work.random:
        chooser = random.Random(_SEED)
        order = chooser.sample(range(count), min(count, PLACES))
    return [start // SECTOR + number * step for number in order]


def stamp(buffer: bytearray, first_sector: int) -> None:
    """Write the number of its sector into the first eight bytes (native order) of each sector of `buffer`."""
    words = memoryview(buffer).cast("Q")
    count = len(buffer) // SECTOR
    words[:: SECTOR // 8] = memoryview(array("Q", range(first_sector, first_sector + count)))


def percentiles(samples: array[int]) -> tuple[int, int, int]:
    """Return the 50th, 99th and 99.9th percentile of at least one sample."""
    ordered = sorted(samples)
    p50, p99, p999 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99, 0.999))
    return p50, p99, p999
