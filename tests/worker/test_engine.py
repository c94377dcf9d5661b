"""The engine with a real ring: what is answered when layers, flushes or grants fail, or when it has to end."""

from __future__ import annotations

import errno
import gc
import sys

import pytest

from tests.served import HeldDisk, Served
from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
)
from xenbackend.block.request import Op, Request
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE
from xenbackend.worker.holds import Hold

GNTST_GENERAL_ERROR = -1  # grant_table.h


class Bug(Exception):
    """An exception raised by a broken layer."""


class BrokenDisk(HeldDisk):
    """A disk whose `submit` raises an exception after it has kept, or even completed, its requests."""

    broken = False

    def submit(self, batch: list[Request]) -> None:
        """Take requests, then raise an exception."""
        super().submit(batch)
        if self.broken:
            raise Bug("it broke")


@pytest.mark.rows("R24")
def test_layers_bug_ends_what_it_held(vbd: Served) -> None:
    """D8: if `submit` raises an exception, the requests that the layer held end with an error, an alarm says so, and
    the disk goes on.
    """
    disk = vbd.disk = BrokenDisk()
    frontend = vbd.connect()
    disk.holding = disk.broken = True
    lost = [frontend.submit(BLKIF_OP_WRITE, sector, data=bytes(PAGE), push=False) for sector in (0, 8, 16)]
    frontend.wait(lost)
    disk.holding = disk.broken = False
    disk.held.clear()
    frontend.write(0, b"x" * PAGE)

    assert [BLKIF_RSP_ERROR] * 3 == [request.status for request in lost]
    assert b"x" * PAGE == frontend.read(0, 8)
    assert ["a layer failed, its requests end with an I/O error: Bug: it broke"] == vbd.alarms
    assert 1 == vbd.engine.bugs
    assert 0 == vbd.engine.in_flight


def test_late_completion_of_a_lost_request_is_harmless(vbd: Served) -> None:
    """D8: a request that a bug has ended may be completed later, even with others; it is not answered again."""
    disk = vbd.disk = BrokenDisk()
    frontend = vbd.connect()
    disk.holding = disk.broken = True
    frontend.wait([frontend.submit(BLKIF_OP_WRITE, 0, data=bytes(PAGE))])
    disk.broken = False
    good = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step()
    disk.give_back()
    frontend.wait([good])

    assert BLKIF_RSP_OKAY == good.status
    assert {} == vbd.engine._grants.held  # its memory is free again
    assert [0, 0] == [vbd.engine.in_flight, frontend.rings[0].in_flight()]


def test_late_completion_of_a_lost_barriers_write_is_harmless(vbd: Served) -> None:
    """D8: the write of a barrier that a bug has ended may be completed later; the barrier is not answered again."""
    disk = vbd.disk = BrokenDisk()
    frontend = vbd.connect(Wishes(flush=False))
    barrier = frontend.submit(2, 0, data=bytes(PAGE))
    while disk.seen != ["FLUSH"]:
        vbd.step()
    disk.holding = disk.broken = True
    frontend.wait([barrier])
    disk.broken = False
    vbd.step()
    disk.give_back()
    disk.holding = False

    assert BLKIF_RSP_ERROR == barrier.status
    assert [] == frontend.poll()
    assert bytes(PAGE) == frontend.read(0, 8)


def test_bug_on_the_way_up_ends_what_was_not_answered(vbd: Served) -> None:
    """D8: if a layer raises an exception over completed requests, each of them is answered all the same."""
    disk = vbd.disk = BrokenDisk()
    frontend = vbd.connect()
    answer, disk.complete = disk.complete, lambda batch: answer(batch[:1])  # the rest never reaches the engine
    disk.broken = True
    requests = [frontend.submit(BLKIF_OP_READ, sector, 8, push=False) for sector in (0, 8)]
    frontend.wait(requests)

    assert [BLKIF_RSP_OKAY, BLKIF_RSP_ERROR] == [request.status for request in requests]
    assert 0 == vbd.engine.in_flight


