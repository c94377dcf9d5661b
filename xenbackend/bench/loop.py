"""The closed loop of all load generators: a new request replaces each finished one, and some requests are timed.

Must not know a protocol: a generator reports which requests have finished, and issues as many new ones.

One request at a time is timed, as a sample, so that the clock is read once per batch, and throughput and latency come
from the same run. At depth 1, every request is timed.

Before a generator sleeps, it polls for answers for `poll_ns`: in a virtual machine, waking up takes 25-100 us, which
would be most of the measured time. If `poll_ns` is 0, it sleeps at once, as a guest does.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from xenbackend.bench.plan import BenchError, Work

STALL = 10.0  # seconds without any answer, after which a measurement is void


@dataclass(slots=True)
class Window:
    """One run of a closed loop; `busy` is the share of the time that was not spent waiting, latencies are in ns."""

    requests: int
    seconds: float
    busy: float
    latencies: array[int]


class ClosedLoop(ABC):
    """A load generator for one backend. Order of calls: `start`, any number of `run`, `drain`; then `start` again."""

    name = ""
    size = 0  # bytes of the disk
    poll_ns = 0  # how long to poll before sleeping
    _waited_ns = 0

    @abstractmethod
    def start(self, work: Work, places: list[int]) -> None:
        """Issue the first `work.depth` requests, for the first of `places` (sector numbers)."""

    @abstractmethod
    def reap(self) -> list[int]:
        """Wait for answers, and return the numbers of the finished requests, at least one.

        Raises: BenchError if a request has failed, or none was answered for `STALL` seconds.
        """

    @abstractmethod
    def renew(self, finished: list[int]) -> int:
        """Check the data of finished requests, issue as many new ones, and return the number of one of the new ones.

        Raises: BenchError for wrong data.
        """

    @abstractmethod
    def close(self) -> None:
        """Release the connection to the backend."""

    def run(self, seconds: float) -> Window:
        """Run the loop for `seconds`, or longer until one request was timed."""
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
        """Wait for the `work.depth` requests in flight, without issuing new ones."""
        left = work.depth
        while left:
            left -= len(self.reap())

    def wait(self, look: Callable[[], int], sleep: Callable[[], int]) -> int:
        """Call `look` repeatedly for `poll_ns`, and return its first result that is not 0, or else that of `sleep`."""
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
        """Return the error for a backend that has stopped answering."""
        return BenchError(f"{self.name} has not answered for {STALL:.0f} seconds")

    def wrong_data(self, sector: int, found: int) -> BenchError:
        """Return the error for a read that returned another sector's data."""
        return BenchError(f"{self.name} answered a read of sector {sector} with the data of sector {found}")
