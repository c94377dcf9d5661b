"""The closed loop that all load generators share: as many requests come as go, and some of them are timed.

Must not know a protocol: a generator says what finished, and issues as many again.

Requests are timed by sample, one at a time, so that the clock is read once per batch and throughput and latency come
from the same run. At depth 1 that is every request.

Before a generator sleeps it looks for `poll_ns` whether something comes: waking up takes a virtual machine 25-100 us,
and would be most of what is measured. With 0 it sleeps at once, as a guest does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from xenbackend.bench.plan import BenchError, Work

STALL = 10.0  # seconds without any answer after which a measurement is void


@dataclass(slots=True)
class Window:
    """A stretch of a closed loop; `busy` is the share of it that was not spent waiting, latencies are in ns."""

    requests: int
    seconds: float
    busy: float
    latencies: array[int]


class ClosedLoop(ABC):
    """A load generator for one backend. Order of calls: `start`, `run` any number, `drain`; then `start` again."""

    name = ""
    size = 0  # bytes of the disk
    poll_ns = 0  # how long to look before sleeping
    _waited_ns = 0

    @abstractmethod
    def start(self, work: Work, places: list[int]) -> None:
        """Issue the first `work.depth` requests, for the first of `places` (sectors)."""

    @abstractmethod
    def reap(self) -> list[int]:
        """Wait for answers and return the numbers of the requests that they end, at least one.

        Raises: BenchError when a request failed, or none is answered for `STALL` seconds.
        """

    @abstractmethod
    def renew(self, finished: list[int]) -> int:
        """Check the data of the finished requests, issue as many new ones, and return the number of one of those.

        Raises: BenchError for wrong data.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the backend."""

    def run(self, seconds: float) -> Window:
        """Keep the loop going for `seconds`, and until one request was timed."""
        clock, reap, renew = time.perf_counter_ns, self.reap, self.renew
        latencies = array("Q")
        requests = 0
        waited = self._waited_ns
        begin = now = issued_at = clock()
        deadline = begin + int(seconds * 1e9)
        timed = -1
        while now < deadline or not latencies:
            finished = reap()
            now = clock()
            requests += len(finished)
            if timed in finished:
                latencies.append(now - issued_at)
                timed = -1
            fresh = renew(finished)
            if timed < 0:
                timed = fresh
                issued_at = now
        busy = 1 - (self._waited_ns - waited) / (now - begin)
        return Window(requests, (now - begin) / 1e9, busy, latencies)

    def drain(self, work: Work) -> None:
        """Wait for the `work.depth` requests that are in flight, without issuing new ones."""
        left = work.depth
        while left:
            left -= len(self.reap())

    def wait(self, look: Callable[[], int], sleep: Callable[[], int]) -> int:
        """Return what `look` finds, called again and again for `poll_ns`, else what `sleep` does."""
        clock = time.perf_counter_ns
        begin = clock()
        deadline = begin + self.poll_ns
        while not (found := look()):
            if clock() >= deadline:
                found = sleep()
                break
        self._waited_ns += clock() - begin
        return found

    def stalled(self) -> BenchError:
        """Return the error for a backend that stopped answering."""
        return BenchError(f"{self.name} has not answered for {STALL:.0f} seconds")

    def wrong_data(self, sector: int, found: int) -> BenchError:
        """Return the error for a read that brought another sector's data."""
        return BenchError(f"{self.name} answered a read of sector {sector} with the data of sector {found}")
