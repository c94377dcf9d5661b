"""Xenstore's names for a vbd: its paths, and the numbers and names of virtual devices. Pure.

Must not read a value.

    backend    /local/domain/<backend_domid>/backend/<kind>/<frontend_domid>/<devid>
    frontend   /local/domain/<frontend_domid>/device/vbd/<devid>

Numbers of devices, from xen-vbd-interface(7):

    1 << 28 | disk << 8 | partition        xvd, where the next line has not enough bits
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

DOMID_FIRST_RESERVED = 0x7FF0  # xen.h
EXTENDED = 1 << 28
DEVID_END = 2 << 28  # reserved from here on

_NUMBER = "(0|[1-9][0-9]{0,9})"
_BACKEND = re.compile(rf"(?:/local/domain/{_NUMBER}/)?backend/([a-z0-9_]{{1,32}})/{_NUMBER}/{_NUMBER}(?:/(.*))?")
_OF_DOMAIN = re.compile(rf"(?:/local/domain/{_NUMBER}/)?backend/([a-z0-9_]{{1,32}})/{_NUMBER}")
_LETTERS = re.compile(r"(xvd|sd|hd)([a-z]{1,5})([1-9][0-9]{0,2})?")
_DIGITS = re.compile(rf"d{_NUMBER}(?:p{_NUMBER})?")


@dataclass(frozen=True, slots=True, order=True)
class VbdPath:
    """One vbd as xenstore names it: `kind` is ``vbd``, ``vbd3`` …; domain numbers; the decimal device number."""

    kind: str
    backend_domid: int
    frontend_domid: int
    devid: int

    def __str__(self) -> str:
        return f"{self.kind}/{self.frontend_domid}/{self.devid}"

    @property
    def backend(self) -> str:
        """The backend's directory."""
        return f"{domain_path(self.backend_domid)}/backend/{self}"

    @property
    def frontend(self) -> str:
        """The frontend's directory: ``device/vbd`` whatever the backend's kind."""
        return f"{domain_path(self.frontend_domid)}/device/vbd/{self.devid}"


def domain_path(domid: int) -> str:
    """Return the directory of a domain."""
    return f"/local/domain/{domid}"


def libxl_path(path: VbdPath) -> str:
    """Return the directory by which libxl knows a vbd: its own copy of the backend's keys."""
    return f"/libxl/{path.frontend_domid}/device/vbd/{path.devid}"


def parse_backend_path(path: str, own_domid: int) -> tuple[VbdPath, str] | None:
    """Return the vbd that a path lies in and the rest below it, or None when it is not in the directory of one vbd.

    A path that begins with ``backend/`` is relative to our own domain, `own_domid`, as in an event of a relative watch.
    Numbers are plain decimals in range: a node that a toolstack would not make is nobody's vbd.
    """
    match = _BACKEND.fullmatch(path)
    if match is None:
        return None
    backend_domid = own_domid if match[1] is None else int(match[1])
    frontend_domid, devid = int(match[3]), int(match[4])
    if max(backend_domid, frontend_domid) >= DOMID_FIRST_RESERVED or devid >= DEVID_END:
        return None
    return VbdPath(match[2], backend_domid, frontend_domid, devid), match[5] or ""


def parse_domain_directory(path: str) -> tuple[str, int] | None:
    """Return kind and frontend's domain of a directory that has the vbds of one domain, or None when it is none.

    That is what a toolstack removes with the last vbd of a domain.
    """
    match = _OF_DOMAIN.fullmatch(path)
    return (match[2], int(match[3])) if match else None


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
    """Return the name of a virtual device; a number that no name stands for is its own. Reverses `vdev_to_devid`."""
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
    """Return 0 for a, 25 for z, 26 for aa: numbers in base 26 without a zero."""
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
