"""cow: keeps what the guest writes in a file of its own; the layer below is only read.

Synopsis:
    cow:FILE[,block=SIZE]
    cow:[block=SIZE]

Description:
    At first the disk has the content of the layer below. What the guest writes or discards goes to FILE, so many guests
    can start from one image that none of them alters. FILE is created if it does not exist, and initialised if it is
    empty. To start again from the layer below, detach the disk and remove FILE.

    Without FILE the disk is temporary: what the guest writes goes to a file without a name, in the directory of the
    setting `scratch`. It survives kills, upgrades and restarts of the service, and is gone once the disk is detached,
    however that happens, so nothing is ever left behind.

    Any image or chain can be below. Several disks may share it, since it is opened for reading, and locked for reading.
    A snapshot (`xenbackend image snapshot`) does the same within an image format that other programs know; this layer
    needs no particular format below, and keeps all writes in one FILE.

Behaviour:
    FILE has a map with a byte for each block of `block` bytes. If the first write to a block does not cover all of it,
    the rest is read from below, and the whole block is written to FILE; writes to other blocks go on in the meantime.
    Later writes to the block go straight to FILE. A discard returns the space that FILE used for the range to its file
    system. A block that is discarded as a whole before it was ever written is recorded as zeros, and takes no space.

    The map is kept in memory that outlives the worker. A flush first makes the blocks durable, then writes the changed
    parts of the map, then makes these durable. So after a power failure a block is as it was at the last flush, or
    newer, and the bytes around a write are never lost. Closing the disk does the same.

    FILE is locked while it is open. It records the disk's size, and which images are below and when each was modified
    last. If an image has changed, or is another one, the chain is refused, because the blocks in FILE would not match
    it. Either restore the former image, or remove FILE, which loses what was written.

    If the file system of FILE is full, writes to new blocks pause the disk as the policy says. Reads, discards and
    writes to blocks that FILE has go on, and the disk resumes by itself when there is space.

    To keep what was written, detach the disk and convert the chain: `xenbackend image convert 'cow:FILE|aio:BASE'
    qcow2:NEW`. To drop it, remove FILE.

    `xenbackend cow keep DISK FILE` gives the unnamed file of a disk in service a name on the same file system; it never
    replaces an existing file. From then on the chain is `cow:FILE`. `xenbackend cow drop DISK` replaces the unnamed
    file by a new one, so that the disk again has the content of the layer below. With `--force` it does so even while a
    guest uses the disk, whose content then changes under it.

    An unnamed file is lost if the service stops and nothing keeps the file: `xenbackend stop` refuses to do that
    without `--force`, `systemctl restart` keeps the file, `systemctl stop` does not. Afterwards the disk waits, with
    the reason `other-file`, and `resume` does not help: detach the disk, or start with a new file by
    `xenbackend set --replace`.

    `set` needs `--replace` to insert or remove this layer, because the disk's content is different afterwards, and
    `snapshot` is refused below it. `xenbackend status --json` shows how many blocks are `own` and `zeros`.

Example:
    cow:/srv/guests/1.cow|aio:/srv/images/template.raw
    log:|cow:/srv/guests/2.cow|qcow2:/srv/images/template.qcow2
    cow:|qcow2:/srv/images/template.qcow2

Limits:
    FILE must be a regular file, and not a symbolic link. Anything that opens the chain creates it, except for
    `xenbackend check`. A chain that is only read has no unnamed file, and shows the content of the layer below. If a
    chain has two layers without FILE, the upper one is written to. The directory of unnamed files needs space for what
    guests write: when it is full, their disks pause.
    Changes to a block device below cannot be detected, since its time does not show them. The map takes 16 MiB of
    memory for each TiB of disk with the default block. What was written since the last flush is lost if the host
    crashes, or if service and worker end together and nothing keeps their memory. The layer below cannot grow while
    FILE is kept.
    A request costs 0.7 us more than without this layer, in batches of 32; the first write to a block also costs the
    read and the write of that block.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from xenbackend.block.below import describe
from xenbackend.block.beside import begin, check_block, have, is_new, note_in_use, refuse_emptied
from xenbackend.block.driver import Env, File, Filter, Geometry
from xenbackend.block.durable_map import DurableMap
from xenbackend.block.durable_pages import TOKEN
from xenbackend.block.files import UNNAMED
from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.formats.cow import BASE, OWN, ZEROS, Header
from xenbackend.block.mapped.parts import Join, Part, Pool, allocate, cut
from xenbackend.block.options import RecordPath, Size, option
from xenbackend.block.request import Op, Request, clear
from xenbackend.errors import DriverError

_READ, _WRITE = int(Op.READ), int(Op.WRITE)  # in `submit` looking up and comparing the names would cost more


class Cow(Filter):
    """See the head of this file."""

    name = "cow"
    keeps_writes = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `cow:`."""

        file: RecordPath = option("the file that keeps what is written", default=UNNAMED, target=True)
        block: Size = option("bytes of a block, a power of two; only for a new FILE", default=64 << 10)

        def __post_init__(self) -> None:
            check_block(self.block)

    options: Options
    _file: File | None = None
    _map: DurableMap | None = None

    def open(self, env: Env) -> Geometry:
        """Open FILE, and initialise it if it is new. Raises: DriverError, OSError."""
        geometry = super().open(env)
        file = self._file = None if env.read_only and self._is_unnamed else self._open_file(env)
        header = self._header = self._begin(file) if file else Header(geometry.size, self.options.block, "", b"")
        self._size, self._block, self._data_at = header.size, header.block, header.data_at
        self._bits = header.block.bit_length() - 1
        if file and file.size >= header.file_size:  # otherwise it is new, and open for reading only
            self._map = DurableMap(env, file, HEADER_SIZE, header.map_size, header.token)
            note_in_use(env, self.options.file, file)
        self._states = self._map.states if self._map else memoryview(bytes(header.map_size))
        self._pool = Pool()
        self._back: list[Request] = []
        self._busy: dict[int, list[Part]] = {}  # by block being written for the first time: pieces that wait for it
        can_discard = self._can_discard = bool(file and file.can_discard and not env.read_only)
        return replace(
            geometry,
            read_only=env.read_only,
            can_flush=True,
            can_discard=can_discard,
            discard_granularity=header.block if can_discard else 0,
            discard_alignment=0,
            physical_sector_size=max(geometry.physical_sector_size, file.physical_sector_size if file else 0),
        )

    def _open_file(self, env: Env) -> File:
        """Open FILE and return it. Raises: DriverError, OSError."""
        file, _ = have(env, self.options.file, read_only=env.read_only)
        file.complete = self.on_complete
        env.report("mode", file.mode)
        if self._is_unnamed:
            env.report("scratch", env.files.look(UNNAMED).real)
        return file

    @property
    def _is_unnamed(self) -> bool:
        return self.options.file == UNNAMED

    def _begin(self, file: File) -> Header:
        """Return the header of FILE; initialise FILE if it is new and not read-only. Raises: DriverError, OSError."""
        assert self.below is not None  # noqa: S101 - as in `Filter.open`
        base = describe(self.next, self.env.files, with_changes=True)
        wanted = Header(self.below.size, self.options.block, base, os.urandom(TOKEN))
        first = file.read_at(0, HEADER_SIZE)
        if not is_new(file, first, wanted.file_size):
            found = Header.parse(first)
            if found.size != wanted.size:
                raise DriverError(
                    f"{self._stranger} has {wanted.size} bytes now, and had {found.size}; {self._way_out}"
                )
            if found.base != wanted.base:
                raise DriverError(f"{self._stranger} has been replaced or changed since then; {self._way_out}")
            if file.size < found.file_size:
                raise DriverError(f"it has only {file.size} of its {found.file_size} bytes: it has been truncated")
            return found
        refuse_emptied(self.env, self.options.file)
        found = wanted
        if not self.env.read_only:
            begin(file, found, size=found.file_size, written=HEADER_SIZE + found.map_size)
        return found

    @property
    def _stranger(self) -> str:
        file = "its unnamed file" if self._is_unnamed else self.options.file
        return f"the layer below, on which {file} was created,"

    @property
    def _way_out(self) -> str:
        what = "detach the disk" if self._is_unnamed else "remove the file"
        return f"restore the former one, or {what}, which loses what was written to it"

    def submit(self, batch: list[Request]) -> None:
        """Send each request, or its pieces, to where the blocks are: the layer below or FILE."""
        bits, states, take = self._bits, self._states, self._pool.take
        below: list[Request] = []
        file: list[Request] = []
        for request in batch:
            op = request.op
            if op > _WRITE and (op == Op.FLUSH or not self._can_discard):
                self._flush(request) if op == Op.FLUSH else self._end(request, errno.EOPNOTSUPP)
                continue
            first, last = request.offset >> bits, (request.offset + request.length - 1) >> bits
            state = states[first]
            is_one = first == last or states[first : last + 1].tobytes().count(state) == last + 1 - first
            if is_one and (state == OWN or (state == BASE and op == _READ)):
                part = take(op, request.offset, request.length, request.iov, _whole, request)
                if state == OWN:
                    part.offset += self._data_at
                    file.append(part)
                else:
                    below.append(part)
            elif op == Op.DISCARD:
                self._discard(request, first, last)
            else:
                self._split(request, first, last)
        if below:
            self.next.submit(below)  # type: ignore[union-attr]  # a filter in a chain has a layer below
        if file:
            self._file.submit(file)  # type: ignore[union-attr]  # open
        self._give_back()

    def on_complete(self, batch: list[Request]) -> None:
        """Continue with parts that the layer below or FILE gives back."""
        put = self._pool.put
        for part in batch:
            if part.done is _whole:  # type: ignore[attr-defined]  # only parts are sent; most of them are these
                request: Request = part.tag
                request.status = part.status
                self._back.append(request)
                put(part)  # type: ignore[arg-type]  # the same
            elif self._map is not None and self._map.owns(part):  # type: ignore[arg-type]  # the same
                self._map.take(part)  # type: ignore[arg-type]  # the same
            else:
                part.done(part)  # type: ignore[attr-defined]  # the same
                put(part)  # type: ignore[arg-type]  # the same
        self._give_back()

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        counts = self._map.counts if self._map else [0, 0, 0]
        return {"own": counts[OWN], "zeros": counts[ZEROS]}

    def close(self) -> None:
        """Write the map to FILE, and close FILE. Raises: OSError."""
        try:
            if self._map is not None:
                self._states = memoryview(b"")
                self._map.close(writes=not self.env.read_only)
        finally:
            if self._file is not None:
                self._file.close()

    def _end(self, request: Request, status: int) -> None:
        request.status = status
        self._back.append(request)

    def _give_back(self) -> None:
        if self._back:
            back, self._back = self._back, []
            self.complete(back)

    def _flush(self, request: Request) -> None:
        if self._map is None:
            self._end(request, 0)
            return

        def done(status: int) -> None:
            self._end(request, status)
            self._give_back()

        self._map.flush(done)

    def _split(self, request: Request, first: int, last: int) -> None:
        """Execute a request block by block."""
        starts = [request.offset, *(block << self._bits for block in range(first + 1, last + 1))]
        ends = [*starts[1:], request.offset + request.length]
        lengths = [end - start for start, end in zip(starts, ends, strict=True)]
        iovs = cut(request.iov, lengths) if request.iov else ([] for _ in lengths)
        join = Join(request, len(lengths))
        for start, length, iov in zip(starts, lengths, iovs, strict=True):
            self._do(self._pool.take(request.op, start, length, iov, self._piece_done, join))

    def _discard(self, request: Request, first: int, last: int) -> None:
        """Discard any number of blocks, in runs; one by one only blocks covered in part, or that are being written."""
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
                self.next.submit([piece])  # type: ignore[union-attr]  # as in `submit`
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
        part = self._pool.take(Op.READ, place, length, [memory[:length]], read, None)
        self.next.submit([part])  # type: ignore[union-attr]  # as in `submit`

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
    raise AssertionError(f"{part!r} is ended by `on_complete`")
