"""Requests lost by a layer's bug: whose they are, what replaces them, and what becomes of their memory."""

from __future__ import annotations

import errno
from types import SimpleNamespace
from typing import Any

import pytest

from tests.served import HeldDisk, Served
from xenbackend.blkif.abi import BLKIF_OP_WRITE, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenbackend.blkif.request import RingRequest
from xenbackend.block.policy import PAUSE_S
from xenbackend.block.request import Op, Request
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE
from xenbackend.worker.barrier import Barrier
from xenbackend.worker.fault import is_ours, substitute

DATA = b"c" * PAGE


class Memory:
    """A stand-in for the grants, which records what was abandoned."""

    def __init__(self) -> None:
        self.abandoned: list[tuple[RingRequest, Request]] = []

    def abandon(self, record: RingRequest, request: Request) -> None:
        """Record it."""
        self.abandoned.append((record, request))


def record_of_a_guest() -> RingRequest:
    """Return the record of a guest's request."""
    record = RingRequest(3, SimpleNamespace(), Request())
    record.request.tag, record.request.op = record, Op.WRITE
    return record


def test_another_request_takes_the_place_of_a_lost_one() -> None:
    """A lost request is replaced by one that ends with EIO; the lost one has no owner, and keeps its memory."""
    record, memory = record_of_a_guest(), Memory()
    lost = record.request
    other = substitute(lost, memory)

    assert (other, record, errno.EIO, Op.WRITE) == (record.request, other.tag, other.status, other.op)
    assert lost.tag is None
    assert [(record, lost)] == memory.abandoned
    assert [False, True] == [is_ours(lost), is_ours(other)]


def test_a_step_of_a_barrier_is_taken_for_the_barrier() -> None:
    """A lost flush of a barrier ends that step and leaves the memory of its write alone; a lost write abandons it."""
    record, memory = record_of_a_guest(), Memory()
    barrier: Any = Barrier(record, record.request, [])
    flush = barrier.next_step()
    other = substitute(flush, memory)
    untouched = memory.abandoned[:]
    barrier.end_step(0)
    write = barrier.next_step()
    second = substitute(write, memory)

    assert (barrier, Op.FLUSH) == (other.tag, other.op)
    assert [] == untouched
    assert (barrier, second) == (second.tag, record.request)
    assert [(record, write)] == memory.abandoned


def test_what_belongs_to_a_layer_is_not_ours() -> None:
    """A request that a layer has made for itself is left alone, whatever its tag."""
    own = [Request(), Request("a tag"), Request(record_of_a_guest())]

    assert [False] * 3 == [is_ours(request) for request in own]


class Trap(HeldDisk):
    """A disk that loses its requests with an exception while `broken` is set."""

    broken = False

    def submit(self, batch: list[Request]) -> None:
        """Take requests, or lose them."""
        if self.broken:
            raise KeyError("lost")
        super().submit(batch)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_kept_request_that_a_bug_loses_is_trouble_no_more(vbd: Served, persistent: bool) -> None:
    """A request that is kept for lack of space, and lost by a bug when it is tried again, is answered, and the trouble
    is over.
    """
    disk = vbd.disk = Trap()
    frontend = vbd.connect(Wishes(persistent=persistent))
    disk.errors = {Op.WRITE: errno.ENOSPC}
    for _ in range(2):
        write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
        vbd.step(2)
        disk.broken = True
        vbd.pass_time(PAUSE_S)
        disk.broken = False
        frontend.poll()

        assert BLKIF_RSP_ERROR == write.status
        assert "" == vbd.troubles[-1]
    assert 4 == len(vbd.troubles)  # the second trouble was reported too
    disk.errors = {}
    again = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    frontend.wait([again])

    assert BLKIF_RSP_OKAY == again.status
    assert 0 == vbd.engine.in_flight


def test_what_a_bug_ended_is_not_kept(vbd: Served) -> None:
    """A request that a bug has ended is answered with an error at once, whatever the policy: it would fail again."""
    vbd.policy = "write=pause,read=pause"
    disk = vbd.disk = Trap()
    frontend = vbd.connect()
    disk.broken = True
    write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    frontend.wait([write])

    assert BLKIF_RSP_ERROR == write.status
    assert [] == vbd.troubles
