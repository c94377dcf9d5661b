"""The file that `log:` with a target writes, one record per request: packing, decoding, filtering and summing up.

Must not open a file or read a clock.

A file is a sequence of 32-byte records, all numbers little-endian. The first 8 bytes distinguish the two kinds: as a
time, the magic would be after the year 2262.

    a session: a worker opened the layer, or the file was begun anew       a request, in the order of completion
     0  8  magic, "xbelog" 0x01 0xff; 0x01 is the version                   0  8  when it was submitted, ns since 1970
     8  8  size of the disk in bytes                                        8  8  first sector, in 512 bytes
    16  8  when it began, ns since 1970                                    16  8  from submitted to completed, ns
    24  4  the medium's sector size in bytes                               24  4  sectors, 2**32 - 1 for that and more
    28  4  process id of the worker                                        28  2  status: 0, or an errno
                                                                           30  1  operation: 0 read, 1 write, 2 flush,
                                                                                  3 discard, 255 records lost
                                                                           31  1  zero

If records were lost before (the writer was too slow, or the disk full), one record says so: its operation is 255, and
its count of sectors is the number of lost records. A last record that is cut short is from a worker that died, and is
ignored.
"""

from __future__ import annotations

import struct
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

from xenbackend.block.request import Op
from xenbackend.units import SECTOR

SIZE = 32  # bytes of every record
MAGIC = b"xbelog\x01\xff"
LOST = 255  # operation
MAX_COUNT = 0xFFFF_FFFF
HOT_RANGE = 1 << 20  # bytes of the ranges that are counted for "hottest"
RECENT_ENDS = 64  # a request counts as sequential when it begins where one of this many before it ended
_READ_AHEAD = 4096 * SIZE

SESSION = struct.Struct("<8sQQII")
REQUEST = struct.Struct("<QQQIHBx")


class Session(NamedTuple):
    """A worker began to record: disk and sector size in bytes, wall clock in ns, process id."""

    size: int
    began_ns: int
    sector_size: int
    pid: int


class Entry(NamedTuple):
    """One request: wall clock in ns when it was submitted, its range in bytes, ns until completion, status as errno."""

    time_ns: int
    offset: int
    length: int
    latency_ns: int
    status: int
    op: Op


class Lost(NamedTuple):
    """So many records are missing at this place."""

    time_ns: int
    records: int


def pack_session(session: Session) -> bytes:
    """Return the record of a session."""
    return SESSION.pack(MAGIC, *session)


