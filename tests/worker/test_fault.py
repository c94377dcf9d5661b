"""Requests that a layer's bug has lost: whose they are, what takes their place, and what is left of them."""

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
    """Who holds the memory of requests that are copied; takes note of what was abandoned."""

    def __init__(self) -> None:
        self.abandoned: list[tuple[RingRequest, Request]] = []

    def abandon(self, record: RingRequest, request: Request) -> None:
        """Take note."""
        self.abandoned.append((record, request))


def record_of_a_guest() -> RingRequest:
    """Return a record with its request."""
    record = RingRequest(3, SimpleNamespace(), Request())
    record.request.tag, record.request.op = record, Op.WRITE
    return record


def test_another_request_takes_the_place_of_a_lost_one() -> None:
    """The record gets a request that ends with EIO; the lost one belongs to nobody, and keeps its memory."""
    record, memory = record_of_a_guest(), Memory()
    lost = record.request
    other = substitute(lost, memory)

    assert (other, record, errno.EIO, Op.WRITE) == (record.request, other.tag, other.status, other.op)
    assert lost.tag is None
    assert [(record, lost)] == memory.abandoned
    assert [False, True] == [is_ours(lost), is_ours(other)]


def test_a_step_of_a_barrier_is_taken_for_the_barrier() -> None:
    """A lost flush of a barrier ends the barrier's step, and leaves its write's memory alone; a lost write does not."""
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
    """A request that a layer made, whatever it tags it with, is left alone."""
    own = [Request(), Request("a tag"), Request(record_of_a_guest())]

    assert [False] * 3 == [is_ours(request) for request in own]


class Trap(HeldDisk):
    """A disk that loses what it gets, with an exception, where it is told to."""

    broken = False

    def submit(self, batch: list[Request]) -> None:
        """Take requests, or lose them."""
        if self.broken:
            raise KeyError("lost")
        super().submit(batch)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_kept_request_that_a_bug_loses_is_trouble_no_more(vbd: Served, persistent: bool) -> None:
    """A request that waited for space and is lost when it is tried again is answered, and the trouble taken back."""
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
    assert 4 == len(vbd.troubles)  # the second one was said as well
    disk.errors = {}
    again = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    frontend.wait([again])

    assert BLKIF_RSP_OKAY == again.status
    assert 0 == vbd.engine.in_flight


def test_what_a_bug_ended_is_not_kept(vbd: Served) -> None:
    """An error that a bug made would come again: whatever the policy, the guest hears of it at once."""
    vbd.policy = "write=pause,read=pause"
    disk = vbd.disk = Trap()
    frontend = vbd.connect()
    disk.broken = True
    write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    frontend.wait([write])

    assert BLKIF_RSP_ERROR == write.status
    assert [] == vbd.troubles
