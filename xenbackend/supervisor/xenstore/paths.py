"""Xenstore's paths of a vbd.

Must not read a value.

    backend    /local/domain/<backend_domid>/backend/<kind>/<frontend_domid>/<devid>
    frontend   /local/domain/<frontend_domid>/device/vbd/<devid>
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from xenbackend.disks import DEVID_END, disk_of

DOMID_FIRST_RESERVED = 0x7FF0  # xen.h

_NUMBER = "(0|[1-9][0-9]{0,9})"
_BACKEND = re.compile(rf"(?:/local/domain/{_NUMBER}/)?backend/([a-z0-9_]{{1,32}})/{_NUMBER}/{_NUMBER}(?:/(.*))?")
_OF_DOMAIN = re.compile(rf"(?:/local/domain/{_NUMBER}/)?backend/([a-z0-9_]{{1,32}})/{_NUMBER}")


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
    def disk(self) -> str:
        """The disk's name for people, such as ``5/xvda``."""
        return disk_of(self.frontend_domid, self.devid)

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


def own_root(domid: int) -> str:
    """Return the directory in which a service makes nodes of its own.

    A domain other than dom0 may write to few places of its directory; ``data`` is the one for general use.
    Source: libxl `libxl__domain_make`; docs/misc/xenstore-paths.pandoc.
    """
    return f"{domain_path(domid)}/data" if domid else domain_path(domid)


def status_root(domid: int) -> str:
    """Return the directory below which a service shows the status of its vbds."""
    return f"{own_root(domid)}/xenbackend"


def libxl_path(path: VbdPath) -> str:
    """Return the directory by which libxl knows a vbd: its own copy of the backend's keys."""
    return f"/libxl/{path.frontend_domid}/device/vbd/{path.devid}"


def parse_backend_path(path: str, own_domid: int) -> tuple[VbdPath, str] | None:
    """Return the vbd that a path belongs to, with the rest of the path; None if it is not in a vbd's directory.

    A path that begins with ``backend/`` is relative to our own domain, `own_domid`, as in an event of a relative watch.
    Numbers must be plain decimals in range: a node that no toolstack would make is not a vbd.
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
    """Return kind and frontend's domain of a directory with the vbds of one domain; None if it is another path.

    A toolstack removes that directory with the last vbd of the domain.
    """
    match = _OF_DOMAIN.fullmatch(path)
    return (match[2], int(match[3])) if match else None
