"""Tests of `xenbackend.block.remote.tls` with a server of the tests behind TLS, both trusted and untrusted."""

from __future__ import annotations

import _ssl
import ctypes
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from struct import pack
from types import SimpleNamespace

import pytest

from tests.block.drivers.test_nbd import until_served
from tests.certificates import KINDS, Authority, make_key
from tests.helpers_block import Machine, again, content, flush, read, write
from tests.nbd_server import MULTI_CONN, Export, Server
from xenbackend.block.remote import tls
from xenbackend.block.remote.connection import Connection
from xenbackend.block.remote.tls import Tls, TlsFailed, TlsSocket
from xenbackend.block.request import AWAY
from xenbackend.errors import ChainError, DriverError
from xenbackend.nbd.abi import NbdError
from xenbackend.nbd.client import Offer

SIZE = 3 << 20


class Places:
    """Directories with certificates."""

    def __init__(self, directory: Path) -> None:
        ours = self.ours = Authority(directory / "ours")
        self.good, self.expired = ours.server("good"), ours.server("expired", days=-1)
        self.other_host = ours.server("other", "other.example")
        self.stranger = Authority(directory / "theirs", "theirs").server("good")
        self.client, self.nobody = (ours.client(f"client-{shows}", shows_itself=shows) for shows in (True, False))

    def with_files(self, name: str, files: Mapping[str, str]) -> Path:
        """Return a copy of our client's directory in which some files are replaced."""
        directory = self.ours.directory / name
        directory.mkdir()
        for file, written in {**credentials(self.client), **files}.items():
            (directory / file).write_text(written)
        return directory

    def context(self, directory: Path, *, wants_client: bool = False) -> ssl.SSLContext:
        """Return the TLS context of a server with the certificates of a directory."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(directory / "server-cert.pem", directory / "server-key.pem")
        if wants_client:
            context.load_verify_locations(self.ours.certificate)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Places:
    """Return directories with certificates of every kind."""
    return Places(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def machine() -> Iterator[Machine]:
    """Return a machine that is closed after the test."""
    machine = Machine()
    yield machine
    machine.close()


@pytest.fixture
def server(tmp_path: Path, places: Places) -> Iterator[Server]:
    """Return a server that requires TLS and a client certificate of ours."""
    export = Export(bytearray(Random(1).randbytes(SIZE)))
    with Server(tmp_path / "nbd.sock", export) as server:
        server.tls, server.needs_tls = places.context(places.good, wants_client=True), True
        yield server


def text(server: Server, directory: Path, options: str = "") -> str:
    """Return the text of a chain with this server's disk and the certificates of a directory."""
    return f"nbd:unix:{server.path},certificates={directory},drain=0s{options}"


def credentials(directory: Path) -> dict[str, str]:
    """Return the files in a directory."""
    return {each.name: each.read_text() for each in directory.glob("c*.pem")}


def test_what_is_written_is_read_back(machine: Machine, server: Server, places: Places) -> None:
    """Requests of any size, many at once, and in more pieces than a record holds, work in both directions."""
    chain = machine.open(text(server, places.client))
    assert server.export.content == machine.everything(chain)
    pieces = [Random(number).randbytes(512 * (1 + number % 9)) for number in range(200)]
    batch = [write(512 * 9 * number, piece) for number, piece in enumerate(pieces)]
    assert [0] * 201 == machine.do(chain, *batch, flush())
    assert [0] == machine.do(chain, write(1 << 20, bytes(1 << 20), Random(9).randbytes(1 << 20)))
    batch = [read(0, SIZE), read(512, 512, 1024), read(1 << 20, 512, 65536, 1 << 20)]
    assert [0] * 3 == machine.do(chain, *batch)
    for request in batch:
        assert server.export.content[request.offset : request.offset + request.length] == content(request)
    assert chain.layers[0].driver.env.facts["encryption"].startswith("TLSv1.")
    chain.close()


