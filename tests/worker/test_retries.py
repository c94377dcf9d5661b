"""Requests that are kept and tried again: when, how often, what is reported, and how they end."""

from __future__ import annotations

import errno

import pytest

from tests.served import Served
from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
)
from xenbackend.block.policy import PAUSE_S, Policy
from xenbackend.block.request import AWAY, CACHE_LOST, IMAGE_DAMAGED, Op, Request
from xenbackend.rig.frontend import Wishes
from xenbackend.units import PAGE
from xenbackend.worker.retries import Retries

DATA = b"k" * PAGE
FULL = {Op.WRITE: errno.ENOSPC}


@pytest.mark.parametrize("persistent", [False, True])
def test_a_full_disk_is_waited_for(vbd: Served, persistent: bool) -> None:
    """Writes that find no space are done once there is some; the guest only sees that they take long."""
    frontend = vbd.connect(Wishes(persistent=persistent))
    vbd.disk.errors = FULL
    writes = [frontend.submit(BLKIF_OP_WRITE, 8 * place, data=DATA, push=False) for place in range(3)]
    read = frontend.submit(BLKIF_OP_READ, 80, 8)
    frontend.wait([read])
    for _ in range(5):
        vbd.pass_time(PAUSE_S)
    frontend.poll()
    waiting = [write.status for write in writes]
    vbd.disk.errors = {}
    vbd.pass_time(PAUSE_S)
    frontend.wait(writes)

    assert [None] * 3 == waiting
    assert [BLKIF_RSP_OKAY] * 4 == [request.status for request in (*writes, read)]
    assert DATA * 3 == frontend.read(0, 24)
    assert 0 == vbd.engine.in_flight


@pytest.mark.parametrize("operation", [BLKIF_OP_READ, BLKIF_OP_WRITE, BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER])
def test_a_server_that_is_away_is_waited_for(vbd: Served, operation: int) -> None:
    """Requests that never reached a server, flushes included, are repeated when it is back; none fails or is lost."""
    frontend = vbd.connect()
    vbd.disk.errors = dict.fromkeys(Op, AWAY)
    data = DATA if operation in (BLKIF_OP_WRITE, BLKIF_OP_WRITE_BARRIER) else b""
    request = frontend.submit(operation, 8, 8 if operation == BLKIF_OP_READ else 0, data=data)
    for _ in range(3):
        vbd.pass_time(PAUSE_S)
    frontend.poll()
    waiting, trouble = request.status, vbd.troubles[0]
    vbd.disk.errors = {}
    for _ in range(3):
        vbd.pass_time(PAUSE_S)
    frontend.wait([request])

    assert (None, BLKIF_RSP_OKAY) == (waiting, request.status)
    assert "the disk's server is away" in trouble
    assert not vbd.engine.holds.reasons


@pytest.mark.parametrize("operation", [BLKIF_OP_READ, BLKIF_OP_WRITE])
def test_a_cache_that_alone_has_something_is_waited_for(vbd: Served, operation: int) -> None:
    """If a cache cannot access its file, which alone has some data, reads and writes wait, and the sentence says not to
    remove the file.
    """
    frontend = vbd.connect()
    vbd.disk.errors = dict.fromkeys(Op, CACHE_LOST)
    is_write = operation == BLKIF_OP_WRITE
    request = frontend.submit(operation, 8, 8 * (not is_write), data=DATA * is_write)
    for _ in range(8):
        vbd.pass_time(PAUSE_S)
    frontend.poll()
    waiting, trouble = request.status, vbd.troubles[0]
    vbd.disk.errors = {}
    vbd.pass_time(PAUSE_S)
    frontend.wait([request])

    assert (None, BLKIF_RSP_OKAY) == (waiting, request.status)
    assert "repair the storage of that file, and do not remove it" in trouble


def test_a_damaged_image_is_waited_for(vbd: Served) -> None:
    """A write that would destroy more of a damaged image is never answered with an error; the sentence says how to
    repair the image.
    """
    frontend = vbd.connect()
    vbd.disk.errors = {Op.WRITE: IMAGE_DAMAGED}
    write = frontend.submit(BLKIF_OP_WRITE, 8, data=DATA)
    vbd.pass_time(PAUSE_S)
    frontend.poll()
    sentence = (
        "a write at byte 4096 was not done, because it would destroy metadata of the damaged image; it waits: shut "
        "the guest down, and repair the image with: xenbackend image check --repair"
    )

    assert ([sentence], None) == (vbd.troubles, write.status)
    assert b"\0" * PAGE == frontend.read(8, 8)


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_trouble_is_said_once_and_taken_back(vbd: Served, persistent: bool, count: int) -> None:
    """However many requests wait, and however often they are tried, the trouble is reported once, and so is its end."""
    frontend = vbd.connect(Wishes(persistent=persistent))
    vbd.disk.errors = FULL
    for place in range(count):
        frontend.submit(BLKIF_OP_WRITE, 8 * place, data=DATA)
        vbd.pass_time(PAUSE_S)
    said = vbd.troubles[:]
    standing = vbd.connection and vbd.connection.trouble
    vbd.disk.errors = {}
    vbd.pass_time(PAUSE_S)

    sentence = (
        "a write at byte 0 failed (No space left on device); the disk waits and tries again every second: make space"
    )

    assert [sentence] == said
    assert said == vbd.alarms
    assert said[0] == standing
    assert "" == vbd.troubles[1] == (vbd.connection and vbd.connection.trouble)
    assert 2 == len(vbd.troubles)


