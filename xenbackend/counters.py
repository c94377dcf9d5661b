"""The counters of one vbd, in the first page of its journal: the worker adds, the supervisor and people read.

Must not format anything. Each counter is one aligned 64-bit word with one writer, so a reader in another process sees
the old value or the new one, never half of each. The counters outlive the worker: its successor continues them until
the vbd or the service ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

NAMES = (
    "reads", "writes", "flushes", "discards",
    "read_bytes", "written_bytes",
    "errors",            # requests that ended with an error of the disk
    "guest_errors",      # requests that broke a rule of the protocol
    "in_flight",         # now
    "turns",             # passes of the engine that found work
    "notifications",     # sent to the frontend
    "missed_wakeups",    # times that only the safety poll found work; expected: 0
    "latency_samples",   # requests timed: the first of about every eighth batch
    "latency_ns",        # their sum
    "latency_max_ns",
    "bugs",              # exceptions caused by faults of ours (D8)
    "rests",             # how often polling for requests before sleeping was suspended because it cost too much
    "rested_ns",         # for how long in total
    "look_ns",           # how long a poll may take now; 0 while polling is suspended, and if it is not allowed
)  # fmt: skip
HISTOGRAM = 64  # first word of the latency histogram: word 64 + n counts samples of 2**(n-1) <= ns < 2**n
BUCKETS = 48
FIGURES = 112  # first word of the layers' figures: one word per figure, in the order of the layers, top first
SIZE = 4096  # bytes: the page
WORD_MAX = (1 << 64) - 1  # the largest value of a word; larger values wrap
OPERATIONS = ("read", "write", "flush", "discard")
BY_OPERATION = SIZE // 8 - len(OPERATIONS) * (1 + BUCKETS)  # first word of the times: per operation sum, histogram
MOST_FIGURES = BY_OPERATION - FIGURES
INDEX = {name: place for place, name in enumerate(NAMES)}


def snapshot(page: memoryview) -> dict[str, int]:
    """Return every counter by name. `page` is at least SIZE bytes."""
    words = page[:SIZE].cast("Q")
    return {name: words[place] for place, name in enumerate(NAMES)}


def histogram(page: memoryview) -> list[int]:
    """Return the latency histogram's buckets; `page` is at least SIZE bytes."""
    return page[:SIZE].cast("Q")[HISTOGRAM : HISTOGRAM + BUCKETS].tolist()


def by_operation(page: memoryview) -> dict[str, dict[str, Any]]:
    """Return the latencies of each operation: their sum in ns, and the buckets of their histogram."""
    words = page[:SIZE].cast("Q")[BY_OPERATION:].tolist()
    parts = [words[first : first + 1 + BUCKETS] for first in range(0, len(words), 1 + BUCKETS)]
    return {name: {"sum_ns": part[0], "buckets": part[1:]} for name, part in zip(OPERATIONS, parts, strict=True)}


def figures(page: memoryview, names: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """Return the figures of each layer, by `names`: each layer's names, top first. `page` is at least SIZE bytes.

    Figures beyond MOST_FIGURES are left out.
    """
    words = iter(page[:SIZE].cast("Q")[FIGURES:BY_OPERATION].tolist())
    return [dict(zip(each, words, strict=False)) for each in names]


def percentile_ns(buckets: Sequence[int], fraction: float) -> int:
    """Return the upper bound in ns of the bucket below which `fraction` of the samples lie, 0 without samples."""
    wanted = sum(buckets) * fraction  # rounding may make this more than the number of samples
    seen = bound = 0
    for place, count in enumerate(buckets):
        if count and (not bound or seen < wanted):
            bound = 1 << place
        seen += count
    return bound
