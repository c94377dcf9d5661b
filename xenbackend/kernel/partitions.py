"""Which block devices are partitions of one another, and where in one another they are.

Must not open a device.

Sources: Linux Documentation/ABI/stable/sysfs-block (dev, partition, start, size; the last two count sectors of 512
bytes, whatever those of the device are).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

_SECTOR = 512


@dataclass(frozen=True, slots=True)
class Partition:
    """A partition that is a device, or that a device has.

    name     of the other device of the two, as its node in /dev is called
    number   of the other device (st_rdev)
    start    where it is in its disk, in bytes
    size     in bytes
    """

    name: str
    number: int
    start: int
    size: int


def within(number: int) -> Partition | None:
    """Return which partition of which disk a device is, the disk being the other device; None if it is not one."""
    own = _place(number)
    if not os.path.exists(f"{own}/partition"):  # noqa: PTH110 - importing pathlib would slow `image info` down
        return None
    disk = os.path.dirname(own)  # noqa: PTH120 - as above
    with suppress(OSError):  # it is being removed
        return Partition(_name(disk), _number(disk), *_extent(own))
    return None


def of(number: int) -> Iterator[Partition]:
    """Yield the partitions of a device; nothing if it has none."""
    own = _place(number)
    with suppress(OSError):
        for name in sorted(os.listdir(own)):  # noqa: PTH208 - as above
            place = f"{own}/{name}"
            if os.path.exists(f"{place}/partition"):  # noqa: PTH110 - as above
                with suppress(OSError):  # as above
                    yield Partition(_name(place), _number(place), *_extent(place))


def _place(number: int) -> str:
    return os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")


def _name(place: str) -> str:
    return place.rpartition("/")[2].replace("!", "/")  # which sysfs has instead, since it could not be in a name


def _number(place: str) -> int:
    major, minor = _read(f"{place}/dev").split(":")
    return os.makedev(int(major), int(minor))


def _extent(place: str) -> tuple[int, int]:
    return int(_read(f"{place}/start")) * _SECTOR, int(_read(f"{place}/size")) * _SECTOR


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:  # noqa: PTH123 - as above
        return file.read().strip()
