"""The properties of an open image: size, sectors, whether it can discard, and whether direct I/O reaches the medium.

Must not open or lock an image, read it for a guest, or decide what follows from its findings.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from xenbackend.errors import DriverError, printable
from xenbackend.units import SECTOR, round_up

BLKSSZGET = 0x1268  # linux/fs.h
BLKDISCARD = 0x1277
BLKPBSZGET = 0x127B
BLKGETSIZE64 = 0x80081272
PUNCH_HOLE_KEEP_SIZE = 3  # linux/falloc.h
_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
_AT_STATX_DONT_SYNC = 0x4000
_STATX_MEASURE = 0x200  # STATX_SIZE
_STX_SIZE = 5  # its place in struct statx, in words of 8 bytes
_STATX_DIOALIGN = 0x2000  # linux/stat.h
_STATX_SIZE = 256  # bytes
_DIO_MEM_ALIGN = 152  # offset of stx_dio_mem_align in struct statx; stx_dio_offset_align follows
_MAX_PHYSICAL = 1 << 20  # bytes; no disk has a larger physical sector

_Statx = ctypes.c_uint64 * (_STATX_SIZE // 8)  # struct statx as words
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long)

_WRONG_KINDS = (
    (stat.S_ISDIR, "is a directory"),
    (stat.S_ISFIFO, "is a pipe"),
    (stat.S_ISSOCK, "is a socket"),
    (stat.S_ISCHR, "is a character device"),
)


@dataclass(frozen=True, slots=True)
class Medium:
    """An image as the host sees it; all sizes in bytes."""

    size: int  # whole sectors, unless the image format lets its file end anywhere
    sector_size: int  # of the disk: 512 for a file, what the device says for a block device, or what was asked for
    is_device: bool
    can_discard: bool
    discard_granularity: int  # 0 if it cannot discard
    end: int  # less than `size` if the last sector is incomplete; the missing bytes read as zeros
    unit: int  # the smallest write to the medium, whatever the disk's sectors: the device's own sector, 1 for a file
    physical_sector_size: int  # what the medium writes at once, if known: a multiple of the sector size


@dataclass(frozen=True, slots=True)
class Alignment:
    """The alignment that direct I/O requires, in bytes; powers of two."""

    memory: int  # of each memory address
    offset: int  # of each offset in the file, and of each length


def check_kind(status: os.stat_result, path: str) -> None:
    """Refuse kinds of files that cannot be images. Raises: DriverError."""
    for is_kind, words in _WRONG_KINDS:
        if is_kind(status.st_mode):
            raise DriverError(f"{path} {words}; an image is a file or a block device", path=path)


def examine(
    fd: int,
    path: str,
    *,
    read_only: bool,
    ends_anywhere: bool = False,
    sector_size: int = 0,
    discard_granularity: int = 0,
) -> Medium:
    """Return the properties of the image behind `fd`.

    Args:
        fd: open in the mode in which the image will be used.
        path: for messages.
        read_only: nothing will be written; an incomplete last sector reads as if zeros followed, which are not stored.
        ends_anywhere: the size is not rounded up to whole sectors.
        sector_size: of the disk, in bytes; 0 for the medium's own.
        discard_granularity: of a block device, as `find_granularity` returns it.

    Raises: DriverError if it cannot be an image, OSError.
    """
    status = os.fstat(fd)
    check_kind(status, path)
    is_device = stat.S_ISBLK(status.st_mode)
    medium = _device(fd, discard_granularity) if is_device else _file(fd, status, read_only=read_only)
    if medium.size == 0:
        raise DriverError(f"{path} is empty; an image needs at least one sector", path=path)
    sector = sector_size or medium.sector_size
    size = medium.size if ends_anywhere else round_up(medium.size, sector)
    physical = max(sector, medium.physical_sector_size)
    medium = replace(medium, size=size, sector_size=sector, physical_sector_size=physical)
    if not read_only:
        refuse_part_of_a_sector(medium, path)
    return medium


def refuse_part_of_a_sector(medium: Medium, path: str) -> None:
    """Refuse an image with an incomplete last sector, which can only be read. Raises: DriverError, with a way out."""
    if medium.end == medium.size:
        return
    sector = medium.sector_size
    sentence = f"{path} has {medium.end} bytes, which is not a multiple of its {sector} byte sectors"
    import shlex  # late: most files end with a whole sector

    way_out = f"extend the file to a whole sector: truncate -s %{sector} {shlex.quote(printable(path))}"
    if medium.is_device:
        way_out = "choose smaller sectors with sector="
    raise DriverError(f"{sentence}; attach the disk read-only, or {way_out}", path=path)


def _file(fd: int, status: os.stat_result, *, read_only: bool) -> Medium:
    can_discard = not read_only and _can_punch(fd, status.st_size)
    granularity = status.st_blksize if can_discard else 0
    return Medium(
        size=status.st_size, sector_size=SECTOR, is_device=False, can_discard=can_discard,
        discard_granularity=granularity, end=status.st_size, unit=1, physical_sector_size=_unit_of_file(fd),
    )  # fmt: skip


def _unit_of_file(fd: int) -> int:
    """Return the unit of direct I/O that the file system states for a file: the sector of the device below, or more."""
    stated = _stated_alignment(fd)
    return stated.offset if stated is not None and _is_physical(stated.offset, SECTOR) else SECTOR


def _device(fd: int, discard_granularity: int) -> Medium:
    (size,) = struct.unpack("Q", fcntl.ioctl(fd, BLKGETSIZE64, bytes(8)))
    (sector_size,) = struct.unpack("i", fcntl.ioctl(fd, BLKSSZGET, bytes(4)))
    (physical,) = struct.unpack("I", fcntl.ioctl(fd, BLKPBSZGET, bytes(4)))
    can_discard = discard_granularity > 0
    granularity = max(discard_granularity, sector_size) if can_discard else 0
    return Medium(
        size=size, sector_size=sector_size, is_device=True, can_discard=can_discard, discard_granularity=granularity,
        end=size, unit=sector_size,
        physical_sector_size=physical if _is_physical(physical, sector_size) else sector_size,
    )  # fmt: skip


def _is_physical(size: int, sector_size: int) -> bool:
    """Return whether a guest accepts this size: Linux requires a power of two that is at least the sector size."""
    return sector_size <= size <= _MAX_PHYSICAL and not size & size - 1


def measure(fd: int) -> Callable[[], int]:
    """Return a function that returns how many bytes a file has now, as `size_of`.

    It takes less time than that, does not sleep, and is for one thread.
    """
    if not hasattr(_libc, "statx"):
        return lambda: os.fstat(fd).st_size
    buffer = _Statx()
    call, flags = _libc.statx, _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC

    def now() -> int:
        if call(fd, b"", flags, _STATX_MEASURE, buffer):
            return os.fstat(fd).st_size
        return buffer[_STX_SIZE]

    return now


def size_of(fd: int) -> int:
    """Return how many bytes a file has now, as far as the kernel knows without asking a server. Raises: OSError.

    For any thread. To ask a server for it, as `os.fstat` does, NFS first writes all changed pages back.
    """
    return measure(fd)()


def find_granularity(number: int) -> int:
    """Return a block device's discard granularity in bytes, from sysfs; 0 if it cannot discard."""
    if _queue_limit(number, "discard_max_bytes") <= 0:
        return 0
    return max(1, _queue_limit(number, "discard_granularity"))


