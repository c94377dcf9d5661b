"""Holds, the reasons to take no request: what each stops, who is called when nothing is in flight, and what ends it."""

from __future__ import annotations

import errno

from tests.served import Served
from xenbackend.blkif.abi import (
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_OKAY,
)
from xenbackend.block.request import Op
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.rig.guest_ring import Submitted
from xenbackend.units import PAGE
from xenbackend.worker.holds import Hold, Holds

DATA = b"h" * PAGE


def test_who_waits_is_called_once() -> None:
    """A callback for the moment when nothing is in flight is called once, or never if its hold was removed before."""
    holds = Holds()
    called: list[str] = []
    holds.add(Hold.PAUSE, lambda: called.append("pause"))
    holds.add(Hold.END, lambda: called.append("end"))
    holds.remove(Hold.PAUSE)
    awaited = holds.awaits_quiet()
    holds.quiet()
    holds.quiet()

    assert awaited
    assert ["end"] == called
    assert (True, False) == (Hold.END in holds, holds.awaits_quiet())


def test_who_waits_for_quiet_is_called_once() -> None:
    """All such callbacks are called, once each, and their holds last until they are removed."""
    holds = Holds()
    called: list[str] = []
    holds.add(Hold.PAUSE, lambda: called.append("pause"))
    holds.add(Hold.SWAP, lambda: called.append("swap"))
    holds.quiet()
    holds.quiet()

    assert ["pause", "swap"] == called
    assert not holds.awaits_quiet()
    assert {Hold.PAUSE, Hold.SWAP} == holds.reasons


def test_what_was_taken_goes_on_while_a_predecessors_requests_are_done() -> None:
    """Every hold but REPLAY bars retries, since it stands for a disk that must be left alone."""
    barred = {}
    for why in Hold:
        holds = Holds()
        holds.add(why)
        barred[why] = holds.bar_retries()

    assert {why: why is not Hold.REPLAY for why in Hold} == barred
    assert not Holds().bar_retries()


def test_a_hold_takes_nothing_and_waits_for_what_is_in_flight(vbd: Served) -> None:
    """With a hold, earlier requests are answered, then the callback is called; later requests wait until the hold is
    removed.
    """
    frontend = vbd.connect(Wishes(queues=2))
    vbd.disk.holding = True
    early = [frontend.submit(BLKIF_OP_READ, 0, 8, ring=ring) for ring in (0, 1)]
    vbd.step(2)
    told: list[int] = []
    vbd.engine.hold(Hold.PAUSE, lambda: told.append(vbd.engine.in_flight))
    late = [frontend.submit(BLKIF_OP_READ, 0, 8, ring=ring) for ring in (0, 1)]
    vbd.step(4)
    before = told[:]
    vbd.disk.holding = False
    vbd.disk.give_back()
    vbd.step(4)
    frontend.poll()
    during = [each.status for each in (*early, *late)]
    vbd.engine.let_go(Hold.PAUSE)
    frontend.wait(late)

    assert [] == before
    assert [0] == told
    assert [BLKIF_RSP_OKAY, BLKIF_RSP_OKAY, None, None] == during


def test_who_waits_hears_of_the_last_answer(vbd: Served) -> None:
    """The callback is called when the last request in flight is answered, even if no other request comes."""
    frontend = vbd.connect()
    vbd.disk.holding = True
    read = frontend.submit(BLKIF_OP_READ, 0, 8)
    vbd.step(2)
    told: list[int] = []
    vbd.engine.hold(Hold.PAUSE, lambda: told.append(vbd.engine.in_flight))
    vbd.step(2)
    before = told[:]
    vbd.disk.give_back()
    vbd.step(2)
    frontend.poll()

    assert ([], [0]) == (before, told)
    assert BLKIF_RSP_OKAY == read.status


def test_each_hold_is_let_go_by_itself(vbd: Served) -> None:
    """With two holds nothing is taken until both are removed, in whatever order."""
    frontend = vbd.connect()
    for first, second in ((Hold.PAUSE, Hold.SWAP), (Hold.SWAP, Hold.PAUSE)):
        vbd.engine.hold(Hold.PAUSE, lambda: None)
        vbd.engine.hold(Hold.SWAP, lambda: None)
        vbd.step(2)
        read = frontend.submit(BLKIF_OP_READ, 0, 8)
        vbd.engine.let_go(first)
        vbd.step(3)
        frontend.poll()
        between = read.status
        vbd.engine.let_go(second)
        frontend.wait([read])

        assert (None, BLKIF_RSP_OKAY) == (between, read.status)


