"""The export of a disk: its socket, its chain, what all clients share, and its end."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.exported import Exported
from xenbackend.block.driver import Geometry
from xenbackend.block.request import Op
from xenbackend.nbd.abi import CMD_FLAG_FUA, CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, MAX_BLOCK, REQUEST, REQUEST_MAGIC
from xenbackend.worker.export import LARGEST, MAX_CLIENTS, SLOTS, _offer

DATA = b"d" * 512


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[Exported]:
    """An exported disk. Its clients must not cause a bug."""
    with Exported(tmp_path) as exported:
        yield exported
    assert [] == exported.stray_bugs


@pytest.mark.rows("A31")
def test_one_client_too_many_is_refused(exported: Exported) -> None:
    """A client too many is hung up on at once; when another one has gone there is room again."""
    clients = [exported.client().go() for _ in range(MAX_CLIENTS)]
    refused = exported.client()
    refused.listen()
    clients[0].close()
    exported.step(2)
    exported.client().go()

    assert refused.is_hung_up
    assert b"" == refused.received
    assert "refused" in exported.complaints[0]


@pytest.mark.parametrize("kind", [CMD_WRITE, CMD_TRIM])
def test_durable_writes_are_flushed(exported: Exported, kind: int) -> None:
    """A write with FUA is answered only when a flush after it is done."""
    exported.chain.holding = True
    client = exported.client().go()
    client.ask(kind, data=DATA if kind == CMD_WRITE else b"", flags=CMD_FLAG_FUA)
    exported.chain.give_back()
    between = bytes(client.listen())
    seen = list(exported.chain.seen)
    exported.chain.give_back()

    assert b"" == between
    assert ["WRITE" if kind == CMD_WRITE else "DISCARD", "FLUSH"] == seen
    assert (1, 0, b"") == client.reply()


def test_write_that_fails_is_not_flushed(exported: Exported) -> None:
    """A write with FUA that fails is answered with its error, without a flush."""
    exported.chain.errors = {Op.WRITE: errno.ENOSPC}
    client = exported.client().go()
    client.ask(CMD_WRITE, data=DATA, flags=CMD_FLAG_FUA)

    assert (1, errno.ENOSPC, b"") == client.reply()
    assert ["WRITE"] == exported.chain.seen


def test_no_flush_succeeds_after_one_that_failed(exported: Exported) -> None:
    """After a failed flush all later ones fail, although the kernel would let them pass; an alarm is raised once."""
    client = exported.client().go()
    exported.chain.errors = {Op.FLUSH: errno.ENOSPC}
    client.ask(CMD_FLUSH, 0, 0)
    exported.chain.errors = {}
    client.ask(CMD_FLUSH, 0, 0)
    client.ask(CMD_WRITE, data=DATA, flags=CMD_FLAG_FUA)
    client.ask(CMD_WRITE, data=DATA)

    assert [errno.EIO, errno.EIO, errno.EIO, 0] == [client.reply()[1] for _ in range(4)]
    assert 1 == len(exported.alarms)


def test_requests_in_flight_are_bounded(exported: Exported) -> None:
    """The chain gets no more requests than there are slots for all clients together; the others wait, in order."""
    exported.chain.holding = True
    greedy, modest = exported.client().go(), exported.client().go()
    greedy.send(b"".join(REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, n, 0, 512) for n in range(2 * SLOTS)))
    modest.ask(CMD_READ)
    held = len(exported.chain.held)
    exported.chain.give_back(exported.chain.held[:10])
    greedy.listen()
    exported.chain.give_back()
    exported.step(4)
    exported.chain.holding = False
    exported.chain.give_back()

    assert SLOTS == held
    assert 0 == modest.reply(512)[1]
    assert list(range(2 * SLOTS)) == [greedy.reply(512)[0] for _ in range(2 * SLOTS)]


@pytest.mark.slow
@pytest.mark.rows("A31")
def test_memory_is_bounded(exported: Exported) -> None:
    """The largest request waits until all memory is free, and small ones do not pass it for ever."""
    exported.chain.holding = True
    small, large = exported.client().go(), exported.client().go()
    small.ask(CMD_READ, 0, 4096)
    large.ask(CMD_READ, 0, MAX_BLOCK)
    small.ask(CMD_READ, 0, 4096, cookie=2)
    held = [request.length for request in exported.chain.held]
    exported.chain.give_back()
    small.reply(4096)
    exported.step(4)
    then = [request.length for request in exported.chain.held]
    exported.chain.give_back()

    assert [4096] == held
    assert [LARGEST] * (MAX_BLOCK // LARGEST) == then
    assert MAX_BLOCK == len(large.reply(MAX_BLOCK)[2])
    exported.step(4)
    exported.chain.give_back()
    assert 2 == small.reply(4096)[0]


@pytest.mark.parametrize("failing", [False, True])
def test_large_requests_are_cut(exported: Exported, failing: bool) -> None:
    """A large request is cut into pieces of a ring's largest request, and answered once, with the first error."""
    client, length = exported.client().go(), 2 * LARGEST + 512
    data = b"".join(bytes([number]) * 512 for number in range(50)).ljust(length, b"e")
    client.ask(CMD_WRITE, 1024, length, data, flags=CMD_FLAG_FUA)
    written = client.reply()
    exported.chain.holding = True
    client.ask(CMD_READ, 1024, length)
    pieces = [(request.offset, request.length) for request in exported.chain.held]
    exported.chain.errors = {Op.READ: errno.EIO} if failing else {}
    exported.chain.give_back(exported.chain.held[1:2])
    exported.chain.errors = {}
    between = bytes(client.listen())
    exported.chain.give_back()

    assert (1, 0, b"") == written
    assert ["WRITE"] * 3 + ["FLUSH"] + ["READ"] * 3 == exported.chain.seen
    assert [(1024, LARGEST), (1024 + LARGEST, LARGEST), (1024 + 2 * LARGEST, 512)] == pieces
    assert b"" == between
    assert ((1, errno.EIO, b"") if failing else (1, 0, data)) == client.reply(length)


