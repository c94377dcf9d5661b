"""The faces of an image, which have the same data, or some of it: files, loop devices over them, disks, partitions.

Must not set up or detach a loop device, nor take a lock or a claim.

Locks belong to one face, and cannot be seen at another one. Claims can be seen at a disk and its partitions, but only
those of writers. So a process that has locked one face has to look at the others. Two partitions of one disk have no
data in common, so neither is a face of the other.

Sources: loop(4), LOOP_GET_STATUS64; linux/loop.h; Linux drivers/block/loop.c for its files in sysfs;
proc_pid_mountinfo(5); proc_pid_fdinfo(5).
"""

from __future__ import annotations

import fcntl
import os
import re
import stat
import struct
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from xenbackend.kernel import partitions

_BLOCK = "/sys/block"
_LOOP_GET_STATUS64 = 0x4C05
_INFO = struct.Struct("=QQQQQ192x")  # lo_device, lo_inode, lo_rdevice, lo_offset, lo_sizelimit; the rest is not used
_LOOP_MAJOR = 7
_LOOK = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
_OCTAL = re.compile(r"\\([0-7]{3})")
_ENDLESS = 1 << 64

_Key = tuple[int, int]  # of a file: device and inode; of a block device: 0 and its number
_Span = tuple[int, int]  # from the first byte to the one behind the last


@dataclass(frozen=True, slots=True)
class Face:
    """Another face, open for reading.

    span          the bytes of it that the image has, too
    shares_claim  it is a partition or the disk of the face by which it was found. The kernel compares claims on both,
                  so a claim on one of them is known by now, and may be the caller's own
    is_whole      it has all data of the image, and no others
    """

    path: str
    fd: int
    is_device: bool
    span: _Span = (0, _ENDLESS)
    shares_claim: bool = False
    is_whole: bool = True


@dataclass(frozen=True, slots=True)
class _Step:
    """The way from a face to one beside it: `own` are its bytes that both have, `shift` is added to get the other's."""

    path: str
    key: _Key
    fd: int
    own: _Span = (0, _ENDLESS)
    shift: int = 0
    shares_claim: bool = False


@contextmanager
def faces(fd: int) -> Iterator[list[Face]]:
    """Yield all other faces of an open image, direct and indirect ones; they are closed afterwards. Raises: OSError.

    The file below a loop device is found by its name, and left out if the name means another file by now.
    """
    found = [Face("", fd, is_device=stat.S_ISBLK(os.fstat(fd).st_mode))]
    try:
        named = dict(_set_up())
        seen = {_key(fd)}
        for face in found:  # the list grows in the loop
            for step in [*_above(face.fd, named), *_below(face, named), *_on_one_disk(face)]:
                start, end = max(face.span[0], step.own[0]), min(face.span[1], step.own[1])
                if step.key in seen or start >= end:
                    os.close(step.fd)
                    continue
                seen.add(step.key)
                found.append(
                    Face(
                        step.path,
                        step.fd,
                        is_device=step.key[0] == 0,
                        span=(start + step.shift, end + step.shift),
                        shares_claim=step.shares_claim,
                        is_whole=face.is_whole and step.own == (0, _ENDLESS),
                    )
                )
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


def _above(fd: int, named: dict[str, str]) -> Iterator[_Step]:
    """Yield the steps to each loop device over a file.

    Only loop devices whose file has the same name are asked, since another one's file may be on a file system that does
    not answer. If the file has several links, all loop devices are asked.
    """
    if not named:
        return
    status = os.fstat(fd)
    has_links = stat.S_ISREG(status.st_mode) and status.st_nlink > 1
    mounted = _mounted_files()
    own = _names(os.readlink(f"/proc/self/fd/{fd}"), mounted)  # noqa: PTH115 - as above
    for name, path in named.items():
        if has_links or own & _names(path, mounted):
            with suppress(OSError):  # it has been detached
                loop = os.open(f"/dev/{name}", _LOOK)
                is_over_it = False
                try:
                    below, start, size = _is_over(loop)
                    is_over_it = below == _key(fd)
                finally:
                    if not is_over_it:
                        os.close(loop)
                if is_over_it:
                    own_span = (start, start + size if size else _ENDLESS)
                    yield _Step(f"/dev/{name}", _key(loop), loop, own_span, -start)


def _below(face: Face, named: dict[str, str]) -> Iterator[_Step]:
    """Yield the step to the file below a loop device; nothing if `face` is no loop device."""
    number = os.fstat(face.fd).st_rdev
    if not face.is_device or os.major(number) != _LOOP_MAJOR:
        return
    with suppress(OSError, KeyError):  # it is not set up, its file has lost its name, or it is a partition
        path = named[_last(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")]
        node = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            below, start, size = _is_over(face.fd)
            if _key(node) == below:
                fd = os.open(f"/proc/self/fd/{node}", _LOOK)
                yield _Step(path, below, fd, (0, size or _ENDLESS), start)
        finally:
            os.close(node)


def _on_one_disk(face: Face) -> Iterator[_Step]:
    """Yield the steps to the partitions of a disk, and to the disk of a partition."""
    if not face.is_device:
        return
    number = os.fstat(face.fd).st_rdev
    found = [(each, (each.start, each.start + each.size), -each.start) for each in partitions.of(number)]
    if disk := partitions.within(number):
        found.append((disk, (0, disk.size), disk.start))
    for other, own, shift in found:
        with suppress(OSError):  # it has no node
            fd = os.open(f"/dev/{other.name}", _LOOK)
            if _key(fd) == (0, other.number):
                yield _Step(f"/dev/{other.name}", (0, other.number), fd, own, shift, shares_claim=True)
            else:
                os.close(fd)


def _mounted_files() -> dict[str, str]:
    """Return what is mounted by place, as the name that it has in its own file system.

    A file can be mounted on another one (``mount --bind``), and has the name of that one then.
    """
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:  # noqa: PTH123 - as above
        rows = [line.split(" ", 5) for line in file]
    return {_plain(row[4]): _plain(row[3]) for row in rows}


def _plain(text: str) -> str:
    return _OCTAL.sub(lambda found: chr(int(found[1], 8)), text)


def _names(path: str, mounted: dict[str, str]) -> set[str]:
    """Return the last parts of a path, and of the path that the file has in its own file system."""
    return {each.rpartition("/")[2] for each in (path, mounted.get(path, path))}


def _is_over(loop: int) -> tuple[_Key, int, int]:
    """Return the key of the file below a loop device, and where in it the device is: its offset and size, or 0 for all.

    Hangs if the file system does not answer. Raises: OSError.
    """
    device, inode, number, start, size = _INFO.unpack(fcntl.ioctl(loop, _LOOP_GET_STATUS64, bytes(_INFO.size)))
    return ((0, number) if number else (device, inode)), start, size


def _last(link: str) -> str:
    """Return the last part of a link's target. Raises: OSError."""
    return os.readlink(link).rpartition("/")[2]  # noqa: PTH115 - as above


def _key(fd: int) -> _Key:
    status = os.fstat(fd)
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
