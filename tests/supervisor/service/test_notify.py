"""What the service tells systemd."""

from __future__ import annotations

import socket
from pathlib import Path

from xenbackend.supervisor.service.notify import Notifier


def test_states_reach_the_named_socket(tmp_path: Path) -> None:
    """Each state is one datagram to the socket in NOTIFY_SOCKET, as sd_notify(3) says."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "3000000"})
        notifier.ready()
        notifier.status("serving 2 vbds")
        notifier.alive()
        notifier.stopping()

        assert [b"READY=1", b"STATUS=serving 2 vbds", b"WATCHDOG=1", b"STOPPING=1"] == [
            systemd.recv(100) for _ in range(4)
        ]
        assert 1.5 == notifier.interval_s


def test_abstract_sockets_are_understood() -> None:
    """An address that begins with @ is in the abstract namespace."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("")
        Notifier({"NOTIFY_SOCKET": "@" + systemd.getsockname()[1:].decode()}).ready()

        assert b"READY=1" == systemd.recv(100)


def test_nobody_listening_is_no_error(tmp_path: Path) -> None:
    """If there is no socket, or it is gone, nothing happens."""
    Notifier({}).ready()
    Notifier({"NOTIFY_SOCKET": str(tmp_path / "gone")}).ready()

    assert Notifier({"WATCHDOG_USEC": "3000000"}).interval_s is None
