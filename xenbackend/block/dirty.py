"""The ranges of a disk that were written: one bit for each piece of the disk, in memory that outlives the process.

Must not know a driver's options, a text format or a file.

The disk is divided into pieces of `granularity` bytes, one bit each, and the bits into chunks of `CHUNK_BITS`. Every
chunk has a state: CLEAN (its bits mean nothing), BITS (its bits count) or FULL (all dirty, whatever its bits are). So
creating or clearing a map touches states and no bits, a discard of a TiB is one small slice assignment, and a walk
skips clean chunks without touching (and so allocating) their bits.

    header | outbox | states, 1 byte per chunk | bits, CHUNK_BYTES per chunk            for 512-byte pieces of 1 TiB:
                                                                                      256 KiB of states, 256 MiB of bits

The memory of a map is limited, whatever size an image claims to have: a larger disk has larger pieces (`fitting`).

Every step is ordered so that a process killed in the middle leaves too much marked as dirty, never too little:

- a chunk's bits are zeroed before its state becomes BITS, and set before the request goes on;
- `take` writes a page of ranges to the outbox before it clears their bits, and `take` without a page number puts
  ranges that were not acknowledged back into the map before it empties the outbox.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

from xenbackend.block.request import Request
from xenbackend.units import PAGE, round_up

CHUNK_BYTES = 1024  # of bits; 4 MiB of disk in 512-byte pieces
CHUNK_BITS = CHUNK_BYTES * 8
_CHUNK_SHIFT = CHUNK_BYTES.bit_length() - 1
MAX_BITS = 256 << 20  # bytes of a map's bits: 1 TiB of disk in 512-byte pieces
PAGE_RANGES = 1024  # a page of ranges ends with the chunk that brings it to this many
PAGE_CHUNKS = 512  # and after this many chunks, so that no page keeps the worker's loop for more than milliseconds
MAX_PAGE_RANGES = PAGE_RANGES + CHUNK_BITS // 2  # the last chunk may hold every other piece

_CLEAN, _BITS, _FULL = 0, 1, 2
_ONES = b"\xff" * CHUNK_BYTES
_ZEROS = bytes(CHUNK_BYTES)
_MAGIC = 0x31797472_69646278  # "xbdirty1"
_MAGIC_AT, _SIZE_AT, _GRANULARITY_AT, _TRACKING_AT, _PAGE_AT, _POSITION_AT, _OUTBOX_AT = range(7)  # words of the header
_OUTBOX_BYTES = round_up(MAX_PAGE_RANGES * 16, PAGE)


class Range(NamedTuple):
    """Bytes `offset` to `offset + length` of the disk."""

    offset: int
    length: int


class StalePageError(Exception):
    """The page that a reader acknowledged is not the last one handed out."""


class DirtyMap:
    """The map, kept in `memory` (`memory_size` bytes, zeros at first or as a predecessor left them)."""

    def __init__(self, memory: memoryview, size: int, granularity: int, *, is_tracking: bool) -> None:
        """Take over the map in `memory`, or begin an empty one there, with this value of `is_tracking`.

        Units: `size` is the disk's in bytes; `granularity` is a power of two of at least 512 bytes.
        """
        chunks = _chunks(size, granularity)
        states_at = PAGE + _OUTBOX_BYTES
        bits_at = states_at + round_up(chunks, PAGE)
        self.size = size
        self.granularity = granularity
        self.chunk_size = CHUNK_BITS * granularity  # bytes of disk
        self._chunks = chunks
        self._words = memory[:PAGE].cast("Q")
        self._outbox = memory[PAGE:states_at].cast("Q")
        self._states = memory[states_at : states_at + chunks]
        self._bits = memory[bits_at : bits_at + chunks * CHUNK_BYTES]
        self._shift = granularity.bit_length() + 2  # log2 of the bytes of disk that one byte of the bits stands for
        self.is_fresh = self._words[:3].tolist() != [_MAGIC, size, granularity]
        if self.is_fresh:
            self.clear()
            self.is_tracking = is_tracking
            self._words[:3] = array("Q", (_MAGIC, size, granularity))

    @property
    def is_tracking(self) -> bool:
        """True while the owner should mark writes and discards; a successor of this process finds it unchanged."""
        return bool(self._words[_TRACKING_AT])

    @is_tracking.setter
    def is_tracking(self, value: bool) -> None:
        self._words[_TRACKING_AT] = value

    @property
    def unacknowledged(self) -> int:
        """The number of ranges handed out by `take` and not acknowledged."""
        return self._words[_OUTBOX_AT]

    def dirty_at_most(self) -> int:
        """Return an upper bound of the dirty bytes, in whole chunks; 0 if nothing is dirty."""
        return min(self.size, (self._chunks - bytes(self._states).count(_CLEAN)) * self.chunk_size)

    def mark_changes(self, batch: list[Request]) -> bool:
        """Mark the writes and discards of a batch; return whether it has any.

        Cost per request: 0.15 us if it covers exactly one byte of the bits (4 KiB in 512-byte pieces), 0.35 us if it
        covers several whole bytes, and 0.7 us otherwise: if it is not aligned, or the first in its chunk.
        """
        states, bits, shift = self._states, self._bits, self._shift
        unit = 1 << shift
        remainder = unit - 1
        at = -1
        for request in batch:
            if request.op & 1:  # WRITE and DISCARD, the two odd ones
                offset, length = request.offset, request.length
                at = offset >> shift
                if offset & remainder or states[at >> _CHUNK_SHIFT] != _BITS:
                    self.mark(offset, length)
                elif length == unit:
                    bits[at] = 255
                elif not length & remainder and at % CHUNK_BYTES + (count := length >> shift) <= CHUNK_BYTES:
                    bits[at : at + count] = _ONES[:count]
                else:
                    self.mark(offset, length)
        return at >= 0

    def mark(self, offset: int, length: int) -> None:
        """Mark every piece that overlaps the range."""
        first = offset // self.granularity
        stop = -(-(offset + length) // self.granularity)
        chunk, last = first // CHUNK_BITS, (stop - 1) // CHUNK_BITS
        if chunk == last:
            self._mark_in_chunk(chunk, first % CHUNK_BITS, stop - chunk * CHUNK_BITS)
        elif chunk < last:
            self._mark_in_chunk(chunk, first % CHUNK_BITS, CHUNK_BITS)
            self._states[chunk + 1 : last] = bytes((_FULL,)) * (last - chunk - 1)
            self._mark_in_chunk(last, 0, stop - last * CHUNK_BITS)

    def _mark_in_chunk(self, chunk: int, first: int, stop: int) -> None:
        """Mark the bits `first` to `stop` (not included) of one chunk."""
        state = self._states[chunk]
        if state == _FULL:
            return
        if stop - first == CHUNK_BITS:
            self._states[chunk] = _FULL
            return
        bits = self._bits
        start = chunk * CHUNK_BYTES
        if state == _CLEAN:
            bits[start : start + CHUNK_BYTES] = _ZEROS
            self._states[chunk] = _BITS
        head, tail = start + first // 8, start + (stop - 1) // 8
        head_mask, tail_mask = 0xFF << first % 8 & 0xFF, 0xFF >> -stop % 8
        if head == tail:
            bits[head] |= head_mask & tail_mask
            return
        bits[head] |= head_mask
        bits[head + 1 : tail] = _ONES[: tail - head - 1]
        bits[tail] |= tail_mask

    def clear(self) -> None:
        """Clear the map, including the ranges handed out."""
        self._words[_OUTBOX_AT] = 0
        self._words[_PAGE_AT] += 1  # a reader between two pages must not take the next one for the rest of the old map
        self._states[:] = bytes(self._chunks)

    def release(self) -> None:
        """Release the memory."""
        for view in (self._words, self._outbox, self._states, self._bits):
            view.release()

    def peek(self, position: int = 0) -> tuple[list[Range], int]:
        """Return dirty ranges from about `position` (bytes) on, and where the next page begins; `size` at the end.

        They include ranges that were handed out and not acknowledged. Each page shows the map at its own moment.
        """
        position -= position % self.chunk_size
        ranges, after = self._page(position)
        handed = self._handed_out()
        if handed:
            clipped = [
                Range(max(position, each.offset), min(after, each.offset + each.length) - max(position, each.offset))
                for each in handed
                if each.offset < after and each.offset + each.length > position
            ]
            ranges = _joined(sorted(ranges + clipped))
        return ranges, after

    def take(self, acknowledged: int | None = None, in_flight: Sequence[Range] = ()) -> tuple[list[Range], int]:
        """Hand out a page of dirty ranges and clear them in the map, in one step; return them and the page's number.

        Ranges of `in_flight`, which are being altered, may have their old or their new bytes: those that overlap the
        page stay dirty for the next sweep.

        Without `acknowledged` a sweep begins: ranges that an earlier reader did not acknowledge are dirty again. With
        the number of the previous page, that page is forgotten for good and the sweep goes on. A page without ranges
        ends the sweep and needs no acknowledgement.
        Raises: StalePageError if `acknowledged` is not the number of the last page handed out.
        """
        words = self._words
        if acknowledged is None:
            for each in self._handed_out():
                self.mark(*each)
            words[_POSITION_AT] = 0
        elif acknowledged != words[_PAGE_AT]:
            raise StalePageError(f"page {acknowledged} is not the last one that was handed out")
        words[_OUTBOX_AT] = 0
        position = words[_POSITION_AT]
        ranges: list[Range] = []
        while position < self.size and not ranges:
            begin = position
            ranges, position = self._page(begin)
        words[_PAGE_AT] += 1
        words[_POSITION_AT] = position
        if ranges:
            self._hand_out(ranges)
            chunk, stop = begin // self.chunk_size, -(-position // self.chunk_size)
            self._states[chunk:stop] = bytes(stop - chunk)
            for each in in_flight:
                if _touches(ranges, each):
                    self.mark(*each)
        return ranges, words[_PAGE_AT]

    def _hand_out(self, ranges: list[Range]) -> None:
        self._outbox[: 2 * len(ranges)] = array("Q", [number for each in ranges for number in each])
        self._words[_OUTBOX_AT] = len(ranges)

    def _handed_out(self) -> list[Range]:
        numbers = self._outbox[: 2 * self._words[_OUTBOX_AT]].tolist()
        return [Range(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]

    def _page(self, position: int) -> tuple[list[Range], int]:
        """Return the ranges of whole chunks from `position` (where one begins) on, and where the next page begins."""
        states = bytes(self._states)
        runs: list[tuple[int, int]] = []  # first and stop, in pieces
        chunk = position // self.chunk_size
        dirty = states.translate(_AS_DIRTY)
        chunk = dirty.find(1, chunk)
        if chunk < 0:
            return [], self.size
        stop = min(self._chunks, chunk + PAGE_CHUNKS)
        while 0 <= chunk < stop and len(runs) < PAGE_RANGES:
            self._append_runs(runs, chunk, is_full=states[chunk] == _FULL)
            after = chunk + 1
            chunk = dirty.find(1, after)
        after = self._chunks if chunk < 0 else after
        ranges = [self._range(first, last) for first, last in runs]
        return ranges, min(self.size, after * self.chunk_size)

    def _append_runs(self, runs: list[tuple[int, int]], chunk: int, *, is_full: bool) -> None:
        """Append the runs of dirty pieces of one chunk; join the first to the previous run if they touch."""
        at = chunk * CHUNK_BITS
        bits = _ONES if is_full else bytes(self._bits[chunk * CHUNK_BYTES : (chunk + 1) * CHUNK_BYTES])
        found = [(at, at + CHUNK_BITS)] if bits == _ONES else _runs(int.from_bytes(bits, "little"), at)
        if found and runs and runs[-1][1] == at == found[0][0]:
            found[0] = (runs.pop()[0], found[0][1])
        runs += found

    def _range(self, first: int, stop: int) -> Range:
        offset = first * self.granularity
        return Range(offset, min(self.size, stop * self.granularity) - offset)


_AS_DIRTY = bytes((0, 1, 1)) + bytes(253)  # translates states to 1 if anything is dirty, for `bytes.find`


def fitting(size: int, granularity: int) -> int:
    """Return the granularity for a disk of `size` bytes: the one wanted, or a larger one so that `MAX_BITS` suffices.

    Both are powers of two of at least 512 bytes. With larger pieces more is marked as dirty, never less.
    """
    pieces = -(-size // (MAX_BITS * 8))  # bytes of disk for each bit that fits
    return max(granularity, 1 << (pieces - 1).bit_length() if pieces > 1 else 0)


def memory_size(size: int, granularity: int) -> int:
    """Return the bytes of memory that a map of a disk of `size` bytes needs; only pages that are touched take RAM."""
    chunks = _chunks(size, granularity)
    return PAGE + _OUTBOX_BYTES + round_up(chunks, PAGE) + round_up(chunks * CHUNK_BYTES, PAGE)


def _chunks(size: int, granularity: int) -> int:
    return -(-size // (granularity * CHUNK_BITS))


def _runs(bits: int, at: int) -> list[tuple[int, int]]:
    """Return first and stop of each run of ones in `bits`, whose bit 0 is number `at`."""
    # Binary digits, lowest first, that are 1 where a bit differs from the one before: `str.find` steps from edge to
    # edge four times as fast as arithmetic on the long integer if every other piece is dirty.
    edges = bin(bits ^ bits << 1)[:1:-1]
    found = []
    first = edges.find("1")
    while first >= 0:
        stop = edges.find("1", first + 1)
        found.append((at + first, at + stop))
        first = edges.find("1", stop + 1)
    return found


def _touches(ranges: list[Range], one: Range) -> bool:
    """Return whether any of `ranges`, which are sorted and disjoint, overlaps `one`."""
    place = bisect_right(ranges, one.offset, key=_end)
    return place < len(ranges) and ranges[place].offset < one.offset + one.length


def _end(one: Range) -> int:
    return one.offset + one.length


def _joined(ranges: list[Range]) -> list[Range]:
    """Join sorted ranges that touch or overlap, and return the result."""
    joined = ranges[:1]
    for each in ranges[1:]:
        offset, length = joined[-1]
        if each.offset > offset + length:
            joined.append(each)
        else:
            joined[-1] = Range(offset, max(offset + length, each.offset + each.length) - offset)
    return joined
