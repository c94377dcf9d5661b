"""Damaged images by the hundred thousand: what may come of each, and how long and how large it may get.

Must not know a format: a test gives what makes a case and what looks at it.
"""

from __future__ import annotations

import json
import os
import re
import resource
import time
from collections.abc import Callable
from pathlib import Path

from tests.stamp import stamp
from xenbackend.errors import DriverError

MAX_SECONDS = 1.0  # of the CPU, for one case
MAX_GROWTH = 512 << 10  # KiB that the process may grow by


def endure(count: int, make: Callable[[], bytes], look: Callable[[bytes], object]) -> int:
    """Look at so many damaged images, and return how many were refused: by a DriverError, nothing else comes out."""
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
    _leave(count)
    return refused


def _leave(count: int) -> None:
    """Leave the figure for the scoreboard, where the suite is run for it (FIGURES names the directory)."""
    directory, test = os.environ.get("FIGURES"), os.environ.get("PYTEST_CURRENT_TEST", "")
    if directory:
        name = re.sub(r"\W+", "-", test.removeprefix("tests/block/formats/").partition(" ")[0])
        path = Path(directory) / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"count": count, **stamp()}) + "\n")