def test_bad_page_among_good_ones_fails_alone(vbd: Served) -> None:
    """A page that cannot be copied fails its own request only; no memory is lost."""
    frontend = vbd.connect()
    room = vbd.connection and vbd.engine._grants._free[:]
    for operation in (BLKIF_OP_WRITE, BLKIF_OP_READ):
        for sectors in (8, 16):
            data = {"data": bytes(512 * sectors)} if operation == BLKIF_OP_WRITE else {"count": sectors}
            requests = [frontend.submit(operation, 16 * place, **data, push=False) for place in range(8)]
            vbd.guest.fail(requests[3].pages[-1].gref, GNTST_GENERAL_ERROR)
            frontend.wait(requests)
            vbd.guest.fail(requests[3].pages[-1].gref, 0)

            assert [BLKIF_RSP_OKAY] * 3 + [BLKIF_RSP_ERROR] + [BLKIF_RSP_OKAY] * 4 == [each.status for each in requests]
            assert sorted(room) == sorted(vbd.engine._grants._free)
            assert {} == vbd.engine._grants.held
            again = [frontend.submit(BLKIF_OP_READ, 8 * place, 8, push=False) for place in range(32)]
            frontend.wait(again)

            assert [BLKIF_RSP_OKAY] * 32 == [request.status for request in again]
    assert 4 == vbd.engine.guest_errors
    assert ["grant copy ended with status -1"] * 4 == vbd.complaints


