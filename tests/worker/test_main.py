"""The worker's process against its supervisor's messages: in order, out of order, and when nobody is left to listen."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.driven import Driven, WorkerProcess
from xenbackend import counters, journal
from xenbackend.blkif.abi import BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenbackend.protocol import messages
from xenbackend.rig.frontend import DiskError, Wishes
from xenbackend.units import PAGE

pytestmark = pytest.mark.slow  # each starts a process
DATA = b"d" * PAGE
SLOW = "delay:write=100ms|ram:1M"


def test_messages_in_order(driven: Driven) -> None:
    """Open, Connect, Disconnect, Connect, Close: each has its answer, and the process ends with status 0."""
    driven.connect("ram:1M").write(0, DATA)
    driven.reconnect()

    assert DATA == driven.frontend.read(0, 8)
    driven.worker.end()
    assert [] == driven.worker.said


def test_a_frontend_that_comes_again_takes_no_more_descriptors(driven: Driven) -> None:
    """What a worker opens for a connection it closes with it; what says whether to look for requests it has once."""
    descriptors = Path(f"/proc/{driven.worker.process.pid}/fd")
    driven.connect("ram:1M")
    before = sorted(each.name for each in descriptors.iterdir())
    driven.reconnect()

    assert before == sorted(each.name for each in descriptors.iterdir())


def test_supervisors_death_ends_the_worker_in_order(driven: Driven) -> None:
    """When the socket closes, what is in flight is answered before the chain is closed and the process ends."""
    driven.connect(SLOW)
    request = driven.begin_write(DATA)
    driven.worker.socket.close()

    assert 0 == driven.worker.process.wait(10)
    driven.frontend.poll()
    assert BLKIF_RSP_OKAY == request.status


def test_close_right_behind_disconnect_waits_for_it(driven: Driven) -> None:
    """Close may come while Disconnect still drains: the chain is closed when nothing is in flight any more."""
    driven.connect(SLOW)
    request = driven.begin_write(DATA)
    driven.worker.send(messages.Disconnect())
    driven.worker.send(messages.Close())
    driven.worker.expect(messages.Disconnected)
    driven.worker.expect(messages.Closed)

    assert 0 == driven.worker.process.wait(10)
    driven.frontend.poll()
    assert BLKIF_RSP_OKAY == request.status


def test_failed_open_is_said(driven: Driven) -> None:
    """A chain that cannot be opened is answered with a sentence, and the worker can be ended as ever."""
    answer = driven.worker.open("aio:/nonexistent/image")

    assert isinstance(answer, messages.Failed)
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
    agreed |= {"goes_on": False}

    assert {"chain": "ram:1M", "connect": agreed} == journal.AGREED.read(driven.worker.journal)
    driven.disconnect()
    assert journal.AGREED.read(driven.worker.journal) is None


def test_command_is_answered_by_the_layer(driven: Driven) -> None:
    """A verb reaches the layer that it names; where there is none, the reply says so."""
    driven.connect("fault:op=write,limit=1|ram:1M")
    with pytest.raises(DiskError):
        driven.frontend.write(0, DATA)
    driven.worker.send(messages.Command(1, "fault", "count", []))
    driven.worker.send(messages.Command(2, "nobody", "count", []))

    assert messages.Reply(1, ok=True, data="1") == driven.worker.expect(messages.Reply)
    assert not driven.worker.expect(messages.Reply).ok


@pytest.mark.parametrize(("size", "expected"), [("x", "ValueError"), ("300000", "too large"), ("40000", "too large")])
def test_command_that_cannot_be_answered_is_told(driven: Driven, size: str, expected: str) -> None:
    """A layer's bug over a verb, and an answer that fits into no datagram, come back as a sentence; work goes on."""
    driven.connect("clumsy:at=nothing|ram:1M")
    driven.worker.send(messages.Command(1, "clumsy", "bytes", [size]))
    driven.worker.send(messages.Command(2, "clumsy", "bytes", ["3"]))
    reply = driven.worker.expect(messages.Reply)

    assert (1, False) == (reply.id, reply.ok)
    assert expected in reply.data
    assert messages.Reply(2, ok=True, data="\0\0\0") == driven.worker.expect(messages.Reply)


