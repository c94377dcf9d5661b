"""A connection: its channels, its safety poll, and how a failed start is undone."""

from __future__ import annotations

import errno

import pytest

from tests.driven import FRONT
from tests.served import Served
from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_EOPNOTSUPP,
    BLKIF_RSP_ERROR,
    BLKIF_RSP_OKAY,
    X86_32,
)
from xenbackend.block.request import Op
from xenbackend.errors import KernelError
from xenbackend.journal import poison, poisoned
from xenbackend.rig.frontend import Wishes
from xenbackend.worker.connection import SAFETY_POLL_S, describe_failed_flush

NOTHING = {"mappings": 0, "pins": 0, "ports": 0}


def kick_in_vain(vbd: Served, times: int) -> int:
    """Notify the worker without work, `times` times; return how often it found the port pending."""
    turns = vbd.engine.turns
    for _ in range(times):
        vbd.frontend.rings[0].port.notify()
        vbd.step(2)
    found: int = vbd.engine.turns - turns
    return found


def test_port_that_fires_in_vain_is_heard_less_and_less(vbd: Served) -> None:
    """A few events without work do no harm; after that, each makes the port wait for up to 10 ms, until work comes."""
    frontend = vbd.connect()
    at_once = kick_in_vain(vbd, 100)
    for _ in range(20):
        vbd.pass_time(0.011)
        kick_in_vain(vbd, 1)
    waiting = kick_in_vain(vbd, 100)
    later = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.pass_time(0.011)
    frontend.poll()

    assert at_once < 12
    assert waiting <= 1
    assert BLKIF_RSP_OKAY == later.status


def test_lost_wake_up_is_found_and_counted(vbd: Served) -> None:
    """Work without an event is found by the second look of the safety poll, and counted as a missed wake-up."""
    frontend = vbd.connect()
    request = frontend.rings[0].submit(BLKIF_OP_READ, 0, 8)
    frontend.rings[0].ring.push()  # without a notification
    vbd.pass_time(SAFETY_POLL_S + 0.01)
    first_look = vbd.disk.seen[:]
    vbd.pass_time(SAFETY_POLL_S + 0.01)
    frontend.poll()

    assert [] == first_look
    assert BLKIF_RSP_OKAY == request.status
    assert vbd.connection is not None
    assert 1 == vbd.connection._counters.missed_wakeups


