"""Both ends of a shared ring: indices, slots, and when to notify. Pure, over a memoryview and a fence.

Must not know what a request means. The other side is hostile and may write any byte of the ring at any moment.

R1  Indices are free-running unsigned 32-bit; differences are taken modulo 2**32; slot = index & (size - 1).
R2  The other side's producer index is loaded once per look, and slots are read after it, never before.
R3  A frontend that announces more requests than there are free slots is broken (`RingOverflow`); such a number is never
    used as a loop bound.
R4  A slot is copied to private memory once, and only the copy is read.
R5  Responses are in memory before the response producer index says so.
R6  After moving that index: full fence, then load `rsp_event`; notify iff this move has passed it.
R7  Before sleeping: set `req_event`, full fence, look once more.
R8  Each request gets exactly one response, and its grants are released before that response is published.
R9  Responses never outrun requests: published <= consumed.
R10 Index loads and stores are single aligned 32-bit accesses: `memoryview.cast("I")` does one memcpy of 4 bytes.

R2 and R5 need no fence of their own on x86, where loads stay in order among loads and stores among stores; elsewhere
`BackRing` is told that it needs one. The engine ensures R8.
Private indices count beyond 32 bits, so that they can be compared. Our own values are never read back from the ring.

Source: io/ring.h (RING_PUSH_RESPONSES_AND_CHECK_NOTIFY, RING_FINAL_CHECK_FOR_REQUESTS, RING_REQUEST_PROD_OVERFLOW).
"""

from __future__ import annotations

from collections.abc import Callable

from xenbackend.blkif.abi import REQ_EVENT, REQ_PROD, RING_HEADER, RSP_EVENT, RSP_PROD, Layout
from xenbackend.errors import GuestError

_MASK = 0xFFFF_FFFF


class RingOverflow(GuestError):
    """The frontend announces more requests than its ring has free slots."""


class BackRing:
    """The backend's end.

    `consumed` and `answered` are private and count up without wrapping; `size` is the number of slots, a power of two.
    """

    def __init__(
        self,
        pages: memoryview,
        layout: Layout,
        entries: int,
        fence: Callable[[], None],
        *,
        is_strongly_ordered: bool = True,
    ) -> None:
        """Join a ring, whether new or in use: requests and responses continue from its `rsp_prod`.

        Args:
            pages: the ring's bytes, mapped side by side.
            layout: the layout of its slots.
            entries: number of slots, a power of two.
            fence: a full memory fence.
            is_strongly_ordered: whether the machine needs no fence for R2 and R5, such as x86.
        """
        self._order = None if is_strongly_ordered else fence
        self.size = entries
        self.layout = layout
        self.pages = pages
        self._index = pages.cast("I")
        self._fence = fence
        self.consumed = self.answered = self._index[RSP_PROD]
        self._stride = layout.slot_size
        self.write_response = layout.response.pack_into  # zeroes the padding
        self.places = [RING_HEADER + slot * layout.slot_size for slot in range(entries)]  # bytes into `pages`

    def published(self) -> int:
        """Return how many responses `rsp_prod` in the ring is beyond `answered`; the frontend may have changed it."""
        return (self._index[RSP_PROD] - self.answered) & _MASK

    def go_on_from(self, consumed: int, answered: int) -> None:
        """Continue for a predecessor that had taken `consumed` requests and published `answered` responses."""
        self.consumed, self.answered = consumed, answered

    def available(self) -> int:
        """Return how many requests can be taken. Raises: RingOverflow (R3)."""
        count = (self._index[REQ_PROD] - self.consumed) & _MASK
        if self._order is not None:
            self._order()
        if count > self.size - (self.consumed - self.answered):
            free = self.size - (self.consumed - self.answered)
            raise RingOverflow(f"the frontend announced {count} requests, but only {free} slots are free")
        return count

    def has_moved(self) -> bool:
        """Return whether the frontend's producer index differs from `consumed`: then call `available`."""
        return self._index[REQ_PROD] != self.consumed & _MASK

    def until_wrap(self) -> int:
        """Return how many slots there are from the next one to the end of the ring's memory."""
        return self.size - (self.consumed & (self.size - 1))

    def take(self, copy: memoryview, count: int) -> None:
        """Copy the next `count` slots into `copy`, count * slot_size bytes, and count them as consumed (R4).

        `count` is at most `available()` and `until_wrap()`.
        """
        start = self.places[self.consumed & (self.size - 1)]
        copy[:] = self.pages[start : start + count * self._stride]
        self.consumed += count

    def put_response(self, place: int, guest_id: int, operation: int, status: int) -> None:
        """Write response number `place` into its slot, with zeroed padding; `publish` makes it visible."""
        self.write_response(self.pages, self.places[place & (self.size - 1)], guest_id, operation, status)

    def put_back(self, place: int, slot: memoryview) -> None:
        """Write a request that was taken into the slot of response number `place`, which the frontend does not read."""
        start = self.places[place & (self.size - 1)]
        self.pages[start : start + self._stride] = slot

    def publish(self, answered: int) -> bool:
        """Make all responses before number `answered` visible (R5, R9). Return whether to notify the frontend (R6)."""
        before = self.answered
        self.answered = answered
        index = self._index
        if self._order is not None:
            self._order()
        index[RSP_PROD] = answered & _MASK
        self._fence()
        return (answered - index[RSP_EVENT]) & _MASK < answered - before

    def disarm(self) -> None:
        """Ask for no events while we poll. Call `final_check` before sleeping."""
        self._index[REQ_EVENT] = self.consumed & _MASK

    def final_check(self) -> int:
        """Ask for an event on the next request, then check once more (R7). Returns and raises as `available`."""
        self._index[REQ_EVENT] = (self.consumed + 1) & _MASK
        self._fence()
        return self.available()

    def release(self) -> None:
        """Release the view of the pages, so that they can be unmapped."""
        self._index.release()