def test_so_many_tries_and_then_the_error(vbd: Served) -> None:
    """A read with 3 retries is tried 4 times, a second apart, and then the guest gets the error."""
    frontend = vbd.connect()
    vbd.disk.errors = {Op.READ: errno.EIO}
    read = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(2)
    tries = [len(vbd.disk.seen)]
    for _ in range(8):
        vbd.pass_time(0.5)
        tries.append(len(vbd.disk.seen))
    frontend.poll()

    assert [1, 1, 2, 2, 3, 3, 4, 4, 4] == tries
    assert BLKIF_RSP_ERROR == read.status
    assert ([], []) == (vbd.troubles, vbd.alarms)


def test_a_request_that_is_used_again_has_all_its_tries(vbd: Served) -> None:
    """A new request has all its tries, whatever happened to the one that used the same record before."""
    frontend = vbd.connect()
    for _ in range(3):
        vbd.disk.errors = {Op.READ: errno.EIO}
        vbd.disk.seen.clear()
        read = frontend.submit(BLKIF_OP_READ, 0, 8)
        vbd.step(2)
        vbd.pass_time(1)
        vbd.pass_time(1)
        vbd.disk.errors = {}
        vbd.pass_time(1)
        frontend.wait([read])

        assert BLKIF_RSP_OKAY == read.status
        assert ["READ"] * 4 == vbd.disk.seen


def test_each_kind_has_its_own_pace(vbd: Served) -> None:
    """A request that is to be retried soon neither hastens nor waits for one that is to be retried later."""
    vbd.policy = "read=retry 2 every 10s"
    frontend = vbd.connect()
    vbd.disk.errors = {Op.READ: errno.EIO, **FULL}
    read = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(2)
    write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    vbd.step(2)
    seen = []
    for _ in range(21):
        vbd.disk.seen.clear()
        vbd.pass_time(1)
        seen.append(sorted(vbd.disk.seen))
    frontend.poll()

    assert [9, 19] == [place for place, step in enumerate(seen) if "READ" in step]
    assert all("WRITE" in step for step in seen)
    assert (BLKIF_RSP_ERROR, None) == (read.status, write.status)


def test_who_has_to_wait_long_is_not_forgotten(vbd: Served) -> None:
    """A request that is due later is tried then, even if nothing else is left to be tried."""
    vbd.policy = "read=retry 2 every 10s"
    frontend = vbd.connect()
    vbd.disk.errors = {Op.READ: errno.EIO, **FULL}
    write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    vbd.step(2)
    read = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(2)
    vbd.disk.errors = {}
    vbd.pass_time(PAUSE_S)
    frontend.wait([write])
    vbd.pass_time(9)
    frontend.wait([read])

    assert [BLKIF_RSP_OKAY] * 2 == [write.status, read.status]


def test_another_policy_counts_from_the_next_failure_on(vbd: Served) -> None:
    """With a new policy `report`, a kept request is answered at its next failure, and the trouble is over."""
    frontend = vbd.connect()
    vbd.disk.errors = FULL
    write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    vbd.step(2)
    vbd.engine.retries.policy = Policy("enospc=report")
    vbd.pass_time(PAUSE_S)
    frontend.poll()

    assert BLKIF_RSP_ERROR == write.status
    assert "" == vbd.troubles[-1]


def test_discards_wait_too(vbd: Served) -> None:
    """A discard that finds no space is kept like a write, and the sentence names it."""
    frontend = vbd.connect()
    vbd.disk.errors = {Op.DISCARD: errno.EDQUOT}
    discard = frontend.submit(BLKIF_OP_DISCARD, 8, 8)
    vbd.step(2)
    vbd.disk.errors = {}
    vbd.pass_time(PAUSE_S)
    frontend.wait([discard])

    assert BLKIF_RSP_OKAY == discard.status
    assert vbd.troubles[0].startswith(f"a discard at byte {PAGE} failed (Disk quota exceeded)")


def test_the_end_answers_what_waits(vbd: Served) -> None:
    """When a frontend goes away, kept requests are answered with an error, and never tried again."""
    frontend = vbd.connect()
    vbd.disk.errors = FULL
    writes = [frontend.submit(BLKIF_OP_WRITE, 8 * place, data=DATA) for place in range(3)]
    vbd.step(3)
    vbd.disk.errors = {}
    assert vbd.disconnect()
    frontend.poll()
    vbd.pass_time(PAUSE_S)

    assert [BLKIF_RSP_ERROR] * 3 == [write.status for write in writes]
    assert ["WRITE"] * 3 == vbd.disk.seen
    assert bytes(PAGE) == bytes(vbd.disk.content[:PAGE])


