"""The driver nbd against a server of the tests: reads, writes, refusals, and a server that goes away."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from random import Random
from struct import pack

import pytest

from tests.helpers_block import Machine, again, content, discard, flush, read, write
from tests.nbd_server import FLUSH, FUA, HAS_FLAGS, MULTI_CONN, READ_ONLY, Export, Server
from xenbackend.block.chain import Chain
from xenbackend.block.drivers.nbd import Nbd
from xenbackend.block.request import AWAY, Request
from xenbackend.errors import ChainError, DriverError
from xenbackend.image.extents import map_chain

SIZE = 1 << 20


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture(params=[True, False], ids=["structured", "simple"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Return a server with random content, with structured and with simple replies."""
    export = Export(bytearray(Random(1).randbytes(SIZE)), structured=request.param)
    with Server(tmp_path / "nbd.sock", export) as server:
        yield server


@pytest.fixture
def plain(tmp_path: Path) -> Iterator[Server]:
    """Return a server with random content."""
    with Server(tmp_path / "nbd.sock", Export(bytearray(Random(1).randbytes(SIZE)))) as server:
        yield server


def text(server: Server, options: str = "") -> str:
    """Return the chain that has this server's disk."""
    return f"nbd:unix:{server.path}{options},drain=0s"


def fact(chain: Chain, key: str) -> str:
    """Return what the layer has published."""
    return str(chain.layers[0].driver.env.facts[key])


def until_says(machine: Machine, chain: Chain, why: str) -> None:
    """Let time pass until the layer says this about its connection."""
    give_up = machine.reactor.now() + 20
    while why not in fact(chain, "connection"):
        assert machine.reactor.now() < give_up, fact(chain, "connection")
        machine.reactor.call_later(0.05, machine.reactor.stop)
        machine.reactor.run()


def until_served(machine: Machine, chain: Chain, *batch: Request) -> list[int]:
    """Do requests as the engine does: those that end with AWAY are sent again a little later, as often as needed."""
    while AWAY in (found := machine.do(chain, *batch)):
        machine.reactor.call_later(0.05, machine.reactor.stop)
        machine.reactor.run()
        for request in batch:
            again(request)
    return found


def test_what_is_read_is_what_the_server_has(machine: Machine, server: Server) -> None:
    """Reads of any size, into any pieces, and many at once return the server's bytes."""
    chain = machine.open(text(server))
    batch = [read(0, SIZE), read(512, 512, 1024), read(4096, 131072, 512, 65536), read(SIZE - 512, 512)]
    assert [0] * 4 == machine.do(chain, *batch)
    for request in batch:
        assert server.export.content[request.offset : request.offset + request.length] == content(request)
    chain.close()


def test_a_read_of_zeros_clears_what_was_in_the_buffer(machine: Machine, plain: Server) -> None:
    """A hole in a reply clears the guest's pages."""
    plain.export.content[:] = bytes(SIZE)
    chain = machine.open(text(plain))
    assert bytes(SIZE) == machine.everything(chain)
    chain.close()


def test_what_is_written_is_on_the_server(machine: Machine, server: Server) -> None:
    """Writes of many pieces, and of more than a socket takes at once, arrive at the server; so do discards."""
    chain = machine.open(text(server))
    pieces = [Random(2).randbytes(512) for _ in range(1500)]
    assert [0, 0] == machine.do(chain, write(512, *pieces), flush())
    assert b"".join(pieces) == server.export.content[512 : 512 + 512 * 1500]
    assert [0] == machine.do(chain, discard(0, 4096))
    assert bytes(4096) == server.export.content[:4096]
    chain.close()


def test_a_chain_that_is_closed_says_goodbye(machine: Machine, plain: Server) -> None:
    """A chain that is closed ends its connection. Each chain needs one connection."""
    for count in range(1, 4):
        machine.open(text(plain)).close()
        assert count == plain.accepted


def test_requests_are_cut_to_what_the_server_takes(machine: Machine, plain: Server) -> None:
    """A request longer than the server accepts is sent in parts and ends once, with the worst of their errors."""
    plain.export.blocks = (512, 4096, 8192)
    seen: list[int] = []

    def odd(near: socket.socket, _flags: int, kind: int, cookie: bytes, offset: int, length: int) -> bool:
        seen.append(length)
        if kind == 0 and offset == 16384:
            near.sendall(pack(">IHH8sIIH", 0x668E33EF, 1, 1 << 15 | 1, cookie, 6, errno.ENOSPC, 0))
            return True
        return False

    plain.odd = odd
    chain = machine.open(text(plain))
    whole = read(32768, 100, 65536 - 100)
    assert [0, errno.ENOSPC] == machine.do(chain, whole, read(0, 32768))
    assert plain.export.content[32768 : 32768 + 65536] == content(whole)
    assert [0] == machine.do(chain, write(0, bytes(20480)))
    assert 8192 == max(seen)
    chain.close()


