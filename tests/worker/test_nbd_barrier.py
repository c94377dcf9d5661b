"""If a worker dies with a write under way at an NBD server, that write never lands after those of its successor."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.certificates import Authority
from tests.driven import Driven
from tests.nbd_server import MULTI_CONN, Export, Server
from xenbackend.opener import connecting
from xenbackend.protocol import messages
from xenbackend.protocol.messages import Stage
from xenbackend.units import PAGE

pytestmark = pytest.mark.slow  # each starts a process
SIZE = 1 << 20
A, B = b"A" * PAGE, b"B" * PAGE


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """Return a server whose first write of A bytes is slow."""
    with Server(tmp_path / "nbd.sock", Export(bytearray(SIZE)), slow=b"A") as server:
        yield server


def chain(server: Server, drain: str = "0s") -> str:
    """Return the chain of the server's disk."""
    return f"nbd:unix:{server.path},drain={drain}"


def kill_amid_a_write(driven: Driven, server: Server, text: str) -> None:
    """Kill the worker while the server does a slow write of A bytes; first let it open `text`, if given."""
    if text:
        driven.connect(text)
    driven.begin_write(A)
    assert server.begun.wait(20)
    server.slow = b"\0never"
    driven.worker.process.kill()
    driven.worker.process.wait()
    driven.start_successor()


def begin_successor(driven: Driven, text: str) -> threading.Thread:
    """Let a successor open the chain, and return the thread that waits for that."""
    thread = threading.Thread(target=driven.open, args=[text])
    thread.start()
    thread.join(0.5)
    assert thread.is_alive(), "it did not wait"
    return thread


def has_opened(opening: threading.Thread) -> None:
    """Wait until the successor has opened the chain."""
    opening.join(20)
    assert not opening.is_alive(), "it waits for ever"


def serve_and_overwrite(driven: Driven) -> None:
    """Let the successor take over the rings and repeat what was in flight; then write B bytes."""
    driven.worker.tell(messages.Serve, None)
    assert not driven.worker.expect_standing(Stage.SERVING).failure
    driven.frontend.drain()  # of two writes in flight to one place either may win
    driven.frontend.write(0, B)
    driven.frontend.flush()


def let_the_late_write_land(server: Server) -> None:
    """Let the server do all that it was sent."""
    server.go.set()
    for thread in list(server._threads):
        if thread.name.endswith("(_write)"):
            thread.join(20)


@pytest.mark.parametrize("way", ["plain", "tls", "connections"])
def test_a_late_write_does_not_land_after_its_successors(
    driven: Driven, server: Server, tmp_path: Path, way: str
) -> None:
    """A successor opens the disk only once the server has ended every connection of the dead worker."""
    text, count = chain(server), 1
    if way == "tls":
        ours = Authority(tmp_path / "ours")
        certificates, directory = ours.server("server"), ours.client("client", shows_itself=True)
        server.needs_tls, server.tls = True, ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.tls.load_cert_chain(certificates / "server-cert.pem", certificates / "server-key.pem")
        server.tls.load_verify_locations(ours.certificate)
        server.tls.verify_mode = ssl.CERT_REQUIRED
        text += f",certificates={directory}"
    elif way == "connections":
        server.export.flags |= MULTI_CONN
        text, count = f"{text},connections=3", 3
    kill_amid_a_write(driven, server, text)
    opening = begin_successor(driven, text)
    assert count == server.accepted
    server.go.set()
    has_opened(opening)
    serve_and_overwrite(driven)
    let_the_late_write_land(server)
    assert B == server.export.content[:PAGE]


def test_without_the_barrier_it_does(driven: Driven, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the barrier the same steps lose a write that was answered and flushed, so the test above would notice."""
    monkeypatch.setattr(connecting.Connections, "_drain", lambda *_: None)
    kill_amid_a_write(driven, server, chain(server))
    driven.open(chain(server))
    serve_and_overwrite(driven)
    assert B == server.export.content[:PAGE]
    let_the_late_write_land(server)
    assert A == server.export.content[:PAGE]


def test_a_server_that_closes_early_is_waited_for_as_the_chain_says(driven: Driven, server: Server) -> None:
    """If a server ends connections before its writes are done, a write that lands within `drain` comes before those of
    the successor.
    """
    server.drains = False
    kill_amid_a_write(driven, server, chain(server, "2s"))
    began = driven.worker.openers.now()
    opening = begin_successor(driven, chain(server, "2s"))
    let_the_late_write_land(server)
    assert A == server.export.content[:PAGE]
    has_opened(opening)
    assert driven.worker.openers.now() - began >= 2
    serve_and_overwrite(driven)
    assert B == server.export.content[:PAGE]


def test_a_server_that_is_silent_keeps_the_disk_waiting(
    driven: Driven, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the server does not end a connection, the successor fails with a sentence that says so, and the next one goes
    on once it has ended.
    """
    monkeypatch.setattr(connecting, "DRAIN_S", 0.2)
    kill_amid_a_write(driven, server, chain(server))
    refused = driven.worker.open(chain(server))
    assert "has not ended a former connection" in refused.failure
    assert "xenbackend resume" in refused.failure
    assert [False] == [each.is_broken for each in driven.worker.openers.undrained]
    assert 1 == server.accepted
    server.go.set()
    driven.start_successor()
    driven.open(chain(server))
    serve_and_overwrite(driven)
    assert B == server.export.content[:PAGE]


def test_a_worker_that_closes_in_order_leaves_nothing_to_wait_for(driven: Driven, server: Server) -> None:
    """After a worker has handed over, its successor opens the disk at once, whatever `drain` is."""
    driven.connect(chain(server, "30s")).write(0, B)
    driven.worker.close(hands_over=True)
    driven.worker.process.wait(10)
    assert not driven.worker.openers.connections
    driven.start_successor()
    began = driven.worker.openers.now()
    driven.open(chain(server, "30s"))
    assert driven.worker.openers.now() - began < 20
    serve_and_overwrite(driven)


def test_a_lost_connection_is_made_anew_in_service(driven: Driven, server: Server) -> None:
    """If a connection is lost, the guest waits, and what was in flight is done over the next connection."""
    server.drains = False
    driven.connect(chain(server))
    request = driven.begin_write(A)
    assert server.begun.wait(20)
    server.slow = b"\0never"
    server.cut()
    wanted = driven.worker.expect(lambda it: isinstance(it, messages.Standing) and it.wants_connections)
    assert "lost" in wanted.layers[0].facts["connection"]
    server.go.set()
    assert not driven.worker.ask(messages.Reconnect()).sentence
    driven.frontend.wait([request])
    assert A == server.export.content[:PAGE]
    assert 2 == server.accepted
    assert not driven.worker.stand().wants_connections


def test_a_larger_export_is_offered_when_that_is_asked_for(driven: Driven, server: Server) -> None:
    """`resize` reads the export's size again; a successor waits for the end of the connection made for that."""
    text = chain(server)
    driven.connect(text).write(0, B)
    server.export.content.extend(bytes(SIZE))
    assert not driven.worker.ask(messages.Swap(text, order=3, is_resize=True)).sentence
    assert 2 * SIZE == driven.worker.stand().layers[0].size
    driven.frontend.write(8, B)
    assert [(f"unix:{server.path}", 0)] == list(driven.worker.openers.connections)
    kill_amid_a_write(driven, server, "")
    opening = begin_successor(driven, text)
    let_the_late_write_land(server)
    has_opened(opening)
    serve_and_overwrite(driven)
    assert B * 2 == server.export.content[: 2 * PAGE]
