"""The identity of the file or block device behind a descriptor, independent of names and of what they mean now.

Must not open anything by its name, nor write to the file or device.

Device and inode number alone do not distinguish a file from a later one, since file systems reuse an inode's number for
the next file (ext4 in 5 of 5 tries). The handle contains a generation, which changes when the number is reused. If a
file system has no handles, the time of birth is used instead. The number of a block device is reused as well, and a
device that stays may get another medium; the kernel's disk sequence number changes in both cases. A partition is the
same only if it also begins and ends at the same places.

On NFS and similar file systems, an O_PATH descriptor does not keep a file alive: asking about it may fail with ESTALE.

Sources: name_to_handle_at(2), AT_EMPTY_PATH; statx(2), STATX_BTIME; linux/fs.h, BLKGETDISKSEQ (Linux 5.15);
sysfs-block, partition and start.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass, fields, replace

from xenbackend.errors import KernelError
from xenbackend.units import SECTOR

MAX_TEXT = 512  # characters of an identity as a text
_MAX_HANDLE = 128  # bytes, MAX_HANDLE_SZ of linux/exportfs.h
_AT_EMPTY_PATH = 0x1000  # linux/fcntl.h
_AT_HANDLE_FID = 0x200  # linux/fcntl.h, Linux 6.6: a handle that identifies a file, but cannot be used to open it
_STATX_BTIME = 0x800  # linux/stat.h
_STATX_SIZE = 256  # bytes
_BORN = 80  # offset of stx_btime in struct statx: seconds with 64 bits, nanoseconds with 32
_BLKGETDISKSEQ = 0x80081280  # linux/fs.h
_BLKGETSIZE64 = 0x80081272
_OUR_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK  # O_NONBLOCK: do not wait for a medium
_HAS_NO_HANDLES = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.EOVERFLOW, errno.EPERM)

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """A regular file.

    device  of its file system (st_dev)
    inode   its inode number (st_ino)
    handle  type and bytes of the file system's handle, which contains the inode's generation, as ``1:<hexadecimal>``;
            empty if the file system has no handles
    born    time of birth, in nanoseconds since 1970, if there is no handle; 0: not known, or not needed
    """

    device: int
    inode: int
    handle: str = ""
    born: int = 0


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """A block device.

    number    major and minor (st_rdev)
    sequence  the disk's sequence number, which no other disk or medium has until the host is restarted; 0 if the
              kernel has no such numbers
    start     of a partition, in bytes
    size      of a partition, in bytes; 0 for a whole disk, which may grow
    """

    number: int
    sequence: int = 0
    start: int = 0
    size: int = 0


Identity = FileIdentity | DeviceIdentity
_KINDS = {FileIdentity: "file", DeviceIdentity: "device"}


def identify(fd: int) -> Identity:
    """Return the identity of the regular file or block device behind a descriptor, which may be an O_PATH one.

    A device behind an O_PATH descriptor is opened for reading for a moment. Raises: KernelError; its errno is ESTALE if
    a server no longer knows the file, ENXIO if no device has the node's number, EINVAL for anything that is neither a
    regular file nor a block device.
    """
    try:
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode):
            handle = _handle(fd)
            return FileIdentity(status.st_dev, status.st_ino, handle, 0 if handle else birth_of(fd))
        if stat.S_ISBLK(status.st_mode):
            return _identify_device(fd, status.st_rdev)
    except OSError as error:
        raise KernelError("look which file it is", error.errno or errno.EIO) from None
    raise KernelError("look which file it is: it is neither a regular file nor a block device", errno.EINVAL)


def to_text(identity: Identity) -> str:
    """Return an identity as it is stored and sent: ``file device=2049 inode=12 handle=1:0c000000deadbeef``."""
    values = ((each.name, getattr(identity, each.name)) for each in fields(identity))
    return " ".join([_KINDS[type(identity)], *(f"{name}={value}" for name, value in values if value)])


def from_text(text: str) -> Identity:
    """Return the identity from which `to_text` made `text`. Raises: ValueError for any other text."""
    word, *items = text.split(" ")
    kind = next((each for each, name in _KINDS.items() if name == word), None)
    values = dict(item.split("=", 1) for item in items if "=" in item)
    if kind is None or len(text) > MAX_TEXT or len(values) != len(items):
        raise ValueError(f"not an identity: {text[:80]!r}")
    numbers = {name: int(value) for name, value in values.items() if name != "handle" and value.isdecimal()}
    try:
        found: Identity = kind(**(values | numbers))
    except TypeError:
        raise ValueError(f"not an identity: {text[:80]!r}") from None
    if to_text(found) != text or not all(name in numbers or name == "handle" for name in values):
        raise ValueError(f"not an identity: {text[:80]!r}")
    return found


def difference(noted: Identity, found: Identity) -> str:
    """Return how `found` differs from `noted`, in words for the end of a sentence; empty if they are the same."""
    match noted, found:
        case FileIdentity(), FileIdentity():
            return _file_difference(noted, found)
        case DeviceIdentity(), DeviceIdentity():
            return _device_difference(noted, found)
        case FileIdentity(), _:
            return "it is now a block device, but was a file"
    return "it is now a file, but was a block device"


def has_grown(noted: Identity, found: Identity) -> bool:
    """Return whether `found` is the same partition as `noted`, and larger."""
    if not isinstance(noted, DeviceIdentity) or not isinstance(found, DeviceIdentity) or not noted.size:
        return False
    return found.size > noted.size and replace(found, size=noted.size) == noted


def _file_difference(noted: FileIdentity, found: FileIdentity) -> str:
    if noted.device != found.device:
        return f"it is another file, on device {_numbers(found.device)}, not {_numbers(noted.device)}"
    if noted.inode != found.inode:
        return f"it is another file, inode {found.inode}, not {noted.inode}"
    if noted.handle and found.handle:
        is_same = noted.handle == found.handle
    else:  # a value that only one of them has says nothing
        is_same = not (noted.born and found.born) or noted.born == found.born
    return "" if is_same else f"it is another file, made again with the inode number {found.inode} of the former one"


def _device_difference(noted: DeviceIdentity, found: DeviceIdentity) -> str:
    if noted.number != found.number:
        return f"it is another block device, {_numbers(found.number)}, not {_numbers(noted.number)}"
    if noted.sequence != found.sequence:
        return (
            f"block device {_numbers(found.number)} has another disk or medium, with sequence number "
            f"{found.sequence}, not {noted.sequence}"
        )
    if (noted.start, noted.size) != (found.start, found.size):
        return (
            f"partition {_numbers(found.number)} has {found.size} bytes from byte {found.start}, but had {noted.size} "
            f"from byte {noted.start}"
        )
    return ""


def _numbers(device: int) -> str:
    return f"{os.major(device)}:{os.minor(device)}"


def _handle(fd: int) -> str:
    """Return the file system's handle of a file, empty if the file system has none. Raises: OSError."""
    for flags in (0, _AT_HANDLE_FID):
        buffer = ctypes.create_string_buffer(8 + _MAX_HANDLE)
        struct.pack_into("I", buffer, 0, _MAX_HANDLE)
        mount = ctypes.c_int()
        if not hasattr(_libc, "name_to_handle_at"):
            return ""
        if _libc.name_to_handle_at(fd, b"", buffer, ctypes.byref(mount), _AT_EMPTY_PATH | flags) == 0:
            length, kind = struct.unpack_from("Ii", buffer)
            return f"{kind}:{buffer.raw[8 : 8 + length].hex()}"
        code = ctypes.get_errno()
        if code not in _HAS_NO_HANDLES:
            raise OSError(code, os.strerror(code))
    return ""


