"""A disk exported by NBD in the test's own thread, and a client that sends exactly the bytes that a test wants.

Must not sleep: time passes for the export only when a test moves its clock.
"""

from __future__ import annotations

import socket
from pathlib import Path
from struct import pack
from typing import Any, Self

from tests.served import HeldDisk
from xenbackend.block.driver import Geometry
from xenbackend.block.request import PENDING
from xenbackend.loop.reactor import Reactor
from xenbackend.nbd.abi import IHAVEOPT, OPT_GO, REPLY, REPLY_MAGIC, REQUEST, REQUEST_MAGIC
from xenbackend.opener.listening import listen
from xenbackend.worker.export import Export

SIZE = 64 << 20
GO = pack(">I", 3) + IHAVEOPT + pack(">IIIH", OPT_GO, 6, 0, 0)
HANDSHAKE = 18 + (20 + 12) + (20 + 14) + 20  # bytes of the greeting and of the answer to GO


class HeldChain(HeldDisk):
    """A disk that answers when told, in the form of an open chain; the next `submit` raises `bug`."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry.size)
        self.geometry = geometry
        self.contain: Any = None
        self.bug: Exception | None = None
        self.drained = 0  # how often it was asked to pass on what it holds back

    def release(self) -> None:
        """See `Chain`."""
        self.drained += 1

    def submit(self, batch: list[Any]) -> None:
        assert {PENDING} == {request.status for request in batch}
        bug, self.bug = self.bug, None
        super().submit(list(batch))
        batch.clear()  # it is ours (D2)
        if bug:
            raise bug


class Client:
    """A client of the export; what it receives is kept in `received`."""

    def __init__(self, exported: Exported) -> None:
        self.exported = exported
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(exported.path))
        self.socket.setblocking(False)
        self.received = bytearray()
        self.is_hung_up = False

    def go(self) -> Self:
        """Do the handshake."""
        self.send(GO)
        assert HANDSHAKE == len(self.take(HANDSHAKE))
        return self

    def send(self, data: bytes) -> int:
        """Send what the socket takes, letting the export take it in turn; return how much that was."""
        sent = 0
        for _ in range(1000):
            try:
                sent += self.socket.send(data[sent:])
            except BlockingIOError:
                pass
            except OSError:
                break
            self.exported.step(2)
            if sent == len(data):
                break
        return sent

    def ask(
        self, kind: int, offset: int = 0, length: int = 512, data: bytes = b"", cookie: int = 1, flags: int = 0
    ) -> None:
        """Send a request, and the bytes of a write."""
        self.send(REQUEST.pack(REQUEST_MAGIC, flags, kind, cookie, offset, length) + data)

    def listen(self) -> bytearray:
        """Receive what there is."""
        while not self.is_hung_up:
            self.exported.step(2)
            try:
                data = self.socket.recv(1 << 20)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            self.is_hung_up = not data
            self.received += data
        return self.received

    def take(self, length: int) -> bytes:
        """Return the next bytes, as many as there are up to `length`."""
        data = bytes(self.listen()[:length])
        del self.received[:length]
        return data

    def reply(self, length: int = 0) -> tuple[int, int, bytes]:
        """Return cookie, error and data of the next reply; `length` bytes follow one without error."""
        magic, error, cookie = REPLY.unpack(self.take(REPLY.size))
        assert REPLY_MAGIC == magic
        return cookie, error, self.take(0 if error else length)

    def close(self) -> None:
        self.socket.close()


class Exported:
    """An export over a disk that answers when told.

    now                       the export's clock, in seconds
    complaints, alarms, bugs  what the worker would have said
    """

    def __init__(self, directory: Path, geometry: Geometry | None = None) -> None:
        self.path = directory / "nbd" / "disk.sock"
        self.now = 0.0
        self.complaints: list[str] = []
        self.alarms: list[str] = []
        self.bugs: list[Exception] = []
        self.stray_bugs: list[Exception] = []
        self.is_over = False
        self.chain = HeldChain(geometry or Geometry(size=SIZE, can_discard=True))
        self.reactor = Reactor(clock=lambda: self.now, on_bug=self.stray_bugs.append)
        self.clients: list[Client] = []
        self.export = Export(
            socket.socket(fileno=listen(str(self.path))),
            str(self.path),
            self.chain,
            self.reactor,
            kick=lambda: None,
            channel=self,
            on_bug=self.bugs.append,
        )

    def stand(self) -> None:
        """Take note that the standing has changed."""

    def complain(self, sentence: str) -> None:
        """Take a complaint about a client."""
        self.complaints.append(sentence)

    def alarm(self, sentence: str) -> None:
        """Take what an administrator must read."""
        self.alarms.append(sentence)

    def client(self) -> Client:
        """Return a client to which the greeting has been sent."""
        self.clients.append(Client(self))
        self.step(2)
        return self.clients[-1]

    def step(self, passes: int = 1) -> None:
        """Let the loop pass, without ever sleeping in it."""
        for _ in range(passes):
            self.reactor.call_soon(self.reactor.stop)
            self.reactor.run()

    def pass_time(self, seconds: float) -> None:
        """Move the clock, second by second, and let timers go off."""
        for _ in range(int(seconds)):
            self.now += 1
            self.step(2)

    def end(self) -> bool:
        """Close the export; False if something is still in flight after a few passes of the loop."""
        self.export.close(lambda: setattr(self, "is_over", True))
        self.step(4)
        return self.is_over

    def close(self) -> None:
        """Release everything, and check that nothing was kept."""
        self.chain.holding = False
        if self.chain.held:
            self.chain.give_back()
        self.step(4)
        for client in self.clients:
            client.close()
        self.step(4)
        assert self.is_over or self.end()
        self.reactor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
