"""The counters of one vbd, in the first page of its journal: the worker adds, the supervisor and people read.

Must not format anything. Each counter is one aligned 64-bit word with one writer, so that a reader in another process
sees old or new, never half. They outlive the worker: its successor at the same
vbd goes on with them, until the vbd or the service ends.
"""

from __future__ import annotations

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
SIZE = 4096  # bytes: the page
INDEX = {name: place for place, name in enumerate(NAMES)}


def snapshot(page: memoryview) -> dict[str, int]:
    """Return every counter by name. `page` is at least SIZE bytes."""
    words = page[:SIZE].cast("Q")
    return {name: words[place] for place, name in enumerate(NAMES)}


def histogram(page: memoryview) -> list[int]:
    """Return the latency histogram's buckets; `page` is at least SIZE bytes."""
    return page[:SIZE].cast("Q")[HISTOGRAM : HISTOGRAM + BUCKETS].tolist()


def percentile_ns(buckets: list[int], fraction: float) -> int:
    """Return the upper bound in ns of the bucket where `fraction` of the samples lie below, 0 without any."""
    wanted = sum(buckets) * fraction  # rounded up it may be more than there are
    seen = bound = 0
    for place, count in enumerate(buckets):
        if count and (not bound or seen < wanted):
            bound = 1 << place
        seen += count
    return bound