def birth_of(fd: int) -> int:
    """Return a file's time of birth in nanoseconds since 1970, 0 if its file system does not know. Raises: OSError."""
    buffer = ctypes.create_string_buffer(_STATX_SIZE)
    if not hasattr(_libc, "statx"):
        return 0
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_BTIME, buffer) != 0:
        code = ctypes.get_errno()
        if code == errno.ENOSYS:
            return 0
        raise OSError(code, os.strerror(code))
    (mask,) = struct.unpack_from("I", buffer)
    seconds, nanoseconds = struct.unpack_from("qI", buffer, _BORN)
    return int(seconds * 10**9 + nanoseconds) if mask & _STATX_BTIME else 0


def _identify_device(fd: int, number: int) -> DeviceIdentity:
    """Return the identity of a block device, which is opened for a moment if `fd` is an O_PATH one. Raises: OSError."""
    try:
        sequence = _ask(fd, _BLKGETDISKSEQ)
    except OSError as error:
        if error.errno == errno.ENOTTY:  # Linux before 5.15
            sequence = 0
        elif error.errno == errno.EBADF:  # opened by O_PATH
            opened = os.open(f"/proc/self/fd/{fd}", _OUR_FLAGS)
            try:
                return _identify_device(opened, number)
            finally:
                os.close(opened)
        else:
            raise
    start = _start_of_partition(number)
    return DeviceIdentity(number, sequence, start or 0, 0 if start is None else _ask(fd, _BLKGETSIZE64))


def _start_of_partition(number: int) -> int | None:
    """Return the offset of a partition on its disk, in bytes; None for a whole disk."""
    from pathlib import Path  # late: most images are files

    directory = Path(f"/sys/dev/block/{_numbers(number)}")
    if not (directory / "partition").exists():
        return None
    return int((directory / "start").read_text(encoding="ascii")) * SECTOR


def _ask(fd: int, request: int) -> int:
    value: int = struct.unpack("Q", fcntl.ioctl(fd, request, bytes(8)))[0]
    return value
