"""A load generator on a blkif ring of the rig: a guest that does nothing but keep requests in flight.

Must not start a worker, nor set up a ring in another way than a guest would.

The request of each slot is encoded in advance, so that each request only costs storing its sector and one copy into the
ring. The pages of a request are scattered, as in a real guest: they are adjacent only by chance.
"""

from __future__ import annotations

import random
import select
from itertools import cycle

from xenbackend.bench.loop import STALL, ClosedLoop
from xenbackend.bench.plan import DEPTH, LENGTH, BenchError, Work
from xenbackend.blkif.abi import (
    BLKIF_MAX_SEGMENTS_PER_REQUEST,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    LAST_SECTOR_OF_PAGE,
    NATIVE,
    RING_HEADER,
)
from xenbackend.blkif.request import encode_direct, encode_indirect, encode_segments
from xenbackend.kernel.ports import Fence
from xenbackend.protocol.messages import Connect, RingParameters
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import GuestRing
from xenbackend.units import PAGE

_PAGES = LENGTH // PAGE  # data pages of a slot
PAGES = DEPTH * (_PAGES + 1) + 1  # that a guest needs: data pages and one indirect page per slot, and the ring
_SECTOR_WORD = 2  # the 64-bit word of a slot that holds the sector, in direct and indirect requests
_ID_WORD, _RESULT_WORD = 0, 1  # of a response: id, then operation, padding and status


class BlkifLoop(ClosedLoop):
    """Keeps requests in flight on a ring of one page. The caller, who has opened the chain, has to set `size`."""

    def __init__(self, name: str, guest: Guest, fence: Fence, *, persistent: bool, verify: bool) -> None:
        """Allocate and grant everything; `guest` must have `PAGES` free pages. Raises: KernelError.

        `verify`: the disk is stamped (`bench.plan`), and the stamps of reads are checked.
        """
        self.name = name
        self._persistent = persistent
        self._verify = verify
        self._front = GuestRing(guest, NATIVE, 0, fence)
        self._ring = self._front.ring
        self._guest = guest
        self._frames = guest.allocate(DEPTH * _PAGES)
        random.Random(0).shuffle(self._frames)
        self._grefs = [guest.grant(frame) for frame in self._frames]
        self._indirect_frames = guest.allocate(DEPTH)
        self._indirect_grefs = [guest.grant(frame) for frame in self._indirect_frames]
        self._words = guest.memory.cast("Q")
        self._poll = select.poll()
        self._poll.register(self._front.port.fileno(), select.POLLIN)
        slot_words = NATIVE.slot_size // 8
        responses = self._ring.pages[RING_HEADER : RING_HEADER + self._ring.size * NATIVE.slot_size].cast("Q")
        self._ids = responses[_ID_WORD::slot_words]
        self._results = responses[_RESULT_WORD::slot_words]
        starts = range(RING_HEADER, RING_HEADER + self._ring.size * NATIVE.slot_size, NATIVE.slot_size)
        self._slots = [self._ring.pages[start : start + NATIVE.slot_size] for start in starts]

    def parameters(self) -> Connect:
        """Return the parameters by which a worker can serve this frontend."""
        ring = RingParameters(self._front.grefs, self._front.port.number)
        return Connect(NATIVE.protocol, [ring], self._persistent)

    def start(self, work: Work, places: list[int]) -> None:
        """Encode a request per slot, and issue the first ones."""
        self._prepare(work, places)
        self.renew(list(range(work.depth)))

    def _prepare(self, work: Work, places: list[int]) -> None:
        self._write = work.write
        self._depth = work.depth
        self._operation = BLKIF_OP_WRITE if work.write else BLKIF_OP_READ
        self._places = cycle(places)
        encoded = memoryview(bytearray(b"".join(self._encode(slot, work.length) for slot in range(work.depth))))
        self._encoded = encoded
        self._images = [encoded[start : start + NATIVE.slot_size] for start in range(0, len(encoded), NATIVE.slot_size)]
        self._sectors = encoded.cast("Q")[_SECTOR_WORD :: NATIVE.slot_size // 8]
        self._stamps_at = [self._frames[slot * _PAGES] * PAGE // 8 for slot in range(work.depth)]
        for at in self._stamps_at:
            self._words[at] = 0  # as if each slot had just read sector 0, since `renew` checks that

    def _encode(self, slot: int, length: int) -> bytes:
        first = slot * _PAGES
        count = length // PAGE
        segments = [(gref, 0, LAST_SECTOR_OF_PAGE) for gref in self._grefs[first : first + count]]
        if count <= BLKIF_MAX_SEGMENTS_PER_REQUEST:
            return encode_direct(NATIVE, self._operation, slot, 0, segments)
        self._guest.page(self._indirect_frames[slot])[: 8 * count] = encode_segments(segments)
        return encode_indirect(NATIVE, self._operation, slot, 0, count, [self._indirect_grefs[slot]])

    def reap(self) -> list[int]:
        """Take all responses; wait if there are none."""
        ring = self._ring
        count = ring.waiting() or self.wait(ring.waiting, self._sleep)
        if count > self._depth:
            raise self.too_many(count)
        first = ring.consumed & (ring.size - 1)
        last = (first + count) & (ring.size - 1)
        ring.consumed += count
        if first < last:
            finished = self._ids[first:last].tolist()
            results = self._results[first:last].tolist()
        else:
            finished = self._ids[first:].tolist() + self._ids[:last].tolist()
            results = self._results[first:].tolist() + self._results[:last].tolist()
        if results.count(self._operation) != count or max(finished) >= self._depth:
            raise self.failed()
        return finished

    def too_many(self, count: int) -> BenchError:
        """Return the error for more responses than requests."""
        return BenchError(f"{self.name} announced {count} responses to {self._depth} requests")

    def failed(self) -> BenchError:
        """Return the error for a response with an error status or an unknown request."""
        return BenchError(f"{self.name} answered a request with an error, or answered one that was not made")

    def _sleep(self) -> int:
        while not (count := self._ring.final_check()):
            if not self._poll.poll(STALL * 1000):
                raise self.stalled()
            self._front.port.clear()
        return count

    def renew(self, finished: list[int]) -> int:
        """Put the next places into the finished slots, publish them together, and notify if asked to."""
        sectors, words, stamps_at, images = self._sectors, self._words, self._stamps_at, self._images
        slots, mask, ring = self._slots, self._ring.size - 1, self._ring
        produced = ring.produced
        write, verify = self._write, self._verify
        for slot, place in zip(finished, self._places, strict=False):
            if write:
                words[stamps_at[slot]] = place
            elif verify and words[stamps_at[slot]] != sectors[slot]:
                raise self.wrong_data(sectors[slot], words[stamps_at[slot]])
            sectors[slot] = place
            slots[produced & mask][:] = images[slot]
            produced += 1
        ring.produced = produced
        if ring.push():
            self._front.port.notify()
        return finished[produced % len(finished)]

    def close(self) -> None:
        """Do nothing: the guest ends with its connection, after the worker has released the ring."""
