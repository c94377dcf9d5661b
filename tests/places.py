"""Where tests put what must not lie in their temporary directory: into memory, or on a disk.

Must not be used for anything else: whoever can do with `tmp_path` takes that.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MEMORY, DISK = Path("/dev/shm"), Path("/var/tmp")
OUTSIDE = (MEMORY, DISK, Path("/tmp"), Path("/run"))


def prefix() -> str:
    """Return what names outside begin with: the temporary directory's, by which they are found when a suite is over."""
    return f"{Path(tempfile.gettempdir()).name}-"


@contextmanager
def directory(place: Path) -> Iterator[Path]:
    """Have a directory there."""
    with tempfile.TemporaryDirectory(dir=place, prefix=prefix()) as name:
        yield Path(name)
