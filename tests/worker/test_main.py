"""The worker's process and its supervisor's messages: in order, out of order, and when nobody is left to listen."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.driven import Driven, WorkerProcess
from xenbackend import counters, journal
from xenbackend.blkif.abi import BLKIF_OP_FLUSH_DISKCACHE, BLKIF_OP_WRITE, BLKIF_RSP_ERROR, BLKIF_RSP_OKAY
from xenbackend.protocol import messages
from xenbackend.protocol.codes import Code
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import DiskError, Wishes
from xenbackend.units import PAGE

pytestmark = pytest.mark.slow  # each starts a process
DATA = b"d" * PAGE
SLOW = "delay:write=100ms|ram:1M"


def test_messages_in_order(driven: Driven) -> None:
    """Open, Serve, Leave, Serve and Close are each answered, and the process ends with status 0."""
    driven.connect("ram:1M").write(0, DATA)
    driven.reconnect()

    assert DATA == driven.frontend.read(0, 8)
    driven.worker.end()
    assert [] == driven.worker.lines


def test_a_frontend_that_comes_again_takes_no_more_descriptors(driven: Driven) -> None:
    """A worker closes what it has opened for a connection, so that a reconnection takes no more descriptors."""
    descriptors = Path(f"/proc/{driven.worker.process.pid}/fd")
    driven.connect("ram:1M")
    before = sorted(each.name for each in descriptors.iterdir())
    driven.reconnect()

    assert before == sorted(each.name for each in descriptors.iterdir())


def test_supervisors_death_ends_the_worker_in_order(driven: Driven) -> None:
    """When the supervisor's socket closes, requests in flight are answered, the chain is closed and the worker ends."""
    driven.connect(SLOW)
    request = driven.begin_write(DATA)
    driven.worker.socket.close()

    assert 0 == driven.worker.process.wait(10)
    driven.frontend.poll()
    assert BLKIF_RSP_OKAY == request.status


def test_close_right_behind_leave_waits_for_it(driven: Driven) -> None:
    """If Close comes while Leave still drains, the chain is closed once nothing is in flight."""
    driven.connect(SLOW)
    request = driven.begin_write(DATA)
    driven.worker.tell(messages.Leave)
    driven.worker.close()

    assert 0 == driven.worker.process.wait(10)
    driven.frontend.poll()
    assert BLKIF_RSP_OKAY == request.status


def test_failed_open_is_said(driven: Driven) -> None:
    """If a chain cannot be opened, the standing says why, and the worker can be closed as usual."""
    standing = driven.worker.open("aio:/nonexistent/image")

    assert (Stage.IDLE, errno.ENOENT) == (standing.stage, standing.errno)
    assert "/nonexistent/image" in standing.failure
    driven.worker.end()


def test_successor_gets_the_memories(driven: Driven) -> None:
    """A memory that a layer keeps goes to the supervisor, and a successor that gets it back continues with it."""
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

    assert {"chain": "ram:1M", "connect": agreed, "order": 0} == journal.AGREED.read(driven.worker.journal)
    driven.disconnect()
    assert {"chain": "ram:1M", "connect": None, "order": 0} == journal.AGREED.read(driven.worker.journal)


def test_command_is_answered_by_the_layer(driven: Driven) -> None:
    """A command reaches the layer that it names; if there is none, the reply says so."""
    driven.connect("fault:op=write,limit=1|ram:1M")
    with pytest.raises(DiskError):
        driven.frontend.write(0, DATA)
    commands = [messages.Command(*each, []) for each in (("fault", "count"), ("nobody", "count"), ("fault", "sing"))]
    replies = [driven.worker.ask(command) for command in commands]

    assert (Code.OK, "1") == (replies[0].code, replies[0].data)
    assert [Code.INVALID] * 2 == [reply.code for reply in replies[1:]]
    assert "'nobody'" in replies[1].sentence
    assert "'sing'" in replies[2].sentence


@pytest.mark.parametrize(
    ("size", "code", "expected"),
    [
        ("x", Code.BUG, "ValueError"),
        ("300000", Code.INVALID, "too large"),
        ("40000", Code.INVALID, "too large"),
    ],
)
def test_command_that_cannot_be_answered_is_told(driven: Driven, size: str, code: Code, expected: str) -> None:
    """If a layer raises an exception over a command, or its answer is too long for a datagram, the reply says so, and
    the worker goes on.
    """
    driven.connect("clumsy:at=nothing|ram:1M")
    reply = driven.worker.ask(messages.Command("clumsy", "bytes", [size]))

    assert (code, "") == (reply.code, reply.data)
    assert expected in reply.sentence
    assert "\0\0\0" == driven.worker.ask(messages.Command("clumsy", "bytes", ["3"])).data


