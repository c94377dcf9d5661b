"""The tests' own NBD server: what must hold whatever a test does with it."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from tests.nbd_server import Export, Server


def test_it_is_closed_while_it_starts_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing the server does not join a thread that has not been started yet, which would be an error."""
    server = Server(tmp_path / "socket", Export(bytearray(4096)))
    start, joined_too_early = threading.Thread.start, []

    def slowly(thread: threading.Thread) -> None:
        joined_too_early.extend(each for each in server._threads if each is thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", slowly)
    with server, socket.socket(socket.AF_UNIX) as near:
        near.connect(str(server.path))
        assert near.recv(8) == b"NBDMAGIC"
    assert [] == joined_too_early
    assert not any(each.is_alive() for each in server._threads)
    assert 2 == len(server._threads)
