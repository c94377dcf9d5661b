"""The NBD load generator, against a server in this test and against nbdkit."""

from __future__ import annotations

import contextlib
import select
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from struct import Struct

import pytest

from xenbackend.bench.nbd import NbdLoop
from xenbackend.bench.plan import SMALLEST, WORKS, BenchError, places
from xenbackend.bench.server import Server
from xenbackend.bench.session import bench_file
from xenbackend.units import SECTOR

REQUEST = Struct(">IHHQQI")
READ = next(work for work in WORKS if work.name == "rr4k")
WRITE = next(work for work in WORKS if work.name == "rw4k")


class TinyServer:
    """Serves one connection: reads return their stamps, writes are kept as {offset: first eight bytes}."""

    def __init__(self, path: Path) -> None:
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(str(path))
        self.listener.listen()
        self.written: dict[int, bytes] = {}
        self.shift = 0  # sectors by which reads are off
        self.error = 0
        self.refuses = False
        self.unsent = b""
        self.gone = False  # stays silent after the first answer
        self.held = 0  # bytes of each reply that are held back for the next one
        self.thread = threading.Thread(target=self.serve)

    def serve(self) -> None:
        """Answer until the client hangs up."""
        connection, _ = self.listener.accept()
        with connection, contextlib.suppress(ConnectionError):
            connection.sendall(b"NBDMAGICIHAVEOPT\0\3")
            option = self.take(connection, 4 + 16)
            self.take(connection, int.from_bytes(option[-4:], "big"))
            self.answer_option(connection)
            while (request := self.take(connection, 28)) and self.answer(connection, request):
                pass

    def answer_option(self, connection: socket.socket) -> None:
        """Grant the export, or refuse it."""
        reply = Struct(">QIII")
        if self.refuses:
            connection.sendall(reply.pack(0x3E889045565A9, 7, 1 << 31 | 6, 4) + b"none")
            return
        connection.sendall(reply.pack(0x3E889045565A9, 7, 3, 12) + Struct(">HQH").pack(0, SMALLEST, 1))
        connection.sendall(reply.pack(0x3E889045565A9, 7, 1, 0))

    def answer(self, connection: socket.socket, request: bytes) -> bool:
        """Answer one request; return False after a disconnect request."""
        _, _, kind, cookie, offset, length = REQUEST.unpack(request)
        data = b""
        if kind == 1:
            self.written[offset] = self.take(connection, length)[:8]
        elif kind == 0:
            data = (offset // SECTOR + self.shift).to_bytes(8, "little").ljust(length, b"\0")
        else:
            return False
        self.unsent += Struct(">IIQ").pack(0x67446698, self.error, cookie) + data
        ready = len(self.unsent) - self.held
        connection.sendall(self.unsent[:ready])
        self.unsent = self.unsent[ready:]
        if self.held and not select.select([connection], [], [], 0.05)[0]:  # no request follows
            connection.sendall(self.unsent)
            self.unsent = b""
        if self.gone:
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        return not self.gone

    @staticmethod
    def take(connection: socket.socket, length: int) -> bytes:
        """Receive exactly this many bytes."""
        return connection.recv(length, socket.MSG_WAITALL)


@contextlib.contextmanager
def serving(tmp_path: Path, **facts: object) -> Iterator[tuple[TinyServer, str]]:
    """Serve until the client hangs up."""
    server = TinyServer(tmp_path / "socket")
    for name, value in facts.items():
        setattr(server, name, value)
    server.thread.start()
    try:
        yield server, str(tmp_path / "socket")
    finally:
        server.thread.join()
        server.listener.close()


def test_handshake_tells_the_size(tmp_path: Path) -> None:
    """The export's size is the one in NBD_INFO_EXPORT."""
    with serving(tmp_path) as (_, path):
        loop = NbdLoop("tiny", path)
        loop.close()

        assert SMALLEST == loop.size


def test_a_refused_export_is_named(tmp_path: Path) -> None:
    """If the server refuses the export, the error is a sentence with the server's words."""
    with serving(tmp_path, refuses=True) as (_, path), pytest.raises(BenchError, match="tiny refuses export 'x': none"):
        NbdLoop("tiny", path, "x")


@pytest.mark.parametrize("held", [0, 100], ids=["whole replies", "torn replies"])
def test_reads_are_checked_and_kept_in_flight(tmp_path: Path, held: int) -> None:
    """However replies are split, each is recognised as a whole, with the right sector's data."""
    with serving(tmp_path, held=held) as (_, path), contextlib.closing(NbdLoop("tiny", path)) as loop:
        loop.start(READ, places(READ, loop.size))
        finished: list[int] = []
        for _ in range(20):
            batch = loop.reap()
            finished += batch
            loop.renew(batch)

        assert list(range(len(finished))) == finished

        loop.drain(READ)


def test_wrong_data_ends_the_measurement(tmp_path: Path) -> None:
    """A read with another sector's data is an error that names both sectors."""
    with serving(tmp_path, shift=1) as (_, path), contextlib.closing(NbdLoop("tiny", path)) as loop:
        loop.start(READ, [8, 16] * 16)
        with pytest.raises(BenchError, match="tiny answered a read of sector 8 with the data of sector 9"):
            loop.run(0.1)


def test_an_error_reply_ends_the_measurement(tmp_path: Path) -> None:
    """An error reply ends the measurement."""
    with serving(tmp_path, error=5) as (_, path), contextlib.closing(NbdLoop("tiny", path)) as loop:
        loop.start(WRITE, places(WRITE, loop.size))
        with pytest.raises(BenchError, match="answered a request with an error"):
            loop.run(0.1)


def test_a_server_that_hangs_up_ends_the_measurement(tmp_path: Path) -> None:
    """A server that hangs up ends the measurement at once."""
    with serving(tmp_path, gone=True) as (_, path), contextlib.closing(NbdLoop("tiny", path)) as loop:
        loop.start(READ, places(READ, loop.size))
        with pytest.raises(BenchError, match="tiny hung up"):
            loop.run(0.1)


def test_writes_carry_the_stamp_of_their_place(tmp_path: Path) -> None:
    """Written data begin with their sector's number, even when the places repeat."""
    with serving(tmp_path) as (server, path), contextlib.closing(NbdLoop("tiny", path)) as loop:
        loop.start(WRITE, places(WRITE, loop.size)[:80])
        loop.run(0.02)
        loop.drain(WRITE)

    assert len(server.written) > WRITE.depth
    assert {offset: (offset // SECTOR).to_bytes(8, "little") for offset in server.written} == server.written


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nbdkit") is None, reason="nbdkit is not installed")
def test_every_workload_on_nbdkit(tmp_path: Path) -> None:
    """A real server answers every workload without an error, with the file's data."""
    path = str(tmp_path / "socket")
    with bench_file(tmp_path / "file", SMALLEST):
        arguments = ["nbdkit", "--foreground", "--unix", path, "file", str(tmp_path / "file")]
        server = Server("nbdkit", arguments, tmp_path / "log", cpu=None)
        loop = server.connect(lambda: NbdLoop("nbdkit", path))
        for work in WORKS:
            loop.start(work, places(work, loop.size))

            assert loop.run(0.01).requests > 0

            loop.drain(work)
        loop.close()
        server.close()
