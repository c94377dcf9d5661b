"""What is measured: the workloads, the places that they access, and the results of one measurement.

Must not open a file or start a process.

A bench file is stamped: each sector of 512 bytes begins with its own number, so that every read can be checked at low
cost. Reads only access the first half and writes only the second, so that no write changes what a read checks.
"""

from __future__ import annotations

import random
from array import array
from dataclasses import dataclass

from xenbackend.errors import ConfigError, XenbackendError
from xenbackend.units import SECTOR

PLACES = 1 << 16  # how many places a random workload accesses before it repeats them
_SEED = 20091110  # a workload accesses the same places in every run, in every round, and on every target


class BenchError(XenbackendError):
    """A measurement is void: a backend died, stalled, refused something, or returned wrong data."""


@dataclass(frozen=True, slots=True)
class Work:
    """One workload: `depth` requests of `length` bytes are kept in flight.

    If it is `fresh`, each measurement has a new, empty image.
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
    # 11 segments, the longest direct request: a frontend without indirect requests cannot send longer ones
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
SMALLEST = 2 * DEPTH * LENGTH  # bytes; on a smaller disk, two requests for the same place could be in flight


@dataclass(frozen=True, slots=True)
class Sample:
    """One measurement of one target. Units: seconds; latencies in ns.

    `backend_cpu` is the user and system time of the serving process, including its kernel threads. `client_busy` is the
    share of the time in which the load generator did not wait: near 1, it was the limit, and the rate is a lower bound.
    `rested` is the share of the measurement, including the warm-up, in which a worker of ours did not poll for requests
    before it slept, because polling cost too much, or the cost was not known; None for other targets. `loops` is how
    many CPUs the loops beside it got; None if there were none.
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
        """Requests per second."""
        return self.requests / self.seconds

    @property
    def cpu_us(self) -> float:
        """The backend's CPU time per request in microseconds."""
        return self.backend_cpu / self.requests * 1e6


def select_works(names: list[str], *, read_only: bool, image: bool = False) -> list[Work]:
    """Return the workloads with these names in their usual order; all workloads if there are no names.

    Args:
        names: the names that were asked for.
        read_only: leave out workloads that write.
        image: include workloads that need an empty image.

    Raises: ConfigError for an unknown name, or if no workload is left.
    """
    known = [work.name for work in WORKS]
    for name in names:
        if name not in known:
            raise ConfigError(f"{name!r} is not a workload; the workloads are {', '.join(known)}")
    if not image and any(work.fresh and work.name in names for work in WORKS):
        raise ConfigError("a first write needs an empty image to write to; choose its format with --image")
    chosen = [
        work
        for work in WORKS
        if (work.name in names or not names) and not (work.write and read_only) and (image or not work.fresh)
    ]
    if not chosen:
        raise ConfigError("only writing workloads were chosen, but this disk is read-only")
    return chosen


def half(work: Work, size: int) -> tuple[int, int]:
    """Return the offset and length, in bytes, of the part of a disk of `size` bytes that a workload accesses."""
    length = size // 2 // LENGTH * LENGTH
    return (length if work.write else 0), length


def places(work: Work, size: int) -> list[int]:
    """Return the first sector of each request of a workload on a disk of `size` bytes, in order.

    Raises: ConfigError if the disk is smaller than `SMALLEST`.
    """
    if size < SMALLEST:
        raise ConfigError(f"a disk of {size} bytes is too small to measure; it needs at least {SMALLEST} bytes")
    start, length = half(work, size)
    count = length // work.length
    step = work.length // SECTOR
    order: range | list[int] = range(count)
    if work.random:
        chooser = random.Random(_SEED)
        order = chooser.sample(range(count), min(count, PLACES))
    return [start // SECTOR + number * step for number in order]


def stamp(buffer: bytearray, first_sector: int) -> None:
    """Write the number of each sector of `buffer` into its first eight bytes (in native order)."""
    words = memoryview(buffer).cast("Q")
    count = len(buffer) // SECTOR
    words[:: SECTOR // 8] = memoryview(array("Q", range(first_sector, first_sector + count)))


def percentiles(samples: array[int]) -> tuple[int, int, int]:
    """Return the 50th, 99th and 99.9th percentiles of one or more samples."""
    ordered = sorted(samples)
    p50, p99, p999 = (ordered[min(len(ordered) - 1, int(len(ordered) * share))] for share in (0.5, 0.99, 0.999))
    return p50, p99, p999
