"""What the service tells systemd."""

from __future__ import annotations

import socket
from contextlib import closing, suppress
from functools import partial
from pathlib import Path

from tests.supervisor.helpers import run_until
from xenbackend.loop.reactor import Reactor
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


def test_what_systemd_does_not_take_is_sent_again(tmp_path: Path) -> None:
    """While systemd takes no messages, nothing waits for it. Once it takes them, it hears the newest state of each
    kind, in the order in which they were said, without a further one: it would end a service of which it has not heard.
    """
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as systemd,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as others,
        closing(Reactor()) as loop,
    ):
        systemd.bind(str(tmp_path / "notify"))
        others.connect(str(tmp_path / "notify"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "notify")})
        notifier.send_again_from(loop)
        with suppress(BlockingIOError):
            while others.send(b"other"):
                pass
        for say in (notifier.alive, notifier.ready, partial(notifier.status, "one"), notifier.alive):
            say()
        notifier.status("two")
        heard: list[bytes] = []
        loop.add(systemd.fileno(), lambda: heard.append(systemd.recv(100)))
        run_until(loop, lambda: b"STATUS=two" in heard)

        assert [b"READY=1", b"WATCHDOG=1", b"STATUS=two"] == [each for each in heard if each != b"other"]


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