class HalfDisk(HeldDisk):
    """A disk that gives back the first request of a batch at once and keeps the rest."""

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does."""
        first = batch[0]
        self.holding = True
        super().submit(batch)
        self.give_back([first])


def test_read_that_cannot_be_delivered_is_answered_once(vbd: Served) -> None:
    """A read whose page cannot be written is answered once, with an error, although others of its batch are still in
    flight.
    """
    disk = vbd.disk = HalfDisk()
    frontend = vbd.connect()
    requests = [frontend.submit(BLKIF_OP_READ, 0, 16, push=False) for _ in range(3)]
    vbd.guest.fail(requests[0].pages[1].gref, GNTST_GENERAL_ERROR)
    frontend.wait(requests[:1])
    disk.give_back()
    frontend.wait(requests)

    assert [BLKIF_RSP_ERROR, BLKIF_RSP_OKAY, BLKIF_RSP_OKAY] == [request.status for request in requests]


def test_page_alone_among_others_is_its_own(vbd: Served) -> None:
    """A request of one whole page that is taken with others uses the page that it names, and not one of an earlier
    request.
    """
    frontend = vbd.connect()
    first = [frontend.submit(BLKIF_OP_WRITE, 8 * place, data=b"1" * PAGE, push=False) for place in range(8)]
    keep = [vbd.guest.grant(page.frame) for page in first[0].pages]  # so that the next request gets another grant ref
    frontend.wait(first)
    second = frontend.submit(BLKIF_OP_WRITE, 0, data=b"2" * PAGE, push=False)
    flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    grefs = [first[0].pages[0].gref, second.pages[0].gref]
    frontend.wait([second, flush])

    assert grefs[0] != grefs[1]
    assert b"2" * PAGE == frontend.read(0, 8)
    assert 1 == len(keep)


def test_failed_flush_is_not_answered(vbd: Served) -> None:
    """After a failed flush an alarm is raised, nothing more is taken, and the flush is answered only at the end, with
    an error.
    """
    frontend = vbd.connect()
    vbd.disk.errors = {Op.FLUSH: errno.EIO}
    flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    vbd.step(3)
    later = frontend.submit(BLKIF_OP_WRITE, 0, data=bytes(PAGE))
    vbd.step(3)

    assert [None, None] == [flush.status, later.status]
    assert ["FLUSH"] == vbd.disk.seen
    assert ["a flush failed (EIO); the disk is paused"] == vbd.alarms
    assert vbd.disconnect()
    frontend.poll()
    assert [BLKIF_RSP_ERROR, None] == [flush.status, later.status]


def test_a_failed_flush_takes_the_others_with_it(vbd: Served) -> None:
    """If one of several flushes in flight fails, none of them is answered as successful: the kernel reports a lost
    write to one of them only.
    """
    frontend = vbd.connect()
    disk = vbd.disk
    disk.holding = True
    flushes = [frontend.submit(BLKIF_OP_FLUSH_DISKCACHE) for _ in range(3)]
    vbd.step(3)
    one, two, three = disk.held
    disk.errors = {Op.FLUSH: errno.EIO}
    disk.give_back([one])
    disk.errors = {}
    disk.give_back([two, three])
    vbd.step(3)
    frontend.poll()

    assert [None] * 3 == [flush.status for flush in flushes]
    assert 1 == len(vbd.alarms)
    assert vbd.disconnect()
    frontend.poll()
    assert [BLKIF_RSP_ERROR] * 3 == [flush.status for flush in flushes]


def test_a_frontend_that_never_pauses_does_not_own_the_loop(vbd: Served) -> None:
    """If requests come without a pause, `serve` still returns after a while, and is called again."""
    vbd.connect()
    engine, (queue,) = vbd.engine, vbd.engine.queues
    looks: list[object] = []
    engine.poller.finds_work = lambda *_: looks.append(queue) or True  # as if there were always one more
    engine.serve(queue)

    assert 1 <= len(looks) <= 16
    assert not queue.is_idle
    assert any(getattr(call, "args", ()) == (queue,) for call in vbd.reactor._soon)
    del engine.poller.finds_work
    vbd.step(3)
    assert queue.is_idle


def test_what_a_layer_made_for_itself_is_not_answered(vbd: Served) -> None:
    """D8: of the requests that a failed layer held, only the guest's are ended; those that the layer made itself are
    left alone.
    """
    frontend = vbd.connect()
    disk = vbd.disk
    disk.holding = True
    read = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(3)
    own = Request("the layer's own")
    own.status = -1
    ended = Request(None)
    ended.status = -1
    vbd.engine.contain(Bug("on its way up"), [own, *disk.held, ended])
    frontend.wait([read])

    assert BLKIF_RSP_ERROR == read.status
    assert ("the layer's own", -1) == (own.tag, own.status)


def test_flush_that_is_not_supported_is_answered_so(vbd: Served) -> None:
    """EOPNOTSUPP for a flush means that there is nothing to flush: it is passed on, and pauses nothing."""
    frontend = vbd.connect()
    vbd.disk.errors = {Op.FLUSH: errno.EOPNOTSUPP}
    flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    frontend.wait([flush])

    assert BLKIF_RSP_EOPNOTSUPP == flush.status
    assert bytes(PAGE) == frontend.read(0, 8)


def test_error_of_the_disk_is_answered(vbd: Served) -> None:
    """Each errno that the policy reports is answered as an error, and EOPNOTSUPP with its own code."""
    vbd.policy = "read=report"
    frontend = vbd.connect()
    vbd.disk.errors = {Op.READ: errno.ENOSPC, Op.DISCARD: errno.EOPNOTSUPP}
    requests = [frontend.submit(BLKIF_OP_READ, 0, 8), frontend.submit(BLKIF_OP_DISCARD, 0, 8)]
    frontend.wait(requests)

    assert [BLKIF_RSP_ERROR, BLKIF_RSP_EOPNOTSUPP] == [request.status for request in requests]


def test_answers_come_in_any_order_and_to_their_own_ring(vbd: Served) -> None:
    """Requests of two rings may be completed in one batch in any order; each ring gets its own answers."""
    frontend = vbd.connect(Wishes(queues=2))
    vbd.disk.holding = True
    requests = [frontend.submit(BLKIF_OP_READ, 8 * place, 8) for place in range(20)]
    vbd.step(2)
    vbd.disk.give_back(reversed(vbd.disk.held))
    frontend.wait(requests)

    assert [BLKIF_RSP_OKAY] * 20 == [request.status for request in requests]
    assert [10, 10] == [queue.requests[BLKIF_OP_READ] for queue in vbd.engine.queues]


def test_full_memory_makes_requests_wait(vbd: Served) -> None:
    """Requests for which there is no memory stay in the ring, and are taken once there is some."""
    frontend = vbd.connect(Wishes(queues=8, indirect=32))
    vbd.disk.holding = True
    requests = [frontend.submit(BLKIF_OP_READ, 0, 136) for _ in range(256)]
    vbd.step(4)
    taken = len(vbd.disk.held)
    while vbd.disk.held:
        vbd.disk.give_back(vbd.disk.held[:7])
        vbd.step(2)
    frontend.wait(requests)

    assert 0 < taken < 256
    assert [BLKIF_RSP_OKAY] * 256 == [request.status for request in requests]


def test_drain_takes_nothing_more(vbd: Served) -> None:
    """While a disk goes away, requests in flight are answered, and later ones stay in the ring."""
    frontend = vbd.connect(Wishes(queues=2))
    vbd.disk.holding = True
    early = [frontend.submit(BLKIF_OP_READ, 0, 8, ring=0) for _ in range(2)]
    vbd.step()
    calls: list[int] = []
    connection = vbd.connection
    assert connection is not None
    connection.quiet(Hold.END)(calls.append)
    late = [frontend.submit(BLKIF_OP_WRITE, 8, data=bytes(PAGE), ring=0)]
    vbd.step(2)
    for request in list(vbd.disk.held):
        vbd.disk.give_back([request])
    vbd.step(2)
    late.append(frontend.submit(BLKIF_OP_WRITE, 8, data=bytes(PAGE), ring=1))
    vbd.step(2)
    connection.close()
    frontend.poll()
    vbd.connection = None

    assert ["READ", "READ"] == vbd.disk.seen
    assert [0] == calls
    assert [BLKIF_RSP_OKAY, BLKIF_RSP_OKAY, None, None] == [request.status for request in (*early, *late)]


def test_who_waits_for_quiet_has_the_layers_pass_on_what_they_hold(vbd: Served) -> None:
    """As soon as somebody waits until nothing is in flight, layers are told to pass on what they hold back."""
    frontend = vbd.connect()
    vbd.disk.holding = True
    request = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step()
    connection = vbd.connection
    assert connection is not None
    released: list[int] = []

    def release() -> None:
        released.append(len(vbd.disk.held))
        if vbd.disk.held:
            vbd.disk.give_back()

    connection.engine.release = release
    connection.engine.hold(Hold.PAUSE)
    vbd.step(2)
    assert [] == released
    calls: list[int] = []
    connection.quiet(Hold.SWAP)(calls.append)
    vbd.step(3)
    frontend.poll()

    assert ([1], [0], BLKIF_RSP_OKAY) == (released[:1], calls, request.status)


def test_turns_leave_no_objects_behind(vbd: Served) -> None:
    """The data path leaves no objects behind: after a thousand turns there are as many blocks of memory as before."""
    frontend = vbd.connect(Wishes(persistent=True))

    def turns(count: int) -> None:
        for turn in range(count):
            frontend.wait([frontend.submit(turn % 2, 0, data=bytes(PAGE)) for turn in range(4)])
            frontend.rings[0]._pool.sort(key=lambda page: page.gref)

    turns(50)
    gc.disable()
    try:
        before = sys.getallocatedblocks()
        turns(1000)
        after = sys.getallocatedblocks()
    finally:
        gc.enable()

    assert abs(after - before) < 100
