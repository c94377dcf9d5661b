"""The faces of an image: a file and the loop devices over it, a loop device and what it is over. One has the same data.

Must not set up or detach a loop device, nor take a lock or a claim.

Locks and claims hang on one face, and are not seen at another one. So whoever has locked one looks at the others.

Sources: loop(4), LOOP_GET_STATUS64; linux/loop.h; Linux drivers/block/loop.c for what stands in sysfs.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

_BLOCK = "/sys/block"
_LOOP_GET_STATUS64 = 0x4C05
_INFO = struct.Struct("=QQQ208x")  # lo_device, lo_inode, lo_rdevice; and what is not looked at
_LOOP_MAJOR = 7
_LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK

_Key = tuple[int, int]  # device and inode of a file; 0 and the device's number of a block device


@dataclass(frozen=True, slots=True)
class Face:
    """Another face, open for reading."""

    path: str
    fd: int
    is_device: bool


@contextmanager
def faces(fd: int) -> Iterator[list[Face]]:
    """Have all other faces of an open image, near and far, to look at. Raises: OSError.

    What a loop device is over is found by its name, and left out where that means another file by now.
    """
    found = [Face("", fd, is_device=stat.S_ISBLK(os.fstat(fd).st_mode))]
    try:
        named = dict(_set_up())
        seen = {_key(fd)} if named else set()
        for face in found if named else ():  # it grows meanwhile
            for path, key, each in [*_above(face.fd, named), *_below(face, named)]:
                if key in seen:
                    os.close(each)
                    continue
                seen.add(key)
                found.append(Face(path, each, is_device=key[0] == 0))
        yield found[1:]
    finally:
        for face in found[1:]:
            os.close(face.fd)


def _set_up() -> Iterator[tuple[str, str]]:
    """Yield the name of each loop device that is set up, and that of what it is over, as it is at the moment."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(_BLOCK)):  # noqa: PTH208 - `image info` has no time for pathlib
            if name.startswith("loop"):
                with (
                    suppress(OSError),  # it is not set up
                    open(f"{_BLOCK}/{name}/loop/backing_file", "rb") as file,  # noqa: PTH123 - the same
                ):
                    yield name, os.fsdecode(file.read().rstrip(b"\n"))


def _above(fd: int, named: dict[str, str]) -> Iterator[tuple[str, _Key, int]]:
    """Yield the loop devices over a file: path, key and a descriptor.

    Only what has its name is asked, as the file of another one may be on a file system that does not answer; but a
    file with several names may be below any of them.
    """
    status = os.fstat(fd)
    own = _last(f"/proc/self/fd/{fd}")
    for name, path in named.items():
        if path.rpartition("/")[2] == own or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1):
            with suppress(OSError):  # it has been detached
                loop = os.open(f"/dev/{name}", _LOOK)
                is_over_it = False
                try:
                    is_over_it = _is_over(loop) == _key(fd)
                finally:
                    if not is_over_it:
                        os.close(loop)
                if is_over_it:
                    yield f"/dev/{name}", _key(loop), loop


def _below(face: Face, named: dict[str, str]) -> Iterator[tuple[str, _Key, int]]:
    """Yield what a loop device is over, if this is one, likewise."""
    number = os.fstat(face.fd).st_rdev
    if not face.is_device or os.major(number) != _LOOP_MAJOR:
        return
    with suppress(OSError, KeyError):  # it is not set up, or what is below has lost its name
        path = named[_last(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")]
        node = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if _key(node) == _is_over(face.fd):
                yield path, _key(node), os.open(f"/proc/self/fd/{node}", _LOOK)
        finally:
            os.close(node)


def _is_over(loop: int) -> _Key:
    """Return what a loop device is over; it may be on a file system that does not answer. Raises: OSError."""
    device, inode, number = _INFO.unpack(fcntl.ioctl(loop, _LOOP_GET_STATUS64, bytes(_INFO.size)))
    return (0, number) if number else (device, inode)


def _last(link: str) -> str:
    """Return the last part of the path to which a link leads. Raises: OSError."""
    return os.readlink(link).rpartition("/")[2]  # noqa: PTH115 - as above


def _key(fd: int) -> _Key:
    status = os.fstat(fd)
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
