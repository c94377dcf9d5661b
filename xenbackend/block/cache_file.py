"""The file of a cache: opens it, initialises it, or refuses it.

Must not initialise a file of mode=writeback that has dirty blocks, nor use it for another disk.
"""

from __future__ import annotations

import os

from xenbackend.block.below import changed_ns, describe
from xenbackend.block.beside import begin, have, is_new, note_in_use, refuse_emptied
from xenbackend.block.cache_map import WAYS
from xenbackend.block.cache_parts import MAX_SLOTS
from xenbackend.block.driver import File, Filter, HostFile
from xenbackend.block.formats.beside import HEADER_SIZE, MIN_BLOCK
from xenbackend.block.formats.cache import BackHeader, Header
from xenbackend.errors import DriverError

_CLOSING_NS = 10 * 10**9  # after FILE's time, layers below may still write while they close; clocks may also differ
_PIECE = 1 << 20


def open_back(driver: Filter, path: str, size: int, block: int) -> tuple[HostFile, BackHeader | None]:
    """Open the file of a write-back cache; return it and its header, or None if it is read-only and has nothing to use.

    Raises: DriverError, OSError.
    """
    env = driver.env
    base = describe(driver.next, env.files, with_changes=False)
    wanted = BackHeader(size // block * block, block, base, os.urandom(16))
    file, changed_at = have(env, path, read_only=env.read_only)
    try:
        header = _header_of(file, driver, path, wanted, changed_at)
        if header is not None:
            note_in_use(env, path, file)
        return file, header
    except BaseException:
        file.close()
        raise


def open_read(driver: Filter, path: str, size: int, block: int) -> tuple[HostFile, Header]:
    """Open the file of any other cache, and return it and its header; initialise it if it is new or of another size.

    It is opened for writing even if the disk is read-only, as reads are cached, too. Raises: DriverError, OSError.
    """
    file, _ = have(driver.env, path, read_only=False, is_copy=True)
    try:
        header = Header(size // block * block, block, "", os.urandom(16))
        first = file.read_at(0, HEADER_SIZE)
        if first.startswith(BackHeader.MAGIC):
            raise DriverError(
                f"{path} was used with mode=writeback, and may hold the only copy of some blocks; use that mode until "
                "the disk has nothing dirty, then remove the file"
            )
        found = header if is_new(file, first, header.file_size) else Header.parse(first)
        is_other = (found.size, found.block) != (header.size, header.block) or file.size < header.file_size
        if found is not header and not is_other:
            return file, found
        begin(file, header, size=header.file_size, written=HEADER_SIZE)  # its former content is useless
    except BaseException:
        file.close()
        raise
    return file, header


def _header_of(file: File, driver: Filter, path: str, wanted: BackHeader, changed_at: int) -> BackHeader | None:
    env = driver.env
    first = file.read_at(0, HEADER_SIZE)
    if not is_new(file, first, wanted.file_size) and not first.startswith(Header.MAGIC):
        found = BackHeader.parse(first)
        if found.blocks > MAX_SLOTS:  # to read all their tags would take for ever
            raise DriverError(
                f"its header is damaged: {found.blocks} slots, more than the {MAX_SLOTS} that are possible"
            )
        if file.size < found.file_size:
            raise DriverError(f"it has only {file.size} of its {found.file_size} bytes: it has been truncated")
        dirty = _count(file, found)
        if dirty or (found.base, found.size, found.block) == (wanted.base, wanted.size, wanted.block):
            _check(driver, path, found, wanted, dirty, changed_at)
            return found
    elif not any(first):
        refuse_emptied(env, path)
    if env.read_only:
        return None
    if any(first):  # first an empty cache with a new token: after a kill, no memory of a former worker fits to the file
        kind = Header if first.startswith(Header.MAGIC) else BackHeader
        file.write_at(0, kind(WAYS * MIN_BLOCK, MIN_BLOCK, "", os.urandom(16)).pack())
    begin(file, wanted, size=wanted.file_size, written=wanted.data_at)
    return wanted


def _check(driver: Filter, path: str, found: BackHeader, wanted: BackHeader, dirty: int, changed_at: int) -> None:
    """Check that the file's content belongs to the layer below. Raises: DriverError, OSError."""
    has = f"{path} holds the only copy of {dirty} blocks"
    if found.base != wanted.base:
        raise DriverError(f"{has} of another disk; name another file, or remove this one, which loses these blocks")
    if (found.size, found.block) != (wanted.size, wanted.block):
        raise DriverError(
            f"{has}, and was made with size={found.size},block={found.block}; use these values until nothing is dirty"
        )
    if dirty and not driver.env.resumes and changed_ns(driver.next, driver.env.files) > changed_at + _CLOSING_NS:
        raise DriverError(
            f"{has}, and what is below has been changed since then without this layer; if nobody wrote to the disk, "
            f"touch {path} and try again; otherwise remove the file, which loses these blocks"
        )


def _count(file: File, header: BackHeader) -> int:
    """Return the number of tags in a file, which is that of its dirty blocks."""
    end, count = HEADER_SIZE + header.map_size, 0
    for place in range(HEADER_SIZE, end, _PIECE):
        tags = memoryview(file.read_at(place, min(_PIECE, end - place))).cast("Q").tolist()
        count += len(tags) - tags.count(0)
    return count
