"""Tests of `xenbackend.worker.connector`: connections that are renewed while a disk is served."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers_block import TEST_DRIVERS
from tests.openers import Openers
from xenbackend.block.drivers import BUILT_IN
from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.jobs import Job
from xenbackend.worker.connector import Connector
from xenbackend.worker.opener import RemoteOpener


@pytest.fixture(autouse=True)
def _served(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the test driver `served` known."""
    monkeypatch.setitem(BUILT_IN, "served", TEST_DRIVERS["served"])


Answer = tuple[socket.socket | None, DriverError | None]


@pytest.fixture
def openers() -> Iterator[Openers]:
    """Return openers in threads."""
    made = Openers()
    yield made
    made.close()


@pytest.fixture
def reactor() -> Iterator[Reactor]:
    """Return a loop."""
    made = Reactor()
    yield made
    made.close()


def test_all_that_are_wanted_are_made_by_one_opener(reactor: Reactor, openers: Openers, tmp_path: Path) -> None:
    """One opener makes all connections that are wanted: each layer gets its socket, or the reason why there is none."""
    path = str(tmp_path / "sock")
    told: list[bool] = []
    answers: list[Answer] = []
    connector = Connector(reactor, lambda: told.append(connector.wants), lambda *_: None)
    job = Job("vbd/5/51712", [f"served:{path}"], read_only=False)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        connector.want(Endpoint(path=path), 0, After.LOSS, lambda *answer: answers.append(answer))
        connector.want(Endpoint(path="/another"), 0, After.LOSS, lambda *answer: answers.append(answer))
        connector.serve(openers.remote(job), reactor.stop)
        assert not connector.wants
        reactor.run()
    assert [True, True] == told
    (near, none), (nothing, why) = answers
    assert near is not None, why or none
    assert none is None
    assert nothing is None
    assert "is not a server of this disk" in str(why)
    assert [(f"unix:{path}", 0)] == list(openers.connections)
    near.close()


def test_an_opener_that_ends_is_no_answer(reactor: Reactor, openers: Openers) -> None:
    """If the opener or the service has gone, the layer is told, and may ask for a connection again."""
    answers: list[Answer] = []
    connector = Connector(reactor, lambda: None, lambda *_: None)

    def again(near: socket.socket | None, why: DriverError | None) -> None:
        answers.append((near, why))
        if len(answers) == 1:
            connector.want(Endpoint(path="/s"), 0, After.LOSS, again)

    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    far.close()
    connector.want(Endpoint(path="/s"), 0, After.LOSS, again)
    connector.serve(RemoteOpener(near), reactor.stop)
    reactor.run()
    assert [None, None] == [each for each, _ in answers]
    assert all("ended" in str(why) for _, why in answers)


def test_an_opener_too_many_is_let_go_of(reactor: Reactor, openers: Openers) -> None:
    """An opener that comes when no connection is wanted, or when another one is at work, is closed."""
    done: list[str] = []
    connector = Connector(reactor, lambda: None, lambda *_: None)
    job = Job("vbd/5/51712", ["served:/nonexistent"], read_only=False)
    connector.serve(openers.remote(job), lambda: done.append("nothing to do"))
    connector.want(Endpoint(path="/nonexistent"), 0, After.LOSS, lambda *_: None)
    connector.serve(openers.remote(job), reactor.stop)
    connector.serve(openers.remote(job), lambda: done.append("one too many"))
    reactor.run()
    assert ["nothing to do", "one too many"] == done
    openers.close()
    assert [0, 0, 0] == openers.ends


def test_what_is_closed_in_order_is_told() -> None:
    """The supervisor is told of a connection that was closed in order, so that it need not be kept."""
    parted: list[tuple[str, int, int]] = []
    reactor = Reactor()
    Connector(reactor, lambda: None, lambda *each: parted.append(each)).parted("host:1", 2, 3)
    reactor.close()
    assert [("host:1", 2, 3)] == parted