def test_most_memories_can_be_handed_over(driven: Driven) -> None:
    """The largest number of memories and the journal fit beside one message."""
    driven.worker.openers.memories = {str(number): os.memfd_create("kept") for number in range(messages.MAX_MEMORIES)}

    assert Stage.OPEN == driven.worker.open("ram:1M").stage
    assert messages.MAX_MEMORIES < len(driven.worker.kept)


def test_paused_disk_is_told(driven: Driven) -> None:
    """The supervisor is told of a failed flush."""
    driven.connect("fault:op=flush|ram:1M")
    driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)

    assert "the disk is paused" in driven.worker.expect_standing().flush_failed


def test_layers_bug_is_said_and_counted_and_survived(driven: Driven) -> None:
    """D8: if a layer raises an exception, its requests end with an error, that is logged and counted, and the worker
    goes on.
    """
    driven.connect("clumsy:at=complete|ram:1M")
    with pytest.raises(DiskError) as caught:
        driven.frontend.write(0, DATA)
    driven.worker.stand()

    assert BLKIF_RSP_ERROR == caught.value.status
    assert ["critical"] == [line.level for line in driven.worker.lines]
    assert "KeyError: 'complete'" in driven.worker.lines[0].event


@pytest.mark.parametrize("at", ["submit", "complete"])
def test_bug_in_the_last_flush_does_not_keep_the_disk(driven: Driven, at: str) -> None:
    """R23: if a layer raises an exception over the last flush, that is logged, and the disk goes away all the same."""
    driven.connect(f"clumsy:at={at}|ram:1M")
    driven.disconnect()
    driven.worker.end()

    assert ["critical"] == [line.level for line in driven.worker.lines]


def test_counters_outlive_connections(driven: Driven) -> None:
    """The counters in the journal add up over connections, and are exact when a connection has ended."""
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
    assert counters.percentile_ns(counters.histogram(driven.worker.journal), 0.5) > 0


def test_counters_are_up_to_date_when_a_worker_was_asked_where_it_stands(driven: Driven) -> None:
    """When a worker reports its standing, its counters are up to date."""
    frontend = driven.connect("ram:1M")
    counted = []
    for _ in range(3):
        frontend.write(0, DATA)
        driven.worker.stand()
        counted.append(driven.worker.counters()["writes"])

    assert [1, 2, 3] == counted


def test_a_pause_is_told_when_nothing_is_in_flight(driven: Driven) -> None:
    """A pause is answered once the requests in flight are; later ones wait for Resume. Without a frontend it is
    answered at once.
    """
    driven.open(SLOW)
    codes = [driven.worker.ask(each).code for each in (messages.Pause(), messages.Resume())]
    driven.attach(Wishes())
    early = driven.begin_write(DATA)
    codes.append(driven.worker.ask(messages.Pause()).code)
    driven.frontend.poll()
    late = driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    is_paused = driven.worker.stand().is_paused
    driven.frontend.poll()
    held = (early.status, late.status)
    driven.worker.ask(messages.Resume())
    driven.frontend.wait([late])

    assert ([Code.OK] * 3, True, False) == (codes, is_paused, driven.worker.stand().is_paused)
    assert (BLKIF_RSP_OKAY, None) == held
    assert BLKIF_RSP_OKAY == late.status


def test_a_pause_that_is_taken_back_is_told(driven: Driven) -> None:
    """If a disk is resumed before a pause is reached, each pause gets one reply, which says so."""
    driven.connect(SLOW)
    driven.begin_write(DATA)
    pauses = [driven.worker.put(messages.Pause()) for _ in range(2)]
    resume = driven.worker.put(messages.Resume())
    replies = [driven.worker.expect_reply(each) for each in (*pauses, resume)]

    assert [Code.FAILED, Code.FAILED, Code.OK] == [reply.code for reply in replies]
    assert "the disk was resumed" in replies[0].sentence


def test_a_pause_that_nothing_is_left_for_is_reached(driven: Driven) -> None:
    """If the frontend leaves, or the worker ends, nothing is in flight, and a pause gets its reply."""
    driven.connect(SLOW)
    driven.begin_write(DATA)
    first = driven.worker.put(messages.Pause())
    driven.worker.tell(messages.Leave)
    replies = [driven.worker.expect_reply(first)]
    driven.worker.tell(messages.Close)
    late = driven.worker.put(messages.Pause())
    replies.append(driven.worker.expect_reply(late))

    assert [Code.OK, Code.GONE] == [reply.code for reply in replies]
    assert 0 == driven.worker.process.wait(10)


def test_a_paused_disk_stays_so(driven: Driven) -> None:
    """A pause outlives the frontend's connection; a worker can also be opened paused."""
    standings = [driven.open("ram:1M", is_paused=True)]
    driven.attach(Wishes())
    standings.append(driven.worker.stand())
    driven.disconnect()
    for ring in driven.frontend.rings:
        ring.close()
    driven.attach(Wishes())
    flush = driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    standings.append(driven.worker.stand())
    driven.frontend.poll()
    held = flush.status
    driven.worker.ask(messages.Resume())
    driven.frontend.wait([flush])

    assert [True] * 3 == [standing.is_paused for standing in standings]
    assert (None, BLKIF_RSP_OKAY) == (held, flush.status)


