"""A file that a filter keeps beside a disk: made, opened, and begun so that a kill leaves a whole one or a new one.

Must not know what is in it beyond its header (`formats.beside`).
"""

from __future__ import annotations

import os

from xenbackend.block.driver import Env, File
from xenbackend.block.formats.beside import HEADER_SIZE, MAX_BLOCK, MIN_BLOCK, Header
from xenbackend.units import PAGE, format_size


def check_block(block: int) -> None:
    """See that an option is a size of blocks. Raises: ValueError with a sentence."""
    if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
        raise ValueError(f"block is {format_size(block)}; it must be 4K, 8K, ... up to 1M")


def have(env: Env, path: str, *, read_only: bool) -> tuple[File, int]:
    """Return the file, open, and when it was changed last, in nanoseconds since 1970; it is made where it is not there.

    Raises: DriverError, OSError.
    """
    made = env.files.open_record(path)
    try:
        found = os.fstat(made)  # to open it for good gives it another time of change
        if not found.st_size:
            os.ftruncate(made, HEADER_SIZE)
    finally:
        os.close(made)
    return env.files.open(path, read_only=read_only, step=PAGE), found.st_mtime_ns


def is_new(file: File, first: bytes, size: int) -> bool:
    """Return whether a file is to be begun, whose first bytes are these, and which has `size` bytes once it is."""
    return not any(first) and file.size in (HEADER_SIZE, size)


def begin(file: File, header: Header, *, size: int, written: int) -> None:
    """Make a file `size` bytes long, which begins with `header`; up to `written` it is more than a hole.

    So no write there finds the file system full. The header comes last, and durably. Raises: OSError.
    """
    file.grow(size)
    for place in range(HEADER_SIZE, written, MAX_BLOCK):
        file.write_at(place, bytes(min(MAX_BLOCK, written - place)))
    file.sync()
    file.write_at(0, header.pack())
    file.sync()
