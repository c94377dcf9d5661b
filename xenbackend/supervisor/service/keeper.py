"""Descriptors that outlive the service: what started the service keeps them, and hands them to the next one.

Must not know what a descriptor is. systemd is such a keeper (`FileDescriptorStoreMax=` in the unit); without systemd
it is `service.parent`.

Source: sd_notify(3), FDSTORE, FDSTOREREMOVE, FDNAME and FDPOLL; sd_listen_fds(3).
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Mapping, MutableMapping

from xenbackend.errors import KernelError
from xenbackend.supervisor.service.notify import address_of

FIRST = 3  # descriptor that a service inherits, SD_LISTEN_FDS_START
MAX_NAME = 255  # characters
_TIMEOUT_S = 1.0  # for a keeper to take a message


class Keeper:
    """The keeper's address, and what it had kept.

    is_there    whether there is a keeper
    inherited   the kept descriptors by name, ours from now on
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        """Read ``NOTIFY_SOCKET``, ``FDSTORE``, ``LISTEN_FDS``, ``LISTEN_FDNAMES`` and ``LISTEN_PID``."""
        self._address = address_of(environment)
        store = environment.get("FDSTORE", "")
        self._room = int(store) if store.isdigit() else 0  # descriptors
        self.is_there = bool(self._address) and self._room > 0
        self.inherited = _inherited(environment) if self.is_there else {}
        self._names = set(self.inherited)  # of what is kept now
        self._has_patience = True  # not after it took no message: then none is waited for until it takes one again

    def keep(self, name: str, fd: int) -> None:
        """Have a descriptor kept under a name that nothing else has. If the keeper is busy, this waits a second, once.

        Raises: KernelError, also if there is no room, which the keeper would not report.
        """
        if self.is_there and name not in self._names and len(self._names) >= self._room:
            operation = f"keep more than {self._room} descriptors in the process that started the service (FDSTORE)"
            raise KernelError(operation, errno.ENOSPC)
        self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", fd)
        self._names.add(name)

    def replace(self, name: str, fd: int) -> None:
        """Have a descriptor kept in place of a former one of that name. Raises: KernelError.

        Otherwise systemd would keep both under that name.
        """
        self.forget(name)
        self.keep(name, fd)

    def forget(self, name: str) -> None:
        """Have the keeper close a descriptor. Raises: KernelError."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={name}")
        self._names.discard(name)

    def _send(self, state: str, *fds: int) -> None:
        if not self.is_there:
            return
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as near:
                near.settimeout(_TIMEOUT_S if self._has_patience else 0)
                near.connect(self._address)
                socket.send_fds(near, [state.encode()], list(fds))
            self._has_patience = True
        except OSError as error:
            if isinstance(error, TimeoutError | BlockingIOError):
                self._has_patience = False
            code = error.errno or errno.ETIMEDOUT
            raise KernelError("keep a descriptor in the process that started the service", code) from None


def forget_inheritance(environment: MutableMapping[str, str]) -> None:
    """Remove the variables, so that no process of ours takes its own descriptors for kept ones."""
    for name in ("LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"):
        environment.pop(name, None)


def _inherited(environment: Mapping[str, str]) -> dict[str, int]:
    if environment.get("LISTEN_PID", str(os.getpid())) != str(os.getpid()):
        return {}
    count = environment.get("LISTEN_FDS", "0")
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    found: dict[str, int] = {}
    for place in range(int(count) if count.isdigit() else 0):
        os.set_inheritable(FIRST + place, False)
        name = names[place] if place < len(names) else str(place)
        if name in found:  # systemd keeps both if a name is given twice, and hands over the newest first
            os.close(FIRST + place)
        else:
            found[name] = FIRST + place
    return found
