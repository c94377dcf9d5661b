"""Where a server is that a layer's disk comes from: what its text names, before anybody looks a name up.

Must not resolve a name, nor make a socket: an opener does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A stream socket's other end: a path in the file system, or else a host and a port."""

    path: str = ""
    host: str = ""  # a name or an address; one of IPv6 without brackets
    port: int = 0

    def __str__(self) -> str:
        """Return ``unix:/path``, ``host:port`` or ``[address]:port``."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class After(StrEnum):
    """What a connection takes the place of: what must have ended at its server before."""

    NOTHING = "nothing"
    DEATH = "death"  # all connections that a worker of this disk has left
    LOSS = "loss"  # that of the same server and place, which is of no use any more
    BREACH = "breach"  # the same, and the network has given it up: no end of it will ever be seen


def servers_of(options: Any) -> dict[str, Endpoint]:
    """Return the servers that a layer's options name, by their text: options whose value has an `endpoint`."""
    values = [getattr(options, each.name) for each in fields(options)]
    found = [each.endpoint for each in values if isinstance(getattr(each, "endpoint", None), Endpoint)]
    return {str(endpoint): endpoint for endpoint in found}


DISK = "disk"  # beside the settings of a cluster's client: a text that no other disk has, of this host or another one


@dataclass(frozen=True, slots=True)
class Account:
    """As whom a cluster is asked, and the file on this host that says where it is and by which key."""

    conf: str  # a whole path
    user: str  # of Ceph, without ``client.``


AUTHORITIES, CERTIFICATE, KEY = "ca-cert.pem", "client-cert.pem", "client-key.pem"  # as QEMU and libnbd call the files


def certificates_of(options: Any) -> str:
    """Return the directory with the certificates that a layer's options name; empty: they name none."""
    found = getattr(options, "credentials", "")
    return found if isinstance(found, str) else ""


def account_of(options: Any) -> Account | None:
    """Return the account that a layer's options name by their `account`, None where they name none."""
    found = getattr(options, "account", None)
    return found if isinstance(found, Account) else None
