"""Finds the block devices that blkback serves to guests. blkback does not claim them, but lists them in sysfs.

Must not change anything on the bus: `supervisor.vbd.claim` takes vbds away from blkback.

Source: Linux drivers/block/xen-blkback/xenbus.c, `xen_vbd_create`, `VBD_SHOW(physical_device)`, `VBD_SHOW(mode)`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress

from xenbackend.disks import disk_of
from xenbackend.errors import ConfigError
from xenbackend.kernel import partitions

BUS = "/sys/bus/xen-backend/devices"
_VBD = re.compile(r"vbd-([0-9]{1,5})-([0-9]{1,10})")


def disks_on(number: int, *, by_writers: bool = False) -> Iterator[str]:
    """Yield the disks, such as ``5/xvda``, that blkback serves from a device, its partitions or the disk it is part of.

    Args:
        number: the device's number (st_rdev).
        by_writers: yield only the disks that their guests may write to.
    """
    with suppress(FileNotFoundError, NotADirectoryError):  # not a Xen host
        names = os.listdir(BUS)  # noqa: PTH208 - importing pathlib would slow `image info` down
        family = _family(number) if names else set()
        for name in sorted(names):
            if match := _VBD.fullmatch(name):
                with suppress(OSError, ValueError, ConfigError):  # it has no device, or is being removed
                    major, minor = (int(part, 16) for part in _read(f"{BUS}/{name}/physical_device").split(":"))
                    mode = _read(f"{BUS}/{name}/mode")
                    if os.makedev(major, minor) in family and not (by_writers and "w" not in mode):
                        yield disk_of(int(match[1]), int(match[2]))


def _family(number: int) -> set[int]:
    """Return the numbers of a device, of its partitions, and of the disk of which it is a partition."""
    disk = partitions.within(number)
    return {number, *(each.number for each in partitions.of(number)), *((disk.number,) if disk else ())}


def _read(path: str) -> str:
    with open(path, encoding="ascii", errors="replace") as file:  # noqa: PTH123 - as above
        return file.read().strip()