def test_a_connection_that_is_lost_is_made_anew_with_tls(machine: Machine, server: Server, places: Places) -> None:
    """A connection that follows a lost one is encrypted too. Requests in flight come back as AWAY."""
    left = [True]

    def odd(*_: object) -> bool:
        if left:
            left.clear()
            server.cut()
            return True
        return False

    chain = machine.open(text(server, places.client))
    server.odd = odd
    request = read(0, 4096)
    assert [AWAY] == machine.do(chain, request)
    assert [0] == until_served(machine, chain, again(request))
    assert server.export.content[:4096] == content(request)
    assert 2 == server.accepted
    chain.close()


@pytest.mark.parametrize(
    ("name", "host", "sentence"),
    [
        ("good", "localhost", ""),
        ("good", "127.0.0.1", ""),
        ("good", "", ""),
        ("expired", "localhost", "its certificate has expired"),
        ("other_host", "localhost", "its certificate is for another host"),
        ("other_host", "127.0.0.1", "its certificate is for another address"),
        ("other_host", "", ""),
        ("stranger", "localhost", "not from an authority that"),
        ("stranger", "", "not from an authority that"),
    ],
)
def test_each_certificate_that_is_wrong_has_a_sentence(places: Places, name: str, host: str, sentence: str) -> None:
    """A certificate that has expired, is for another host, or from an unknown authority is refused with the reason."""
    near, far = socket.socketpair()
    context = places.context(getattr(places, name))

    def serve() -> None:
        try:
            context.wrap_socket(far, server_side=True).close()
        except OSError:
            far.close()

    thread = threading.Thread(target=serve)
    thread.start()
    it = Tls(credentials(places.nobody), host).over(near)
    if sentence:
        with pytest.raises(TlsFailed, match=sentence):
            it.handshake()
    else:
        it.handshake()
        assert it.version.startswith("TLSv1.")
        assert it.recv(1) == b""
    it.close()
    thread.join(10)


def test_who_shows_no_certificate_is_told(machine: Machine, server: Server, places: Places) -> None:
    """If the server requires a client certificate and there is none, the error says so."""
    with pytest.raises(DriverError, match=r"certificate required|handshake"):
        machine.open(text(server, places.nobody))


def test_a_server_without_tls_hears_nothing_of_us(machine: Machine, server: Server, places: Places) -> None:
    """A server without TLS does not even learn the export's name. One that requires TLS is refused with advice."""
    server.tls, server.needs_tls = None, False
    with pytest.raises(DriverError, match="it does not offer TLS, which nbds:// requires"):
        machine.open(text(server, places.client))
    assert [] == server.asked
    server.needs_tls = True
    with pytest.raises(DriverError, match=r"it requires TLS; write nbds:// with certificates="):
        machine.open(f"nbd:unix:{server.path},drain=0s")


@pytest.mark.rows("A32")
def test_what_comes_before_tls_ends_the_connection(machine: Machine, server: Server, places: Places) -> None:
    """Plain-text bytes after the server's consent to TLS could come from anybody, so they end the connection."""
    server.injects = pack(">QIII", 0x3E889045565A9, 8, 1, 0)
    with pytest.raises(DriverError, match="sends data before it is asked"):
        machine.open(text(server, places.client))


class Pair:
    """Both ends of a connection with TLS: ours, and a server's."""

    def __init__(self, places: Places) -> None:
        near, far = socket.socketpair()
        context = places.context(places.good)
        inside: list[ssl.SSLSocket] = []
        thread = threading.Thread(target=lambda: inside.append(context.wrap_socket(far, server_side=True)))
        thread.start()
        self.ours = Tls(credentials(places.nobody), "").over(near)
        self.ours.handshake()
        thread.join(10)
        [self.theirs] = inside

    def close(self) -> None:
        """Close both."""
        self.ours.close()
        self.theirs.close()

    def send_garbage(self) -> None:
        """Send a record that nobody with the session's keys can have sent."""
        with socket.socket(fileno=os.dup(self.theirs.fileno())) as raw:
            raw.sendall(b"\x17\x03\x03\x00\x20" + bytes(32))