def test_port_that_cannot_be_armed_is_tried_again(vbd: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a port cannot be unmasked, its ring is looked at every second, and the port is tried again each time."""
    frontend = vbd.connect()
    assert vbd.connection is not None
    events, tries = vbd.connection._events, []
    real = events.unmask

    def unmask(port: int) -> None:
        tries.append(port)
        if len(tries) <= 2:
            raise KernelError("unmask a port", 5)
        real(port)

    monkeypatch.setattr(events, "unmask", unmask)
    for _ in range(3):
        request = frontend.rings[0].submit(BLKIF_OP_READ, 0, 8)
        frontend.rings[0].push()
        vbd.step(2)
        for _ in range(3):
            vbd.pass_time(SAFETY_POLL_S + 0.01)
        frontend.poll()
        assert BLKIF_RSP_OKAY == request.status

    assert len(tries) >= 3
    assert ["unmask a port: Input/output error"] * 2 == [str(bug) for bug in vbd.bugs]
    vbd.bugs.clear()


def test_ring_broken_in_silence_is_found(vbd: Served) -> None:
    """A ring whose producer index is out of range is stopped even if no event comes."""
    frontend = vbd.connect(Wishes(queues=2))
    frontend.rings[1].ring.index[0] = 2**31
    vbd.pass_time(SAFETY_POLL_S + 0.01)
    vbd.pass_time(SAFETY_POLL_S + 0.01)

    assert ["ring 1 was stopped: "] == [each[:20] for each in vbd.halted]
    assert "announced 2147483648 requests, but only 32 slots are free" in vbd.halted[0]


@pytest.mark.parametrize("key", ["ring-ref0", "ring-ref1", "event-channel"])
@pytest.mark.parametrize("ring", [0, 2])
def test_failed_connect_leaves_nothing(vbd: Served, ring: int, key: str) -> None:
    """If any page or port of any ring cannot be had, nothing stays mapped or bound, and another try succeeds."""
    vbd.connect(Wishes(queues=3, ring_order=1))
    vbd.disconnect()
    path = f"{FRONT}/queue-{ring}/{key}"
    good, vbd.nodes.values[path] = vbd.nodes.values[path], "9999"
    vbd.connection = None
    with pytest.raises(KernelError):
        vbd.connect_rings()
    failed = vbd.xen.held()
    vbd.nodes.values[path] = good
    vbd.connect_rings()

    assert NOTHING == failed
    assert {"mappings": 3, "pins": 6, "ports": 3} == vbd.xen.held()


def test_timers_that_come_after_the_end_do_nothing(vbd: Served) -> None:
    """Timers of a connection do no harm when they expire after its end."""
    vbd.connect()
    kick_in_vain(vbd, 30)
    vbd.disconnect()
    vbd.pass_time(60)

    assert NOTHING == vbd.xen.held()


def test_what_was_not_offered_is_refused(vbd: Served) -> None:
    """A discard that the toolstack forbids, and a request with more segments than were offered, reach no layer."""
    vbd.offered = {"can_discard": False, "max_segments": 32}
    frontend = vbd.connect()
    frontend.rings[0].max_indirect = 256
    requests = [
        frontend.submit(BLKIF_OP_DISCARD, 0, 8),
        frontend.submit(BLKIF_OP_READ, 0, 33 * 8),
        frontend.submit(BLKIF_OP_READ, 0, 32 * 8),
    ]
    frontend.wait(requests)

    assert [BLKIF_RSP_EOPNOTSUPP, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY] == [request.status for request in requests]
    assert ["READ"] == vbd.disk.seen


@pytest.mark.parametrize("step", ["fail_held", "publish"])
def test_bug_at_the_end_does_not_keep_the_guests_pages(vbd: Served, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """If anything raises an exception while a connection ends, pages are still unmapped and the end reported."""
    vbd.connect()
    assert vbd.connection is not None

    def bug() -> None:
        raise ValueError(step)

    monkeypatch.setattr(vbd.engine if step == "fail_held" else vbd.connection._counters, step, bug)

    assert vbd.disconnect()
    assert NOTHING == vbd.xen.held()
    assert [step] == [str(each) for each in vbd.bugs]
    vbd.bugs.clear()


def test_failed_flush_is_told(vbd: Served) -> None:
    """If flushes fail, an alarm tells once that the disk is paused."""
    frontend = vbd.connect()
    vbd.disk.errors = {Op.FLUSH: errno.EIO}
    for _ in range(2):
        frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    vbd.step(3)

    assert [describe_failed_flush(errno.EIO)] == vbd.alarms


def test_failed_flush_is_in_the_journal_before_anything_else(vbd: Served) -> None:
    """A failed flush is noted in the journal before it is reported, since the kernel reports it only once: a successor
    then knows of it.
    """
    frontend = vbd.connect()
    vbd.disk.errors = {Op.FLUSH: errno.EIO}
    noted: list[int] = []
    vbd.alarm = lambda _sentence: noted.append(poisoned(vbd.journal))
    frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    vbd.step(3)

    assert [errno.EIO] == noted


def test_successor_honours_a_failed_flush(vbd: Served) -> None:
    """A worker that rejoins the rings holds the disk for its predecessor's failed flush; with a new frontend it does
    not.
    """
    frontend = vbd.connect()
    vbd.disk.errors = {Op.FLUSH: errno.EIO}
    flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    vbd.step(3)
    vbd.disk.errors = {}
    vbd.kill()
    vbd.alarms.clear()
    vbd.connect_rings(rejoins=True)
    late = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(5)
    frontend.poll()
    held = (flush.status, late.status)
    assert vbd.connection is not None
    vbd.connection.resume()
    frontend.wait([flush, late])
    vbd.disconnect()

    assert (None, None) == held
    assert [describe_failed_flush(errno.EIO)] == vbd.alarms
    poison(vbd.journal, errno.EIO)
    assert bytes(4096) == vbd.connect().read(0, 8)
    assert 0 == poisoned(vbd.journal)


def test_what_was_lost_earlier_holds_the_disk(vbd: Served) -> None:
    """A connected frontend whose disk failed a flush before this worker started is not served until `resume`."""
    vbd.offered = {"goes_on": True}
    poison(vbd.journal, errno.EIO)
    frontend = vbd.connect()
    assert vbd.connection is not None
    read = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(4)
    frontend.poll()
    held = read.status
    vbd.connection.resume()
    frontend.wait([read])

    assert (None, BLKIF_RSP_OKAY) == (held, read.status)
    assert [describe_failed_flush(errno.EIO)] == vbd.alarms


@pytest.mark.parametrize(
    "wishes", [Wishes(), Wishes(layout=X86_32, start_index=2**32 - 9), Wishes(queues=2, persistent=True, indirect=32)]
)
def test_what_was_held_back_is_found_in_the_ring(vbd: Served, wishes: Wishes) -> None:
    """Requests that were held back when a worker left a connected frontend are found by the next one, without a
    journal, however often that happens: each is done in its order and answered once, before later ones.
    """
    vbd.offered, vbd.policy = {"goes_on": True}, "enospc=pause"
    vbd.disk.errors = {Op.WRITE: errno.ENOSPC}
    frontend = vbd.connect(wishes)
    held, done = [], []
    for place in range(6):
        pages = 16 if wishes.indirect and place == 3 else 1
        held.append(frontend.submit(BLKIF_OP_WRITE, 256 * place, data=bytes([place + 1]) * 4096 * pages))
        done.append(frontend.submit(BLKIF_OP_READ, 0, 8))
    frontend.wait(done)
    for _ in range(2):
        assert vbd.disconnect(goes_on=True)
        frontend.poll()
        assert [None] * len(held) == [request.status for request in held]
        vbd.journal[:] = bytes(len(vbd.journal))
        vbd.connect_rings()
        vbd.step(4)
        held.append(frontend.submit(BLKIF_OP_WRITE, 256 * len(held), data=bytes([len(held) + 1]) * 4096))
        vbd.step(4)
    vbd.disk.errors = {}
    vbd.pass_time(2.0)
    frontend.wait(held)
    found = [frontend.read(256 * place, 8)[0] for place in range(8)]
    frontend.poll()

    assert [BLKIF_RSP_OKAY] * 14 == [request.status for request in [*held, *done]]
    assert [1, 2, 3, 4, 5, 6, 7, 8] == found
    assert [] == vbd.halted


@pytest.mark.parametrize("op", [BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE_BARRIER])
def test_a_failed_flush_is_never_answered_while_its_frontend_stays(vbd: Served, op: int) -> None:
    """A worker that leaves a connected frontend does not answer a flush that failed, nor what is behind a barrier. The
    next worker does them after `resume`.
    """
    vbd.disk.errors = {Op.FLUSH: errno.EIO}
    frontend = vbd.connect(Wishes(flush=op == BLKIF_OP_FLUSH_DISKCACHE))
    data = b"" if op == BLKIF_OP_FLUSH_DISKCACHE else b"x" * 4096
    requests = [frontend.submit(op, 0, data=data, push=False), frontend.submit(BLKIF_OP_READ, 0, 8)]
    vbd.step(6)
    assert vbd.disconnect(goes_on=True)
    vbd.journal[:] = bytes(len(vbd.journal))
    poison(vbd.journal, errno.EIO)  # as the next service does, by what xenstore says
    vbd.offered, vbd.disk.errors = {"goes_on": True}, {}
    vbd.connect_rings()
    vbd.step(6)
    frontend.poll()
    before = requests[0].status
    assert vbd.connection is not None
    vbd.connection.resume()
    frontend.wait(requests)

    assert (None, [BLKIF_RSP_OKAY] * 2) == (before, [request.status for request in requests])
    assert not data or data == requests[1].data
    vbd.alarms.clear()


def test_a_ring_is_gone_on_with_in_its_order(vbd: Served) -> None:
    """Requests that a predecessor had taken are done before new ones, in the ring's order, and answered once."""
    frontend = vbd.connect()
    vbd.disk.holding = True
    requests = [frontend.submit(BLKIF_OP_WRITE, 0, data=bytes([place]) * 4096, push=False) for place in range(20)]
    frontend.rings[0].push()
    vbd.step(2)
    first, *_ = vbd.disk.held
    vbd.disk.give_back([vbd.disk.held[3], first])
    vbd.kill()
    vbd.disk.holding = False
    vbd.disk.seen.clear()
    requests.append(frontend.submit(BLKIF_OP_READ, 0, 8))
    vbd.connect_rings(rejoins=True)
    frontend.wait(requests)

    assert ["WRITE"] * 18 + ["READ"] == vbd.disk.seen
    assert [BLKIF_RSP_OKAY] * 21 == [request.status for request in requests]
    assert bytes([19]) * 4096 == requests[-1].data


def test_a_successor_kicks_the_frontend(vbd: Served) -> None:
    """A successor notifies the frontend, since its predecessor's notification may have been lost."""
    frontend = vbd.connect()
    vbd.disk.holding = True
    read = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(2)
    vbd.disk.give_back()
    vbd.disk.holding = False
    frontend.rings[0].port.clear()  # as if there had been no notification
    vbd.kill()
    vbd.connect_rings(rejoins=True)

    assert frontend.rings[0].port.clear()
    frontend.wait([read, frontend.submit(BLKIF_OP_READ, 8, 8)])
    assert BLKIF_RSP_OKAY == read.status
