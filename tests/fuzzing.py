"""Runs hundreds of thousands of damaged images through a parser, and limits its errors, its time and its memory.

Must not know a format: a test gives the functions that make a case and look at it.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

from tests import figures
from xenbackend.errors import DriverError

MAX_SECONDS = 1.0  # of the CPU, for one case
MAX_GROWTH = 512 << 10  # KiB that the process may grow by


def endure(count: int, make: Callable[[], bytes], look: Callable[[bytes], object]) -> int:
    """Look at so many damaged images, and return how many were refused. Only DriverError may be raised."""
    before, refused, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0.0
    for _ in range(count):
        data = make()
        begin = time.process_time()
        try:
            look(data)
        except DriverError:
            refused += 1
        slowest = max(slowest, time.process_time() - begin)
    assert slowest < MAX_SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MAX_GROWTH
    figures.add("damaged", count)
    return refused
