"""An NBD server for tests, in threads of the test's process: as good, as slow or as wrong as a test wants.

Must not use our own server's code, so that both sides do not share mistakes; the numbers are those of `nbd.abi`.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from struct import pack, unpack
from typing import Self

OPTION_REPLY = 0x3E889045565A9
ACK, INFO, META = 1, 3, 4
UNSUP, UNKNOWN, TLS_REQD = (1 << 31 | number for number in (1, 6, 5))
HAS_FLAGS, READ_ONLY, FLUSH, FUA, TRIM, MULTI_CONN = 1, 2, 4, 8, 32, 256


class Closed(Exception):
    """The client has closed its side."""


@dataclass
class Export:
    """What is served; a test may change it between two connections."""

    content: bytearray
    flags: int = HAS_FLAGS | FLUSH | FUA | TRIM
    blocks: tuple[int, int, int] | None = None
    structured: bool = True
    name: bytes = b""


@dataclass
class Server:
    """A server that listens at a path, with a thread for each connection and for each write.

    Attributes:
        export: what is served.
        drains: a connection is closed once all its requests are done, as nbdkit does; else at once, as qemu-nbd.
        slow: writes whose data begins with these bytes wait for `go`.
        odd: called for each request with the socket and its fields; True if it has dealt with the request.
        greet: called for each connection before the greeting; True if it has dealt with the connection.
        accepted: connections so far.
        flags_of: the flags of each write, in order.
        asked: the exports that were asked for.
        tls: context with the server's certificate; None: it has no TLS.
        needs_tls: it refuses options without TLS.
        injects: bytes that it sends in plain text after agreeing to TLS.
    """

    path: Path
    export: Export
    drains: bool = True
    slow: bytes = b"\0never"
    odd: Callable[[socket.socket, int, int, bytes, int, int], bool] = lambda *_: False
    greet: Callable[[socket.socket], bool] = lambda _: False
    accepted: int = 0
    flags_of: list[int] = field(default_factory=list)
    asked: list[bytes] = field(default_factory=list)
    tls: ssl.SSLContext | None = None
    needs_tls: bool = False
    injects: bytes = b""
    go: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)  # a slow write has come
    _open: list[socket.socket] = field(default_factory=list)
    _threads: list[threading.Thread] = field(default_factory=list)
    _listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.go.set()
        self.stop()
        for thread in self._threads:
            thread.join(20)

    def start(self) -> None:
        """Listen."""
        self.path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen(16)
        self._start(self._accept, self._listener)

    def stop(self) -> None:
        """End like a server that is killed: all connections are closed."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            self.path.unlink(missing_ok=True)
        self.cut()

    def cut(self) -> None:
        """Close all present connections."""
        for near in list(self._open):
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)

    def _start(self, function: Callable[..., None], *arguments: object) -> threading.Thread:
        thread = threading.Thread(target=function, args=arguments, daemon=True)
        thread.start()  # before anybody joins it
        self._threads.append(thread)
        return thread

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            self.accepted += 1
            self._open.append(near)
            self._start(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        writes: list[threading.Thread] = []
        inside: list[socket.socket] = []  # the same connection, with TLS
        try:
            if not self.greet(near):
                self._transmit(self._handshake(near, inside), writes)
        except (Closed, OSError):
            pass
        finally:
            if self.drains:
                for thread in writes:
                    thread.join(20)
            self._open.remove(near)
            with contextlib.suppress(OSError):
                near.shutdown(socket.SHUT_RDWR)
            for each in (*inside, near):
                each.close()

    def _handshake(self, near: socket.socket, inside: list[socket.socket]) -> socket.socket:
        """Do the handshake, and return the socket by which requests come. Raises: Closed."""
        near.sendall(b"NBDMAGICIHAVEOPT" + pack(">H", 3))
        take(near, 4)
        structured = False
        while True:
            magic, option, length = unpack(">8sII", take(near, 16))
            assert magic == b"IHAVEOPT"
            data = take(near, length)

            def reply(kind: int, body: bytes = b"", option: int = option, to: socket.socket = near) -> None:
                to.sendall(pack(">QIII", OPTION_REPLY, option, kind, len(body)) + body)

            if option == 5 and self.tls is not None:
                near.sendall(pack(">QIII", OPTION_REPLY, option, ACK, 0) + self.injects)
                structured = False
                near = self.tls.wrap_socket(near.dup(), server_side=True)
                inside.append(near)
            elif self.needs_tls and not isinstance(near, ssl.SSLSocket):
                reply(TLS_REQD)
            elif option == 8 and self.export.structured:
                structured = True
                reply(ACK)
            elif option == 10 and structured:
                reply(META, pack(">I", 7) + b"base:allocation")
                reply(ACK)
            elif option == 7:
                (size,) = unpack(">I", data[:4])
                self.asked.append(data[4 : 4 + size])
                if self.asked[-1] != self.export.name:
                    reply(UNKNOWN, b"no such export here")
                    continue
                reply(INFO, pack(">HQH", 0, len(self.export.content), self.export.flags))
                if self.export.blocks:
                    reply(INFO, pack(">HIII", 3, *self.export.blocks))
                reply(ACK)
                return near
            else:
                reply(UNSUP)

    def _transmit(self, near: socket.socket, writes: list[threading.Thread]) -> None:
        content, lock = self.export.content, threading.Lock()
        while True:
            magic, flags, kind, cookie, offset, length = unpack(">IHH8sQI", take(near, 28))
            assert magic == 0x25609513
            data = take(near, length) if kind == 1 else b""
            if kind == 2:
                return
            if self.odd(near, flags, kind, cookie, offset, length):
                continue
            if kind == 0:
                piece = bytes(content[offset : offset + length])
                with lock:
                    near.sendall(self._data(cookie, offset, piece))
            elif kind == 1:
                self.flags_of.append(flags)
                writes.append(self._start(self._write, near, cookie, offset, data, content, lock))
            elif kind == 7:
                with lock:
                    near.sendall(self._status(cookie, offset, length))
            else:
                if kind == 4:
                    content[offset : offset + length] = bytes(length)
                with lock:
                    near.sendall(pack(">II8s", 0x67446698, 0, cookie))

    def _data(self, cookie: bytes, offset: int, piece: bytes) -> bytes:
        if not self.export.structured:
            return pack(">II8s", 0x67446698, 0, cookie) + piece
        half = len(piece) // 2
        first, second = piece[:half], piece[half:]
        found = b""
        if any(first):
            found += pack(">IHH8sIQ", 0x668E33EF, 0, 1, cookie, 8 + half, offset) + first
        else:
            found += pack(">IHH8sIQI", 0x668E33EF, 0, 2, cookie, 12, offset, half)
        return found + pack(">IHH8sIQ", 0x668E33EF, 1, 1, cookie, 8 + len(second), offset + half) + second

    def _status(self, cookie: bytes, offset: int, length: int) -> bytes:
        content, ranges, place = self.export.content, [], offset
        while place < offset + length:
            is_zero = not any(content[place : place + 512])
            end = place + 512
            while end < offset + length and (not any(content[end : end + 512])) == is_zero:
                end += 512
            ranges.append(pack(">II", end - place, 3 if is_zero else 0))
            place = end
        body = pack(">I", 7) + b"".join(ranges)
        return pack(">IHH8sI", 0x668E33EF, 1, 5, cookie, len(body)) + body

    def _write(
        self, near: socket.socket, cookie: bytes, offset: int, data: bytes, content: bytearray, lock: threading.Lock
    ) -> None:
        if data.startswith(self.slow):
            self.begun.set()
            self.go.wait(20)
        content[offset : offset + len(data)] = data
        with lock, contextlib.suppress(OSError):
            near.sendall(pack(">II8s", 0x67446698, 0, cookie))


def main(path: str, size: str) -> None:
    """Serve zeros in a process of its own until its standard input ends."""
    with Server(Path(path), Export(bytearray(int(size)))):
        print("ready", flush=True)
        sys.stdin.read()


def take(near: socket.socket, length: int) -> bytes:
    """Return so many bytes. Raises: Closed."""
    found = b""
    while len(found) < length:
        piece = near.recv(length - len(found))
        if not piece:
            raise Closed
        found += piece
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
