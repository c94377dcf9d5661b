"""Which block devices the kernel's own block backend serves to guests: it claims none, and says so in sysfs.

Must not change anything on the bus: taking a vbd away from it is `supervisor.vbd.claim`'s.

Source: Linux drivers/block/xen-blkback/xenbus.c, `xen_vbd_create`, `VBD_SHOW(physical_device)`, `VBD_SHOW(mode)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress

from xenbackend.disks import disk_of
from xenbackend.errors import ConfigError

BUS = "/sys/bus/xen-backend/devices"
_VBD = re.compile(r"vbd-([0-9]{1,5})-([0-9]{1,10})")


def disks_on(number: int, *, by_writers: bool = False) -> Iterator[str]:
    """Yield the disks that are served from a device, from its disk or a partition of it, such as ``5/xvda``.

    `by_writers`: only those to which their guest may write. `number` is the device's (st_rdev).
    """
    with suppress(FileNotFoundError, NotADirectoryError):  # there is no Xen
        names = os.listdir(BUS)  # noqa: PTH208 - `image info` has no time for pathlib
        family = _family(number) if names else set()
        for name in sorted(names):
            if match := _VBD.fullmatch(name):
                with suppress(OSError, ValueError, ConfigError):  # it has no device, or goes away
                    major, minor = (int(part, 16) for part in _read(f"{BUS}/{name}/physical_device").split(":"))
                    mode = _read(f"{BUS}/{name}/mode")
                    if os.makedev(major, minor) in family and not (by_writers and "w" not in mode):
                        yield disk_of(int(match[1]), int(match[2]))


def _family(number: int) -> set[int]:
    """Return the numbers of a device, of its partitions, and of the disk that it is a partition of."""
    found = {number}
    own = f"/sys/dev/block/{os.major(number)}:{os.minor(number)}"
    with suppress(OSError):
        own = os.path.realpath(own)
        if os.path.exists(f"{own}/partition"):  # noqa: PTH110 - as above
            found.add(_number(os.path.dirname(own)))  # noqa: PTH120 - as above
        for name in os.listdir(own):  # noqa: PTH208 - as above
            if os.path.exists(f"{own}/{name}/partition"):  # noqa: PTH110 - as above
                found.add(_number(f"{own}/{name}"))
    return found


def _number(device: str) -> int:
    major, minor = _read(f"{device}/dev").split(":")
    return os.makedev(int(major), int(minor))


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:  # noqa: PTH123 - as above
        return file.read().strip()
