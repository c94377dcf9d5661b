"""Copies ranges between two open disks, several at a time; zeros are not written where the target has zeros already.

Must not know where the ranges come from, nor record what is done: the caller is told, in the order of the ranges.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial

from xenbackend.block.extents import Extent
from xenbackend.block.mapped.parts import allocate
from xenbackend.block.request import Op, Request
from xenbackend.image.session import Disk, Session, check_status, flush_request, request_for
from xenbackend.units import SECTOR, round_up

PIECE = 1 << 20  # bytes of one request
DEPTH = 16  # pieces that are in progress at the same time
GRAIN = 4096  # bytes: shorter runs of zeros are data
SYNC_EVERY = 128 << 20  # bytes written, after which a flush of the target begins, while the copy continues


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of both disks, in bytes, and whether the source has data there; if not, the target shall have zeros."""

    offset: int
    length: int
    is_data: bool = True

    @property
    def end(self) -> int:
        """The offset of its end, in bytes."""
        return self.offset + self.length


Told = Callable[[Piece], None]  # may raise, to stop
Runs = list[tuple[int, int]]  # ranges of a piece's bytes, as start and end


def pieces_of(extents: Iterable[Extent]) -> Iterator[Piece]:
    """Cut extents into pieces at multiples of `PIECE`.

    An extent may end inside a sector if a file does. Then the whole sector belongs to it, and not to the next extent.
    """
    for extent in extents:
        place, last = round_up(extent.start, SECTOR), round_up(extent.end, SECTOR)
        while place < last:
            end = min(last, (place // PIECE + 1) * PIECE)
            yield Piece(place, end - place, not extent.is_zeros)
            place = end


@dataclass(eq=False, slots=True)
class _Slot:
    """Memory for one piece, and the progress of that piece."""

    memory: memoryview
    piece: Piece = field(default_factory=lambda: Piece(0, 0))
    left: int = 0  # requests that have not completed
    written: int = 0  # bytes


class Transfer:
    """Copies from one disk to another.

    Args:
        session: in which both disks are open.
        source: is read.
        target: is written.
        is_blank: the target reads as zeros wherever nothing has been written yet.
    """

    def __init__(self, session: Session, source: Disk, target: Disk, *, is_blank: bool) -> None:
        self._session = session
        self._source = source
        self._target = target
        self._is_blank = is_blank
        self._free = [_Slot(allocate(PIECE)) for _ in range(DEPTH)]
        self._under_way: deque[_Slot] = deque()  # in the order of the ranges
        self._arrived: list[tuple[_Slot, Request]] = []  # successful reads whose data have not been sent yet
        self._failed: list[tuple[Disk, Request]] = []
        self._pending = 0  # requests that have not completed
        self._sync: Request | None = None  # the flush in progress
        self._durable: Callable[[], None] | None = None  # to be called, as the flush has ended
        self._lost: Request | None = None  # a flush that failed
        self.written = 0  # bytes

    def run(self, pieces: Iterable[Piece], done: Told, durable: Told = lambda _: None) -> None:
        """Copy pieces with data, and make the target read as zeros in the others.

        However it ends, nothing is in flight afterwards, and all pieces that `done` was told of are copied.

        Args:
            pieces: in the order of the disk.
            done: is called with each piece that is copied, after all pieces before it.
            durable: is called with the last piece that a flush has made durable.

        Raises: RequestFailed if a request has failed; what `done` and `durable` raise.
        """
        todo, last = iter(pieces), Piece(0, 0)
        settled = 0  # bytes written in completed pieces since the last flush began
        try:
            while self._begin(todo):
                self._session.run_until(self._has_news)
                self._write_what_arrived()
                if self._failed:
                    check_status(*self._failed[0])
                while self._under_way and not self._under_way[0].left:
                    slot = self._under_way.popleft()
                    self._free.append(slot)
                    last = slot.piece
                    settled += slot.written
                    done(last)
                if self._durable is not None:
                    now_durable, self._durable = self._durable, None
                    now_durable()
                if self._sync is not None:  # if all requests complete at once, nothing else would run the loop
                    self._session.glance()
                elif settled >= SYNC_EVERY and self._target.can_flush:
                    settled = 0
                    self._begin_sync(partial(durable, last))
        finally:
            self._session.run_until(lambda: not self._pending)
            self._free += self._under_way
            self._under_way.clear()
            self._arrived.clear()
            self._failed.clear()
            self._durable = None

    def flush(self) -> None:
        """Make everything written durable. Raises: RequestFailed, also if an earlier flush has failed.

        After a failed flush data may be lost, but the kernel reports that only once: the next flush would succeed.
        """
        if self._lost is not None:
            check_status(self._target, self._lost)
        if self._target.can_flush:
            self._session.do(self._target, flush_request())

    def _begin(self, todo: Iterator[Piece]) -> bool:
        """Begin to read as many pieces as there is memory for; return whether any piece is in progress."""
        reads: dict[Disk, list[Request]] = {self._source: [], self._target: []}
        while self._free and (piece := next(todo, None)) is not None:
            slot = self._free.pop()
            slot.piece, slot.left = piece, 1
            self._under_way.append(slot)
            disk = self._source if piece.is_data else self._target
            then = partial(self._ended, disk, slot)
            reads[disk].append(request_for(Op.READ, piece.offset, slot.memory[: piece.length], then))
        for disk, batch in reads.items():
            self._send(disk, batch)
        return bool(self._under_way)

    def _has_news(self) -> bool:
        return bool(self._arrived or self._failed or self._durable) or not self._under_way[0].left

    def _send(self, disk: Disk, batch: list[Request]) -> None:
        if batch:
            self._pending += len(batch)
            disk.submit(batch)

    def _write_what_arrived(self) -> None:
        arrived, self._arrived = self._arrived, []
        writes = []
        for slot, read in arrived:
            view = read.iov[0]
            runs = self._runs_to_write(view, slot.piece)
            slot.written = sum(end - start for start, end in runs)
            self.written += slot.written
            slot.left = len(runs)
            then = partial(self._ended, self._target, slot)
            writes += [request_for(Op.WRITE, read.offset + start, view[start:end], then) for start, end in runs]
        self._send(self._target, writes)

    def _ended(self, disk: Disk, slot: _Slot, request: Request) -> None:
        self._pending -= 1
        if request.status:
            self._failed.append((disk, request))
        if request.op == Op.READ and not request.status:
            self._arrived.append((slot, request))  # the slot's `left` then counts its writes
        else:
            slot.left -= 1
        self._session.wake()

    def _runs_to_write(self, view: memoryview, piece: Piece) -> Runs:
        if piece.is_data:
            return data_runs(view) if self._is_blank else [(0, len(view))]
        runs = data_runs(view)
        for start, end in runs:
            view[start:end] = bytes(end - start)
        return runs

    def _begin_sync(self, then: Callable[[], None]) -> None:
        """Begin a flush, which covers all pieces that `done` was told of so far, and call `then` when it has ended."""
        self._sync = flush_request()
        self._sync.tag = partial(self._is_synced, then)
        self._send(self._target, [self._sync])

    def _is_synced(self, then: Callable[[], None], request: Request) -> None:
        self._pending -= 1
        self._sync = None
        if request.status:
            self._lost = request
            self._failed.append((self._target, request))
        else:
            self._durable = then
        self._session.wake()


def data_runs(view: memoryview) -> Runs:
    """Return the runs of grains in a view that are not all zeros, as start and end."""
    words = view[: len(view) // 8 * 8].cast("Q")
    if not (words and (words[0] or words[-1])) and bytes(view) == bytes(len(view)):
        return []

    def has_data(start: int, end: int) -> bool:  # usually one word is enough, at a twentieth of the cost
        return bool(words[start >> 3]) or bytes(view[start:end]) != bytes(end - start)

    return grain_runs(len(view), has_data)


def grain_runs(length: int, is_wanted: Callable[[int, int], bool]) -> Runs:
    """Return the runs of wanted grains in `length` bytes; `is_wanted` is called with start and end of each grain."""
    runs: Runs = []
    for start in range(0, length, GRAIN):
        end = min(length, start + GRAIN)
        if is_wanted(start, end):
            first = runs.pop()[0] if runs and runs[-1][1] == start else start
            runs.append((first, end))
    return runs