def test_most_memories_can_be_handed_over(driven: Driven) -> None:
    """As many memories as a supervisor keeps, and the journal, fit beside one message."""
    driven.worker.kept = {str(number): os.memfd_create("kept") for number in range(messages.MAX_MEMORIES)}

    assert isinstance(driven.worker.open("ram:1M"), messages.Opened)
    assert messages.MAX_MEMORIES < len(driven.worker.kept)


def test_paused_disk_is_told(driven: Driven) -> None:
    """The supervisor hears of a flush that failed."""
    driven.connect("fault:op=flush|ram:1M")
    driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)

    assert "the disk is paused" in driven.worker.expect(messages.Paused).sentence


def test_layers_bug_is_said_and_counted_and_survived(driven: Driven) -> None:
    """D8: a layer's bug ends its requests with an error, is said with its text, is counted; the worker goes on."""
    driven.connect("clumsy:at=complete|ram:1M")
    with pytest.raises(DiskError) as caught:
        driven.frontend.write(0, DATA)
    driven.worker.send(messages.Command(1, "clumsy", "x", []))
    driven.worker.expect(messages.Reply)

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


def test_counters_are_up_to_date_when_a_worker_was_asked_where_it_stands(driven: Driven) -> None:
    """Who asks need not wait for the second that counters are published in."""
    frontend = driven.connect("ram:1M")
    counted = []
    for _ in range(3):
        frontend.write(0, DATA)
        driven.worker.stand()
        counted.append(driven.worker.counters()["writes"])

    assert [1, 2, 3] == counted


def test_a_pause_is_told_when_nothing_is_in_flight(driven: Driven) -> None:
    """What was taken is answered first, what comes waits for Resume; a disk without a frontend is held at once."""
    driven.open(SLOW)
    driven.worker.ask(messages.Pause(), messages.Held)
    driven.worker.send(messages.Resume())
    driven.attach(Wishes())
    early = driven.begin_write(DATA)
    driven.worker.ask(messages.Pause(), messages.Held)
    driven.frontend.poll()
    late = driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    driven.worker.stand()
    driven.frontend.poll()
    held = (early.status, late.status)
    driven.worker.send(messages.Resume())
    driven.frontend.wait([late])

    assert (BLKIF_RSP_OKAY, None) == held
    assert BLKIF_RSP_OKAY == late.status


def test_a_paused_disk_stays_so(driven: Driven) -> None:
    """A pause outlives the frontend's connection, and a worker that is opened so: each is told Held once connected."""
    driven.open("ram:1M", is_paused=True)
    driven.attach(Wishes())
    driven.worker.expect(messages.Held)
    driven.disconnect()
    for ring in driven.frontend.rings:
        ring.close()
    driven.attach(Wishes())
    driven.worker.expect(messages.Held)
    flush = driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    driven.worker.stand()
    driven.frontend.poll()
    held = flush.status
    driven.worker.send(messages.Resume())
    driven.frontend.wait([flush])

    assert (None, BLKIF_RSP_OKAY) == (held, flush.status)


def test_a_disk_that_lost_something_waits_to_be_resumed(driven: Driven) -> None:
    """What an earlier worker lost holds a frontend in service until somebody resumes; one that begins anew is free."""
    driven.goes_on = True
    driven.open("ram:1M", lost="it lost a flush yesterday")
    driven.attach(Wishes())
    (said,) = [message for message in driven.worker.said if isinstance(message, messages.Paused)]
    flush = driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    standing = driven.worker.stand()
    driven.frontend.poll()
    held = flush.status
    driven.worker.send(messages.Resume())
    driven.frontend.wait([flush])
    driven.reconnect().flush()

    assert "it lost a flush yesterday" == said.sentence == standing.paused
    assert (None, BLKIF_RSP_OKAY) == (held, flush.status)
    assert "" == driven.worker.stand().paused


def test_a_frontend_that_begins_anew_goes_by_what_it_finds(driven: Driven) -> None:
    """A guest that boots after something was lost is not held: it reads what is there."""
    driven.open("ram:1M", lost="it lost a flush yesterday")
    driven.attach(Wishes()).flush()

    assert "" == driven.worker.stand().paused