def test_a_pause_lets_a_barrier_come_to_its_end(vbd: Served) -> None:
    """A pause waits for a barrier that was taken, and for the requests behind it."""
    frontend = vbd.connect(Wishes(flush=False))
    vbd.disk.holding = True
    requests = [
        frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=DATA, push=False),
        frontend.submit(BLKIF_OP_READ, 0, 8),
    ]
    vbd.step(2)
    told: list[list[str]] = []
    vbd.engine.hold(Hold.PAUSE, lambda: told.append(vbd.disk.seen[:]))
    for _ in range(8):
        vbd.disk.give_back() if vbd.disk.held else None
        vbd.step(2)
    frontend.poll()

    assert [["FLUSH", "WRITE", "FLUSH", "READ"]] == told
    assert [BLKIF_RSP_OKAY] * 2 == [request.status for request in requests]


def test_a_pause_is_reached_with_a_failed_flush_or_kept_requests(vbd: Served) -> None:
    """A pause does not wait for what cannot go on: a failed flush, or a kept request, even of a barrier."""
    frontend = vbd.connect(Wishes(flush=False))
    vbd.disk.errors = {Op.WRITE: errno.ENOSPC}
    frontend.submit(BLKIF_OP_WRITE_BARRIER, 0, data=DATA)
    vbd.step(5)
    told: list[str] = []
    vbd.engine.hold(Hold.PAUSE, lambda: told.append("kept"))
    vbd.step(3)
    vbd.disk.errors = {Op.FLUSH: errno.EIO}
    vbd.engine.let_go(Hold.PAUSE)
    vbd.step(5)
    vbd.engine.hold(Hold.PAUSE, lambda: told.append("flush"))
    vbd.step(3)
    assert vbd.connection is not None
    vbd.connection.engine.let_go(Hold.FLUSH)
    vbd.engine.hold(Hold.PAUSE, lambda: told.append("flush let go"))
    vbd.step(3)

    assert ["kept", "flush", "flush let go"] == told


def test_a_failed_flush_is_not_done_again_while_the_chain_is_exchanged(vbd: Served) -> None:
    """If `resume` comes during an exchange, a failed flush is repeated after it, in the new chain."""
    frontend = vbd.connect()
    vbd.disk.errors = {Op.FLUSH: errno.EIO}
    flush = frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    vbd.step(3)
    vbd.engine.hold(Hold.SWAP, lambda: None)
    vbd.step(2)
    vbd.disk.errors = {}
    assert vbd.connection is not None
    vbd.connection.resume()
    vbd.step(3)
    during = vbd.disk.seen[:]
    vbd.engine.let_go(Hold.SWAP)
    frontend.wait([flush])

    assert ["FLUSH"] == during
    assert ["FLUSH", "FLUSH"] == vbd.disk.seen
    assert BLKIF_RSP_OKAY == flush.status


def test_a_predecessors_requests_are_done_before_a_paused_disk_is_left(vbd: Served) -> None:
    """A worker that closes in order does its predecessor's requests although the disk is paused, as no successor will;
    later ones stay in the ring.
    """
    frontend, write = _taken_over(vbd)
    vbd.engine.hold(Hold.PAUSE)
    later = frontend.submit(BLKIF_OP_WRITE, 8, data=DATA)
    vbd.step(5)
    before = vbd.disk.seen[:]
    told: list[int] = []
    vbd.engine.hold(Hold.END, lambda: told.append(vbd.engine.in_flight))
    vbd.step(5)
    frontend.wait([write])

    assert ([], ["WRITE"]) == (before, vbd.disk.seen)
    assert ([0], BLKIF_RSP_OKAY, None) == (told, write.status, later.status)


def test_a_pause_holds_a_predecessors_requests_too(vbd: Served) -> None:
    """If a worker dies while paused, its successor leaves the disk alone until it is told to resume."""
    frontend, write = _taken_over(vbd)
    told: list[int] = []
    vbd.engine.hold(Hold.PAUSE, lambda: told.append(vbd.engine.in_flight))
    vbd.step(5)
    held = vbd.disk.seen[:]
    vbd.engine.let_go(Hold.PAUSE)
    frontend.wait([write])

    assert [] == held
    assert [0] == told
    assert (BLKIF_RSP_OKAY, DATA) == (write.status, frontend.read(0, 8))


def _taken_over(vbd: Served) -> tuple[Frontend, Submitted]:
    """Return a frontend that a successor has rejoined, and a write that the dead worker had taken."""
    frontend = vbd.connect()
    vbd.disk.holding = True
    write = frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    vbd.step(2)
    vbd.kill()
    vbd.disk.holding = False
    vbd.disk.seen.clear()
    vbd.connect_rings(rejoins=True)
    return frontend, write
