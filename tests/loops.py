"""Loop devices, with sectors as large as a test wants them; where there are none, the test is skipped.

Must not leave a device behind, whatever becomes of the test.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def loop(path: Path, size: int, *, sector_size: int) -> Iterator[tuple[str, Path]]:
    """Have a device on a new file, and get the paths of both. Sizes in bytes."""
    if not shutil.which("losetup"):
        pytest.skip("losetup is not installed (Debian: mount)")
    with path.open("wb") as file:
        file.truncate(size)
    arguments = ["losetup", "--find", "--show", f"--sector-size={sector_size}", path]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no loop device for us: {done.stderr.strip()}")
    device = done.stdout.strip()
    try:
        yield device, path
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)
