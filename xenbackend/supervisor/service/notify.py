"""Tells systemd how the service is: sd_notify(3), without a library.

Must not block, and must not fail: the service does not depend on being watched.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from xenbackend.loop.reactor import Reactor, Timer

_AGAIN_S = 1.0  # between two tries to send what was not taken


def address_of(environment: Mapping[str, str]) -> str:
    """Return the address that ``NOTIFY_SOCKET`` names, empty if there is none."""
    address = environment.get("NOTIFY_SOCKET", "")
    return "\0" + address[1:] if address.startswith("@") else address


class Notifier:
    """Sends states to the socket that systemd named; does nothing if there is none.

    systemd takes no messages while it reloads its units. What it has not taken is sent again until it is taken, of each
    kind the newest: it ends a service that does not become ready, or does not say in time that it is alive.

    Args:
        environment: holds ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC``, as systemd sets them.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = address_of(environment)
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        has_watchdog = bool(self._address) and watchdog_us.isdigit()
        self.interval_s = int(watchdog_us) / 2e6 if has_watchdog else None  # half of the time that systemd allows
        self._untaken: dict[str, str] = {}  # states by their kind, such as ``READY``
        self._loop: Reactor | None = None
        self._again: Timer | None = None

    def send_again_from(self, loop: Reactor) -> None:
        """Have this loop send what was not taken; without a loop, only the next state does so."""
        self._loop, self._again = loop, loop.timer(self._send_untaken)

    def ready(self) -> None:
        """Say that the service serves from now on."""
        self._send("READY=1")

    def alive(self) -> None:
        """Say that the loop still turns."""
        self._send("WATCHDOG=1")

    def stopping(self) -> None:
        """Say that the service is about to end."""
        self._send("STOPPING=1")

    def status(self, sentence: str) -> None:
        """Set what ``systemctl status`` shows."""
        self._send(f"STATUS={sentence}")

    def _send(self, state: str) -> None:
        if not self._address:
            return
        kind = state.partition("=")[0]
        self._untaken.pop(kind, None)  # so that it comes behind those that are older
        self._untaken[kind] = state
        self._send_untaken()

    def _send_untaken(self) -> None:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as near:
                for kind, state in list(self._untaken.items()):
                    near.sendto(state.encode(), self._address)
                    del self._untaken[kind]
        except BlockingIOError:
            pass
        except OSError:  # nobody listens
            self._untaken.clear()
        if self._loop is not None and self._again is not None:
            self._again.set(self._loop.now() + _AGAIN_S if self._untaken else None)
