"""One client of an export: requests that arrive in pieces, answers, and what ends the connection."""

from __future__ import annotations

import errno
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.descriptors import open_descriptors
from tests.exported import GO, HANDSHAKE, SIZE, Exported
from xenbackend.block.driver import Geometry
from xenbackend.nbd.abi import (
    CMD_DISC,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    MAX_BLOCK,
    REPLY,
    REQUEST,
    REQUEST_MAGIC,
)
from xenbackend.worker.export import LARGEST
from xenbackend.worker.export_client import HANDSHAKE_S, STALL_S

DATA = bytes(range(256)) * 16


@pytest.fixture
def exported(tmp_path: Path) -> Iterator[Exported]:
    """An exported disk. Its clients must not cause a bug."""
    with Exported(tmp_path) as exported:
        yield exported
    assert [] == exported.stray_bugs


def test_write_and_read(exported: Exported) -> None:
    """A client reads what another one has written."""
    exported.client().go().ask(CMD_WRITE, 4096, 4096, DATA)
    reader = exported.client().go()
    reader.ask(CMD_READ, 4096, 4096, cookie=9)

    assert (1, 0, b"") == exported.clients[0].reply()
    assert (9, 0, DATA) == reader.reply(4096)


def test_requests_byte_by_byte(exported: Exported) -> None:
    """It makes no difference how a client's bytes are cut, even if requests arrive together with the handshake."""
    client = exported.client()
    write = REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, 1, 0, 512) + DATA[:512]
    sent = GO + write + REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, 2, 0, 512)
    for byte in sent:
        client.send(bytes([byte]))
    whole = exported.client()
    whole.send(sent)

    for each in (client, whole):
        each.take(HANDSHAKE)
        assert [(1, 0, b""), (2, 0, DATA[:512])] == [each.reply(), each.reply(512)]


def test_many_at_once_are_one_batch(exported: Exported) -> None:
    """Requests that are in the socket together are submitted as one batch, and answered in the order of completion."""
    exported.chain.holding = True
    client = exported.client().go()
    client.send(b"".join(REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, n, 512 * n, 512) for n in range(5)))
    exported.chain.give_back(exported.chain.held[::-1])

    assert [4, 3, 2, 1, 0] == [client.reply(512)[0] for _ in range(5)]


@pytest.mark.parametrize(
    ("kind", "offset", "length", "error"),
    [
        (CMD_READ, SIZE, 512, errno.EINVAL),
        (CMD_WRITE, SIZE, 512, errno.ENOSPC),
        (CMD_WRITE, 1, 4096, errno.EINVAL),
        (CMD_WRITE, SIZE, 300_000, errno.EINVAL),
        (6, 0, 512, errno.EINVAL),
        (CMD_READ, 0, 0, 0),
        (CMD_WRITE, 0, 0, 0),
    ],
)
def test_refused_requests_do_no_harm(exported: Exported, kind: int, offset: int, length: int, error: int) -> None:
    """An invalid request is answered without reaching a layer, its data is skipped, and the next request is done."""
    client = exported.client().go()
    client.ask(kind, offset, length, bytes(length) if kind == CMD_WRITE else b"")
    client.ask(CMD_READ, cookie=2)

    assert (1, error, b"") == client.reply()
    assert (2, 0, bytes(512)) == client.reply(512)
    assert ["READ"] == exported.chain.seen


def test_read_only_disk(tmp_path: Path) -> None:
    """A write or trim of a read-only disk does not reach the chain."""
    with Exported(tmp_path, Geometry(SIZE, read_only=True, can_discard=True)) as exported:
        client = exported.client().go()
        client.ask(CMD_WRITE, 0, 512, DATA[:512])
        client.ask(CMD_TRIM)

        assert [errno.EPERM, errno.EPERM] == [client.reply()[1], client.reply()[1]]
        assert [] == exported.chain.seen


