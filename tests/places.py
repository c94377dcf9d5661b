"""Directories for what must not be in a test's temporary directory: in memory, or on a disk.

Must not be used if `tmp_path` will do.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY, DISK = Path("/dev/shm"), Path("/var/tmp")
OUTSIDE = (MEMORY, DISK, Path("/tmp"), Path("/run"))


def prefix() -> str:
    """Return the prefix of names outside: the temporary directory's, by which they are found after a suite."""
    return f"{Path(tempfile.gettempdir()).name}-"


@contextmanager
def directory(place: Path) -> Iterator[Path]:
    """Make a directory in `place` within this context."""
    with tempfile.TemporaryDirectory(dir=place, prefix=prefix()) as name:
        yield Path(name)