def _queue_limit(number: int, name: str) -> int:
    """Return a limit of a block device's queue from sysfs, 0 if unknown. A partition has the limits of its disk."""
    from pathlib import Path  # late: most images are files

    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    for queue in (device / "queue", device.resolve().parent / "queue"):
        try:
            return int((queue / name).read_text())
        except (OSError, ValueError):
            continue
    return 0


def _can_punch(fd: int, size: int) -> bool:
    """Return whether the file system can punch holes: try it behind the end of the file, where no data can be lost."""
    return bool(_libc.fallocate(fd, PUNCH_HOLE_KEEP_SIZE, size, mmap.PAGESIZE) == 0)


def discard(fd: int, medium: Medium, offset: int, length: int) -> None:
    """Discard a range, and wait until it is done. On a device, only whole sectors of its own are discarded.

    Raises: OSError.
    """
    if medium.is_device:
        first, end = round_up(offset, medium.unit), (offset + length) // medium.unit * medium.unit
        if first < end:
            fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", first, end - first))
    elif _libc.fallocate(fd, PUNCH_HOLE_KEEP_SIZE, offset, length) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def switch_to_direct(fd: int, medium: Medium) -> Alignment | None:
    """Make `fd` bypass the page cache, and return the alignment; if that is impossible, change nothing and return None.

    Switching keeps the lock and the writes in flight on the same open file description; a second `open` would not.
    """
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
    except OSError:
        return None
    alignment = _stated_alignment(fd) or _tried_alignment(fd, medium)
    if alignment is None or medium.end % alignment.offset:  # the end could only be written by growing the file
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
        return None
    return alignment


def switch_to_cached(fd: int) -> None:
    """Make I/O on `fd`, and on every copy of it, go through the page cache. Raises: OSError."""
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_DIRECT)


def _stated_alignment(fd: int) -> Alignment | None:
    """Return the alignment that statx reports (Linux 6.1); None if it reports none, or direct I/O is impossible."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if not hasattr(_libc, "statx") or _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, buffer) != 0:
        return None
    (mask,) = struct.unpack_from("I", buffer)
    memory, offset = struct.unpack_from("II", buffer, _DIO_MEM_ALIGN)
    return Alignment(memory, max(offset, SECTOR)) if mask & _STATX_DIOALIGN and memory and offset else None


def _tried_alignment(fd: int, medium: Medium) -> Alignment | None:
    """Find the alignment by trial reads; None if no direct I/O is possible.

    A file system that also reads a single byte to an odd address, which no disk can, accepts the flag but goes through
    the page cache all the same.
    """
    if _reads(fd, 1, 1):
        return None
    for offset in (max(SECTOR, medium.unit), mmap.PAGESIZE):
        if medium.end >= offset and _reads(fd, 0, offset):
            return Alignment(SECTOR if offset == SECTOR else offset, offset)
    return None


def _reads(fd: int, shift: int, length: int) -> bool:
    view = memoryview(mmap.mmap(-1, mmap.PAGESIZE + 1))[shift : shift + length]
    try:
        return os.preadv(fd, [view], shift) == length
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
