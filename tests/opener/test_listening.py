"""The socket on which a worker serves a device model."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from xenbackend.opener.listening import listen


def test_socket_is_for_our_user_only(tmp_path: Path) -> None:
    """The socket and its directory are for our user only, and the umask is restored."""
    path = tmp_path / "nbd" / "disk.sock"
    with socket.socket(fileno=listen(str(path))):
        modes = [stat.S_IMODE(each.stat().st_mode) for each in (path, path.parent)]
    former = os.umask(0o22)
    os.umask(former)

    assert [0o600, 0o700] == modes
    assert 0o177 != former


def test_predecessors_socket_is_replaced(tmp_path: Path) -> None:
    """The socket that a killed worker left at the path is replaced, and clients reach the new one."""
    path = str(tmp_path / "disk.sock")
    with socket.socket(fileno=listen(path)) as first, socket.socket(fileno=listen(path)) as second:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            near, _ = second.accept()
            near.close()
        with pytest.raises(BlockingIOError):
            first.accept()


def test_socket_that_cannot_be_made(tmp_path: Path) -> None:
    """If the path is too long, or its directory cannot be made, that is an OSError about it."""
    with pytest.raises(OSError, match="path too long"):
        listen(str(tmp_path / ("x" * 120)))
    (tmp_path / "nbd").write_text("a file")
    with pytest.raises(FileExistsError) as caught:
        listen(str(tmp_path / "nbd" / "disk.sock"))

    assert str(tmp_path / "nbd") in str(caught.value.filename)