def test_a_smallest_request_becomes_the_sector(machine: Machine, plain: Server) -> None:
    """The server's smallest request becomes the sector size: 4096 bytes are served, and more is refused."""
    plain.export.blocks = (4096, 4096, 1 << 20)
    chain = machine.open(text(plain))
    assert 4096 == chain.geometry.sector_size
    chain.close()
    plain.export.blocks = (8192, 8192, 1 << 20)
    with pytest.raises(DriverError, match="at least 8192 bytes"):
        machine.open(text(plain))


def test_a_size_that_is_no_whole_number_of_sectors_is_refused(machine: Machine, plain: Server) -> None:
    """An export whose size is not a multiple of the sector size is refused, and the error has both numbers."""
    plain.export.content.extend(b"tail")
    with pytest.raises(DriverError, match=r"1048580 bytes.*512"):
        machine.open(text(plain))


def test_an_export_is_asked_for_by_its_name(machine: Machine, plain: Server) -> None:
    """An option names the export or, decoded once, the URI does. An unknown one is refused in the server's words."""
    plain.export.name = b"a|b, %41"
    machine.open(text(plain, r",export=a\|b\, %41")).close()
    machine.open(f"nbd:nbd+unix:///a%7Cb%2C%20%2541?socket={plain.path},drain=0s").close()
    assert [plain.export.name] * 2 == plain.asked
    with pytest.raises(DriverError, match=r"no export 'other'.*no such export here"):
        machine.open(text(plain, ",export=other"))


def test_a_server_that_can_only_be_read_makes_a_read_only_disk(machine: Machine, plain: Server) -> None:
    """A read-only export is refused for writing and served for reading."""
    plain.export.flags = HAS_FLAGS | READ_ONLY
    with pytest.raises(DriverError, match="read-only"):
        machine.open(text(plain))
    chain = machine.open(text(plain), read_only=True)
    assert plain.export.content == machine.everything(chain)
    assert (False, False) == (chain.geometry.can_flush, chain.geometry.can_discard)
    chain.close()


def test_durable_writes_bear_the_flag(machine: Machine, plain: Server) -> None:
    """With durable=on each write has the FUA flag. A server without FUA is refused."""
    chain = machine.open(text(plain, ",durable=on"))
    assert [0] == machine.do(chain, write(0, bytes(512)))
    chain.close()
    chain = machine.open(text(plain))
    assert [0] == machine.do(chain, write(0, bytes(512)))
    chain.close()
    assert [1, 0] == plain.flags_of
    plain.export.flags = HAS_FLAGS | FLUSH
    with pytest.raises(DriverError, match="durable"):
        machine.open(text(plain, ",durable=on"))
    assert FUA


def test_an_error_of_the_server_is_that_of_the_request(machine: Machine, server: Server) -> None:
    """A server's error becomes the request's status by the protocol's numbers, or EIO. The connection goes on."""
    codes = iter([errno.ENOSPC, errno.EPERM, 4711])

    def odd(near: socket.socket, _flags: int, kind: int, cookie: bytes, *_: int) -> bool:
        if kind == 1:
            near.sendall(pack(">II8s", 0x67446698, next(codes), cookie))
        return kind == 1

    server.odd = odd
    chain = machine.open(text(server))
    found = [machine.do(chain, write(0, bytes(512)))[0] for _ in range(3)]
    assert [errno.ENOSPC, errno.EPERM, errno.EIO] == found
    assert server.export.content == machine.everything(chain)
    assert 1 == server.accepted
    chain.close()


def test_what_is_zero_is_known_without_reading(machine: Machine, plain: Server) -> None:
    """Block status tells data from zeros. If the server has none, everything counts as data."""
    plain.export.content[4096:65536] = bytes(65536 - 4096)
    chain = machine.open(text(plain))
    found = [(each.start, each.length, each.is_zeros) for each in map_chain(chain.layers)]
    assert [(0, 4096, False), (4096, 61440, True), (65536, SIZE - 65536, False)] == found
    assert plain.export.content == machine.everything(chain)
    chain.close()
    plain.export.structured = False
    chain = machine.open(text(plain))
    assert [(0, SIZE, False)] == [(each.start, each.length, each.is_zeros) for each in map_chain(chain.layers)]
    chain.close()