def test_disk_errors_are_told(exported: Exported) -> None:
    """An error of the disk is the error of the reply, which has no data."""
    exported.chain.errors = {0: errno.ETIMEDOUT, 1: errno.ENOSPC, 3: errno.EOPNOTSUPP}
    client = exported.client().go()
    for cookie, kind in enumerate((CMD_READ, CMD_WRITE, CMD_TRIM)):
        client.ask(kind, data=DATA[:512] if kind == CMD_WRITE else b"", cookie=cookie)

    assert [(0, 5, b""), (1, 28, b""), (2, 95, b"")] == [client.reply(512) for _ in range(3)]


def test_disconnect_waits_for_what_is_in_flight(exported: Exported) -> None:
    """After DISC no more requests are taken, earlier ones are answered, and then the client is hung up on."""
    exported.chain.holding = True
    client = exported.client().go()
    client.ask(CMD_READ)
    client.ask(CMD_DISC)
    client.ask(CMD_READ, cookie=2)
    before = client.listen() and client.is_hung_up
    exported.chain.give_back()

    assert not before
    assert (1, 0, bytes(512)) == client.reply(512)
    assert b"" == client.take(1)
    assert client.is_hung_up


def test_disconnect(exported: Exported) -> None:
    """If nothing is in flight, DISC ends the connection at once."""
    client = exported.client().go()
    client.ask(CMD_DISC)
    client.listen()

    assert client.is_hung_up


@pytest.mark.parametrize("kind", [6, CMD_READ])
def test_client_that_does_not_stop_is_not_read_from(exported: Exported, kind: int) -> None:
    """A client that does not read its refusals, or for whose requests there are no slots, is not read from."""
    exported.chain.holding = True
    client = exported.client().go()
    flood = REQUEST.pack(REQUEST_MAGIC, 0, kind, 1, 0, 512) * 100_000
    sent = client.send(flood)
    more = client.send(flood)

    assert sent + more < len(flood) // 2


def test_client_that_goes_away_is_forgotten(exported: Exported) -> None:
    """When a client goes away, its slots and memory serve others once its requests are done."""
    for _ in range(5):
        exported.chain.holding = True
        client = exported.client().go()
        for _ in range(40):
            client.ask(CMD_READ, 0, 512 << 10)
        client.close()
        exported.step(4)
        exported.chain.holding = False
        exported.chain.give_back()
        exported.step(2)
    last = exported.client().go()
    last.ask(CMD_READ, 0, MAX_BLOCK)

    assert MAX_BLOCK == len(last.reply(MAX_BLOCK)[2])
    assert [] == exported.complaints


@pytest.mark.parametrize(
    ("sent", "why"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "flags 0x47455420"),
        (GO + bytes(28), "a request that begins with 0x0"),
        (GO + REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, 0, 0, 4096) + bytes(28), "a request that begins with 0x0"),
        (GO + REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, 0, 0, MAX_BLOCK + 1), "a write of 33554433 bytes"),
    ],
)
def test_broken_protocol(exported: Exported, sent: bytes, why: str) -> None:
    """A client that breaks the protocol is hung up on, with one line in the log; other clients are served."""
    other = exported.client().go()
    client = exported.client()
    client.send(sent)
    client.listen()
    exported.step(2)
    other.ask(CMD_READ, 0, MAX_BLOCK)

    assert client.is_hung_up
    assert why in exported.complaints[0]
    assert 1 == len(exported.complaints)
    assert 0 == other.reply(MAX_BLOCK)[1]


@pytest.mark.parametrize(
    ("sent", "limit_s"),
    [(b"", HANDSHAKE_S), (GO[:9], HANDSHAKE_S), (GO + REQUEST.pack(REQUEST_MAGIC, 0, CMD_WRITE, 0, 0, 512), STALL_S)],
)
@pytest.mark.rows("A31")
def test_client_that_keeps_us_waiting(exported: Exported, sent: bytes, limit_s: float) -> None:
    """A handshake and the data of a write must arrive within a time limit."""
    client = exported.client()
    client.send(sent)
    exported.pass_time(limit_s - 1)
    client.listen()
    before = client.is_hung_up
    exported.pass_time(3)
    client.listen()

    assert not before
    assert client.is_hung_up
    assert "disconnected" in exported.complaints[0]


