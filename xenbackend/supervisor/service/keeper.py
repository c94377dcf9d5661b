"""Descriptors that outlive the service: what started the service keeps them, and hands them to the next one.

Must not know what a descriptor is. systemd is such a keeper (`FileDescriptorStoreMax=` in the unit); without systemd
it is `service.parent`.

Source: sd_notify(3), FDSTORE, FDSTOREREMOVE, FDNAME and FDPOLL; sd_listen_fds(3).
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterable, Mapping, MutableMapping
from contextlib import suppress

from xenbackend.errors import KernelError
from xenbackend.log import get_logger
from xenbackend.loop.reactor import Reactor, Timer
from xenbackend.supervisor.service.notify import address_of

FIRST = 3  # descriptor that a service inherits, SD_LISTEN_FDS_START
MAX_NAME = 255  # characters
MAX_NAMES = (128 << 10) - len("LISTEN_FDNAMES=")  # bytes: Linux starts no program with a longer variable
_TIMEOUT_S = 1.0  # for a keeper to take a message
_AGAIN_S = 1.0  # between two tries to send what was not taken
_LAST_S = 5.0  # for a keeper to take all of it when the service ends


class Keeper:
    """The keeper's address, and what it had kept.

    A keeper that is busy takes no messages: systemd does not while it reloads its units. It is waited for once. What it
    has not taken by then is sent again until it is taken, of each name the newest state, in the order of the changes.

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
        self._names = set(self.inherited)  # of what is kept now, or will be
        self._length = length_of(self._names)
        self._untaken: dict[str, int] = {}  # duplicates by name; -1: the name is to be forgotten
        self._loop: Reactor | None = None
        self._again: Timer | None = None
        self._log = get_logger("keeper")

    def send_again_from(self, loop: Reactor) -> None:
        """Have this loop send what was not taken; without a loop, only the next change does so."""
        self._loop, self._again = loop, loop.timer(self._send_untaken)

    def keep(self, name: str, fd: int) -> None:
        """Have a descriptor kept under a name that nothing else has. If the keeper is busy, this waits a second, once.

        Raises: KernelError, also if there is no room, which the keeper would not report.
        """
        is_new = self.is_there and name not in self._names
        if is_new and len(self._names) >= self._room:
            operation = f"keep more than {self._room} descriptors in the process that started the service (FDSTORE)"
            raise KernelError(operation, errno.ENOSPC)
        if is_new and self._length + length_of([name]) > MAX_NAMES:
            operation = f"keep another descriptor: the names of {len(self._names)} are as long as one variable may be"
            raise KernelError(operation, errno.ENOSPC)
        self._change(name, fd)
        self._length += length_of([name]) if is_new else 0
        self._names.add(name)

    def replace(self, name: str, fd: int) -> None:
        """Have a descriptor kept in place of a former one of that name. Raises: KernelError.

        Otherwise systemd would keep both under that name.
        """
        self.forget(name)
        self.keep(name, fd)

    def forget(self, name: str) -> None:
        """Have the keeper close a descriptor. Raises: KernelError."""
        self._change(name)
        self._length -= length_of([name]) if name in self._names else 0
        self._names.discard(name)

    def close(self, *, waits: bool) -> None:
        """Send what was not taken for the last time; with `waits`, the keeper has some seconds to take all of it."""
        self._send_untaken(_LAST_S if waits else 0.0)
        if self._untaken and waits:
            self._log.error("the next service will lack what was not taken", descriptors=len(self._untaken))
        for name in list(self._untaken):
            self._drop(name)
        if self._again is not None:
            self._again.set(None)

    def _change(self, name: str, fd: int = -1) -> None:
        """Have a descriptor kept, or a name forgotten. Raises: KernelError."""
        if not self.is_there:
            return
        try:
            if self._untaken:  # later changes wait behind earlier ones
                self._remember(name, fd)
                self._send_untaken()
                return
            try:
                self._send(name, fd, _TIMEOUT_S)
            except (TimeoutError, BlockingIOError):
                self._remember(name, fd)
                self._log.warning("the process that started the service takes no messages; they are sent again")
                self._set_timer()
        except OSError as error:
            code = error.errno or errno.EIO
            raise KernelError("keep a descriptor in the process that started the service", code) from None

    def _remember(self, name: str, fd: int) -> None:
        copy = os.dup(fd) if fd >= 0 else -1
        self._drop(name)
        self._untaken[name] = copy

    def _drop(self, name: str) -> None:
        fd = self._untaken.pop(name, -1)
        if fd >= 0:
            os.close(fd)

    def _send_untaken(self, within_s: float = 0.0) -> None:
        """Send what was not taken, as far as the keeper takes it now, or within so many seconds."""
        if not self._untaken:
            return
        give_up = time.monotonic() + within_s
        with suppress(OSError):
            for name, fd in list(self._untaken.items()):
                for each in (-1, fd) if fd >= 0 else (-1,):  # it may still have a former one of that name
                    self._send(name, each, max(0.0, give_up - time.monotonic()))
                self._drop(name)
            self._log.info("the process that started the service has taken all messages")
        self._set_timer()

    def _set_timer(self) -> None:
        if self._loop is not None and self._again is not None:
            self._again.set(self._loop.now() + _AGAIN_S if self._untaken else None)

    def _send(self, name: str, fd: int, timeout_s: float) -> None:
        """Send one message: keep a descriptor, or forget the name. Raises: OSError."""
        state = f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0" if fd >= 0 else f"FDSTOREREMOVE=1\nFDNAME={name}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as near:
            near.settimeout(timeout_s)
            near.connect(self._address)
            socket.send_fds(near, [state.encode()], [fd] if fd >= 0 else [])


def length_of(names: Iterable[str]) -> int:
    """Return how many bytes names take in ``LISTEN_FDNAMES``, where MAX_NAMES have room."""
    return sum(len(name) + 1 for name in names)


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
