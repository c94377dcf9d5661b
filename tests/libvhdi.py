"""libvhdi, an independent implementation of differencing VHD images; without it a test is skipped.

Its release of 2021 does not look at each bit of a block's bitmap by itself where a byte has ones before zeros, so what
it is compared on is written in whole pages of 4 KiB. It is Debian's python3-libvhdi, for Debian's own Python, which is
therefore a process of its own.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

_PYTHON = "/usr/bin/python3"
_READ = """
import sys
import pyvhdi
files = []
for path in sys.argv[2:]:
    files.append(pyvhdi.file())
    files[-1].open(path)
for child, parent in zip(files, files[1:]):
    child.set_parent(parent)
for piece in sys.argv[1].split():
    offset, length = map(int, piece.split("+"))
    while length:
        data = files[0].read_buffer_at_offset(min(length, 1 << 20), offset)
        assert data, (offset, length)
        sys.stdout.buffer.write(data)
        offset, length = offset + len(data), length - len(data)
"""


@cache
def is_installed() -> bool:
    """Return whether libvhdi can be used here."""
    found = subprocess.run([_PYTHON, "-c", "import pyvhdi"], capture_output=True, check=False)
    return found.returncode == 0


def pieces(paths: Sequence[Path], places: Sequence[tuple[int, int]]) -> bytes:
    """Return what a disk holds at places (offset, length); `paths`: the leaf first, the oldest parent last."""
    if not is_installed():
        pytest.skip("libvhdi is not installed (Debian: python3-libvhdi)")
    words = " ".join(f"{offset}+{length}" for offset, length in places)
    done = subprocess.run([_PYTHON, "-c", _READ, words, *paths], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout
