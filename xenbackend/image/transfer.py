"""Copies ranges between two open disks, a turn of up to 16 MiB at a time; zeros are not written where there are zeros.

Must not know where the ranges come from. Between two turns nothing is in flight: so that is where one may stop.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from xenbackend.block.extents import Extent, Kind
from xenbackend.block.mapped.parts import allocate
from xenbackend.block.request import Op, Request
from xenbackend.image.session import Disk, Ended, Session, check_status, flush_request

PIECE = 1 << 20  # bytes of one request
DEPTH = 16  # requests of one turn
GRAIN = 4096  # bytes: shorter runs of zeros are data


def turns(extents: Iterable[Extent]) -> Iterator[list[tuple[int, int]]]:
    """Yield what to do in one turn: ranges as offset and length, cut where offsets are multiples of `PIECE`."""
    turn: list[tuple[int, int]] = []
    for extent in extents:
        place = extent.start
        while place < extent.end:
            end = min(extent.end, (place // PIECE + 1) * PIECE)
            turn.append((place, end - place))
            place = end
            if len(turn) == DEPTH:
                yield turn
                turn = []
    if turn:
        yield turn


def has_data(extent: Extent) -> bool:
    """Return whether an extent has to be read to know what is there."""
    return extent.kind is Kind.DATA


Choose = Callable[[memoryview], list[tuple[int, int]]]  # the runs of a view that are to be written, as start and end


class Transfer:
    """Copies from one disk to another, which are both open in a session.

    Args:
        session: where the source is open.
        source: what is read.
        target: what is written; open in the same session.
        is_blank: the target reads as zeros wherever nothing was written yet.
    """

    def __init__(self, session: Session, source: Disk, target: Disk, *, is_blank: bool) -> None:
        self._session = session
        self._source = source
        self._target = target
        self._is_blank = is_blank
        self._memory = [allocate(PIECE) for _ in range(DEPTH)]
        self._pending: set[Request] = set()
        self._arrived: list[Request] = []  # reads that succeeded, and whose data is not on its way yet
        self._failed: list[tuple[Disk, Request]] = []
        self.written = 0  # bytes

    def copy(self, turn: Sequence[tuple[int, int]]) -> None:
        """Copy ranges: read all, and write each as soon as it is there.

        Raises: RequestFailed, for one of those that failed, when all of them have ended.
        """
        self._do(self._source, turn, self._runs_to_copy)

    def clear(self, turn: Sequence[tuple[int, int]]) -> None:
        """Make ranges zeros: what is none yet is written. Raises: as `copy`."""
        self._do(self._target, turn, _clear_runs)

    def flush(self) -> None:
        """Make durable what was written. Raises: RequestFailed."""
        self._session.do(self._target, flush_request())

    def _do(self, disk: Disk, turn: Sequence[tuple[int, int]], choose: Choose) -> None:
        reads = [
            _request(Op.READ, offset, memory[:length], partial(self._ended, disk))
            for (offset, length), memory in zip(turn, self._memory, strict=False)
        ]
        self._send(disk, reads)
        while self._pending or self._arrived:
            self._session.run_until(lambda: bool(self._arrived) or not self._pending)
            arrived, self._arrived = self._arrived, []
            writes = [each for request in arrived for each in self._writes(request, choose(request.iov[0]))]
            if writes:
                self._send(self._target, writes)
        if self._failed:
            where, request = self._failed[0]
            self._failed.clear()
            check_status(where, request)

    def _send(self, disk: Disk, batch: list[Request]) -> None:
        self._pending.update(batch)
        disk.submit(batch)

    def _ended(self, disk: Disk, request: Request) -> None:
        self._pending.remove(request)
        if request.status:
            self._failed.append((disk, request))
        elif request.op == Op.READ:
            self._arrived.append(request)
        self._session.wake()

    def _runs_to_copy(self, view: memoryview) -> list[tuple[int, int]]:
        return data_runs(view) if self._is_blank else [(0, len(view))]

    def _writes(self, request: Request, runs: list[tuple[int, int]]) -> list[Request]:
        ended, view = partial(self._ended, self._target), request.iov[0]
        self.written += sum(end - start for start, end in runs)
        return [_request(Op.WRITE, request.offset + start, view[start:end], ended) for start, end in runs]


def data_runs(view: memoryview) -> list[tuple[int, int]]:
    """Return the runs of a view that are not zeros, as start and end, in steps of `GRAIN`."""
    if bytes(view) == bytes(len(view)):
        return []
    zeros, runs = bytes(GRAIN), []
    first = -1
    for start in range(0, len(view), GRAIN):
        piece = bytes(view[start : start + GRAIN])
        if piece == zeros[: len(piece)]:
            if first >= 0:
                runs.append((first, start))
            first = -1
        elif first < 0:
            first = start
    return [*runs, (first, len(view))] if first >= 0 else runs


def _clear_runs(view: memoryview) -> list[tuple[int, int]]:
    runs = data_runs(view)
    for start, end in runs:
        view[start:end] = bytes(end - start)
    return runs


def _request(op: Op, offset: int, view: memoryview, then: Ended) -> Request:
    request = Request(then)
    request.op, request.offset, request.length, request.iov = op, offset, len(view), [view]
    return request
