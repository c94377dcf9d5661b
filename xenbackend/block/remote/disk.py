"""A disk on an NBD server in service: distributes requests to its connections, and splits those that are too large.

Must not decide what happens to requests that failed (the disk's policy does), nor send one again by itself.

Requests in flight on a connection that is lost (`lane`) end with AWAY, and come again from above. They may still be
under way at the server, and could land after requests that were sent by another connection meanwhile. So while a
connection is missing, all new requests end with AWAY; those in flight on the other connections may finish.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from xenbackend.block.driver import Complete, Env
from xenbackend.block.extents import Extent, Kind
from xenbackend.block.remote.connection import Stream, cut
from xenbackend.block.remote.lane import Lane, Wanted
from xenbackend.block.remote.lost import Lost
from xenbackend.block.request import AWAY, PENDING, Op, Request
from xenbackend.errors import DriverError
from xenbackend.nbd.abi import (
    SEND_FLUSH,
    SEND_FUA,
    SEND_MULTI_CONN,
    SEND_READ_ONLY,
    SEND_TRIM,
    STATUS_ZERO,
    NbdError,
)
from xenbackend.nbd.client import Offer

_MOST = 1 << 30  # bytes of one discard, or of one request for block status
_ABILITIES = {SEND_FLUSH: "flush", SEND_TRIM: "discard", SEND_FUA: "write through its cache"}


@dataclass(slots=True)
class _Whole:
    """A request that was split into parts."""

    request: Request
    left: int
    status: int = 0


class RemoteDisk:
    """One export in service. `complete` gets the finished requests; `offer` is the one that the guest was told of."""

    def __init__(self, env: Env, wanted: Wanted, streams: Sequence[Stream], offer: Offer, complete: Complete) -> None:
        """Take over the streams, one for each place, after their handshakes."""
        self.offer = offer
        self._env = env
        self._wanted = wanted
        self._complete = complete
        self._most = (min(offer.max_block, _MOST), min(offer.max_block, _MOST), _MOST, _MOST)  # bytes, by Op
        can = {Op.FLUSH: SEND_FLUSH, Op.DISCARD: SEND_TRIM}
        self._never = {op for op, flag in can.items() if not offer.flags & flag}
        self._parts: dict[Request, _Whole] = {}
        self._lanes = [
            Lane(env, wanted, place, self._give_back, self.why_unsuitable, self._tell) for place in range(len(streams))
        ]
        for lane, stream in zip(self._lanes, streams, strict=True):
            lane.begin(stream, offer)

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does."""
        lanes = self._lanes
        lane = lanes[0]
        connection = lane.connection
        if len(lanes) > 1:
            for each in lanes[1:]:
                other = each.connection
                if other is None:
                    connection = None
                elif connection is not None and other.in_flight < connection.in_flight:
                    lane, connection = each, other
        if connection is None:
            for request in batch:
                request.status = AWAY
            self._complete(batch)
            return
        if self._never and not (batch := self._give_back_unsupported(batch)):
            return
        most = self._most
        for request in batch:
            if request.length > most[request.op]:
                batch = self._cut(batch)
                break
        lane.submit(connection, batch)

    def extents(self, size: int) -> Iterator[Extent]:
        """Yield data and zeros by block status; a sector that is not all zeros counts as data. Raises: DriverError."""
        connection = self._lanes[0].connection
        step = max(512, self.offer.min_block)
        if connection is None or self.offer.context is None:
            yield Extent(0, size, Kind.DATA, 0)
            return
        place = done = 0  # how far the server has answered, and how far we have yielded
        is_zero = False
        while place < size:
            try:
                found = list(connection.block_status(place, min(size - place, _MOST), self._wanted.silence_s))
            except (Lost, NbdError, OSError) as problem:
                raise DriverError(f"the server does not tell which ranges hold data: {problem}") from problem
            for length, flags in found:
                if not length:
                    raise DriverError("the server reports an empty range")
                end = min(place + length, size)
                if bool(flags & STATUS_ZERO) != is_zero:
                    # Round up where zeros begin, and down where data begin: a sector with both is data.
                    edge = min(size, place + -place % step if flags & STATUS_ZERO else place - place % step)
                    if edge > done:
                        yield Extent(done, edge - done, Kind.ZERO if is_zero else Kind.DATA, done)
                        done = edge
                    is_zero = bool(flags & STATUS_ZERO)
                place = end
                if place >= size:
                    break
        if done < size:
            yield Extent(done, size - done, Kind.ZERO if is_zero else Kind.DATA, done)

    def close(self) -> None:
        """Close all connections in order; nothing is in flight. Connections that are being made are given up."""
        for lane in self._lanes:
            lane.close()

    def why_unsuitable(self, offer: Offer) -> str:
        """Return why a guest that was told of `self.offer` cannot continue with another one, or an empty text."""
        known = self.offer
        if offer.size < known.size:
            return (
                f"the export has {offer.size} bytes now, and the guest's disk {known.size}: a disk in use cannot shrink"
            )
        if offer.flags & SEND_READ_ONLY and not known.flags & SEND_READ_ONLY:
            return "the export can only be read now"
        if offer.min_block > max(512, known.min_block) or offer.max_block < self._most[Op.READ]:
            return "the export now requires other request sizes"
        if len(self._lanes) > 1 and not offer.flags & SEND_MULTI_CONN:
            return "it no longer promises that all connections see the same data (multi-conn)"
        missing = [name for flag, name in _ABILITIES.items() if known.flags & flag and not offer.flags & flag]
        return f"the export can no longer {missing[0]}, which the guest was told it could" if missing else ""

    def _tell(self) -> None:
        """Report the state of the connections."""
        count, endpoint = len(self._lanes), self._wanted.endpoint
        troubles = [lane.trouble for lane in self._lanes if lane.connection is None and lane.trouble]
        if count == 1:
            self._env.report("connection", troubles[0] if troubles else f"to {endpoint}")
        elif troubles:
            self._env.report("connection", f"{len(troubles)} of {count} {troubles[0]}")
        elif all(lane.connection is not None for lane in self._lanes):
            self._env.report("connection", f"{count} to {endpoint}")

    def _give_back(self, done: list[Request]) -> None:
        if self._parts:
            done = [whole for request in done if (whole := self._joined(request)) is not None]
        if done:
            self._complete(done)

    def _give_back_unsupported(self, batch: list[Request]) -> list[Request]:
        """Give back requests that the server never does (D6), and return the others."""
        never = [request for request in batch if request.op in self._never]
        for request in never:
            request.status = errno.EOPNOTSUPP
        if never:
            self._complete(never)
        return [request for request in batch if request.op not in self._never]

    def _cut(self, batch: list[Request]) -> list[Request]:
        """Return a batch with each request that is too long replaced by its parts."""
        found = []
        for request in batch:
            most = self._most[request.op]
            if request.length <= most:
                found.append(request)
                continue
            whole = _Whole(request, 0)
            for start in range(0, request.length, most):
                part = Request()
                part.op, part.offset, part.status = request.op, request.offset + start, PENDING
                part.length = min(most, request.length - start)
                if request.iov:
                    part.iov = cut(request.iov, start, part.length)
                self._parts[part] = whole
                whole.left += 1
                found.append(part)
        return found

    def _joined(self, request: Request) -> Request | None:
        """Return the request that is done with this one: itself, or the whole request if this was its last part."""
        whole = self._parts.pop(request, None)
        if whole is None:
            return request
        whole.left -= 1
        whole.status = whole.status or request.status
        if whole.left:
            return None
        whole.request.status = whole.status
        return whole.request
