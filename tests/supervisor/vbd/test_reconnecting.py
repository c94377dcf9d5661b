"""Tests of `xenbackend.supervisor.vbd.reconnecting`."""

from __future__ import annotations

from dataclasses import replace

from xenbackend.loop.reactor import Reactor
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.supervisor.vbd.reconnecting import REST_S, Reconnecting, Then

STANDING = messages.Standing(1, Stage.SERVING, "nbd:", read_only=False, shareable=False)
WANTS = replace(STANDING, wants_connections=True)


def test_a_worker_that_wants_connections_is_given_an_opener_now_and_then() -> None:
    """A worker that wants connections gets an opener at once, one at a time, and at most one every REST_S."""
    now = [100.0]
    asked: list[Then] = []
    loop = Reactor(clock=lambda: now[0])

    def turn() -> None:
        loop.call_soon(loop.stop)
        loop.run()

    reconnecting = Reconnecting(loop, lambda question, then: asked.append(then), lambda: True)
    reconnecting.stands(STANDING)
    assert not asked
    reconnecting.stands(WANTS)
    reconnecting.stands(WANTS)
    assert 1 == len(asked)
    asked[0](messages.Reply(1, Code.OK))
    turn()
    assert 1 == len(asked)
    now[0] += REST_S
    turn()
    assert 2 == len(asked)  # it still wants connections
    reconnecting.stands(STANDING)
    asked[1](messages.Reply(2, Code.GONE))
    now[0] += REST_S
    turn()
    assert 2 == len(asked)
    reconnecting.stands(WANTS)
    assert 3 == len(asked)
    reconnecting.stop()
    asked[2](messages.Reply(3, Code.GONE))
    now[0] += REST_S
    turn()
    assert 3 == len(asked)
    loop.close()


def test_a_worker_that_cannot_have_lost_a_connection_is_given_no_opener() -> None:
    """A worker gets no opener while its chain names no server. If another chain is put in, its next standing counts."""
    asked: list[Then] = []
    may = [False, True]
    loop = Reactor(clock=lambda: 100.0)
    reconnecting = Reconnecting(loop, lambda question, then: asked.append(then), lambda: may.pop(0))
    reconnecting.stands(WANTS)
    loop.call_soon(loop.stop)
    loop.run()
    assert not asked
    reconnecting.stands(WANTS)
    assert 1 == len(asked)
    loop.close()
