"""The guest's pages as `iov`: mapped once and kept, or copied through our own memory.

Must not parse a request, nor decide what is answered: if a page cannot be mapped or copied, its record is marked
refused.

Two classes with the same methods, so that the engine need not know which one it has:

    CopiedGrants      one copy call per batch into a private arena: writes before they are submitted, reads before
                      they are answered. Nothing stays mapped, and no guest can change what a driver looks at.
    PersistentGrants  for frontends that offer `feature-persistent`: each page is mapped when it is first seen and stays
                      mapped, so that I/O goes straight to and from it. A page that cannot be mapped, or exceeds the
                      limit, is copied.

    lend_plain(records)     requests for records that are one whole page each
    lend(records)           requests for any others; those whose pages fail are marked and left out
    fetch_indirect(...)     copies the pages that list an indirect request's segments to private memory
    settle(records)         after the I/O, before the answer
    abandon, reclaim        for a request that is answered while a layer may still use its memory
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack

from xenbackend.blkif.abi import BLKIF_OP_READ, SEGMENT_SIZE
from xenbackend.blkif.features import MAX_SEGMENTS
from xenbackend.blkif.request import BadGrant, RingRequest
from xenbackend.block.request import Request
from xenbackend.errors import KernelError
from xenbackend.kernel import memory
from xenbackend.kernel.ports import GRANT_OK, Arena, CopySegment, GrantTable, Mapping
from xenbackend.units import PAGE, SECTOR

CHUNK = 16 * PAGE  # bytes; most requests fit into one, and then are one buffer for the disk
CHUNKS_PER_REQUEST = MAX_SEGMENTS * PAGE // CHUNK
ARENA_CHUNKS = 512  # 32 MiB of addresses; only what is in flight is ever touched
FREE_SEGMENTS = 32  # of a request whose pages are mapped; with more of them it counts as if it were copied
MAX_PERSISTENT = 8 * 1056  # pages per vbd: as many as Linux blkback keeps for eight rings


class CopiedGrants:
    """Pages of the guest by grant copy. Memory: `ARENA_CHUNKS` * CHUNK bytes at most, allocated as it is touched."""

    def __init__(self, table: GrantTable, allocate: Callable[[int], Arena]) -> None:
        """Use `table` of the frontend's domain; `allocate` gives page-aligned memory."""
        self._table = table
        self._arena = allocate(ARENA_CHUNKS * CHUNK)
        self._free = list(range(ARENA_CHUNKS - 1, 0, -1))  # chunk 0 is where indirect pages land
        self.held: dict[RingRequest | Request, list[int]] = {}  # chunks; while it is empty there is nothing to settle

    def room(self, wanted: int) -> int:
        """Return how many more requests, at most `wanted`, there is memory for, however long they are."""
        return min(wanted, len(self._free) // CHUNKS_PER_REQUEST)

    def lend_plain(self, records: Sequence[RingRequest]) -> list[Request]:
        """Return requests for records that are one whole page each."""
        for record in records:
            record.grefs = (record.gref,)
        return self.lend(records)

    def lend(self, records: Iterable[RingRequest]) -> list[Request]:
        """Return requests for records with data, the content of writes copied in."""
        copies: list[CopySegment] = []
        writes: list[tuple[RingRequest, int]] = []  # with the number of copies up to and including theirs
        lent = []
        for record in records:
            self._give_memory(record)
            if record.operation != BLKIF_OP_READ:
                copies.extend(self._copies(record, to_guest=False))
                writes.append((record, len(copies)))
            lent.append(record)
        self._copy(copies, writes)
        return [record.request for record in lent if record.refused is None]

    def reserve(self, record: RingRequest) -> None:
        """Reserve memory of the arena for a request that is not copied, as far as there is any, until `give_back`."""
        chunks = min(-(-record.length // CHUNK), len(self._free))  # a predecessor may have taken any number
        self.held[record] = [self._free.pop() for _ in range(chunks)]

    def give_back(self, record: RingRequest) -> None:
        """Release what `reserve` took."""
        self._free.extend(self.held.pop(record))

    def settle(self, records: Iterable[RingRequest]) -> None:
        """Copy the data of successful reads to the guest, and take back the memory of all these finished requests."""
        copies: list[CopySegment] = []
        reads: list[tuple[RingRequest, int]] = []
        mine = [record for record in records if record in self.held]
        for record in mine:
            if record.operation == BLKIF_OP_READ and record.request.status == 0:
                copies.extend(self._copies(record, to_guest=True))
                reads.append((record, len(copies)))
        self._copy(copies, reads)
        for record in mine:
            self._free.extend(self.held.pop(record))

    def abandon(self, record: RingRequest, request: Request) -> None:
        """Keep the record's memory from being used again until `request`, which a layer lost, comes back."""
        if record in self.held:
            self.held[request] = self.held.pop(record)

    def reclaim(self, request: Request) -> None:
        """Take back the memory of an abandoned request."""
        self._free.extend(self.held.pop(request, ()))

    def fetch_indirect(self, record: RingRequest, copy: memoryview) -> None:
        """Copy the segments of an indirect request into `copy`; mark the record refused if that fails."""
        left = record.segment_count * SEGMENT_SIZE
        copies = []
        for place, gref in enumerate(record.indirect):
            copies.append(CopySegment(gref, 0, place * PAGE, min(PAGE, left - place * PAGE), to_guest=False))
        self._copy(copies, [(record, len(copies))])
        copy[:left] = self._arena.view[:left]

    def close(self) -> None:
        """Release the arena now: a guest may reconnect faster than old objects are freed. No page of it is mapped."""
        self.held.clear()
        self._arena.view.release()

    def _give_memory(self, record: RingRequest) -> None:
        chunks = [self._free.pop() for _ in range(-(-record.length // CHUNK))]
        self.held[record] = chunks
        left = record.length
        views = []
        for chunk in chunks:
            views.append(self._arena.view[chunk * CHUNK : chunk * CHUNK + min(left, CHUNK)])
            left -= CHUNK
        _fill(record, tuple(views))

    def _copies(self, record: RingRequest, *, to_guest: bool) -> Iterable[CopySegment]:
        chunks = self.held[record]
        spans = record.spans or [(0, PAGE)] * len(record.grefs)
        at = 0  # bytes of the request so far
        for gref, (start, length) in zip(record.grefs, spans, strict=True):
            done = 0
            while done < length:  # a segment that is not a whole page may lie across two chunks
                step = min(length - done, CHUNK - at % CHUNK)
                yield CopySegment(gref, start + done, chunks[at // CHUNK] * CHUNK + at % CHUNK, step, to_guest)
                done += step
                at += step

    def _copy(self, copies: list[CopySegment], owners: list[tuple[RingRequest, int]]) -> None:
        """Make all copies by one call; refuse each request for which a copy has a status other than okay."""
        if not copies:
            return
        try:
            statuses = self._table.copy(self._arena, copies)
        except KernelError as problem:
            for record, _ in owners:
                self._refuse(record, str(problem))
            return
        begin = 0
        for record, end in owners:
            bad = [status for status in statuses[begin:end] if status != GRANT_OK]
            if bad:
                self._refuse(record, f"grant copy ended with status {bad[0]}")
            begin = end

    def _refuse(self, record: RingRequest, why: str) -> None:
        record.refused = BadGrant(why)


class PersistentGrants:
    """Pages of the guest that stay mapped: at most `MAX_PERSISTENT`, until `close`.

    The arena also bounds the memory that Python needs for the segments of long requests, since each of them reserves
    room in it: 4096 requests of 256 ragged segments, as a guest may have in flight, took hundreds of MiB.
    """

    def __init__(self, table: GrantTable, copied: CopiedGrants) -> None:
        """Map through `table`; what cannot stay mapped goes through `copied`."""
        self._table = table
        self._copied = copied
        self._pages: dict[int, memoryview] = {}  # by gref
        self._iovs: dict[int, tuple[memoryview]] = {}  # by gref: the whole page as an iov
        self._neighbours: dict[
            int, tuple[list[int], int, memoryview]
        ] = {}  # by gref: all grefs mapped with it, its index among them, their view
        self._mappings: list[Mapping] = []
        self._reserved: set[RingRequest] = set()
        self.room = copied.room
        self.held = copied.held
        self.reclaim = copied.reclaim

    def lend_plain(self, records: Sequence[RingRequest]) -> list[Request]:
        """Return requests for records that are one whole page each. This loop runs for every such request."""
        iovs = self._iovs
        lent = []
        try:
            for record in records:
                request = record.request
                request.iov = iovs[record.gref]
                request.op = record.operation  # a read is 0 and a write 1 in both worlds
                request.offset = record.first_sector * SECTOR
                request.length = PAGE
                request.status = -1
                lent.append(request)
        except KeyError:
            for record in records:
                record.grefs = (record.gref,)
            return self.lend(records)
        return lent

    def lend(self, records: Iterable[RingRequest]) -> list[Request]:
        """Return requests for records with data, mapping pages that are not mapped yet."""
        lent = []
        elsewhere = []
        for record in records:
            try:
                _fill(record, self._iov(record))
            except KeyError:
                if not self._map_missing(record.grefs):
                    elsewhere.append(record)
                    continue
                _fill(record, self._iov(record))
            if len(record.grefs) > FREE_SEGMENTS:
                self._copied.reserve(record)
                self._reserved.add(record)
            lent.append(record.request)
        return lent + self._copied.lend(elsewhere) if elsewhere else lent

    def _iov(self, record: RingRequest) -> Sequence[memoryview]:
        """Return views of the record's pages, one only if they lie side by side. Raises: KeyError if one is not mapped.

        They often do: pages are mapped together when a request first brings them, and frontends use them together
        again. One view instead of sixteen saves 1.5 of the 5 us that a request of 64 KiB takes in Python, and is a
        single piece for the disk.
        """
        grefs = record.grefs
        if record.spans is None:
            known, place, view = self._neighbours[grefs[0]]
            if known[place : place + len(grefs)] == grefs:
                return (view[place * PAGE : (place + len(grefs)) * PAGE],)
            return [*map(self._pages.__getitem__, grefs)]
        return [self._pages[gref][at : at + length] for gref, (at, length) in zip(grefs, record.spans, strict=True)]

    def settle(self, records: Iterable[RingRequest]) -> None:
        """Settle those that went through the arena, or had reserved memory in it."""
        records = list(records)
        for record in self._reserved.intersection(records) if self._reserved else ():
            self._reserved.remove(record)
            self._copied.give_back(record)
        self._copied.settle(records)

    def abandon(self, record: RingRequest, request: Request) -> None:
        """Keep the record's memory, as `CopiedGrants.abandon` does."""
        self._reserved.discard(record)
        self._copied.abandon(record, request)

    def fetch_indirect(self, record: RingRequest, copy: memoryview) -> None:
        """Copy the segments of an indirect request into `copy`, once."""
        pages = self._pages
        end = record.segment_count * SEGMENT_SIZE
        for place, gref in enumerate(record.indirect):
            if gref not in pages and not self._map_missing(record.indirect):
                self._copied.fetch_indirect(record, copy)
                return
            start = place * PAGE
            copy[start:end] = pages[gref][: end - start]

    def close(self) -> None:
        """Unmap everything; no request is in flight. Raises: KernelError, after trying all mappings."""
        memory.forget(self._pages.values())
        self._pages.clear()
        self._iovs.clear()
        self._neighbours.clear()
        with ExitStack() as undo:  # one that cannot be unmapped must not keep the others
            undo.callback(self._copied.close)
            for mapping in self._mappings:
                undo.callback(mapping.release)
            self._mappings.clear()

    def _map_missing(self, grefs: Sequence[int]) -> bool:
        """Map the pages that are not mapped yet, side by side; False if they cannot be mapped, or are too many."""
        pages = self._pages
        missing = [gref for gref in dict.fromkeys(grefs) if gref not in pages]
        if not missing:
            return True
        if len(pages) + len(missing) > MAX_PERSISTENT:
            return False
        try:
            mapping = self._table.map(missing, writable=True)
        except KernelError:
            return False
        self._mappings.append(mapping)
        for place, gref in enumerate(missing):
            pages[gref] = mapping.view[place * PAGE : (place + 1) * PAGE]
            self._iovs[gref] = (pages[gref],)
            self._neighbours[gref] = (missing, place, mapping.view)
        memory.note(pages[gref] for gref in missing)
        return True


def _fill(record: RingRequest, iov: Sequence[memoryview]) -> None:
    """Fill in the request of a record with data."""
    request: Request = record.request
    request.op = 0 if record.operation == BLKIF_OP_READ else 1
    request.offset = record.first_sector * SECTOR
    request.length = record.length
    request.iov = iov
    request.status = -1