def test_a_disk_that_lost_something_waits_to_be_resumed(driven: Driven) -> None:
    """A flush that an earlier worker failed holds a connected frontend until Resume; a frontend that starts anew is not
    held.
    """
    journal.poison(driven.worker.journal, errno.EIO)
    driven.goes_on = True
    driven.open("ram:1M")
    driven.attach(Wishes())
    flush = driven.frontend.submit(BLKIF_OP_FLUSH_DISKCACHE)
    standing = driven.worker.stand()
    driven.frontend.poll()
    held = flush.status
    driven.worker.ask(messages.Resume())
    driven.frontend.wait([flush])
    driven.reconnect().flush()

    assert "a flush failed (EIO); the disk is paused" == standing.flush_failed
    assert (None, BLKIF_RSP_OKAY) == (held, flush.status)
    assert "" == driven.worker.stand().flush_failed


def test_a_frontend_that_begins_anew_goes_by_what_it_finds(driven: Driven) -> None:
    """A guest that boots after a failed flush is not held, since it reads what is there."""
    journal.poison(driven.worker.journal, errno.EIO)
    driven.open("ram:1M")
    driven.attach(Wishes()).flush()

    assert "" == driven.worker.stand().flush_failed


def test_where_a_worker_stands(driven: Driven) -> None:
    """A standing has the worker's stage, chain and layers, and whatever is wrong now."""
    standings = [driven.worker.stand()]
    driven.open(SLOW, policy="write=pause")
    standings.append(driven.worker.stand())
    driven.attach(Wishes())
    standings.append(driven.worker.stand())
    request = driven.begin_write(DATA)
    driven.worker.tell(messages.Leave)
    standings += [driven.worker.stand(), driven.worker.expect_standing(Stage.OPEN)]
    driven.frontend.wait([request])

    expected = [Stage.IDLE, Stage.OPEN, Stage.SERVING, Stage.LEAVING, Stage.OPEN]
    assert expected == [each.stage for each in standings]
    assert ["", SLOW, SLOW, SLOW, SLOW] == [each.chain for each in standings]
    texts = [[layer.text for layer in each.layers] for each in standings]
    assert [[], *[["delay:write=100ms", "ram:1M"]] * 4] == texts
    assert {("", "", "")} == {(each.halted, each.flush_failed, each.trouble) for each in standings}


def test_a_worker_that_waits_for_its_image_says_so(driven: Driven, images: list[Path]) -> None:
    """A worker that was told to serve and waits for its image's lock reports that it is connecting, so that it is not
    told again.
    """
    other = WorkerProcess(driven.worker.host)
    other.open(f"aio:{images[0]}")
    driven.open(f"aio:{images[0]}", may_wait=True)
    driven.announce(Wishes())
    driven.offer_rings()
    waiting = driven.worker.stand().stage
    paused = driven.worker.ask(messages.Pause()).code
    swap = driven.worker.ask(messages.Swap("ram:1M"))
    other.drop()
    driven.joined()

    assert (Stage.CONNECTING, Stage.SERVING) == (waiting, driven.worker.stand().stage)
    assert (Code.OK, Code.BUSY) == (paused, swap.code)


@pytest.mark.parametrize("kind", [messages.Leave, messages.Close])
def test_a_later_order_ends_the_wait_for_the_image(driven: Driven, images: list[Path], kind: Any) -> None:
    """A worker that waits for an image can be told to leave or close."""
    other = WorkerProcess(driven.worker.host)
    other.open(f"aio:{images[0]}")
    driven.open(f"aio:{images[0]}", may_wait=True)
    driven.announce(Wishes())
    driven.offer_rings()
    driven.worker.stand()
    driven.worker.tell(kind)
    standing = driven.worker.expect_standing()
    other.end()

    assert (Stage.OPEN if kind is messages.Leave else Stage.IDLE) == standing.stage
    if kind is messages.Leave:
        assert Stage.OPEN == driven.worker.stand().stage
        driven.worker.end()
    other.drop()


def test_a_worker_that_still_ends_its_export_is_connecting(driven: Driven, tmp_path: Path) -> None:
    """While its export ends, whose last flush may take long, a worker reports that it is connecting."""
    driven.open("delay:flush=100ms|ram:1M", export=str(tmp_path / "nbd" / "sock"))
    driven.announce(Wishes())
    driven.offer_rings()
    ending = driven.worker.stand().stage
    driven.joined()

    assert (Stage.CONNECTING, Stage.SERVING) == (ending, driven.worker.stand().stage)