def test_the_write_of_a_barrier_waits_and_the_barrier_with_it(vbd: Served) -> None:
    """A barrier whose write finds no space goes on with that write once there is some; nothing passes it meanwhile."""
    frontend = vbd.connect(Wishes(flush=False))
    vbd.disk.errors = FULL
    barrier = frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=DATA, push=False)
    behind = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(6)
    vbd.pass_time(PAUSE_S)
    waiting = [barrier.status, behind.status]
    vbd.disk.errors = {}
    vbd.pass_time(PAUSE_S)
    frontend.wait([barrier, behind])

    assert [None, None] == waiting
    assert ["FLUSH", "WRITE", "WRITE", "WRITE", "FLUSH", "READ"] == vbd.disk.seen
    assert DATA == behind.data


def test_the_end_answers_a_barrier_that_waits(vbd: Served) -> None:
    """When a frontend goes away, a barrier whose write is kept is answered with an error."""
    frontend = vbd.connect(Wishes(flush=False))
    vbd.disk.errors = FULL
    barrier = frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=DATA)
    vbd.step(6)
    assert vbd.disconnect()
    frontend.poll()

    assert BLKIF_RSP_ERROR == barrier.status


def test_a_barrier_does_not_pass_a_write_that_waits(vbd: Served) -> None:
    """A barrier waits for earlier writes even if they have to be retried."""
    frontend = vbd.connect(Wishes(flush=False))
    vbd.disk.errors = FULL
    write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    vbd.step(3)
    barrier = frontend.submit(BLKIF_OP_WRITE_BARRIER, 8, data=DATA)
    vbd.step(6)
    before = vbd.disk.seen[:]
    vbd.disk.errors = {}
    vbd.pass_time(PAUSE_S)
    frontend.wait([write, barrier])

    assert ["WRITE"] == before
    assert ["WRITE", "WRITE", "FLUSH", "WRITE", "FLUSH"] == vbd.disk.seen


def test_what_a_predecessor_left_is_kept_as_well(vbd: Served) -> None:
    """A successor that finds a full disk waits for space with its predecessor's requests, barriers included."""
    frontend = vbd.connect(Wishes(flush=False))
    vbd.disk.errors = FULL
    requests = [
        frontend.submit(operation, sector, data=DATA, push=False)
        for operation, sector in ((BLKIF_OP_WRITE, 0), (BLKIF_OP_WRITE_BARRIER, 8), (BLKIF_OP_WRITE, 16))
    ]
    frontend.poll()
    vbd.step(3)
    vbd.kill()
    vbd.connect_rings(rejoins=True)
    vbd.step(6)
    for _ in range(3):
        vbd.pass_time(PAUSE_S)
    frontend.poll()
    waiting = [request.status for request in requests]
    vbd.disk.errors = {}
    for _ in range(3):
        vbd.pass_time(PAUSE_S)
    frontend.wait(requests)

    assert [None] * 3 == waiting
    assert [BLKIF_RSP_OKAY] * 3 == [request.status for request in requests]
    assert DATA * 3 == frontend.read(0, 24)


def test_nothing_is_tried_while_the_disk_must_not_be_touched(vbd: Served) -> None:
    """While a failed flush or an administrator holds the disk, nothing is retried; what fell due is tried later."""
    frontend = vbd.connect()
    vbd.disk.errors = {**FULL, Op.FLUSH: errno.EIO}
    write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    vbd.step(2)
    flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    vbd.step(2)
    vbd.disk.errors = {}
    for _ in range(3):
        vbd.pass_time(PAUSE_S)
    held = vbd.disk.seen[:]
    assert vbd.connection is not None
    vbd.connection.resume()
    frontend.wait([write, flush])

    assert ["WRITE", "FLUSH"] == held
    assert [BLKIF_RSP_OKAY] * 2 == [write.status, flush.status]
    assert sorted(held * 2) == sorted(vbd.disk.seen)


def test_one_timer_is_enough() -> None:
    """One timer runs, however many requests wait. A request that is overdue, and may not be tried yet, sets none: a
    busy loop would take the CPU from all other disks.
    """
    now, timers = 0.0, []
    retries = Retries(Policy(""), lambda: now, lambda delay_s, call: timers.append((delay_s, call)), lambda _: None)
    retries.again = lambda: None
    for _ in range(3):
        request = Request()
        request.op, request.status = Op.WRITE, errno.ENOSPC
        assert retries.take(request)
    now = 1.5 * PAUSE_S
    for _, call in timers[:]:
        call()

    assert [PAUSE_S] == [delay_s for delay_s, _ in timers]
    assert 3 == len(retries.due())