def pack_request(entry: Entry) -> bytes:
    """Return the record of a request."""
    count = min(entry.length // SECTOR, MAX_COUNT)
    return REQUEST.pack(entry.time_ns, entry.offset // SECTOR, entry.latency_ns, count, entry.status, entry.op)


def pack_lost(lost: Lost) -> bytes:
    """Return the record that represents lost ones."""
    return REQUEST.pack(lost.time_ns, 0, 0, min(lost.records, MAX_COUNT), 0, LOST)


def read(stream: BinaryIO) -> Iterator[Session | Entry | Lost]:
    """Yield the records of a file, from its beginning.

    An invalid record, as left by a crash of the host, counts as a lost one.
    Raises: ValueError if it is not a file of `log:`.
    """
    is_first = True
    while block := stream.read(_READ_AHEAD):
        if is_first and block[: len(MAGIC)] != MAGIC[: len(block)]:
            raise ValueError("not a record of log:, or one of a later version")
        is_first = False
        for at in range(0, len(block) - SIZE + 1, SIZE):
            yield _decode(block[at : at + SIZE])
        if len(block) % SIZE:
            return  # the end; if a worker writes meanwhile, reading on would begin inside a record


def _decode(record: bytes) -> Session | Entry | Lost:
    if record.startswith(MAGIC):
        return Session(*SESSION.unpack(record)[1:])
    time_ns, sector, latency_ns, count, status, op = REQUEST.unpack(record)
    if op == LOST:
        return Lost(time_ns, count)
    if op > max(Op) or time_ns == 0:
        return Lost(0, 1)
    return Entry(time_ns, sector * SECTOR, count * SECTOR, latency_ns, status, Op(op))


@dataclass(frozen=True, slots=True)
class Choice:
    """A filter for requests; each field that is set narrows it."""

    ops: frozenset[Op] = frozenset(Op)
    since_ns: int = 0
    first: int = 0  # bytes: beginning of the range that a request must overlap
    stop: int | None = None  # bytes: its end, excluded; None for the end of the disk
    errors_only: bool = False
    slower_than_ns: int = 0

    def wants(self, entry: Entry) -> bool:
        """Return whether a request passes the filter. A flush overlaps no range, so it passes only if there is none."""
        if entry.op not in self.ops or entry.time_ns < self.since_ns or entry.latency_ns < self.slower_than_ns:
            return False
        if self.errors_only and not entry.status:
            return False
        if self.first == 0 and self.stop is None:
            return True
        return entry.offset + entry.length > self.first and (self.stop is None or entry.offset < self.stop)


@dataclass(slots=True)
class _OpSummary:
    bytes: int = 0
    errors: int = 0
    sequential: int = 0
    latencies_ns: array[int] = field(default_factory=lambda: array("Q"))
    # Requests of a batch complete in any order, so the end of the last one alone would miss most sequences.
    recent_ends: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def add(self, entry: Entry) -> None:
        self.bytes += entry.length
        self.errors += entry.status != 0
        self.latencies_ns.append(entry.latency_ns)
        if entry.op != Op.FLUSH:
            self.sequential += entry.offset in self.recent_ends
            self.recent_ends.pop(entry.offset, None)
            self.recent_ends[entry.offset + entry.length] = None
            if len(self.recent_ends) > RECENT_ENDS:
                self.recent_ends.popitem(last=False)

    def result(self) -> dict[str, Any]:
        latencies = sorted(self.latencies_ns)
        return {
            "requests": len(latencies),
            "bytes": self.bytes,
            "errors": self.errors,
            "sequential_share": round(self.sequential / len(latencies), 4),
            "latency_p50_ns": _percentile(latencies, 50),
            "latency_p99_ns": _percentile(latencies, 99),
            "latency_max_ns": latencies[-1],
        }


class Summary:
    """Sums up requests, which come in the order of the file. Takes 8 bytes of memory per request."""

    def __init__(self) -> None:
        self._ops: dict[Op, _OpSummary] = {}
        self._heat: Counter[int] = Counter()
        self._lost = 0
        self._span: tuple[int, int] | None = None  # ns: the earliest submission, the last completion

    def add(self, entries: Iterable[Entry | Lost]) -> None:
        """Add requests and losses."""
        for entry in entries:
            if isinstance(entry, Lost):
                self._lost += entry.records
                continue
            self._ops.setdefault(entry.op, _OpSummary()).add(entry)
            ended_ns = entry.time_ns + entry.latency_ns
            first, last = self._span or (entry.time_ns, ended_ns)
            self._span = min(first, entry.time_ns), max(last, ended_ns)
            if entry.op in (Op.READ, Op.WRITE):
                self._heat[entry.offset // HOT_RANGE] += 1

    def result(self, hottest: int = 5) -> dict[str, Any]:
        """Return the sums as plain values: the duration, lost records, sums by operation, the busiest ranges of 1 MiB.

        A range is counted once for each read or write that begins in it.
        """
        first, last = self._span or (0, 0)
        return {
            "duration_s": (last - first) / 1e9,
            "lost": self._lost,
            "operations": {op.name.lower(): self._ops[op].result() for op in sorted(self._ops)},
            "hottest": [
                {"offset": place * HOT_RANGE, "length": HOT_RANGE, "requests": count}
                for place, count in self._heat.most_common(hottest)
            ],
        }


def _percentile(values: list[int], percent: int) -> int:
    """Return the value that `percent` of the sorted values do not exceed (the nearest-rank method)."""
    return values[max(0, -(-len(values) * percent // 100) - 1)]