def test_client_that_goes_away_lets_others_have_its_turn(exported: Exported) -> None:
    """When a client goes away, the next one that waits has its turn."""
    exported.chain.holding = True
    first, second, third = (exported.client().go() for _ in range(3))
    first.ask(CMD_READ, 0, MAX_BLOCK)
    for client in (second, third):
        client.ask(CMD_READ)
    second.close()
    exported.pass_time(2)
    first.close()
    exported.step(4)
    exported.chain.holding = False
    exported.chain.give_back()
    exported.step(8)

    assert (1, 0, bytes(512)) == third.reply(512)


@pytest.mark.parametrize("length", [512, 2 * LARGEST])
def test_layers_bug_is_contained(exported: Exported, length: int) -> None:
    """D8: if a layer raises an exception, each request that it held ends once with EIO, however late it returns."""
    exported.chain.holding, exported.chain.bug = True, KeyError("bug")
    client = exported.client().go()
    client.ask(CMD_WRITE, 0, length, bytes(length))
    first = client.reply()
    late = exported.chain.held[:]
    for cookie in range(SLOTS):
        client.ask(CMD_READ, cookie=cookie)
    exported.chain.give_back(late)
    after = bytes(client.listen())
    exported.chain.give_back()
    again = [client.reply(512)[:2] for _ in range(SLOTS)]
    exported.chain.holding = False
    for cookie in range(2 * SLOTS):
        client.ask(CMD_READ, cookie=cookie)
    rest = [client.reply(512)[:2] for _ in range(2 * SLOTS)]

    assert (1, errno.EIO, b"") == first
    assert b"" == after
    assert [(cookie, 0) for cookie in range(SLOTS)] == again
    assert [(cookie, 0) for cookie in range(2 * SLOTS)] == rest
    assert ["'bug'"] == [str(bug) for bug in exported.bugs]
    assert exported.export.had_bugs


def test_layers_own_requests_are_not_answered(exported: Exported) -> None:
    """A request that a failed layer has made for itself is not answered to a client."""
    client = exported.client().go()
    exported.chain.contain(KeyError("bug"), [type("Own", (), {"tag": "of a layer"})()])

    assert b"" == client.take(16)
    assert exported.end()


