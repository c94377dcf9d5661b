"""The names that people give to disks, and the names and numbers of virtual devices. Pure functions.

Must not know a process or xenstore: the command line parses a disk's name before it asks any process.

A disk is named by its domain and the device in that domain: `5/xvda` or `guest/xvda`. Every message and every output
uses the first form. Also accepted are the forms of xenstore: ``5/51712``, ``vbd/5/51712``, and the latter with the
whole path before it.

Numbers of devices, from xen-vbd-interface(7):

    1 << 28 | disk << 8 | partition        xvd, if the fields of the next line are too small
    202 << 8 | disk << 4 | partition       xvd, disks and partitions up to 15
      8 << 8 | disk << 4 | partition       sd, disks and partitions up to 15
      3 << 8 | disk << 6 | partition       hd, disks 0 and 1, partitions up to 63
     22 << 8 | (disk - 2) << 6 | partition hd, disks 2 and 3, partitions up to 63
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass

from xenbackend.errors import ConfigError

EXTENDED = 1 << 28
DEVID_END = 2 << 28  # reserved from here on

_NUMBER = "(0|[1-9][0-9]{0,9})"
_LETTERS = re.compile(r"(xvd|sd|hd)([a-z]{1,5})([1-9][0-9]{0,2})?")
_DIGITS = re.compile(rf"d{_NUMBER}(?:p{_NUMBER})?")
_DISK = re.compile(r"(?:(?:/local/domain/[0-9]+/)?(?:backend/)?([a-z0-9_]{1,32})/)?([^/]+)/((?:/dev/)?[^/]+)")


@dataclass(frozen=True, slots=True)
class DiskName:
    """A disk as a person named it: `domain` is a number or a guest's name; `kind` is empty if any kind matches."""

    kind: str
    domain: str
    devid: int

    def __str__(self) -> str:
        return f"{self.domain}/{devid_to_vdev(self.devid)}"

    @property
    def domid(self) -> int | None:
        """The domain's number, None if the guest's name was given instead."""
        return int(self.domain) if self.domain.isascii() and self.domain.isdigit() else None

    def means(self, kind: str, domid: int, devid: int, guest: str = "") -> bool:
        """Return whether this names the disk of that kind, domain and device; `guest` is the name of the domain."""
        is_domain = self.domid == domid or (self.domid is None and self.domain == guest)
        return is_domain and self.devid == devid and self.kind in ("", kind)


def parse_disk(text: str) -> DiskName:
    """Return the disk that a text such as ``5/xvda`` or ``guest/xvda`` names. Raises: ConfigError."""
    match = _DISK.fullmatch(text)
    if match is None or (match[2].isdigit() and len(match[2]) > 5):
        raise ConfigError(f"{text[:80]!r} is not a disk; write it as 5/xvda or guest/xvda")
    return DiskName(match[1] or "", match[2], vdev_to_devid(match[3]))


def disk_of(domid: int, devid: int) -> str:
    """Return the name of a disk as every message has it: ``5/xvda``."""
    return f"{domid}/{devid_to_vdev(devid)}"


def vdev_to_devid(vdev: str) -> int:
    """Return the number of a virtual device: ``xvda`` is 51712, and so are ``d0``, ``d0p0`` and ``51712`` itself.

    Source: xen-vbd-interface(7). Raises: ConfigError.
    """
    text = vdev.removeprefix("/dev/")
    if text.isascii() and text.isdigit():
        if len(text) <= len(str(DEVID_END)) and int(text) < DEVID_END:  # Python refuses to read very long numbers
            return int(text)
        raise ConfigError(f"{vdev[:40]!r}: device numbers end before {DEVID_END}")
    if match := _DIGITS.fullmatch(text):
        return _number(vdev, "xvd", int(match[1]), int(match[2] or 0))
    if match := _LETTERS.fullmatch(text):
        return _number(vdev, match[1], _disk_of_letters(match[2]), int(match[3] or 0))
    raise ConfigError(
        f"{vdev!r} is not a virtual device; write a name such as xvda, xvdb1, sda, hdc or d0p1, or a number"
    )


def devid_to_vdev(devid: int) -> str:
    """Return the name of a virtual device, or the number in decimal if it has none. Reverses `vdev_to_devid`."""
    kind, disk, partition = _split(devid)
    name = f"{kind}{_letters_of_disk(disk)}{partition or ''}"
    return name if kind and vdev_to_devid(name) == devid else str(devid)


def _split(devid: int) -> tuple[str, int, int]:
    major, minor = devid >> 8, devid & 0xFF
    if EXTENDED <= devid < DEVID_END:
        return "xvd", major - (EXTENDED >> 8), minor
    if major in (202, 8):
        return "xvd" if major == 202 else "sd", minor >> 4, minor & 15
    if major in (3, 22) and minor < 128:
        return "hd", (minor >> 6) + (2 if major == 22 else 0), minor & 63
    return "", 0, 0


def _number(vdev: str, kind: str, disk: int, partition: int) -> int:
    if kind == "xvd" and disk < 16 and partition < 16:
        return 202 << 8 | disk << 4 | partition
    if kind == "xvd" and disk < 1 << 20 and partition < 256:
        return EXTENDED | disk << 8 | partition
    if kind == "sd" and disk < 16 and partition < 16:
        return 8 << 8 | disk << 4 | partition
    if kind == "hd" and disk < 4 and partition < 64:
        return (3 if disk < 2 else 22) << 8 | (disk & 1) << 6 | partition
    limits = {"xvd": "1048576 disks of 255", "sd": "16 disks of 15", "hd": "4 disks of 63"}
    raise ConfigError(f"{vdev!r}: there are only {limits[kind]} partitions; xvd has the most")


def _disk_of_letters(letters: str) -> int:
    """Return 0 for a, 25 for z, 26 for aa: base 26 without a digit for zero."""
    disk = 0
    for letter in letters:
        disk = disk * 26 + string.ascii_lowercase.index(letter) + 1
    return disk - 1


def _letters_of_disk(disk: int) -> str:
    letters = ""
    while disk >= 0:
        letters = string.ascii_lowercase[disk % 26] + letters
        disk = disk // 26 - 1
    return letters