def test_where_a_worker_stands(driven: Driven) -> None:
    """A supervisor that is a new one hears in which phase the worker is, of which chain, and what is wrong now."""
    phases = [driven.worker.stand()]
    driven.open(SLOW, policy="write=pause")
    phases.append(driven.worker.stand())
    driven.attach(Wishes())
    phases.append(driven.worker.stand())
    request = driven.begin_write(DATA)
    driven.worker.send(messages.Disconnect())
    phases.append(driven.worker.stand())
    driven.worker.expect(messages.Disconnected)
    driven.frontend.wait([request])
    phases.append(driven.worker.stand())

    assert ["idle", "open", "serving", "disconnecting", "open"] == [each.phase for each in phases]
    assert ["", SLOW, SLOW, SLOW, SLOW] == [each.chain for each in phases]
    assert [[], *[["delay:write=100ms", "ram:1M"]] * 4] == [[layer.text for layer in each.layers] for each in phases]
    assert {("", "", "")} == {(each.halted, each.paused, each.trouble) for each in phases}


def test_a_worker_that_waits_for_its_image_says_so(driven: Driven, images: list[Path]) -> None:
    """Between Connect and the image's lock a worker is connecting, so that nobody tells it to connect again."""
    other = WorkerProcess(driven.worker.host)
    other.open(f"aio:{images[0]}")
    driven.open(f"aio:{images[0]}", may_wait=True)
    driven.announce(Wishes())
    driven.offer_rings()
    waiting = driven.worker.stand().phase
    other.drop()
    driven.joined()

    assert ("connecting", "serving") == (waiting, driven.worker.stand().phase)


def test_a_worker_that_still_ends_its_export_is_connecting(driven: Driven, tmp_path: Path) -> None:
    """The export's last flush may take long; a supervisor that asks meanwhile need not send Connect again."""
    driven.open("delay:flush=100ms|ram:1M", export=str(tmp_path / "nbd" / "sock"))
    driven.announce(Wishes())
    driven.offer_rings()
    ending = driven.worker.stand().phase
    driven.joined()

    assert ("connecting", "serving") == (ending, driven.worker.stand().phase)


def test_trouble_is_told_and_a_new_policy_obeyed(driven: Driven) -> None:
    """A full disk is told and stands in a report; a policy that says report ends it for the guest."""
    driven.connect("fault:op=write,errno=ENOSPC|ram:1M")
    write = driven.frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    trouble = driven.worker.expect(messages.Trouble).sentence
    standing = driven.worker.stand().trouble
    driven.worker.send(messages.Obey("enospc=report"))
    driven.worker.send(messages.Resume())
    over = driven.worker.expect(messages.Trouble).sentence
    driven.frontend.wait([write])

    assert trouble.endswith("make space")
    assert trouble == standing
    assert "" == over == driven.worker.stand().trouble
    assert BLKIF_RSP_ERROR == write.status


def test_a_worker_that_hands_over_leaves_what_it_held(driven: Driven) -> None:
    """A request that failed and is kept is not answered by a worker that a successor follows: the successor does it."""
    driven.connect("fault:op=write,errno=ENOSPC|ram:1M")
    write = driven.frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    driven.worker.expect(messages.Trouble)
    driven.worker.ask(messages.Close(hands_over=True), messages.Closed)
    driven.frontend.poll()
    left = write.status
    driven.worker.process.wait(10)
    driven.succeed("ram:1M")
    driven.frontend.wait([write])

    assert (None, BLKIF_RSP_OKAY) == (left, write.status)


def test_a_last_flush_that_fails_pauses_the_successor(driven: Driven) -> None:
    """What could not be made durable at the end of a worker is lost to a guest that goes on: the service hears of it,
    and a successor that has the journal does not answer the guest's next flush.
    """
    driven.connect("fault:op=flush,limit=1|ram:1M").write(0, DATA)
    driven.worker.ask(messages.Close(hands_over=True), messages.Paused)
    driven.worker.expect(messages.Closed)
    driven.worker.process.wait(10)
    driven.succeed("ram:1M")

    assert "a flush failed (EIO)" in driven.worker.stand().paused