def test_client_that_waits_is_let_wait(exported: Exported) -> None:
    """A client that sends nothing may stay connected without limit."""
    client = exported.client().go()
    exported.pass_time(100)
    client.ask(CMD_READ)

    assert 0 == client.reply(512)[1]


@pytest.mark.slow
def test_client_that_takes_no_answers_is_not_read_from(exported: Exported) -> None:
    """What a client that reads no answers can make us hold is bounded; when it reads them, they are all right."""
    client = exported.client().go()
    content = random.Random(3).randbytes(1 << 20)
    exported.chain.content[: 1 << 20] = content
    asked = b"".join(REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, n, 0, 1 << 20) for n in range(40))
    client.socket.setsockopt(1, 7, 4096)  # SO_SNDBUF
    sent = client.send(asked)
    begun = len(exported.chain.seen)
    found = []
    for _ in range(40):
        if sent < len(asked):
            sent += client.send(asked[sent:])
        found.append(client.reply(1 << 20))

    assert begun < 40
    assert [(n, 0, content) for n in range(40)] == found


@pytest.mark.slow
def test_client_that_takes_no_answers_for_long_is_thrown_out(exported: Exported) -> None:
    """A client that reads no answers for too long is hung up on; its memory serves others, no descriptor is left."""
    descriptors = len(open_descriptors())
    client = exported.client().go()
    heads = [REQUEST.pack(REQUEST_MAGIC, 0, CMD_READ, 1, 0, length) for length in (MAX_BLOCK, 512)]
    client.send(b"".join(heads))  # the second one waits for memory, before the other client does
    other = exported.client().go()
    other.ask(CMD_READ, 0, MAX_BLOCK)
    before = list(exported.chain.seen)
    exported.pass_time(STALL_S + 2)

    assert ["READ"] * (MAX_BLOCK // LARGEST) == before
    assert MAX_BLOCK == len(other.reply(MAX_BLOCK)[2])
    assert "made no progress for 30 s" in exported.complaints[0]
    assert descriptors + 3 == len(open_descriptors())


@pytest.mark.slow
def test_any_bytes(exported: Exported) -> None:
    """Clients that send any bytes in any pieces end in order: no bug, no open descriptor, and no lost memory."""
    chance = random.Random(4)
    descriptors = len(open_descriptors())
    for _ in range(1500):
        client = exported.client()
        client.send(GO if chance.random() < 0.9 else chance.randbytes(30))
        for _ in range(chance.randrange(6)):
            kind, length = chance.randrange(7), chance.choice([0, 512, 1000, 4096, chance.getrandbits(21)])
            offset = chance.choice([0, 512, 4096, 999, SIZE, SIZE - 512])
            magic = REQUEST_MAGIC if chance.random() < 0.97 else 0
            head = REQUEST.pack(magic, chance.randrange(3) & 1, kind, 5, offset, length)
            payload = bytes(min(length, 8192) if kind == CMD_WRITE else 0)
            client.send((head + payload)[: chance.choice([9999, 9999, chance.randrange(60)])])
        if chance.random() < 0.5:
            client.listen()
        client.close()
    exported.pass_time(2)
    last = exported.client().go()
    last.ask(CMD_READ, 0, MAX_BLOCK)

    assert MAX_BLOCK == len(last.reply(MAX_BLOCK)[2])
    last.close()
    exported.pass_time(2)
    assert descriptors == len(open_descriptors())
    assert len(exported.chain.seen) > 400


def test_flush_is_passed_on(exported: Exported) -> None:
    """A client's flush reaches the disk."""
    client = exported.client().go()
    client.ask(CMD_FLUSH, 0, 0)

    assert (1, 0, b"") == client.reply()
    assert ["FLUSH"] == exported.chain.seen
    assert REPLY.size == 16
