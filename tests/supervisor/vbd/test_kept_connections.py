"""Tests of `xenbackend.supervisor.vbd.kept_connections`, within the handover that keeps them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from tests.descriptors import open_descriptors
from tests.supervisor.helpers import PATH, Kept
from xenbackend.protocol.jobs import MAX_CONNECTIONS, KeptConnection
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.vbd.handover import Handover
from xenbackend.supervisor.vbd.inheritance import sort_inherited

FARS: list[socket.socket] = []  # the servers' ends of a test
S, T = "unix:/run/a|b.sock", "host:10809"


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    """Close the servers' ends after a test."""
    yield
    while FARS:
        FARS.pop().close()


def pair() -> tuple[int, socket.socket]:
    """Return a descriptor of a connection, and the server's end of it."""
    near, far = socket.socketpair()
    FARS.append(far)
    return near.detach(), far


def taken(handover: Handover, server: str, place: int = 0, *, is_alone: bool = False) -> socket.socket:
    """Keep a connection, and return the server's end of it."""
    fd, far = pair()
    assert not handover.connections.take(server, place, fd, is_alone=is_alone)
    return far


def kept_of(handover: Handover) -> list[KeptConnection]:
    """Return the kept connections as a job names them."""
    return sorted([each for each, _ in handover.connections.kept()], key=lambda each: each.server)


def inode_of(handover: Handover) -> int:
    """Return the inode of the one socket that is kept."""
    ((_, fd),) = handover.connections.kept()
    return os.fstat(fd).st_ino


def next_one(keeper: Kept) -> Handover:
    """Return the handover as the next service finds it."""
    found = keeper.keeper()
    return Handover(found, PATH, sort_inherited(found, 0).get(PATH))


def is_open(far: socket.socket) -> bool:
    """Return whether anybody has the other end open."""
    far.setblocking(False)
    try:
        return bool(far.recv(1))
    except BlockingIOError:
        return True


def test_a_connection_takes_the_place_of_its_former() -> None:
    """A new connection replaces the one to its server and place only; one that is alone replaces all."""
    handover = Handover(Keeper({}), PATH)
    first, other, place = taken(handover, S), taken(handover, T), taken(handover, S, 1)
    second = taken(handover, S)
    assert [False, True, True, True] == [is_open(far) for far in (first, other, place, second)]
    last = taken(handover, S, is_alone=True)
    assert [False, False, False, True] == [is_open(far) for far in (other, place, second, last)]
    assert [KeptConnection(S, 0)] == kept_of(handover)
    handover.close()
    assert not is_open(last)


def test_there_are_no_more_than_fit() -> None:
    """A connection too many is refused with a sentence and closed; the others stay."""
    handover = Handover(Keeper({}), PATH)
    fars = [taken(handover, S, place) for place in range(MAX_CONNECTIONS)]
    fd, far = pair()
    assert "keeps at most 16 connections" in handover.connections.take(T, 0, fd, is_alone=False)
    assert not is_open(far)
    assert all(map(is_open, fars))
    taken(handover, S, 3)
    assert MAX_CONNECTIONS == len(kept_of(handover))
    handover.close()


def test_the_next_service_has_them(kept: Kept) -> None:
    """The next service gets all connections, and knows which of them are broken."""
    handover = next_one(kept)
    one, two = taken(handover, S), taken(handover, T)
    handover.connections.is_undrained(T, 0, is_broken=True)
    handover.leave()
    found = next_one(kept)
    assert [KeptConnection(T, 0, is_broken=True), KeptConnection(S, 0)] == kept_of(found)
    assert is_open(one)
    assert is_open(two)
    found.close()
    last = next_one(kept)
    assert not kept_of(last)
    assert [False, False] == [is_open(one), is_open(two)]
    last.close()


def test_an_administrator_lets_go_of_what_has_no_end() -> None:
    """`accept_undrained` closes only the connections whose end could not be seen."""
    handover = Handover(Keeper({}), PATH)
    fine, silent, broken = taken(handover, S), taken(handover, S, 1), taken(handover, S, 2)
    handover.connections.is_undrained(S, 1, is_broken=False)
    handover.connections.is_undrained(S, 2, is_broken=True)
    handover.connections.accept_undrained()
    assert [True, False, False] == [is_open(far) for far in (fine, silent, broken)]
    assert [KeptConnection(S, 0)] == kept_of(handover)
    handover.close()


def test_a_connection_that_was_closed_in_order_is_not_kept() -> None:
    """A connection that its worker has closed in order is dropped; a report about one that the disk never had is
    ignored.
    """
    handover = Handover(Keeper({}), PATH)
    before = len(open_descriptors())
    far = taken(handover, S)
    inode = inode_of(handover)
    handover.connections.has_closed(T, 0, inode)
    handover.connections.has_closed(S, 7, inode)
    handover.connections.has_closed(S, 0, inode + 1)
    assert is_open(far)
    handover.connections.has_closed(S, 0, inode)
    assert not is_open(far)
    far.close()
    assert before == len(open_descriptors())
    handover.close()


def test_the_end_of_a_former_connection_is_not_that_of_its_successor() -> None:
    """If a worker closes a connection and another one to the same server is made, the one in use stays kept, whichever
    the service hears of first.
    """
    handover = Handover(Keeper({}), PATH)
    former = taken(handover, S)
    inode = inode_of(handover)
    successor = taken(handover, S)
    handover.connections.has_closed(S, 0, inode)

    assert [False, True] == [is_open(former), is_open(successor)]
    assert [KeptConnection(S, 0)] == kept_of(handover)
    handover.close()
