"""The faces of an image, which all have the same data: a file and the loop devices over it, a loop device and its file.

Must not set up or detach a loop device, nor take a lock or a claim.

Locks and claims belong to one face, and cannot be seen at another one. So a process that has locked one face has to
look at the others.

Sources: loop(4), LOOP_GET_STATUS64; linux/loop.h; Linux drivers/block/loop.c for its files in sysfs.
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
_INFO = struct.Struct("=QQQ208x")  # lo_device, lo_inode, lo_rdevice; the rest is not used
_LOOP_MAJOR = 7
_LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK

_Key = tuple[int, int]  # of a file: device and inode; of a block device: 0 and its number


@dataclass(frozen=True, slots=True)
class Face:
    """Another face, open for reading."""

    path: str
    fd: int
    is_device: bool


@contextmanager
def faces(fd: int) -> Iterator[list[Face]]:
    """Yield all other faces of an open image, direct and indirect ones; they are closed afterwards. Raises: OSError.

    The file below a loop device is found by its name, and left out if the name means another file by now.
    """
    found = [Face("", fd, is_device=stat.S_ISBLK(os.fstat(fd).st_mode))]
    try:
        named = dict(_set_up())
        seen = {_key(fd)} if named else set()
        for face in found if named else ():  # the list grows in the loop
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
    """Yield the name of each loop device that is set up, and the present path of the file below it."""
    with suppress(FileNotFoundError):
        for name in sorted(os.listdir(_BLOCK)):  # noqa: PTH208 - importing pathlib would slow `image info` down
            if name.startswith("loop"):
                with (
                    suppress(OSError),  # it is not set up
                    open(f"{_BLOCK}/{name}/loop/backing_file", "rb") as file,  # noqa: PTH123 - the same
                ):
                    yield name, os.fsdecode(file.read().rstrip(b"\n"))


def _above(fd: int, named: dict[str, str]) -> Iterator[tuple[str, _Key, int]]:
    """Yield path, key and a descriptor of each loop device over a file.

    Only loop devices whose file has the same name are asked, since another one's file may be on a file system that does
    not answer. If the file has several links, all loop devices are asked.
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
    """Yield path, key and a descriptor of the file below a loop device; nothing if `face` is no loop device."""
    number = os.fstat(face.fd).st_rdev
    if not face.is_device or os.major(number) != _LOOP_MAJOR:
        return
    with suppress(OSError, KeyError):  # it is not set up, or its file has lost its name
        path = named[_last(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")]
        node = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if _key(node) == _is_over(face.fd):
                yield path, _key(node), os.open(f"/proc/self/fd/{node}", _LOOK)
        finally:
            os.close(node)


def _is_over(loop: int) -> _Key:
    """Return the key of the file below a loop device; hangs if its file system does not answer. Raises: OSError."""
    device, inode, number = _INFO.unpack(fcntl.ioctl(loop, _LOOP_GET_STATUS64, bytes(_INFO.size)))
    return (0, number) if number else (device, inode)


def _last(link: str) -> str:
    """Return the last part of a link's target. Raises: OSError."""
    return os.readlink(link).rpartition("/")[2]  # noqa: PTH115 - as above


def _key(fd: int) -> _Key:
    status = os.fstat(fd)
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
