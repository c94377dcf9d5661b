"""One connection to an NBD server after its handshake: sends requests, receives replies, with data directly in `iov`.

Must not connect, nor repeat a request: requests in flight when the connection is lost go back to their sender.

A server is not trusted: an unexpected reply, data outside the range of a request, or anything that is not a reply ends
the connection (`NbdError`), and has no other effect. A read is done when all its bytes have come.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence

from xenbackend.block.remote.lost import Lost, errno_of, lost
from xenbackend.block.remote.status import ask
from xenbackend.block.remote.tls import TlsSocket
from xenbackend.block.request import Op, Request, clear
from xenbackend.nbd.abi import (
    CHUNK_DATA,
    CHUNK_DATA_HEAD,
    CHUNK_DONE,
    CHUNK_ERROR,
    CHUNK_ERROR_HEAD,
    CHUNK_HOLE,
    CHUNK_HOLE_BODY,
    CHUNK_NONE,
    CMD_DISC,
    CMD_FLAG_FUA,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    REPLY,
    REPLY_MAGIC,
    REQUEST,
    REQUEST_MAGIC,
    STRUCTURED,
    STRUCTURED_MAGIC,
    NbdError,
)
from xenbackend.nbd.client import Offer

Stream = socket.socket | TlsSocket
_KINDS = (CMD_READ, CMD_WRITE, CMD_FLUSH, CMD_TRIM)  # by Op
_IOV_MAX = 1024  # pieces of one writev(2); a worker may make no sendmsg(2)
_ROOM = 64 * 1024  # bytes of the receive buffer, for the heads of replies and small data
_MAX_SMALL = 8192  # bytes of a chunk without data
MAX_ERRORS = 64  # error chunks in reply to one request; the servers that we know send one


class Connection:
    """The transmission phase on one socket, which belongs to this object from now on.

    in_flight   number of requests that the server has not answered
    answered    number of requests that it has answered since the beginning
    heard       bytes received since the beginning
    failure     the first reason why the connection is unusable; `take_back` returns the requests in flight then
    """

    def __init__(self, near: Stream, offer: Offer, *, durable: bool = False) -> None:
        """If `durable`, each write is answered only when it is on the medium."""
        near.setblocking(False)
        self.in_flight = self.answered = self.heard = 0
        self.failure: Lost | NbdError | None = None
        self._socket = near
        self._tls = near if isinstance(near, TlsSocket) else None
        self._offer = offer
        self._write_flags = CMD_FLAG_FUA if durable else 0
        self._lent: list[Request | None] = []  # by cookie
        self._free: list[int] = []  # cookies
        self._got: dict[int, int] = {}  # by cookie: bytes received of a read that comes in several chunks
        self._failed: dict[int, tuple[int, int]] = {}  # by cookie: the first errno, and the number of errors
        self._out: deque[memoryview | bytes] = deque()
        self._view = memoryview(bytearray(_ROOM))
        self._at = self._end = 0  # the part of it that was received and not parsed yet
        self._iov: Sequence[memoryview] = ()  # where the data go that come next
        self._after_data: Request | None = None  # the request that is done when these data are there

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self._socket.fileno()

    @property
    def wants_to_send(self) -> bool:
        """Whether there is something that the socket has not accepted yet."""
        return bool(self._out) or (self._tls is not None and self._tls.has_unsent)

    def submit(self, batch: list[Request]) -> None:
        """Send requests, as far as the socket accepts them. They are in flight from now on, even if sending fails."""
        out, lent, free, head = self._out, self._lent, self._free, REQUEST.pack
        was_empty = not out
        write_flags = self._write_flags
        self.in_flight += len(batch)
        for request in batch:
            if free:
                number = free.pop()
                lent[number] = request
            else:
                number = len(lent)
                lent.append(request)
            op = request.op
            if op == 1:  # WRITE
                out.append(head(REQUEST_MAGIC, write_flags, 1, number, request.offset, request.length))
                out.extend(request.iov)
            else:
                out.append(head(REQUEST_MAGIC, 0, _KINDS[op], number, request.offset, request.length))
        if was_empty:
            self.send()

    def send(self) -> None:
        """Send as much as the socket accepts now."""
        out = self._out
        try:
            while out:
                pieces = list(out) if len(out) <= _IOV_MAX else [out[place] for place in range(_IOV_MAX)]
                sent = os.writev(self._socket.fileno(), pieces) if self._tls is None else self._tls.writev(pieces)
                for piece in pieces:
                    if sent < len(piece):
                        break
                    sent -= len(piece)
                    out.popleft()
                if sent:
                    out[0] = memoryview(out[0])[sent:]
            if self._tls is not None:
                self._tls.flush()
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(lost(error))
        except NbdError as problem:
            self.fail(problem)

    def receive(self) -> list[Request]:
        """Receive, and return the requests that are done, with their statuses. Check `failure` afterwards."""
        done: list[Request] = []
        try:
            while self._receive_once(done):
                pass
        except BlockingIOError:
            pass
        except OSError as error:
            self.fail(lost(error))
        except (Lost, NbdError) as problem:
            self.fail(problem)
        self.in_flight -= len(done)
        self.answered += len(done)
        return done

    def fail(self, why: Lost | NbdError) -> None:
        """Set `failure` unless it is set: a socket reports an error of the network only once."""
        self.failure = self.failure or why

    def take_back(self) -> list[Request]:
        """Return the requests in flight, and forget them."""
        self.in_flight = 0
        lost = [request for request in [*self._lent, self._after_data] if request is not None]
        self._lent, self._free, self._iov, self._after_data = [], [], (), None
        self._out.clear()
        self._got.clear()
        self._failed.clear()
        return lost

    def close(self, *, in_order: bool) -> None:
        """Close the socket; if `in_order`, disconnect from the server first; nothing is in flight then."""
        if in_order:
            try:
                self._socket.settimeout(1.0)
                self._socket.sendall(REQUEST.pack(REQUEST_MAGIC, 0, CMD_DISC, 0, 0, 0))
                self._socket.shutdown(socket.SHUT_RDWR)
            except (OSError, NbdError):
                pass  # the connection, or its TLS, has ended already
        self._socket.close()

    def block_status(self, offset: int, length: int, timeout_s: float) -> Iterator[tuple[int, int]]:
        """See `status.ask`; nothing is in flight."""
        return ask(self._socket, self._offer.context or 0, offset, length, timeout_s)

    def _receive_once(self, done: list[Request]) -> bool:
        """Receive once, and parse that; return True if there may be more already."""
        view = self._view
        if self._iov:  # one call for the rest of this read's data, and for what follows, into the buffer
            iov = self._iov
            received = self._socket.recvmsg_into([*iov, view] if len(iov) < _IOV_MAX else iov[:_IOV_MAX])[0]
            if not received:
                raise Lost("the server has closed the connection")
            self.heard += received
            left = self._fill(received)
            if left < 0:
                return True
            self._at, self._end = 0, left
            self._data_are_there(done)
        else:
            left = self._end - self._at
            if left:
                view[:left] = bytes(view[self._at : self._end])
            received = self._socket.recv_into(view[left:])
            if not received:
                raise Lost("the server has closed the connection")
            self.heard += received
            self._at, self._end = 0, left + received
        was_full = self._end == _ROOM
        self._parse(done)
        return bool(self._iov) or was_full or self._tls is not None  # TLS may hold more than the socket shows

    def _fill(self, received: int) -> int:
        """Advance `_iov` by the received bytes; return how many are in the buffer, or -1 if data are still missing."""
        iov = self._iov
        for place, piece in enumerate(iov):
            if received < len(piece):
                self._iov = [piece[received:], *iov[place + 1 :]]
                return -1
            received -= len(piece)
        self._iov = ()
        return received

    def _data_are_there(self, done: list[Request]) -> None:
        request, self._after_data = self._after_data, None
        if request is not None:
            done.append(request)

    def _parse(self, done: list[Request]) -> None:
        view, lent, unpack = self._view, self._lent, REPLY.unpack_from
        at, end = self._at, self._end
        while end - at >= 16:
            magic, word, number = unpack(view, at)
            request = lent[number] if number < len(lent) else None
            if request is None:
                raise NbdError(f"a reply to request {number}, which is not in flight")
            if magic == STRUCTURED_MAGIC:
                if end - at < STRUCTURED.size:
                    break
                after = self._chunk(request, number, word, at, end, done)
                if after < 0:
                    break
                at = after
            elif magic == REPLY_MAGIC:
                at = self._simple(request, number, word, at + 16, end, done)
            else:
                raise NbdError(f"a reply that begins with {magic:#x}")
            if self._iov:
                break
        self._at = at

    def _simple(self, request: Request, number: int, code: int, at: int, end: int, done: list[Request]) -> int:
        """Take a simple reply whose head ends at `at`; return where it ends."""
        if request.op or code:  # anything but a READ that succeeded
            self._finish(request, number, errno_of(code) if code else 0, done)
            return at
        if self._offer.structured:
            raise NbdError("a simple reply to a read")
        self._lent[number] = None
        self._free.append(number)
        request.status = 0
        at = self._copy(request.iov, request.length, at, end)
        if self._iov:
            self._after_data = request
        else:
            done.append(request)
        return at

    def _chunk(self, request: Request, number: int, word: int, at: int, end: int, done: list[Request]) -> int:
        """Take a chunk of a structured reply at `at`; return where it ends, or -1 if it is not complete yet."""
        flags, kind = word >> 16, word & 0xFFFF
        length: int = STRUCTURED.unpack_from(self._view, at)[4]
        body, is_last = at + STRUCTURED.size, bool(flags & CHUNK_DONE)
        if not self._offer.structured:
            raise NbdError("a structured reply, which was not agreed on")
        if kind == CHUNK_DATA and request.op == Op.READ:
            if length <= CHUNK_DATA_HEAD.size:
                raise NbdError(f"data of {length} bytes")
            if end - body < CHUNK_DATA_HEAD.size:
                return -1
            (offset,) = CHUNK_DATA_HEAD.unpack_from(self._view, body)
            length -= CHUNK_DATA_HEAD.size
            iov = self._part(request, number, offset, length)
            after = self._copy(iov, length, body + CHUNK_DATA_HEAD.size, end)
        elif length > _MAX_SMALL:
            raise NbdError(f"a chunk of type {kind} with {length} bytes")
        elif end - body < length:
            return -1
        else:
            self._small_chunk(request, number, kind, self._view[body : body + length], is_last=is_last)
            after = body + length
        if is_last and self._iov:  # the request is done when the rest of its data has come
            self._finish(request, number, 0, [])
            self._after_data = request
        elif is_last:
            self._finish(request, number, 0, done)
        return after

    def _small_chunk(self, request: Request, number: int, kind: int, body: memoryview, *, is_last: bool) -> None:
        """Take a chunk without data."""
        if kind == CHUNK_HOLE and request.op == Op.READ and len(body) == CHUNK_HOLE_BODY.size:
            clear(self._part(request, number, *CHUNK_HOLE_BODY.unpack(body)))
        elif kind & CHUNK_ERROR and len(body) >= CHUNK_ERROR_HEAD.size:
            code, count = self._failed.get(number, (errno_of(CHUNK_ERROR_HEAD.unpack_from(body)[0]), 0))
            if count == MAX_ERRORS:
                raise NbdError(f"more than {MAX_ERRORS} errors in reply to one request")
            self._failed[number] = code, count + 1  # whatever other chunks follow
        elif kind != CHUNK_NONE or body or not is_last:
            raise NbdError(f"a chunk of type {kind} in reply to a {Op(request.op).name}")

    def _part(self, request: Request, number: int, offset: int, length: int) -> Sequence[memoryview]:
        """Check that data belong to a read, count them, and return the memory that they go to."""
        start = offset - request.offset
        if start < 0 or start + length > request.length:
            raise NbdError(f"data for {offset}+{length} in reply to a read of {request.offset}+{request.length}")
        if not length:  # a server could send any number of these
            raise NbdError("a chunk that brings 0 bytes")
        got = self._got.get(number, 0)
        if got + length > request.length:
            raise NbdError(f"more data than the {request.length} bytes that were asked for")
        self._got[number] = got + length
        return request.iov if length == request.length else cut(request.iov, start, length)

    def _copy(self, iov: Sequence[memoryview], length: int, at: int, end: int) -> int:
        """Copy data from the buffer into `iov`, and set `_iov` to where the rest goes; return where they end."""
        view = self._view
        if end - at >= length:
            for piece in iov:
                size = len(piece)
                piece[:] = view[at : at + size]
                at += size
            return at
        for place, piece in enumerate(iov):
            size = len(piece)
            if end - at < size:
                piece[: end - at] = view[at:end]
                self._iov = [piece[end - at :], *iov[place + 1 :]]
                break
            piece[:] = view[at : at + size]
            at += size
        return end

    def _finish(self, request: Request, number: int, status: int, done: list[Request]) -> None:
        got = self._got.pop(number, 0)
        if self._failed:
            status, _ = self._failed.pop(number, (status, 0))
        if request.op == Op.READ and not status and got != request.length:
            raise NbdError(f"{got} bytes for a read of {request.length}")
        self._lent[number] = None
        self._free.append(number)
        request.status = status
        done.append(request)


def cut(iov: Sequence[memoryview], start: int, length: int) -> list[memoryview]:
    """Return the views of `length` bytes of `iov`, from byte `start` on."""
    found = []
    for piece in iov:
        size = len(piece)
        if start < size and length > 0:
            found.append(piece[start : start + length])
            length -= len(found[-1])
        start = max(0, start - size)
    return found