def test_end_answers_what_is_in_flight(exported: Exported) -> None:
    """An export that ends takes no more requests, waits for the chain, answers, hangs up, and only then calls back."""
    exported.chain.holding = True
    busy, idle, half = (exported.client().go() for _ in range(3))
    busy.ask(CMD_WRITE, 0, 512, DATA)
    half.ask(CMD_WRITE, 0, 1024, DATA)
    at_once = exported.end()
    busy.ask(CMD_READ, cookie=2)
    held = len(exported.chain.held)
    exported.chain.give_back()
    exported.step(4)

    assert not at_once
    assert 1 == held
    assert exported.is_over
    assert (1, 0, b"") == busy.reply()
    assert [b"", b"", b""] == [client.take(1) for client in (busy, idle, half)]
    assert all(client.is_hung_up for client in (busy, idle, half))
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(exported.path))  # the socket's maker removes it


def test_end_waits_for_what_nobody_waits_for(exported: Exported) -> None:
    """The end of an export waits even for requests of clients that have gone."""
    exported.chain.holding = True
    client = exported.client().go()
    client.ask(CMD_WRITE, data=DATA)
    client.close()
    exported.step(4)
    at_once = exported.end()
    exported.chain.give_back()
    exported.step(4)

    assert not at_once
    assert exported.is_over


def test_end_waits_for_the_flush_of_a_durable_write(exported: Exported) -> None:
    """The end waits for a write with FUA even between the write and its flush, when the chain has nothing."""
    exported.chain.holding = True
    client = exported.client().go()
    client.ask(CMD_WRITE, data=DATA, flags=CMD_FLAG_FUA)
    exported.export.close(lambda: setattr(exported, "is_over", True))
    client.close()
    exported.chain.give_back()
    before = exported.is_over
    exported.step(4)
    flushing = [Op(request.op).name for request in exported.chain.held]
    exported.chain.give_back()
    exported.step(4)

    assert not before
    assert ["FLUSH"] == flushing
    assert exported.is_over


def test_end_does_not_wait_for_a_client_that_takes_no_answers(exported: Exported) -> None:
    """A client that does not read its answers is hung up on a second after the end has begun, as the guest's driver
    waits for the disk.
    """
    client = exported.client().go()
    client.ask(CMD_READ, 0, MAX_BLOCK)
    at_once = exported.end()
    exported.pass_time(2)

    assert not at_once
    assert exported.is_over


def test_end_wakes_nobody_who_waits(exported: Exported) -> None:
    """When an export ends, a client that waits for memory is hung up on without an answer."""
    exported.chain.holding = True
    first, second = exported.client().go(), exported.client().go()
    first.ask(CMD_READ, 0, MAX_BLOCK)
    second.ask(CMD_READ)
    exported.export.close(lambda: setattr(exported, "is_over", True))
    exported.chain.give_back()
    first.listen()
    exported.step(4)

    assert exported.is_over
    assert ["READ"] * (MAX_BLOCK // LARGEST) == exported.chain.seen


@pytest.mark.parametrize(("physical", "preferred"), [(0, 4096), (512, 4096), (4096, 4096), (65536, 65536)])
def test_what_clients_are_told_to_prefer(physical: int, preferred: int) -> None:
    """The block size that clients should prefer is that of the medium, and at least a page."""
    offer = _offer(Geometry(size=1 << 20, physical_sector_size=physical))

    assert (1 << 20, preferred) == (offer.size, offer.preferred_block)


def test_an_end_waits_for_nothing_that_is_held_back_on_purpose(exported: Exported) -> None:
    """When an export ends, layers are told to pass on what they hold back."""
    exported.chain.holding = True
    exported.client().go().ask(CMD_READ, 0, 4096)
    assert 0 == exported.chain.drained
    exported.export.close(lambda: setattr(exported, "is_over", True))
    drained = exported.chain.drained
    exported.chain.give_back()

    assert drained == 1
