"""Write barriers through a real ring: the order of their steps, what waits for them, and how they end."""

from __future__ import annotations

import errno

import pytest

from tests.served import Served
from xenbackend.blkif.abi import (
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
)
from xenbackend.block.request import Op
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE

WISHES = Wishes(flush=False, queues=2)
DATA = b"b" * PAGE


@pytest.mark.parametrize("operation", [BLKIF_OP_WRITE_BARRIER, BLKIF_OP_FLUSH_DISKCACHE])
@pytest.mark.parametrize("persistent", [False, True])
def test_barrier_is_drain_flush_write_flush(vbd: Served, operation: int, persistent: bool) -> None:
    """A barrier, or a flush with data, begins when all requests before it are done; later requests begin when it has
    ended.
    """
    frontend = vbd.connect(Wishes(flush=False, queues=2, persistent=persistent))
    vbd.disk.holding = True
    first = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA, ring=1)
    vbd.step()
    barrier = frontend.submit(operation, 8, data=DATA * 2, ring=0, push=False)
    behind = frontend.submit(BLKIF_OP_READ, 8, 16, ring=0)
    beside = frontend.submit(BLKIF_OP_READ, 0, 8, ring=1)
    steps = []
    while frontend.rings[0].in_flight() + frontend.rings[1].in_flight():
        vbd.step(3)
        steps.append([Op(request.op).name for request in vbd.disk.held])
        vbd.disk.give_back()
        frontend.poll()

    assert [["WRITE"], ["FLUSH"], ["WRITE"], ["FLUSH"]] == steps[:4]
    assert ["READ", "READ"] == [operation for step in steps[4:] for operation in step]
    assert [BLKIF_RSP_OKAY] * 4 == [request.status for request in (first, barrier, behind, beside)]
    assert DATA * 2 == behind.data


def test_empty_barrier_is_one_flush(vbd: Served) -> None:
    """A barrier without data is a flush of all that was written before."""
    frontend = vbd.connect(WISHES)
    frontend.flush()

    assert ["FLUSH"] == vbd.disk.seen


def test_barriers_in_a_row_are_served_one_after_the_other(vbd: Served) -> None:
    """Barriers that follow one another in the ring are served one at a time, in order."""
    frontend = vbd.connect(WISHES)
    requests = [
        frontend.submit(BLKIF_OP_WRITE_BARRIER, sector, data=DATA, ring=0, push=False) for sector in range(0, 80, 8)
    ]
    frontend.wait(requests)

    assert [BLKIF_RSP_OKAY] * 10 == [request.status for request in requests]
    assert ["FLUSH", "WRITE", "FLUSH"] * 10 == vbd.disk.seen


def test_failed_write_of_a_barrier_is_answered_with_an_error(vbd: Served) -> None:
    """A barrier whose write fails ends with an error, and the requests behind it go on."""
    frontend = vbd.connect(WISHES)
    vbd.disk.errors = {Op.WRITE: errno.EIO}
    barrier = frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=DATA, ring=0, push=False)
    behind = frontend.submit(BLKIF_OP_READ, 0, 8, ring=0)
    frontend.wait([barrier, behind])

    assert [BLKIF_RSP_ERROR, BLKIF_RSP_OKAY] == [barrier.status, behind.status]
    assert ["FLUSH", "WRITE", "READ"] == vbd.disk.seen


def test_failed_flush_of_a_barrier_holds_it(vbd: Served) -> None:
    """A barrier whose flush fails is not answered until the disk goes away, and no request passes it."""
    frontend = vbd.connect(WISHES)
    vbd.disk.errors = {Op.FLUSH: errno.EIO}
    barrier = frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=DATA, ring=0, push=False)
    behind = frontend.submit(BLKIF_OP_READ, 0, 8, ring=0)
    vbd.step(6)

    assert [None, None] == [barrier.status, behind.status]
    assert ["FLUSH"] == vbd.disk.seen
    assert vbd.disconnect()
    frontend.poll()
    assert [BLKIF_RSP_ERROR, None] == [barrier.status, behind.status]


def test_barrier_with_a_bad_page_fails_and_holds_up_nobody(vbd: Served) -> None:
    """A barrier whose data cannot be copied is refused before anything is submitted, and later requests go on."""
    frontend = vbd.connect(WISHES)
    barrier = frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=DATA, ring=0, push=False)
    vbd.guest.fail(barrier.pages[0].gref, -1)
    behind = frontend.submit(BLKIF_OP_READ, 0, 8, ring=0)
    frontend.wait([barrier, behind])

    assert [BLKIF_RSP_ERROR, BLKIF_RSP_OKAY] == [barrier.status, behind.status]
    assert ["READ"] == vbd.disk.seen


def test_disk_goes_away_behind_its_barriers(vbd: Served) -> None:
    """Barriers that were taken are finished before the disk goes away."""
    frontend = vbd.connect(WISHES)
    vbd.disk.holding = True
    requests = [frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=DATA, ring=0, push=False) for _ in range(3)]
    frontend.poll()
    vbd.step()
    left = not vbd.disconnect()
    vbd.disk.holding = False
    vbd.disk.give_back()
    vbd.step(30)
    frontend.poll()
    vbd.connection = None

    assert left
    assert [BLKIF_RSP_OKAY] * 3 == [request.status for request in requests]
    assert 1 == vbd.flushes_at_end
    assert ["FLUSH", "WRITE", "FLUSH"] * 3 == vbd.disk.seen
