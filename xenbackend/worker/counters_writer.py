"""The worker's counters, added up and written where the supervisor and people read them.

Must not be called per request: engine and queues count in plain integers, which are summed up here once a second.
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend import counters
from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
)
from xenbackend.worker.engine import Engine

_SUMS = (
    "reads", "writes", "flushes", "discards", "read_bytes", "written_bytes", "errors", "guest_errors", "turns",
    "notifications", "missed_wakeups", "latency_samples", "latency_ns", "bugs", "rests", "rested_ns",
)  # fmt: skip


class CountersWriter:
    """Adds the counts of one connection to those that the page has already: counters outlive connection and worker."""

    def __init__(self, page: memoryview, engine: Engine) -> None:
        """Write to `page`, counters.SIZE bytes. A predecessor may have left anything there: sums wrap at 64 bits."""
        self.missed_wakeups = 0
        self.figures: Callable[[], list[int]] = list  # what the layers count; set with the chain
        self._engine = engine
        self._words = page.cast("Q")
        self._before = counters.snapshot(page)
        self._samples = 0  # of this connection, that the page has already
        self._buckets_before = self._words[counters.HISTOGRAM : counters.HISTOGRAM + counters.BUCKETS].tolist()
        self._by_operation_before = self._words[counters.BY_OPERATION :].tolist()

    def publish(self) -> None:
        """Write every counter, each by one store."""
        words = self._words
        now = self._now()
        for name in _SUMS:
            words[counters.INDEX[name]] = (self._before[name] + now[name]) & counters.WORD_MAX
        for name in ("in_flight", "latency_max_ns", "look_ns"):
            words[counters.INDEX[name]] = now[name]
        if now["latency_samples"] != self._samples:  # else the hundreds of words about latency are unchanged
            self._samples = now["latency_samples"]
            self._publish_latency()
        for place, figure in enumerate(self.figures()[: counters.MOST_FIGURES], counters.FIGURES):
            words[place] = min(max(0, figure), counters.WORD_MAX)

    def _publish_latency(self) -> None:
        words, queues = self._words, self._engine.queues
        for bucket, before in enumerate(self._buckets_before):
            timed = [each[bucket] for queue in queues for each in queue.latency]
            words[counters.HISTOGRAM + bucket] = (before + sum(timed)) & counters.WORD_MAX
        for place, before in enumerate(self._by_operation_before):
            kind, at = divmod(place, 1 + counters.BUCKETS)
            timed = [queue.latency[kind][at - 1] if at else queue.latency_ns[kind] for queue in queues]
            words[counters.BY_OPERATION + place] = (before + sum(timed)) & counters.WORD_MAX

    def _now(self) -> dict[str, int]:
        engine, queues = self._engine, self._engine.queues

        def requests(*operations: int) -> int:
            return sum(queue.requests[operation] for queue in queues for operation in operations)

        def moved(*operations: int) -> int:
            return sum(queue.bytes[operation] for queue in queues for operation in operations)

        return {
            "reads": requests(BLKIF_OP_READ),
            "writes": requests(BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER),
            "flushes": requests(BLKIF_OP_FLUSH_DISKCACHE),
            "discards": requests(BLKIF_OP_DISCARD),
            "read_bytes": moved(BLKIF_OP_READ),
            "written_bytes": moved(BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER),
            "errors": sum(queue.errors for queue in queues) - engine.guest_errors,
            "guest_errors": engine.guest_errors,
            "in_flight": sum(queue.in_flight for queue in queues),
            "turns": engine.turns,
            "notifications": sum(queue.notifications for queue in queues),
            "missed_wakeups": self.missed_wakeups,
            "latency_samples": sum(queue.samples for queue in queues),
            "latency_ns": sum(sum(queue.latency_ns) for queue in queues),
            "latency_max_ns": max((queue.latency_max_ns for queue in queues), default=0),
            "bugs": engine.bugs,
            "rests": engine.poller.rests,
            "rested_ns": engine.poller.rested_ns,
            "look_ns": engine.poller.look_ns,
        }