def test_what_is_no_tls_any_more_ends_the_connection(places: Places) -> None:
    """A record that nobody with the session's keys can have sent is never accepted as data."""
    pair = Pair(places)
    pair.theirs.sendall(b"good")
    assert b"good" == pair.ours.recv(10)
    pair.send_garbage()
    with pytest.raises(NbdError, match="TLS: "):
        pair.ours.recv(10)
    pair.close()


def test_who_says_goodbye_to_nobody_is_not_told(places: Places) -> None:
    """Closing in order raises no error and closes the socket, even if TLS can send nothing any more."""
    pair = Pair(places)
    connection = Connection(pair.ours, Offer(SIZE, 0, structured=True, context=7))
    pair.send_garbage()
    with pytest.raises(NbdError, match="TLS: "):
        list(connection.block_status(0, SIZE, 10))
    connection.close(in_order=True)
    assert -1 == connection.fileno()
    pair.close()


def with_tickets(places: Places, near: socket.socket, far: socket.socket, count: int) -> tuple[TlsSocket, bytes]:
    """Return our end of a connection, and the records of its server: so many tickets for later sessions, then "data".

    In TLS 1.3 there may be any number of tickets. Python's `ssl` sends two, and OpenSSL as many as it is asked for.
    """
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = places.context(places.good).wrap_bio(incoming, outgoing, server_side=True)
    ours = Tls(credentials(places.nobody), "").over(near)
    thread = threading.Thread(target=ours.handshake)
    thread.start()
    is_done = False
    while not is_done:
        try:
            server.do_handshake()
            is_done = True
        except ssl.SSLWantReadError:
            far.sendall(outgoing.read())
            incoming.write(far.recv(65536))
    far.sendall(outgoing.read())
    thread.join(10)
    library = ctypes.PyDLL(_ssl.__file__)
    place = id(server._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    session = ctypes.c_void_p.from_address(place)
    for _ in range(count):
        assert 1 == library.SSL_new_session_ticket(session)
        server.do_handshake()
    server.write(b"data")
    return ours, outgoing.read()


def test_what_brings_no_data_holds_nobody(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tickets without end do not hold the loop: each call takes a limited amount. No data are lost."""
    monkeypatch.setattr(tls, "_MOST", 4096)  # bytes at once
    near, far = socket.socketpair()
    with near, far:
        ours, records = with_tickets(places, near, far, 200)
        near.setblocking(False)
        room, found, turns = memoryview(bytearray(512)), 0, 0
        far.sendall(records)
        with suppress(BlockingIOError):
            while near.recv(1, socket.MSG_PEEK):
                turns += 1
                with suppress(BlockingIOError):
                    found += ours.recv_into(room)
        assert (4, b"data") == (found, room[:4])
        assert turns >= len(records) // (5 * 4096) > 1


def test_all_that_has_come_is_taken(places: Places) -> None:
    """Answers that arrive together are all taken, because the socket will not signal them again."""
    pair = Pair(places)
    connection = Connection(pair.ours, Offer(SIZE, 0))
    requests = [flush() for _ in range(3)]
    connection.submit(requests)
    for number in range(3):
        pair.theirs.sendall(pack(">IIQ", 0x67446698, 0, number))
    assert requests == connection.receive()
    assert connection.failure is None
    pair.close()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"ca-cert.pem": "nothing"}, "ca-cert.pem has no certificate"),
        ({"client-cert.pem": "nothing"}, "client-cert.pem has no certificate"),
        ({"client-key.pem": "nothing"}, "client-key.pem has no key"),
    ],
)
def test_files_that_are_wrong_are_named(places: Places, change: dict[str, str], why: str) -> None:
    """If a file has no certificate or key in it, the error names the file."""
    with pytest.raises(TlsFailed, match=why):
        Tls({**credentials(places.client), **change}, "")


@pytest.mark.parametrize("host", [".example", "a" * 64 + ".example"])
def test_a_host_that_no_certificate_is_of(places: Places, host: str) -> None:
    """A host name that no certificate can have is refused."""
    with pytest.raises(TlsFailed, match="no certificate is of a host that is called"):
        Tls(credentials(places.nobody), host)


@pytest.mark.parametrize("kind", KINDS)
def test_a_key_that_is_anothers_is_refused(machine: Machine, server: Server, places: Places, kind: str) -> None:
    """A key, of whatever kind, that does not match the certificate is refused before the server is contacted."""
    theirs = places.with_files(f"theirs-{kind}", {"client-key.pem": make_key(kind)})
    server.tls, server.needs_tls = places.context(places.good), True  # accepts a client without a certificate
    with pytest.raises(DriverError, match=r"client-key.pem is not the key of client-cert.pem"):
        machine.open(text(server, theirs))
    assert 0 == server.accepted


def test_a_certificate_that_openssl_does_not_take_is_refused(places: Places) -> None:
    """A certificate whose key is too short for this host's rules is refused. The client does not go on without one."""
    short = Authority(places.ours.directory / "short")
    short.sign(short.directory / "client", key=("-newkey", "rsa:1024", "-nodes"))
    with pytest.raises(TlsFailed, match=r"OpenSSL does not accept client-cert.pem: ee key too small"):
        Tls({**credentials(places.client), **credentials(short.directory)}, "")


def test_a_chain_of_certificates_is_whole(places: Places) -> None:
    """If a further certificate in the file cannot be read, the file is refused and not cut there."""
    certificate = credentials(places.client)["client-cert.pem"]
    broken = certificate + "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    with pytest.raises(TlsFailed, match=r"client-cert.pem has a certificate in it that cannot be read"):
        Tls({**credentials(places.client), "client-cert.pem": broken}, "")
    Tls({**credentials(places.client), "client-cert.pem": f"{certificate}{places.ours.certificate.read_text()}\n"}, "")


def test_a_python_that_is_built_otherwise_is_refused(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    """If Python's SSL context has no OpenSSL context where we look for it, TLS is refused, and nothing is written."""
    library = SimpleNamespace(SSL_CTX_get_options=lambda _: 1)  # it has no other function, so no other can be called
    monkeypatch.setattr(tls, "_library", lambda: library)
    with pytest.raises(TlsFailed, match="the layout of its SSL contexts is unknown"):
        Tls(credentials(places.client), "")


def test_a_key_with_a_passphrase_asks_nobody(places: Places) -> None:
    """An encrypted key is refused, and nobody is asked for its passphrase on a terminal."""
    locked = "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n"
    with pytest.raises(TlsFailed, match="without a passphrase"):
        Tls({**credentials(places.client), "client-key.pem": locked}, "")


@pytest.mark.parametrize(
    ("chain", "why"),
    [
        ("nbd:nbds://host/a", "needs certificates="),
        ("nbd:nbds://host/a?tls-psk-file=/k", "PSK"),
        ("nbd:nbds://u@host/a?tls-certificates=/c", "a user or a fragment"),
        ("nbd:nbds://host/a?tls-verify-peer=false&tls-certificates=/c", "could be anybody"),
        ("nbd://host/a,certificates=/c", "nbd:// does not use TLS"),
        ("nbd://host/a?tls-certificates=/c", "not known in a URI"),
        ("nbd:host:1,certificates=c", "not an absolute path"),
        ("nbd:nbds://host/a?tls-certificates=/c,certificates=/d", "but certificates= names others"),
        ("nbd:host:1,connections=9", "from 1 to 8"),
        ("nbd:host:1,connections=0", "from 1 to 8"),
    ],
)
def test_chains_that_contradict_themselves_are_refused(machine: Machine, chain: str, why: str) -> None:
    """TLS without certificates, certificates without TLS, and a server that is not verified are refused."""
    with pytest.raises(ChainError, match=why):
        machine.open(chain)


def test_several_connections_with_tls(machine: Machine, server: Server, places: Places) -> None:
    """Every one of several connections is encrypted and used."""
    server.export.flags |= MULTI_CONN
    chain = machine.open(text(server, places.client, ",connections=3"))
    assert 3 == server.accepted
    assert [0] * 6 == [machine.do(chain, write(4096 * number, bytes(4096)))[0] for number in range(6)]
    assert bytes(6 * 4096) == server.export.content[: 6 * 4096]
    assert "3 to unix:" in chain.layers[0].driver.env.facts["connection"]
    chain.close()
