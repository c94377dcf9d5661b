"""One ring of a blkfront: requests in flight, their pages and grants, and all the checks of Linux's blkfront.

Must not know xenstore. If a backend breaks a rule, `BackendMisbehaved` is raised; Linux disables such a device
permanently (drivers/block/xen-blkfront.c, "disabled for further use").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

from xenbackend.blkif.abi import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_DISCARD,
    BLKIF_OP_READ,
    LAST_SECTOR_OF_PAGE,
    SEGMENT_SIZE,
    SEGMENTS_PER_INDIRECT_PAGE,
    Layout,
    ring_entries,
)
from xenbackend.blkif.request import encode_direct, encode_discard, encode_indirect, encode_segments
from xenbackend.blkif.ring import FrontRing
from xenbackend.errors import XenbackendError
from xenbackend.rig.guest import GrantInUse, Guest
from xenbackend.units import PAGE, SECTOR

PER_PAGE = PAGE // SECTOR
Span = tuple[int, int]  # first and last sector within a page, both inclusive


class BackendMisbehaved(XenbackendError):
    """A backend did something for which a real blkfront gives up the device."""


@dataclass(slots=True)
class GrantedPage:
    """A page of the guest that the backend may use."""

    frame: int
    gref: int


@dataclass(slots=True, eq=False)
class Submitted:
    """One request of the guest. `status` is None while it is in flight, then the status of the response."""

    operation: int
    sector: int
    count: int  # sectors
    spans: Sequence[Span] = ()
    pages: list[GrantedPage] = field(default_factory=list)
    indirect_pages: list[GrantedPage] = field(default_factory=list)
    status: int | None = None
    data: bytes = b""  # the result of a read


def whole_spans(count: int) -> list[Span]:
    """Return the segments of `count` sectors that begin at the start of a page."""
    return [(0, min(LAST_SECTOR_OF_PAGE, count - first - 1)) for first in range(0, count, PER_PAGE)]


def random_spans(random: Random, count: int) -> list[Span]:
    """Return segments of `count` sectors in total that begin and end anywhere in their pages."""
    spans = []
    while count:
        first = random.randint(0, LAST_SECTOR_OF_PAGE)
        last = random.randint(first, min(LAST_SECTOR_OF_PAGE, first + count - 1))
        spans.append((first, last))
        count -= last - first + 1
    return spans


class GuestRing:
    """A ring of 2**`order` pages with its event channel; `ring` and `port` are public for tests of hostile guests."""

    def __init__(
        self,
        guest: Guest,
        layout: Layout,
        order: int,
        fence: Callable[[], None],
        *,
        persistent: bool = False,
        start_index: int = 0,
    ) -> None:
        """Allocate and grant the ring's pages, and allocate an unbound port. Raises: KernelError.

        `persistent` keeps data pages granted from one request to the next; it may be cleared before the first request.
        `start_index` is the first value of the ring's indices.
        """
        self.guest = guest
        self.layout = layout
        self.persistent = persistent
        self.max_indirect = 0  # segments; the backend's limit
        self._frames = guest.allocate(1 << order)
        self._pages, self._unmap = guest.side_by_side(self._frames)
        self.ring = FrontRing(self._pages, layout, ring_entries(layout, order), fence)
        self.ring.start_at(start_index)
        self.grefs = [guest.grant(frame) for frame in self._frames]
        self.port = guest.allocate_port()
        self._shadow: list[Submitted | None] = [None] * self.ring.size
        self._free_ids = list(range(self.ring.size))
        self._pool: list[GrantedPage] = []  # persistent grants that no request uses now

    def submit(
        self,
        operation: int,
        sector: int = 0,
        count: int = 0,
        data: bytes = b"",
        *,
        spans: Sequence[Span] | None = None,
        secure: bool = False,
    ) -> Submitted:
        """Put one request into the ring; `push` makes it visible.

        The length of a write or barrier is that of `data`; `count` is for a read or discard. More than 11 segments make
        an indirect request.

        Raises: BlockingIOError if no slot is free; KernelError if the guest is out of pages or grants; ValueError if
        the backend does not accept so many segments.
        """
        if not self._free_ids:
            raise BlockingIOError("every slot of the ring is in use")
        is_discard = operation == BLKIF_OP_DISCARD
        count = len(data) // SECTOR or count
        request = Submitted(operation, sector, count)
        if not is_discard:
            request.spans = whole_spans(count) if spans is None else spans
            request.pages = [self._get_page(read_only=operation != BLKIF_OP_READ) for _ in request.spans]
            self._fill(request, data)
        guest_id = self._free_ids.pop()
        self._shadow[guest_id] = request
        if is_discard:
            slot = encode_discard(self.layout, guest_id, sector, count, secure=secure)
        else:
            slot = self._encode(guest_id, request)
        self.ring.put(slot)
        return request

    def _encode(self, guest_id: int, request: Submitted) -> bytes:
        segments = [(page.gref, first, last) for page, (first, last) in zip(request.pages, request.spans, strict=True)]
        if len(segments) <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
            return encode_direct(self.layout, request.operation, guest_id, request.sector, segments)
        if len(segments) > self.max_indirect:
            raise ValueError(f"{len(segments)} segments where the backend takes {self.max_indirect} in one request")
        content = encode_segments(segments)
        for start in range(0, len(content), SEGMENTS_PER_INDIRECT_PAGE * SEGMENT_SIZE):
            page = self._get_page(read_only=True)
            part = content[start : start + PAGE]
            self.guest.page(page.frame)[: len(part)] = part
            request.indirect_pages.append(page)
        grefs = [page.gref for page in request.indirect_pages]
        return encode_indirect(self.layout, request.operation, guest_id, request.sector, len(segments), grefs)

    def push(self) -> None:
        """Make the submitted requests visible, and notify the backend if it asked for that."""
        if self.ring.push():
            self.port.notify()

    def put_raw(self, slot: bytes) -> None:
        """Put arbitrary bytes into the next slot, without any check."""
        self.ring.put(slot)

    def in_flight(self) -> int:
        """Return how many requests have no response yet."""
        return self.ring.size - len(self._free_ids)

    def reap(self) -> list[Submitted]:
        """Take all responses, and ask to be notified of the next one. Raises: BackendMisbehaved."""
        done = []
        self.port.clear()
        while self.ring.waiting() or self.ring.final_check():
            if self.ring.waiting() > self.ring.pushed - self.ring.consumed:
                raise BackendMisbehaved(f"{self.ring.waiting()} responses to {self.in_flight()} requests")
            done.append(self._finish(*self.ring.take()))
        return done

    def _finish(self, guest_id: int, operation: int, status: int, raw: bytes) -> Submitted:
        if guest_id >= len(self._shadow):
            raise BackendMisbehaved(f"a response with the id {guest_id}, which is out of range")
        request = self._shadow[guest_id]
        if request is None:
            raise BackendMisbehaved(f"a response to request {guest_id}, which is not in flight")
        if operation != request.operation:
            raise BackendMisbehaved(f"operation {operation} in the response to operation {request.operation}")
        if raw != self.layout.response.pack(guest_id, operation, status):
            raise BackendMisbehaved(f"padding that is not zero in the response {raw.hex()}")
        if request.operation == BLKIF_OP_READ:
            request.data = self._gather(request)
        for page in (*request.pages, *request.indirect_pages):
            self._put_page(page)
        self._shadow[guest_id] = None
        self._free_ids.append(guest_id)
        request.status = status
        return request

    def close(self) -> None:
        """Revoke all grants and close the port. Raises: BackendMisbehaved if a page is still mapped."""
        self.port.close()
        for page in self._pool:
            self._take_back(page)
        for frame, gref in zip(self._frames, self.grefs, strict=True):
            self._take_back(GrantedPage(frame, gref))
        self._pool.clear()
        self.forget()

    def forget(self) -> None:
        """Release the view of the ring. The grants stay, as when a guest crashes."""
        self.ring.release()
        self._unmap()

    def _get_page(self, *, read_only: bool) -> GrantedPage:
        if self._pool:
            return self._pool.pop()
        frame = self.guest.allocate(1)[0]
        return GrantedPage(frame, self.guest.grant(frame, read_only=read_only and not self.persistent))

    def _put_page(self, page: GrantedPage) -> None:
        if self.persistent:
            self._pool.append(page)
        else:
            self._take_back(page)

    def _take_back(self, page: GrantedPage) -> None:
        try:
            self.guest.revoke(page.gref)
        except GrantInUse as error:
            raise BackendMisbehaved(f"grant {page.gref} is still mapped, though it was given back") from error
        self.guest.free([page.frame])

    def _places(self, request: Submitted) -> list[tuple[int, int]]:
        """Return where a request's data lie in the guest's memory: (start, end) in bytes per segment."""
        return [
            (page.frame * PAGE + first * SECTOR, page.frame * PAGE + (last + 1) * SECTOR)
            for page, (first, last) in zip(request.pages, request.spans, strict=True)
        ]

    def _fill(self, request: Submitted, data: bytes) -> None:
        # The pages of a read are filled as well, so that bytes that the backend does not write are noticed.
        memory = self.guest.memory
        position = 0
        for start, end in self._places(request):
            memory[start:end] = data[position : position + end - start] or b"\xa5" * (end - start)
            position += end - start

    def _gather(self, request: Submitted) -> bytes:
        memory = self.guest.memory
        return b"".join(memory[start:end] for start, end in self._places(request))
