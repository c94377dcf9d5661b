"""The file of a cache: opened, begun, or refused.

Must not begin a file anew that has what is nowhere else, with mode=writeback, nor take it for another disk's.
"""

from __future__ import annotations

import os

from xenbackend.block.below import changed_ns, describe
from xenbackend.block.beside import begin, have, is_new
from xenbackend.block.cache_map import WAYS
from xenbackend.block.cache_parts import MAX_SLOTS
from xenbackend.block.driver import File, Filter, HostFile
from xenbackend.block.formats.beside import HEADER_SIZE, MIN_BLOCK
from xenbackend.block.formats.cache import BackHeader, Header
from xenbackend.errors import DriverError

_CLOSING_NS = 10 * 10**9  # in which the layers below may write after us, also where clocks are not quite one
_PIECE = 1 << 20


def open_back(driver: Filter, path: str, size: int, block: int) -> tuple[HostFile, BackHeader | None]:
    """Return the file, open, and its header; None: it is new, and only read, so that nothing is in it.

    Raises: DriverError, OSError.
    """
    env = driver.env
    base = describe(driver.next, env.files, with_changes=False)
    wanted = BackHeader(size // block * block, block, base, os.urandom(16))
    file, changed_at = have(env, path, read_only=env.read_only)
    try:
        return file, _header_of(file, driver, path, wanted, changed_at)
    except BaseException:
        file.close()
        raise


def open_read(driver: Filter, path: str, size: int, block: int) -> tuple[HostFile, Header]:
    """Return the file of another cache, open and begun where it was not, or of another size, and its header.

    It is written also where the disk is only read: such a one may be slow, too. Raises: DriverError, OSError.
    """
    file, _ = have(driver.env, path, read_only=False)
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
        begin(file, header, size=header.file_size, written=HEADER_SIZE)  # what it had is of no use
    except BaseException:
        file.close()
        raise
    return file, header


def _header_of(file: File, driver: Filter, path: str, wanted: BackHeader, changed_at: int) -> BackHeader | None:
    env = driver.env
    first = file.read_at(0, HEADER_SIZE)
    if not is_new(file, first, wanted.file_size) and not first.startswith(Header.MAGIC):
        found = BackHeader.parse(first)
        if found.blocks > MAX_SLOTS:  # to look at all of them would take for ever
            raise DriverError(
                f"its header is damaged: {found.blocks} slots, more than the {MAX_SLOTS} that are possible"
            )
        if file.size < found.file_size:
            raise DriverError(f"it has only {file.size} of its {found.file_size} bytes: it has been truncated")
        dirty = _count(file, found)
        if dirty or (found.base, found.size, found.block) == (wanted.base, wanted.size, wanted.block):
            _check(driver, path, found, wanted, dirty, changed_at)
            return found
    if env.read_only:
        return None
    if any(first):  # whoever is killed now leaves one that has nothing, of which no worker remembers anything else
        kind = Header if first.startswith(Header.MAGIC) else BackHeader
        file.write_at(0, kind(WAYS * MIN_BLOCK, MIN_BLOCK, "", os.urandom(16)).pack())
    begin(file, wanted, size=wanted.file_size, written=wanted.data_at)
    return wanted


def _check(driver: Filter, path: str, found: BackHeader, wanted: BackHeader, dirty: int, changed_at: int) -> None:
    """See that what a file has fits to the layer below. Raises: DriverError, OSError."""
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
    """Return how many tags a file has."""
    end, count = HEADER_SIZE + header.map_size, 0
    for place in range(HEADER_SIZE, end, _PIECE):
        tags = memoryview(file.read_at(place, min(_PIECE, end - place))).cast("Q").tolist()
        count += len(tags) - tags.count(0)
    return count
