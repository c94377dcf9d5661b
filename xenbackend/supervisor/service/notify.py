"""Tells systemd how the service is: sd_notify(3), without a library.

Must not block, and must not fail: the service does not depend on being watched.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import suppress


def address_of(environment: Mapping[str, str]) -> str:
    """Return the address that ``NOTIFY_SOCKET`` names, empty if there is none."""
    address = environment.get("NOTIFY_SOCKET", "")
    return "\0" + address[1:] if address.startswith("@") else address


class Notifier:
    """Sends states to the socket that systemd named; does nothing if there is none.

    Args:
        environment: holds ``NOTIFY_SOCKET`` and ``WATCHDOG_USEC``, as systemd sets them.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._address = address_of(environment)
        watchdog_us = environment.get("WATCHDOG_USEC", "")
        has_watchdog = bool(self._address) and watchdog_us.isdigit()
        self.interval_s = int(watchdog_us) / 2e6 if has_watchdog else None  # half of the time that systemd allows

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
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as near:
            near.sendto(state.encode(), self._address)
