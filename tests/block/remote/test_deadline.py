"""Tests of `xenbackend.block.remote.deadline`."""

from __future__ import annotations

import socket
import threading

import pytest

from xenbackend.block.remote.deadline import Deadline


def test_what_comes_in_time_is_returned() -> None:
    """A step that would block is repeated once there is something to receive."""
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        threading.Timer(0.05, far.sendall, [b"x"]).start()
        assert b"x" == Deadline(20).do(near, lambda: near.recv(1))


def test_all_steps_share_one_time() -> None:
    """A step that never succeeds, and one that is repeated again and again, both end at the deadline."""
    near, far = socket.socketpair()
    near.setblocking(False)
    with near, far:
        with pytest.raises(TimeoutError):
            Deadline(0.05).do(near, lambda: near.recv(1))
        deadline = Deadline(0.05)
        far.sendall(b"x")
        with pytest.raises(TimeoutError):
            list(iter(lambda: deadline.do(near, lambda: near.recv(1, socket.MSG_PEEK)), b""))