class FrontRing:
    """The frontend's end, for the rig, the load generator and the tests. It does not trust the backend either."""

    def __init__(self, pages: memoryview, layout: Layout, entries: int, fence: Callable[[], None]) -> None:
        """Initialise a new ring in `pages`: both producer indices 0, both event indices 1 (SHARED_RING_INIT)."""
        self.size = entries
        self.layout = layout
        self.pages = pages
        self.index = pages.cast("I")
        self._fence = fence
        self.produced = 0  # requests put into slots
        self.pushed = 0  # requests made visible
        self.consumed = 0  # responses taken
        self._places = [RING_HEADER + slot * layout.slot_size for slot in range(entries)]
        self.index[REQ_PROD] = self.index[RSP_PROD] = 0
        self.index[REQ_EVENT] = self.index[RSP_EVENT] = 1

    def start_at(self, index: int) -> None:
        """Begin at another index than 0, to test the wrap at 2**32; only allowed before the first request."""
        self.produced = self.pushed = self.consumed = index
        self.index[REQ_PROD] = self.index[RSP_PROD] = index & _MASK
        self.index[REQ_EVENT] = self.index[RSP_EVENT] = (index + 1) & _MASK

    def free(self) -> int:
        """Return how many slots are free for requests."""
        return self.size - (self.produced - self.consumed)

    def place(self) -> int:
        """Return the offset in `pages` of the next request's slot."""
        return self._places[self.produced & (self.size - 1)]

    def put(self, slot: bytes | memoryview) -> None:
        """Copy one encoded request into the next slot; `push` makes it visible."""
        start = self.place()
        self.pages[start : start + len(slot)] = slot
        self.produced += 1

    def push(self) -> bool:
        """Make the requests put so far visible. Return whether the backend must be notified."""
        before, self.pushed = self.pushed, self.produced
        self.index[REQ_PROD] = self.produced & _MASK
        self._fence()
        return (self.produced - self.index[REQ_EVENT]) & _MASK < self.produced - before

    def waiting(self) -> int:
        """Return how many responses can be taken. The caller must refuse more responses than it has sent requests."""
        return (self.index[RSP_PROD] - self.consumed) & _MASK

    def take(self) -> tuple[int, int, int, bytes]:
        """Return (id, operation, status, the whole response's bytes) of the next response."""
        start = self._places[self.consumed & (self.size - 1)]
        raw = bytes(self.pages[start : start + self.layout.response.size])
        self.consumed += 1
        guest_id, operation, status = self.layout.response.unpack(raw)
        return guest_id, operation, status, raw

    def final_check(self) -> int:
        """Ask for an event on the next response, then check once more. Returns as `waiting`."""
        self.index[RSP_EVENT] = (self.consumed + 1) & _MASK
        self._fence()
        return self.waiting()

    def release(self) -> None:
        """Release the view of the pages."""
        self.index.release()
