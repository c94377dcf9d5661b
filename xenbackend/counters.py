"""The counters of one vbd, in the first page of its journal: the worker adds, the supervisor and people read.

Must not format anything. Each counter is one aligned 64-bit word with one writer, so that a reader in another process
sees old or new, never half. They outlive the worker: its successor at the same
vbd goes on with them, until the vbd or the service ends.
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
    "notifications",     # kicks sent to the frontend
    "missed_wakeups",    # work that only the safety poll found; expected 0
    "latency_samples",   # requests timed: the first of about every eighth batch
    "latency_ns",        # their sum
    "latency_max_ns",
    "bugs",              # exceptions that were ours (D8)
    "rests",             # how often looking for requests before sleeping was given up, for what it cost
    "rested_ns",         # for how long, in all
    "look_ns",           # how long a look may take now; 0 while it rests, and where nobody may look
)  # fmt: skip
HISTOGRAM = 64  # first word of the latency histogram: word 64 + n counts samples of 2**(n-1) <= ns < 2**n
BUCKETS = 48
FIGURES = 112  # first word of what layers count: one word per figure, in the order of the layers, top first
SIZE = 4096  # bytes: the page
WORD_MAX = (1 << 64) - 1  # what a word holds; what would be more wraps
OPERATIONS = ("read", "write", "flush", "discard")
BY_OPERATION = SIZE // 8 - len(OPERATIONS) * (1 + BUCKETS)  # first word of theirs: each one's sum, then its histogram
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
    """Return for each operation what was timed of it: the sum in ns, and the histogram's buckets."""
    words = page[:SIZE].cast("Q")[BY_OPERATION:].tolist()
    parts = [words[first : first + 1 + BUCKETS] for first in range(0, len(words), 1 + BUCKETS)]
    return {name: {"sum_ns": part[0], "buckets": part[1:]} for name, part in zip(OPERATIONS, parts, strict=True)}


def figures(page: memoryview, names: Sequence[Sequence[str]]) -> list[dict[str, int]]:
    """Return what each layer counts, by the names that it has said; `page` is at least SIZE bytes.

    What is beyond MOST_FIGURES is left out.
    """
    words = iter(page[:SIZE].cast("Q")[FIGURES:BY_OPERATION].tolist())
    return [dict(zip(each, words, strict=False)) for each in names]


def percentile_ns(buckets: list[int], fraction: float) -> int:
    """Return the upper bound in ns of the bucket where `fraction` of the samples lie below, 0 without any."""
    wanted = sum(buckets) * fraction  # rounded up it may be more than there are
    seen = bound = 0
    for place, count in enumerate(buckets):
        if count and (not bound or seen < wanted):
            bound = 1 << place
        seen += count
    return bound