GARBAGE = {
    "no reply at all": b"HTTP/1.1 400 Bad Request",
    "a reply to nothing": pack(">IIQ", 0x67446698, 0, 12345),
    "data for nobody": pack(">IHHQIQ", 0x668E33EF, 1, 1, 0, 520, 1 << 40) + bytes(512),
    "too little data": pack(">IHHQI", 0x668E33EF, 1, 0, 0, 0),
    "a chunk that never ends": pack(">IHHQI", 0x668E33EF, 0, 77, 0, 1 << 30),
    "more data than asked for": pack(">IHHQIQ", 0x668E33EF, 0, 1, 0, 8 + 1024, 0) + bytes(1024),
    "the end": b"",
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_the_connection_and_nothing_else(machine: Machine, plain: Server, said: bytes) -> None:
    """An invalid reply ends the connection, and the request is done by the next one."""
    left = [said]

    def odd(near: socket.socket, *_: object) -> bool:
        if left:
            near.sendall(left.pop())
            near.shutdown(socket.SHUT_WR)
            return True
        return False

    plain.odd = odd
    chain = machine.open(text(plain))
    request = read(0, 512)
    assert [0] == until_served(machine, chain, request)
    assert plain.export.content[:512] == content(request)
    assert 2 == plain.accepted
    chain.close()


def test_what_was_in_flight_is_away_when_the_server_goes(machine: Machine, plain: Server) -> None:
    """All requests in flight on a lost connection come back as AWAY, and each is done by the next connection."""
    held: list[bytes] = []

    def odd(_near: socket.socket, _flags: int, _kind: int, cookie: bytes, *_: int) -> bool:
        held.append(cookie)
        if len(held) == 64:
            plain.cut()
        return len(held) <= 64

    plain.odd = odd
    chain = machine.open(text(plain))
    batch = [write(512 * number, bytes([number]) * 512) for number in range(63)] + [flush()]
    assert [AWAY] * 64 == machine.do(chain, *batch)
    assert [0] * 64 == until_served(machine, chain, *map(again, batch))
    assert b"".join(bytes([number]) * 512 for number in range(63)) == plain.export.content[: 63 * 512]
    assert 2 == plain.accepted
    assert "to unix:" in fact(chain, "connection")
    chain.close()


def test_a_server_that_is_away_is_waited_for(machine: Machine, plain: Server) -> None:
    """While no server listens, requests end with AWAY and the layer says why. Once it is back, the disk goes on."""
    chain = machine.open(text(plain))
    plain.stop()
    assert [AWAY] == machine.do(chain, read(0, 512))
    until_says(machine, chain, "cannot be reached")
    plain.start()
    assert [0] == until_served(machine, chain, again(read(0, 512)))
    chain.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda export: export.content.__delitem__(slice(SIZE // 2, None)), "cannot shrink"),
        (lambda export: setattr(export, "name", b"other"), "no export"),
        (lambda export: setattr(export, "flags", HAS_FLAGS | READ_ONLY), "only be read"),
        (lambda export: setattr(export, "flags", HAS_FLAGS | FUA), "flush"),
        (lambda export: setattr(export, "blocks", (4096, 4096, 1 << 25)), "other request sizes"),
    ],
)
def test_a_server_that_comes_back_with_less_is_not_served_from(
    machine: Machine, plain: Server, change: object, why: str
) -> None:
    """If the server comes back with a smaller export, none, or one that can do less, the disk waits and says why."""
    chain = machine.open(text(plain))
    former = Export(bytearray(plain.export.content))
    change(plain.export)
    plain.cut()
    assert [AWAY] == machine.do(chain, read(0, 512))
    until_says(machine, chain, why)
    assert [AWAY] == machine.do(chain, read(0, 512))
    plain.export = former
    assert [0] == until_served(machine, chain, again(read(0, 512)))
    chain.close()


def test_a_larger_export_goes_on(machine: Machine, plain: Server) -> None:
    """An export that has grown while its server was away is served with its former size."""
    chain = machine.open(text(plain))
    plain.export.content.extend(bytes(SIZE))
    plain.cut()
    assert [0] == until_served(machine, chain, read(SIZE - 512, 512))
    assert SIZE == chain.geometry.size
    chain.close()


def test_a_server_that_owes_an_answer_and_says_nothing_has_gone(machine: Machine, plain: Server) -> None:
    """A server that owes an answer and is silent for longer than `timeout` has gone. While idle it may be silent."""
    silent = [True]
    plain.odd = lambda *_: silent and silent.pop()
    chain = machine.open(text(plain, ",timeout=2s"))
    machine.reactor.call_later(2.5, machine.reactor.stop)
    machine.reactor.run()
    assert 1 == plain.accepted  # idle for longer than the time-out
    began = machine.reactor.now()
    machine.reactor.call_later(15, lambda: pytest.fail("it waits for ever"))
    assert [AWAY] == machine.do(chain, read(0, 512))
    assert machine.reactor.now() - began >= 2
    assert [0] == until_served(machine, chain, read(0, 512))
    chain.close()


@pytest.mark.parametrize(
    "said", [b"", b"SSH-2.0-OpenSSH\r\n", b"NBDMAGIC" + pack(">QQ", 0x00420281861253, SIZE) + bytes(128)]
)
def test_what_is_no_server_is_refused_in_a_sentence(machine: Machine, plain: Server, said: bytes) -> None:
    """Another service, an old server, and one that hangs up each have a message of their own."""

    def greet(near: socket.socket) -> bool:
        near.sendall(said)
        return True

    plain.greet = greet
    with pytest.raises(DriverError, match=r"closed the connection in the handshake|not an NBD server|old form"):
        machine.open(text(plain))


def test_several_connections_need_a_server_that_says_so(machine: Machine, plain: Server) -> None:
    """Several connections require a server that announces multi-conn. Each of them gets its share of the requests."""
    with pytest.raises(DriverError, match="multi-conn"):
        machine.open(text(plain, ",connections=2"))
    plain.export.flags |= MULTI_CONN
    plain.accepted = 0
    seen: set[int] = set()
    plain.odd = lambda near, *_: bool(seen.add(near.fileno()))
    chain = machine.open(text(plain, ",connections=3"))
    assert 3 == plain.accepted
    done: list[Request] = []
    chain.complete = done.extend
    batch = [read(4096 * number, 4096) for number in range(9)]
    for request in batch:
        again(request)
        chain.submit([request])
    machine.reactor.run_until(lambda: len(done) == len(batch))
    assert 3 == len(seen)
    for request in batch:
        assert (0, plain.export.content[request.offset : request.offset + 4096]) == (request.status, content(request))
    chain.close()


@pytest.mark.parametrize("place", [0, 1])
def test_while_one_connection_is_missing_nothing_is_sent(machine: Machine, plain: Server, place: int) -> None:
    """While one of several connections is missing nothing is sent: the server may still be doing a lost request, and no
    later one may overtake it.

    Requests in flight on the other connections are completed.
    """
    plain.export.flags |= MULTI_CONN
    chain = machine.open(text(plain, ",connections=2"))
    goes_on, held = threading.Event(), threading.Event()
    busy: list[tuple[socket.socket, bytes]] = []

    def odd(near: socket.socket, _flags: int, kind: int, cookie: bytes, *_: int) -> bool:
        if held.is_set():
            return False
        if kind == 0:
            busy.append((near, cookie))
        else:
            held.set()
            near.shutdown(socket.SHUT_RDWR)
        return True

    plain.odd, plain.greet = odd, lambda _: not goes_on.wait(10)
    done: list[Request] = []
    first, lost = again(read(0, 512)), again(write(0, bytes(512)))
    chain.complete = done.extend
    if place:  # the first connection has something to do
        chain.submit([first])
    chain.submit([lost])
    machine.reactor.run_until(lambda: lost in done)
    assert AWAY == lost.status
    later = [again(read(512, 512)), again(lost)]
    chain.submit(list(later))
    assert [AWAY, AWAY] == [each.status for each in later]
    assert "1 of 2 lost" in fact(chain, "connection")
    for near, cookie in busy:
        near.sendall(pack(">IHH8sIQ", 0x668E33EF, 1, 1, cookie, 8 + 512, 0) + bytes(512))
        machine.reactor.run_until(lambda: first in done)
        assert 0 == first.status
    goes_on.set()
    assert [0] == until_served(machine, chain, again(lost))
    assert 3 == plain.accepted
    assert "2 to unix:" in fact(chain, "connection")
    chain.close()


@pytest.mark.parametrize("options", [",drain=31s", ",drain=-1s", ",timeout=1s", ",export=b"])
def test_options_that_cannot_be_are_refused(machine: Machine, options: str) -> None:
    """A `drain` longer than any opening would wait, a `timeout` that is too short, and two export names are refused."""
    with pytest.raises(ChainError):
        machine.open(f"nbd:nbd://host/a{options}")


def test_the_same_export_is_the_same_disk(machine: Machine, plain: Server) -> None:
    """The same export is the same disk, however it is used or written."""
    chain = machine.open(text(plain))
    driver = chain.layers[0].driver
    assert isinstance(driver, Nbd)
    found = driver.content()
    chain.close()
    other = machine.open(f"nbd:nbd+unix:///?socket={plain.path},timeout=9s")
    assert found == other.layers[0].driver.content()
    other.close()
