"""Servers and clusters that a layer's disk comes from, as its options name them, before any name is resolved.

Must not resolve a name, nor make a socket: the opener does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a server: the path of a unix socket, or else a host and a port."""

    path: str = ""
    host: str = ""  # a name or an address; an IPv6 address is without brackets
    port: int = 0

    def __str__(self) -> str:
        """Return ``unix:/path``, ``host:port`` or ``[address]:port``."""
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class After(StrEnum):
    """What a new connection replaces: the connections that have to be drained before."""

    NOTHING = "nothing"
    DEATH = "death"  # all connections that a former worker of this disk has left
    LOSS = "loss"  # that to the same server in the same place, which is unusable
    BREACH = "breach"  # the same, but the network broke it, so that it can never be drained


def servers_of(options: Any) -> dict[str, Endpoint]:
    """Return the servers that a layer's options name, by their texts: those of values with an `endpoint`."""
    values = [getattr(options, each.name) for each in fields(options)]
    found = [each.endpoint for each in values if isinstance(getattr(each, "endpoint", None), Endpoint)]
    return {str(endpoint): endpoint for endpoint in found}


DISK = "disk"  # key beside a cluster client's settings: a text that is unique among the disks of all hosts


@dataclass(frozen=True, slots=True)
class Account:
    """The user of a cluster, and the file on this host that says where the cluster and the user's key are."""

    conf: str  # a whole path
    user: str  # of Ceph, without ``client.``


AUTHORITIES, CERTIFICATE, KEY = "ca-cert.pem", "client-cert.pem", "client-key.pem"  # the file names of QEMU and libnbd


def certificates_of(options: Any) -> str:
    """Return the directory with certificates that a layer's options name, or an empty text."""
    found = getattr(options, "credentials", "")
    return found if isinstance(found, str) else ""


def account_of(options: Any) -> Account | None:
    """Return the `account` of a layer's options, or None if they have none."""
    found = getattr(options, "account", None)
    return found if isinstance(found, Account) else None
