"""A load generator for NBD servers on a Unix socket: fixed newstyle handshake, simple replies, one connection.

Must not know which server it is.

All requests of a workload are built in advance, with their numbers as cookies: a batch of reads is one slice of that
memory, sent by one call. All replies have the same size, so that one call receives many, which are then read by stride.

Source: NetworkBlockDevice/nbd doc/proto.md.
"""

from __future__ import annotations

import contextlib
import select
import socket
from itertools import chain
from struct import Struct

from xenbackend.bench.loop import STALL, ClosedLoop
from xenbackend.bench.plan import BenchError, Work
from xenbackend.units import SECTOR

_MAGIC = b"NBDMAGIC" + b"IHAVEOPT"
_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_OPTION = Struct(">8sII")  # IHAVEOPT, option, length of its data
_OPT_GO = 7
_OPTION_REPLY = Struct(">QIII")  # magic, option, type, length
_REP_ACK, _REP_INFO, _REP_ERROR = 1, 3, 1 << 31
_INFO_EXPORT = Struct(">HQH")  # type 0, size in bytes, flags
_REQUEST = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
_REQUEST_MAGIC = 0x25609513
_READ, _WRITE, _DISCONNECT = 0, 1, 2
_REPLY = 16  # bytes: magic, error, cookie
_GOOD = int.from_bytes((0x67446698).to_bytes(4, "big") + bytes(4), "little")  # the first word of a successful reply
_TIMEVAL = Struct("@ll")  # seconds, microseconds
_BUFFER = 4 << 20  # bytes of the socket's send buffer


class NbdLoop(ClosedLoop):
    """Keeps requests in flight on one connection to the server at a Unix socket.

    Raises: BenchError if the server refuses the export or hangs up; OSError if there is no server.
    """

    def __init__(self, name: str, path: str, export: str = "") -> None:
        self.name = name
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER)
        for direction in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            # settimeout() would cost a poll() before each call, and break MSG_WAITALL.
            self._socket.setsockopt(socket.SOL_SOCKET, direction, _TIMEVAL.pack(int(STALL), 0))
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        try:
            self._socket.connect(path)
            self.size = self._negotiate(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def _negotiate(self, export: bytes) -> int:
        greeting = self._exactly(18)
        if greeting[:16] != _MAGIC or not greeting[17] & _FIXED_NEWSTYLE:
            raise BenchError(f"{self.name} is not a fixed newstyle NBD server")
        self._no_zeroes = greeting[17] & _NO_ZEROES
        wish = len(export).to_bytes(4, "big") + export + bytes(2)
        flags = (_FIXED_NEWSTYLE | self._no_zeroes).to_bytes(4, "big")
        self._socket.sendall(flags + _OPTION.pack(b"IHAVEOPT", _OPT_GO, len(wish)) + wish)
        size = 0
        while True:
            _magic, _option, kind, length = _OPTION_REPLY.unpack(self._exactly(_OPTION_REPLY.size))
            data = self._exactly(length)
            if kind >= _REP_ERROR:
                raise BenchError(f"{self.name} refuses export {export.decode()!r}: {data.decode() or hex(kind)}")
            if kind == _REP_ACK:
                return size
            if kind == _REP_INFO and data[:2] == bytes(2):
                size = _INFO_EXPORT.unpack(data)[1]

    def _exactly(self, length: int) -> bytes:
        data = self._socket.recv(length, socket.MSG_WAITALL)
        if len(data) != length:
            raise BenchError(f"{self.name} hung up during the handshake")
        return data

    def start(self, work: Work, places: list[int]) -> None:
        """Build all requests of the workload, and send the first ones."""
        self._write = work.write
        self._expected = places
        self._next = 0
        kind = _WRITE if work.write else _READ
        requests = bytearray(_REQUEST.size * len(places))
        for number, place in enumerate(places):
            # The server does not interpret the cookie: sent in little-endian order, it returns as a native number.
            cookie = int.from_bytes(number.to_bytes(8, "little"), "big")
            fields = (_REQUEST_MAGIC, 0, kind, cookie, place * SECTOR, work.length)
            _REQUEST.pack_into(requests, _REQUEST.size * number, *fields)
        self._requests = memoryview(requests)
        self._each = [self._requests[at : at + _REQUEST.size] for at in range(0, len(requests), _REQUEST.size)]
        self._stride = _REPLY + (0 if work.write else work.length)
        self._replies = memoryview(bytearray(self._stride * work.depth))
        self._words = self._replies.cast("Q")
        self._filled = self._wanted = 0
        self._data = [memoryview(bytearray(work.length)) for _ in range(work.depth if work.write else 0)]
        self._stamps = [data.cast("Q") for data in self._data]
        self._send(work.depth)

    def reap(self) -> list[int]:
        """Receive until there is at least one whole reply."""
        stride = self._stride
        while self._filled < stride:
            self._filled += self._receive()
        count = self._filled // stride
        self._whole = whole = count * stride
        words = self._words[: whole // 8]
        if set(words[:: stride // 8].tolist()) != {_GOOD}:
            raise BenchError(f"{self.name} answered a request with an error")
        finished = words[1 :: stride // 8].tolist()
        self._found = [] if self._write else words[2 :: stride // 8].tolist()
        rest = self._filled - whole
        if rest:
            self._replies[:rest] = self._replies[whole : self._filled]
        self._filled = rest
        return finished

    def _receive(self) -> int:
        """Receive more bytes, after those already received. Return how many, 0 if it had to wait and received none."""
        try:
            received = self._socket.recv_into(self._replies[self._filled :], 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            self.wait(lambda: len(self._poll.poll(0)), self._sleep)
            return 0
        except ConnectionError:
            received = 0
        if not received:
            raise self._gone()
        return received

    def _gone(self) -> BenchError:
        return BenchError(f"{self.name} hung up")

    def _sleep(self) -> int:
        if not self._poll.poll(STALL * 1000):
            raise self.stalled()
        return 1

    def renew(self, finished: list[int]) -> int:
        """Check the data of the replies, and send as many requests."""
        if not self._write:
            expected = [self._expected[number] for number in finished]
            if expected != self._found:
                sector, found = next(pair for pair in zip(expected, self._found, strict=True) if pair[0] != pair[1])
                raise self.wrong_data(sector, found)
        return self._send(len(finished))

    def _send(self, count: int) -> int:
        """Send the next `count` requests, and return the number of one of them."""
        first = self._next
        last = first + count
        if last > len(self._each):
            first, last = 0, count
        self._next = last
        try:
            if self._write:
                self._send_writes(first, last)
            else:
                self._socket.sendall(self._requests[_REQUEST.size * first : _REQUEST.size * last])
        except BlockingIOError:
            raise self.stalled() from None
        except ConnectionError:
            raise self._gone() from None
        return first + first % count

    def _send_writes(self, first: int, last: int) -> None:
        for stamps, place in zip(self._stamps, self._expected[first:last], strict=False):
            stamps[0] = place
        pieces = list(chain.from_iterable(zip(self._each[first:last], self._data, strict=False)))
        sent = self._socket.sendmsg(pieces)
        for piece in pieces:
            if sent < len(piece):
                self._socket.sendall(piece[sent:])
            sent = max(0, sent - len(piece))

    def close(self) -> None:
        """Send a disconnect request, and close the connection."""
        with contextlib.suppress(OSError):  # the server may have ended already
            self._socket.sendall(_REQUEST.pack(_REQUEST_MAGIC, 0, _DISCONNECT, 0, 0, 0))
        self._socket.close()
