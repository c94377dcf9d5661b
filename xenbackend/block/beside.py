"""A file that a filter keeps beside a disk: created, opened, and initialised so that a kill leaves it complete or new.

Must not know its content beyond the header (`formats.beside`).
"""

from __future__ import annotations

import os

from xenbackend.block.driver import Env, File, HostFile
from xenbackend.block.formats.beside import HEADER_SIZE, MAX_BLOCK, MIN_BLOCK, Header
from xenbackend.block.length import Length
from xenbackend.errors import DriverError
from xenbackend.units import PAGE, format_size


def check_block(block: int) -> None:
    """Check an option that is the size of blocks. Raises: ValueError with a sentence."""
    if not MIN_BLOCK <= block <= MAX_BLOCK or block & (block - 1):
        raise ValueError(f"block is {format_size(block)}; it must be 4K, 8K, ... up to 1M")


def have(env: Env, path: str, *, read_only: bool, is_copy: bool = False) -> tuple[HostFile, int]:
    """Open a file, creating it if necessary; return it and when it was changed last, in nanoseconds since 1970.

    `is_copy`: as for `Files.open`. Raises: DriverError, OSError.
    """
    made = env.files.open_record(path)
    try:
        found = os.fstat(made)  # before `open`, which may change this time
        if not found.st_size:
            os.ftruncate(made, HEADER_SIZE)
    finally:
        os.close(made)
    return env.files.open(path, read_only=read_only, step=PAGE, is_copy=is_copy), found.st_mtime_ns


def is_new(file: File, first: bytes, size: int) -> bool:
    """Return whether a file that begins with `first` is not initialised yet; `size` is its size when it is."""
    return not any(first) and file.size in (HEADER_SIZE, size)


def refuse_emptied(env: Env, path: str) -> None:
    """Refuse a new file if a predecessor had data of this layer in it (`note_in_use`). Raises: DriverError, OSError."""
    if _length(env, path).size:
        raise DriverError(
            "it is empty, and had data that the guest wrote: another program has truncated it; restore the file, or "
            "detach the disk, which loses these data"
        )


def note_in_use(env: Env, path: str, file: File) -> None:
    """Note for successors that a file is initialised, and has data of this layer from now on. Raises: OSError."""
    _length(env, path).size = file.size


def _length(env: Env, path: str) -> Length:
    """Return the size of an initialised file, as a predecessor noted it."""
    return env.lengths().of(env.files.look(path).identity)


def begin(file: File, header: Header, *, size: int, written: int) -> None:
    """Initialise a file with `header` and `size` bytes; up to byte `written` it is filled with zeros, and not a hole.

    So later writes there cannot fail because the file system is full. The header is written last. All of it is durable.
    Raises: OSError.
    """
    file.grow(size)
    for place in range(HEADER_SIZE, written, MAX_BLOCK):
        file.write_at(place, bytes(min(MAX_BLOCK, written - place)))
    file.sync()
    file.write_at(0, header.pack())
    file.sync()
