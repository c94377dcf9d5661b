"""readahead: reads ahead for a guest that reads sequentially.

Synopsis:
    readahead:[size=SIZE]

Description:
    For layers on which each request takes long, but a large one hardly longer than a small one: a disk on a network, a
    compressed image. A guest that reads in order finds the next data in memory. nbdkit's filter of that name does the
    same. A local disk hardly gains, since its own cache and most guests read ahead themselves.

Behaviour:
    After three reads in sequence the next `size` bytes are read in one piece, and when the guest gets to that piece,
    the `size` bytes after it. A read inside one such piece is answered from memory, or waits until the piece is there.
    All other reads are passed on; two interleaved streams do not count as sequential.

    A write or discard drops all data that were read ahead or are on their way, and nothing is read ahead until it has
    come back: no read returns data from before a write that was answered. If reading ahead fails, the guest's reads
    are passed on, and get an error only if they fail themselves. Nothing is kept beyond the end of a worker.

    `xenbackend status --json` shows the reads that were answered from memory (`hits`), and the bytes that were read
    ahead (`read_ahead_bytes`).

Example:
    readahead:|qcow2:/srv/images/compressed.qcow2
    readahead:size=4M|partition:1|aio:/mnt/nfs/disk.raw

Limits:
    It takes twice `size` of memory. Writes of others to a shared image (`share=on`, `w!`) do not reach data that are
    already in memory: do not use this layer there. A read that is passed on costs 0.6 us more in batches, and 1 us
    alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from xenbackend.block.driver import Env, Filter, Geometry
from xenbackend.block.mapped.parts import allocate
from xenbackend.block.options import Size, option
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.units import format_size, round_up

_STREAK = 2  # reads that each begin where the one before ended; from then on the guest counts as sequential
_MIN, _MAX = 64 << 10, 16 << 20  # bytes


@dataclass(eq=False, slots=True)
class _Piece:
    """A range of the disk that is read ahead: bytes `start` to `end`, the end excluded."""

    start: int
    end: int
    memory: memoryview
    is_here: bool = False
    waiting: list[Request] = field(default_factory=list)


class Readahead(Filter):
    """See the head of this file."""

    name = "readahead"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `readahead:`."""

        size: Size = option("bytes that are read ahead at a time", default=512 << 10)

        def __post_init__(self) -> None:
            if not _MIN <= self.size <= _MAX:
                raise ValueError(
                    f"size is {format_size(self.size)}; it must be {format_size(_MIN)} to {format_size(_MAX)}"
                )

    options: Options

    def open(self, env: Env) -> Geometry:
        """Begin with no data."""
        geometry = super().open(env)
        self._size = geometry.size
        self._step = round_up(self.options.size, geometry.sector_size)
        self._expected = -1  # where the next read begins if the guest reads in order
        self._streak = 0
        self._pieces: list[_Piece] = []  # at most two, the second behind the first
        self._under_way: dict[Request, _Piece] = {}  # our own reads, also those of dropped pieces
        self._writing = 0  # writes and discards in flight
        self._hits = self._bytes = 0
        return geometry

    def submit(self, batch: list[Request]) -> None:
        """Answer from memory the reads whose data are there, pass on the rest, and read ahead."""
        passed: list[Request] = []
        served: list[Request] = []
        for request in batch:
            op = request.op
            if op == Op.READ:
                self._streak = self._streak + 1 if request.offset == self._expected else 0
                self._expected = request.offset + request.length
                piece = self._find(request)
                if piece is None:
                    passed.append(request)
                elif piece.is_here:
                    self._serve(piece, request)
                    served.append(request)
                else:
                    piece.waiting.append(request)
            else:
                if op != Op.FLUSH:
                    self._writing += 1
                    passed += self._drop()
                passed.append(request)
        if passed:
            self.next.submit(passed)  # type: ignore[union-attr]  # a filter in a chain has a layer below
        if self._streak >= _STREAK and not self._writing:
            self._read_ahead()
        if served:
            self.complete(served)

    def on_complete(self, batch: list[Request]) -> None:
        """Give back the guest's requests, and take in the data that were read ahead."""
        back: list[Request] = []
        again: list[Request] = []
        for request in batch:
            piece = self._under_way.pop(request, None) if self._under_way else None
            if piece is not None:
                self._arrived(piece, request.status, back, again)
            else:
                self._writing -= request.op in (Op.WRITE, Op.DISCARD)
                back.append(request)
        if again:
            self.next.submit(again)  # type: ignore[union-attr]  # as in `submit`
        if back:
            self.complete(back)

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        return {"hits": self._hits, "read_ahead_bytes": self._bytes}

    def close(self) -> None:
        """Wait for what is being read ahead: the layers below are closed next."""
        self.env.wait_for(lambda: not self._under_way)

    def _find(self, request: Request) -> _Piece | None:
        for piece in self._pieces:
            if piece.start <= request.offset and request.offset + request.length <= piece.end:
                return piece
        return None

    def _serve(self, piece: _Piece, request: Request) -> None:
        place = request.offset - piece.start
        for view in request.iov:
            view[:] = piece.memory[place : place + len(view)]
            place += len(view)
        request.status = 0
        self._hits += 1

    def _drop(self) -> Sequence[Request]:
        """Drop all pieces, and return the reads that waited for them."""
        waiting = [request for piece in self._pieces for request in piece.waiting]
        self._pieces.clear()
        return waiting

    def _read_ahead(self) -> None:
        """Read the piece that the guest gets to next: the one at its position or, if there is one, the one after it."""
        at = self._expected
        here = [each for each in self._pieces if each.start <= at < each.end]
        start = here[-1].end if here else at
        behind = [each for each in self._pieces if each.start == start and here]
        awaited = [each for each in self._pieces if each.waiting and each not in here + behind]
        self._pieces = [*here, *behind, *awaited]  # pieces of a stream that has ended are dropped
        if len(self._pieces) >= 2 or start >= self._size:
            return
        piece = _Piece(start, min(start + self._step, self._size), allocate(self._step))
        request = Request()
        request.op, request.offset, request.length, request.status = Op.READ, start, piece.end - start, PENDING
        request.iov = [piece.memory[: request.length]]
        self._pieces.append(piece)
        self._under_way[request] = piece
        self._bytes += request.length
        self.next.submit([request])  # type: ignore[union-attr]  # as in `submit`

    def _arrived(self, piece: _Piece, status: int, back: list[Request], again: list[Request]) -> None:
        if piece not in self._pieces:  # it was dropped; the waiting reads were passed on then
            return
        waiting, piece.waiting = piece.waiting, []
        if status:
            self._pieces.remove(piece)
            again += waiting
            return
        piece.is_here = True
        for request in waiting:
            self._serve(piece, request)
        back += waiting
