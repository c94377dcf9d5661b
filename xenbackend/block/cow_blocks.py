"""The requests of a disk of `cow:`: each goes to the layer below or to FILE, in pieces if its blocks are in both.

Must not send a write to the layer below.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import TYPE_CHECKING

from xenbackend.block.formats.cow import BASE, OWN, ZEROS, Header
from xenbackend.block.mapped.parts import Join, Part, Pool, allocate, cut
from xenbackend.block.request import Op, Request, clear

if TYPE_CHECKING:
    from xenbackend.block.driver import Filter, HostFile
    from xenbackend.block.durable_map import DurableMap

_WRITE = int(Op.WRITE)  # in `submit` looking the name up would cost more


class CowBlocks:
    """The requests of one disk.

    Args:
        driver: whose requests they are.
        file: FILE, which gives its requests back here from now on; None if there is none, for a disk that is only read.
        header: of FILE.
        known: where the blocks are; None if they are all below, and none will be written.
        can_discard: whether discards are done.
    """

    def __init__(
        self, driver: Filter, file: HostFile | None, header: Header, known: DurableMap | None, *, can_discard: bool
    ) -> None:
        self._driver, self._file, self._map, self._can_discard = driver, file, known, can_discard
        self._size, self._block, self._data_at = header.size, header.block, header.data_at
        self._bits = header.block.bit_length() - 1
        self._states = known.states if known else memoryview(bytes(header.map_size))
        self._pool = Pool()
        self._parts_below = 0  # parts of our own that the layer below has
        self._back: list[Request] = []
        self._busy: dict[int, list[Part]] = {}  # by block being written for the first time: pieces that wait for it
        if file is not None:
            file.complete = self._from_file

    def submit(self, batch: list[Request]) -> None:
        """Send each request, or its pieces, to where the blocks are: the layer below or FILE."""
        bits, states, block, inside = self._bits, self._states, self._block, self._block - 1
        below: list[Request] = []
        own: list[Request] = []
        for request in batch:
            op, offset = request.op, request.offset
            first = offset >> bits
            if op <= _WRITE and ((offset & inside) + request.length <= block or self._are_alike(request)):
                state = states[first]
                if state == OWN:
                    own.append(request)
                    continue
                if state == BASE and not op:  # Op.READ is 0
                    below.append(request)
                    continue
            if op == Op.FLUSH:
                self._flush(request)
            elif op != Op.DISCARD:
                self._split(request)
            elif self._can_discard:
                self._discard(request)
            else:
                self._end(request, errno.EOPNOTSUPP)
        if own:
            self._do_own(own)
        if below:
            self._driver.next.submit(below)  # type: ignore[union-attr]  # a filter in a chain has a layer below
        self._give_back()

    def take_back(self, batch: list[Request]) -> None:
        """Continue with what the layer below gives back: parts of our own, and reads from above as they were."""
        if not self._parts_below:
            self._driver.complete(batch)
            return
        pool = self._pool
        for request in batch:
            if type(request) is Part and request.pool is pool:
                self._parts_below -= 1
                request.done(request)
                pool.put(request)
            else:
                self._back.append(request)
        self._give_back()

    def close(self, *, writes: bool) -> None:
        """Write the map to FILE, if `writes`, and release it. Raises: OSError."""
        if self._map is not None:
            self._states = memoryview(b"")
            self._map.close(writes=writes)

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        counts = self._map.counts if self._map else [0, 0, 0]
        return {"own": counts[OWN], "zeros": counts[ZEROS]}

    def _are_alike(self, request: Request) -> bool:
        """Return whether all blocks of a request are in the same state."""
        first, last = self._blocks(request)
        states = self._states[first : last + 1].tobytes()
        return states.count(states[:1]) == len(states)

    def _do_own(self, batch: list[Request]) -> None:
        """Execute requests whose blocks are all in FILE, by a part of our own if that takes longer."""
        done, late = self._file.do_moved(batch, self._data_at)  # type: ignore[union-attr]  # open
        self._back += done
        if late:
            take, at = self._pool.take, self._data_at
            parts = [take(each.op, each.offset + at, each.length, each.iov, _whole, each) for each in late]
            self._file.submit(parts)  # type: ignore[union-attr, arg-type]  # open

    def _from_file(self, batch: list[Request]) -> None:
        """Continue with parts that FILE gives back."""
        put = self._pool.put
        for part in batch:
            if part.done is _whole:  # type: ignore[attr-defined]  # only parts are sent; most of them are these
                request: Request = part.tag
                request.status = part.status
                self._back.append(request)
                put(part)  # type: ignore[arg-type]  # the same
            elif self._map.owns(part):  # type: ignore[union-attr, arg-type]  # what has a file that is used has a map
                self._map.take(part)  # type: ignore[union-attr, arg-type]  # the same
            else:
                part.done(part)  # type: ignore[attr-defined]  # the same
                put(part)  # type: ignore[arg-type]  # the same
        self._give_back()

    def _read_below(self, part: Part) -> None:
        self._parts_below += 1
        self._driver.next.submit([part])  # type: ignore[union-attr]  # as in `submit`

    def _blocks(self, request: Request) -> tuple[int, int]:
        return request.offset >> self._bits, (request.offset + request.length - 1) >> self._bits

    def _end(self, request: Request, status: int) -> None:
        request.status = status
        self._back.append(request)

    def _give_back(self) -> None:
        if self._back:
            back, self._back = self._back, []
            self._driver.complete(back)

    def _flush(self, request: Request) -> None:
        if self._map is None:
            self._end(request, 0)
            return

        def done(status: int) -> None:
            self._end(request, status)
            self._give_back()

        self._map.flush(done)

    def _split(self, request: Request) -> None:
        """Execute a request block by block."""
        first, last = self._blocks(request)
        starts = [request.offset, *(block << self._bits for block in range(first + 1, last + 1))]
        ends = [*starts[1:], request.offset + request.length]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        iovs = cut(request.iov, lengths) if request.iov else ([] for _ in lengths)
        join = Join(request, len(lengths))
        for start, length, iov in zip(starts, lengths, iovs, strict=True):
            self._do(self._pool.take(request.op, start, length, iov, self._piece_done, join))

    def _discard(self, request: Request) -> None:
        """Discard any number of blocks, in runs; one by one only blocks covered in part, or that are being written."""
        first, last = self._blocks(request)
        bits, end = self._bits, request.offset + request.length
        alone = {block for block in self._busy if first <= block <= last}
        if request.offset > first << bits:
            alone.add(first)
        if end < min((last + 1) << bits, self._size):
            alone.add(last)
        join, start = Join(request, 1), first
        for block in (*sorted(alone), last + 1):
            if start < block:
                self._discard_run(join, start, block - 1)
            start = block + 1
        for block in sorted(alone):
            start, stop = max(request.offset, block << bits), min(end, (block + 1) << bits)
            join.left += 1
            self._do(self._pool.take(Op.DISCARD, start, stop - start, (), self._piece_done, join))
        self._join_done(join, 0)

    def _discard_run(self, join: Join, first: int, last: int) -> None:
        """Discard whole blocks: mark those that are not in FILE as ZEROS, and discard the others in FILE."""
        states = self._states[first : last + 1].tobytes()
        self._map.exchange(first, last, BASE, ZEROS)  # type: ignore[union-attr]  # what is written has a map
        start, stop = states.find(OWN), states.rfind(OWN) + 1
        if stop:  # blocks in between that are not OWN are holes in FILE already
            place, length = (first + start) << self._bits, (stop - start) << self._bits
            part = self._pool.take(Op.DISCARD, place + self._data_at, length, (), self._piece_done, join)
            join.left += 1
            self._file.submit([part])  # type: ignore[union-attr]  # open

    def _do(self, piece: Part) -> None:
        """Execute a piece that lies within one block."""
        block = piece.offset >> self._bits
        state = self._states[block]
        if state == OWN:
            piece.offset += self._data_at
            self._file.submit([piece])  # type: ignore[union-attr]  # open
        elif piece.op == Op.READ:
            if state == BASE:
                self._read_below(piece)
            else:
                clear(piece.iov)
                self._settle(piece, 0)
        elif block in self._busy:
            self._busy[block].append(piece)
        elif piece.op == Op.DISCARD and piece.length == self._length_of(block):
            if state == BASE:
                self._map.mark(block, ZEROS)  # type: ignore[union-attr]  # what is written has a map
            self._settle(piece, 0)
        elif piece.op == Op.DISCARD and state == ZEROS:
            self._settle(piece, 0)
        else:
            self._busy[block] = []
            self._write_first(block, piece)

    def _write_first(self, block: int, piece: Part) -> None:
        """Write a block that is not in FILE yet: its content, with the piece in it."""
        length = self._length_of(block)
        if piece.op == Op.WRITE and piece.length == length:
            self._write_block(block, piece, piece.iov, length)
            return
        memory = allocate(self._block)
        if self._states[block] == ZEROS:
            self._fill(block, piece, memory, 0)
            return

        def read(part: Part) -> None:
            self._fill(block, piece, memory, part.status)

        place = block << self._bits
        self._read_below(self._pool.take(Op.READ, place, length, [memory[:length]], read, None))

    def _fill(self, block: int, piece: Part, memory: memoryview, status: int) -> None:
        """Copy the piece into the block's content in `memory`, and write the block. `status` is that of the read."""
        if status:
            self._leave(block, piece, status)
            return
        place = piece.offset - (block << self._bits)
        if piece.op == Op.DISCARD:
            memory[place : place + piece.length] = bytes(piece.length)
        for view in piece.iov:
            memory[place : place + len(view)] = view
            place += len(view)
        self._write_block(block, piece, [memory], self._block)

    def _write_block(self, block: int, piece: Part, iov: Sequence[memoryview], length: int) -> None:
        def written(part: Part) -> None:
            if not part.status:
                self._map.mark(block, OWN)  # type: ignore[union-attr]  # as in `_do`
            self._leave(block, piece, part.status)

        place = self._data_at + (block << self._bits)
        self._file.submit([self._pool.take(Op.WRITE, place, length, iov, written, None)])  # type: ignore[union-attr]  # as there

    def _leave(self, block: int, piece: Part, status: int) -> None:
        """End the first piece, and execute those that waited for it."""
        waiting = self._busy.pop(block)
        self._settle(piece, status)
        for each in waiting:
            self._do(each)

    def _settle(self, piece: Part, status: int) -> None:
        """End a piece with `status`, and return it to the pool."""
        piece.status = status
        self._piece_done(piece)
        self._pool.put(piece)

    def _piece_done(self, piece: Part) -> None:
        self._join_done(piece.tag, piece.status)

    def _join_done(self, join: Join, status: int) -> None:
        join.left -= 1
        join.status = join.status or status
        if not join.left:
            self._end(join.request, join.status)

    def _length_of(self, block: int) -> int:
        return min(self._block, self._size - (block << self._bits))


def _whole(part: Part) -> None:
    raise AssertionError(f"{part!r} is ended by `_from_file`")