def test_trouble_is_told_and_a_new_policy_obeyed(driven: Driven) -> None:
    """A full disk is reported as trouble; with the policy `report` the guest gets the error."""
    driven.connect("fault:op=write,errno=ENOSPC|ram:1M")
    write = driven.frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    trouble = driven.worker.expect_standing().trouble
    standing = driven.worker.stand().trouble
    replies = [driven.worker.ask(each) for each in (messages.SetPolicy("enospc=report"), messages.Resume())]
    driven.frontend.wait([write])

    assert trouble.endswith("make space")
    assert trouble == standing
    assert [Code.OK] * 2 == [reply.code for reply in replies]
    assert "" == driven.worker.stand().trouble
    assert Code.INVALID == driven.worker.ask(messages.SetPolicy("enospc=sing")).code
    assert BLKIF_RSP_ERROR == write.status


def test_a_worker_that_hands_over_leaves_what_it_held(driven: Driven) -> None:
    """A worker that hands over does not answer a request that is kept for a retry: its successor does."""
    driven.connect("fault:op=write,errno=ENOSPC|ram:1M")
    write = driven.frontend.submit(BLKIF_OP_WRITE, 0, data=DATA)
    driven.worker.expect_standing()
    driven.worker.close(hands_over=True)
    driven.frontend.poll()
    left = write.status
    driven.worker.process.wait(10)
    driven.succeed("ram:1M")
    driven.frontend.wait([write])

    assert (None, BLKIF_RSP_OKAY) == (left, write.status)


def test_a_last_flush_that_fails_pauses_the_successor(driven: Driven) -> None:
    """If a worker's last flush fails, the service is told, and a successor with its journal does not answer the guest's
    next flush.
    """
    driven.connect("fault:op=flush,limit=1|ram:1M").write(0, DATA)
    left = driven.worker.close(hands_over=True).flush_failed
    driven.worker.process.wait(10)
    driven.succeed("ram:1M")

    assert "a flush failed (EIO); the disk is paused" == left == driven.worker.stand().flush_failed


def test_an_order_that_cannot_be_carried_out_is_told(driven: Driven) -> None:
    """If an order cannot be carried out, the standing says why, and the next standing no longer does."""
    early = driven.worker.tell(messages.Serve, None), driven.worker.expect_standing()
    driven.open("ram:1M", host="nonexistent")
    again = driven.worker.open("ram:1M")
    driven.announce(Wishes())
    driven.offer_rings()
    failed = driven.worker.expect_standing()
    driven.worker.tell(messages.Leave)
    left = driven.worker.expect_standing()

    assert (1, Stage.IDLE, "the chain is not open") == (early[1].number, early[1].stage, early[1].failure)
    assert (Stage.OPEN, "a worker opens one chain in its life") == (again.stage, again.failure)
    assert (Stage.OPEN, True) == (failed.stage, "nonexistent" in failed.failure)
    assert (Stage.OPEN, "", 0) == (left.stage, left.failure, left.errno)
    driven.worker.end()


def test_a_frontend_is_served_once(driven: Driven) -> None:
    """An order to serve rings that are served already is refused, and they are served on."""
    driven.connect("ram:1M")
    driven.offer_rings()
    standing = driven.worker.expect_standing()
    driven.frontend.write(0, DATA)

    assert (Stage.SERVING, "a frontend is served already") == (standing.stage, standing.failure)


def test_what_was_asked_of_a_worker_that_ends_has_its_reply(driven: Driven) -> None:
    """A question that comes right after Close is answered as too late, and not as failed."""
    driven.open("ram:1M")
    driven.worker.process.send_signal(signal.SIGSTOP)  # else it may have ended before the question comes
    driven.worker.tell(messages.Close)
    question = driven.worker.put(messages.Resume())
    driven.worker.process.send_signal(signal.SIGCONT)
    reply = driven.worker.expect_reply(question)

    assert Code.GONE == reply.code
    assert 0 == driven.worker.process.wait(10)


def test_a_file_that_becomes_shorter_pauses_the_disk(driven: Driven, images: list[Path]) -> None:
    """If another program truncates the image, the disk pauses with a sentence, and goes on when it is resumed."""
    driven.connect(f"aio:{images[0]}")
    os.truncate(images[0], 4096)
    request = driven.begin_write(b"d" * 4096)
    paused = driven.worker.expect(lambda it: isinstance(it, messages.Standing) and bool(it.trouble))
    driven.frontend.wait([request])
    driven.worker.ask(messages.Resume())
    driven.frontend.write(0, b"e" * 4096)

    assert f"{images[0]} has become shorter: it has 4096 of" in paused.trouble
    assert "" == driven.worker.stand().trouble
    assert (4096, b"e" * 4096) == (images[0].stat().st_size, images[0].read_bytes())
