"""Tests of `xenbackend.block.remote.lane`: how long a server may be silent. block/drivers/test_nbd.py has the rest."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from struct import pack
from typing import Any

import pytest

from tests.helpers_block import StepEnv, content, flush, read
from xenbackend.block.remote.lane import TICK_S, Lane, Wanted
from xenbackend.block.request import AWAY, Request
from xenbackend.block.servers import Endpoint
from xenbackend.nbd.abi import REPLY_MAGIC
from xenbackend.nbd.client import Offer

SIZE = 1 << 20
OFFER = Offer(SIZE, 0)
SILENCE_S = 3.0


@dataclass
class Env(StepEnv):
    """An `Env` with descriptors, whose timers the test runs."""

    ready: dict[int, Callable[[], None]] = field(default_factory=dict)
    lost: int = 0

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """See `Env`."""
        self.ready[fd] = callback

    def unwatch(self, fd: int) -> None:
        """See `Env`."""
        del self.ready[fd]

    def reconnect(self, *_: Any) -> None:
        """Count a lost connection. The test makes the next one."""
        self.lost += 1

    def disconnected(self, *_: Any) -> None:
        """See `Env`."""


class Silent:
    """A lane to a server controlled by the test, and the requests that came back."""

    def __init__(self) -> None:
        self.env, self.back = Env(), list[Request]()
        wanted = Wanted(Endpoint("/nowhere"), "", SILENCE_S, durable=False)
        self.lane = Lane(self.env, wanted, 0, self.back.extend, lambda _: "", lambda: None)
        self.ends: list[socket.socket] = []
        self.connect()

    def connect(self) -> None:
        """Make a connection."""
        near, far = socket.socketpair()
        self.ends.append(far)
        self.lane.begin(near, OFFER)

    def submit(self, request: Request) -> None:
        """Send a request."""
        assert self.lane.connection is not None
        self.lane.submit(self.lane.connection, [request])

    def say(self, data: bytes) -> None:
        """Send data as the server."""
        self.ends[-1].sendall(data)
        for callback in list(self.env.ready.values()):
            callback()

    def close(self) -> None:
        """Close everything."""
        self.lane.close()
        for far in self.ends:
            far.close()


@pytest.fixture
def silent() -> Iterator[Silent]:
    """Return a lane with its server."""
    it = Silent()
    yield it
    it.close()


def test_a_server_has_its_time_each_time(silent: Silent) -> None:
    """After a server was given up, the next connection may be silent for just as long."""
    for given_up in range(1, 5):
        silent.submit(read(0, 512))
        ticks = 0
        while silent.env.lost < given_up:
            silent.env.ring()
            ticks += 1
        assert SILENCE_S / TICK_S == ticks
        silent.connect()


def test_a_byte_now_and_then_is_no_answer(silent: Silent) -> None:
    """A server that drips a read's data byte by byte is given up, but not a slow one that sends some KiB in time."""
    request = read(0, 64 * 1024)
    silent.submit(request)
    silent.say(pack(">IIQ", REPLY_MAGIC, 0, 0))
    for _ in range(16):
        for _ in range(2):  # one step less than it may be silent
            silent.env.ring()
            silent.say(b"x" * 2048)
    assert (0, [request], b"x" * 65536) == (silent.env.lost, silent.back, content(request))
    silent.submit(read(0, 64 * 1024))
    silent.say(pack(">IIQ", REPLY_MAGIC, 0, 0))
    for _ in range(4):  # the first step still finds the former answer
        silent.say(b"x")
        silent.env.ring()
    assert 1 == silent.env.lost
    assert [0, AWAY] == [each.status for each in silent.back]


def test_short_answers_are_answers(silent: Silent) -> None:
    """A server that answers each request within the time-out is not given up, however short its answers are."""
    requests = [flush() for _ in range(10)]
    for request in requests:
        silent.submit(request)
    for number in range(10):
        for _ in range(2):
            silent.env.ring()
        silent.say(pack(">IIQ", REPLY_MAGIC, 0, number))
    assert (0, requests) == (silent.env.lost, silent.back)
