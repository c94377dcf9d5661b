"""The worker's process against its supervisor's messages: in order, out of order, and when nobody is left to listen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.driven import Driven
from xenbackend import control, counters, journal
from xenbackend.blkif.abi import BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenbackend.rig.frontend import DiskError
from xenbackend.rig.guest_ring import Submitted
from xenbackend.units import PAGE

pytestmark = pytest.mark.slow  # each starts a process
DATA = b"d" * PAGE
SLOW = "delay:write=100ms|ram:1M"


@pytest.fixture
def driven(tmp_path: Path) -> Iterator[Driven]:
    """A worker that knows a driver with bugs."""
    with Driven(tmp_path, drivers={"clumsy": "tests.helpers_block:Clumsy"}) as driven:
        yield driven


def begin_write(driven: Driven) -> Submitted:
    """Return a write that the worker has taken and that takes its time."""
    request = driven.frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    words = journal.RingJournal(driven.worker.journal, 0, journal.SLOT).words
    while not words[journal.REQ_CONS]:
        pass
    return request


def test_messages_in_order(driven: Driven) -> None:
    """Open, Connect, Disconnect, Connect, Close: each has its answer, and the process ends with status 0."""
    driven.connect("ram:1M").write(0, DATA)
    driven.reconnect()

    assert DATA == driven.frontend.read(0, 8)
    driven.worker.end()
    assert [] == driven.worker.said


def test_supervisors_death_ends_the_worker_in_order(driven: Driven) -> None:
    """When the socket closes, what is in flight is answered before the chain is closed and the process ends."""
    driven.connect(SLOW)
    request = begin_write(driven)
    driven.worker.socket.close()

    assert 0 == driven.worker.process.wait(10)
    driven.frontend.poll()
    assert BLKIF_RSP_OKAY == request.status


def test_close_right_behind_disconnect_waits_for_it(driven: Driven) -> None:
    """Close may come while Disconnect still drains: the chain is closed when nothing is in flight any more."""
    driven.connect(SLOW)
    request = begin_write(driven)
    driven.worker.send(control.Disconnect())
    driven.worker.send(control.Close())
    driven.worker.expect(control.Disconnected)
    driven.worker.expect(control.Closed)

    assert 0 == driven.worker.process.wait(10)
    driven.frontend.poll()
    assert BLKIF_RSP_OKAY == request.status


def test_failed_open_is_said(driven: Driven) -> None:
    """A chain that cannot be opened is answered with a sentence, and the worker can be ended as ever."""
    answer = driven.worker.open("aio:/nonexistent/image")

    assert isinstance(answer, control.Failed)
    assert "/nonexistent/image" in answer.sentence
    driven.worker.end()


def test_successor_gets_the_memories(driven: Driven) -> None:
    """What a layer asked to keep is handed to the supervisor, and a successor that gets it back goes on with it."""
    driven.connect("ram:1M").write(8, DATA)
    driven.worker.process.kill()
    driven.worker.process.wait()
    driven.start_successor()
    driven.connect("ram:1M")

    assert DATA == driven.frontend.read(8, 8)


def test_journals_header_tells_what_was_agreed(driven: Driven) -> None:
    """A successor finds in the journal what its predecessor had agreed with the frontend."""
    frontend = driven.connect("ram:1M")
    rings = [{"grefs": frontend.rings[0].grefs, "event_channel": frontend.rings[0].port.number}]
    agreed = {"protocol": "x86_64-abi", "rings": rings, "persistent": False, "can_discard": True, "max_segments": 256}

    assert {"chain": "ram:1M", "connect": agreed} == journal.AGREED.read(driven.worker.journal)
    driven.disconnect()
    assert journal.AGREED.read(driven.worker.journal) is None


def test_command_is_answered_by_the_layer(driven: Driven) -> None:
    """A verb reaches the layer that it names; where there is none, the reply says so."""
    driven.connect("fault:op=write,limit=1|ram:1M")
    with pytest.raises(DiskError):
        driven.frontend.write(0, DATA)
    driven.worker.send(control.Command(1, "fault", "count", []))
    driven.worker.send(control.Command(2, "nobody", "count", []))

    assert control.Reply(1, ok=True, data="1") == driven.worker.expect(control.Reply)
    assert not driven.worker.expect(control.Reply).ok


@pytest.mark.parametrize(("size", "expected"), [("x", "ValueError"), ("300000", "too large"), ("40000", "too large")])
def test_command_that_cannot_be_answered_is_told(driven: Driven, size: str, expected: str) -> None:
    """A layer's bug over a verb, and an answer that fits into no datagram, come back as a sentence; work goes on."""
    driven.connect("clumsy:at=nothing|ram:1M")
    driven.worker.send(control.Command(1, "clumsy", "bytes", [size]))
    driven.worker.send(control.Command(2, "clumsy", "bytes", ["3"]))
    reply = driven.worker.expect(control.Reply)

    assert (1, False) == (reply.id, reply.ok)
    assert expected in reply.data
    assert control.Reply(2, ok=True, data="\0\0\0") == driven.worker.expect(control.Reply)


def test_most_memories_can_be_handed_over(driven: Driven) -> None:
    """As many memories as a supervisor keeps, and the journal, fit beside one message."""
    driven.worker.kept = {str(number): os.memfd_create("kept") for number in range(control.MAX_MEMORIES)}

    assert isinstance(driven.worker.open("ram:1M"), control.Opened)
    assert control.MAX_MEMORIES < len(driven.worker.kept)


def test_paused_disk_is_told(driven: Driven) -> None:
    """The supervisor hears of a flush that failed."""
    driven.connect("fault:op=flush|ram:1M")
    driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)

    assert "the disk is paused" in driven.worker.expect(control.Paused).sentence


def test_layers_bug_is_said_and_counted_and_survived(driven: Driven) -> None:
    """D8: a layer's bug ends its requests with an error, is said with its text, is counted; the worker goes on."""
    driven.connect("clumsy:at=complete|ram:1M")
    with pytest.raises(DiskError) as caught:
        driven.frontend.write(0, DATA)
    driven.worker.send(control.Command(1, "clumsy", "x", []))
    driven.worker.expect(control.Reply)

    assert BLKIF_RSP_ERROR == caught.value.status
    assert ["critical"] == [line.level for line in driven.worker.said]
    assert "KeyError: 'complete'" in driven.worker.said[0].event


@pytest.mark.parametrize("at", ["submit", "complete"])
def test_bug_in_the_last_flush_does_not_keep_the_disk(driven: Driven, at: str) -> None:
    """R23: a layer that fails over the last flush, on its way down or up, is reported, and the disk goes away."""
    driven.connect(f"clumsy:at={at}|ram:1M")
    driven.disconnect()
    driven.worker.end()

    assert ["critical"] == [line.level for line in driven.worker.said]


def test_counters_outlive_connections(driven: Driven) -> None:
    """The counters in the journal add up over connections, and are exact when one has ended."""
    driven.connect("ram:1M")
    for _ in range(2):
        driven.frontend.write(0, DATA)
        driven.frontend.read(0, 8)
        driven.frontend.flush()
        driven.frontend.discard(0, 8)
        driven.reconnect()
    driven.worker.end()
    counted = driven.worker.counters()
    wanted = {"reads": 2, "writes": 2, "flushes": 2, "discards": 2, "read_bytes": 2 * PAGE, "written_bytes": 2 * PAGE}

    assert wanted == {name: counted[name] for name in wanted}
    assert [0] * 4 == [counted[name] for name in ("errors", "guest_errors", "in_flight", "bugs")]
    assert counters.percentile_ns(driven.worker.journal, 0.5) > 0
