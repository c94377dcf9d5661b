"""cache: keeps blocks of the layer below in a file on a faster device.

Synopsis:
    cache:FILE,size=SIZE[,mode=read|writethrough|writeback][,block=SIZE][,destage=SIZE]

Description:
    What the guest reads from a slow layer, such as an image on NFS, a disk on a server or on rotating media, is kept in
    FILE, and read from there the next time. FILE is on a faster medium, and has room for `size` bytes; it is made where
    it is not there.

    With mode=read (the default) it has what was read. With mode=writethrough also what was written, once that is
    below, in whole blocks or to blocks that it had: for a guest that reads again soon what it wrote. Every write is
    answered by the layer below, in both modes, and a flush flushes that.

    With mode=writeback a write of up to 128 KiB is answered once it is in FILE, and goes below later. FILE is a part of
    the disk then: what is dirty is nowhere else, and lost with FILE.

    `cache=on` of `aio:` has the host's memory do the same; this layer is for more than that has room for.

Behaviour:
    The cache is empty when the disk is attached, and filled by use. What it has is known in memory that outlives the
    worker: kills, upgrades and restarts of the service lose none of it. It is known nowhere else, but for what is
    dirty, so that no block of a former life can come back after a power failure, or after others have written.

    A read of up to 128 KiB that finds one of its blocks missing reads whole blocks from below, and leaves them in the
    cache, unless something was written there meanwhile; with writeback only where all of them are missing. Larger ones,
    as of a backup, go by. Where no place is free, a block gives way that was not used since the last time that one was
    looked for near it.

    With mode=read or writethrough FILE is never needed: a block that cannot be read from it is read from below. After
    16 errors in a row it is left alone until the layer is opened anew, and the fact `cache` says so; where a successor
    cannot open it, none is used.

    With writeback, a flush makes FILE durable, then notes there which blocks are dirty, and flushes what went below. A
    block goes there 5 s after it was written, or earlier where half of those are dirty that may be, at `destage` bytes
    a second; the layer below is flushed before FILE forgets it. So after a power failure each sector is as it was at
    the last flush, or newer. Where FILE gives errors, what it alone has waits, whatever the policy says, and all else
    goes past it. Where the layer below does, the fact `destage` says so. Closing the disk takes up to 5 s for what is
    dirty, as do `set` and `upgrade`; the rest stays in FILE, durably, and the service's log says so. While something is
    dirty, FILE is refused above another layer, or an image that was changed without it.

    `xenbackend status --json` shows `hits` and `misses`, in requests to read, and `errors` of FILE; with writeback also
    how many blocks are `dirty`, how many were `destaged`, and how many pieces of writes went `around` FILE.

Example:
    cache:/ssd/guest.cache,size=4G|aio:/mnt/nfs/guest.img
    cache:/ssd/guest.cache,size=20G,mode=writethrough|nbd:unix:/run/server.sock
    cache:/ssd/guest.cache,size=20G,mode=writeback,destage=50M|aio:/mnt/nfs/guest.img

Limits:
    FILE must be a regular file, for one disk at a time. Commands, and `check`, read past it, but with writeback.
    `size` is 1 MiB and 8 blocks at least, and 16 million blocks at most; a slot takes 13 bytes of memory, with
    writeback 21, and the blocks that are found again and again up to 9 MiB. Above `luks:` FILE has plain text. What
    others write to a shared image (`share=on`, `w!`) is not noticed: do not use it there. A discard of more than 4096
    blocks empties the cache of what is not dirty. A medium below FILE that hangs, rather than failing, holds up what
    is read from it.

    With writeback the image alone is not the disk until nothing is dirty, and nobody is kept from using it. At most
    65536 blocks are, and 3/4 of FILE. `snapshot` is refused. For another mode take another FILE, with nothing dirty.

    In batches of 32 a hit of 4096 bytes costs 0.4 us more than a read without this layer, where FILE is in the host's
    memory, and 1.1 us alone: to look up where each is costs about as much as a tenth of the whole request. Where FILE
    is read past the host's memory (O_DIRECT) it is 1.3 us, as each hit then needs a request of its own. A write costs
    2.8 us more, 7.7 us with mode=writethrough, and 6.8 us with writeback; there 11 us more where FILE has its block,
    and that is not dirty yet.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Annotated

from xenbackend.block.below import describe
from xenbackend.block.cache_file import open_back, open_read
from xenbackend.block.cache_map import CacheMap
from xenbackend.block.cache_parts import MODES, READ, WRITEBACK, WRITETHROUGH, check_sizes, parse_mode
from xenbackend.block.driver import Env, Filter, Geometry, HostFile
from xenbackend.block.formats.cache import DATA_AT
from xenbackend.block.options import Kind, RecordPath, Size, option
from xenbackend.block.request import Request
from xenbackend.block.write_back import WriteBack
from xenbackend.block.write_through import WriteThrough
from xenbackend.errors import DriverError
from xenbackend.units import format_size


class Cache(Filter):
    """See the head of this file."""

    name = "cache"
    is_transparent = True

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `cache:`."""

        file: RecordPath = option("where blocks are kept", target=True)
        size: Size = option("bytes that there is room for")
        mode: Annotated[str, Kind(" or ".join(MODES), parse_mode)] = option(
            "whether what is written is kept, too, or even alone", default=READ
        )
        block: Size = option("bytes of a block, a power of two", default=16 << 10)
        destage: Size = option("with writeback: bytes a second that are written below at most; 0: any", default=0)

        def __post_init__(self) -> None:
            check_sizes(self.size, self.block)
            if self.destage and self.mode != WRITEBACK:
                raise ValueError("destage does nothing without mode=writeback")

    options: Options
    _file: HostFile | None = None
    _requests: WriteThrough | WriteBack

    def __init__(self, options: Options) -> None:
        """See `Driver`."""
        super().__init__(options)
        self.may_answer_alone = options.mode == WRITEBACK
        self.is_transparent = not self.may_answer_alone

    def open(self, env: Env) -> Geometry:
        """Open FILE, or make it. Raises: DriverError, OSError."""
        geometry = super().open(env)
        if self.options.mode == WRITEBACK:
            return self._open_back(env, geometry)
        if not env.serves:
            self._requests = self._through(None)
            return geometry
        try:
            known = self._open_file(env)
        except (DriverError, OSError) as problem:
            if not env.resumes:
                raise
            known = self._map(env, self.options.size // self.options.block, b"")  # nothing that comes is noted there
            self._requests = self._through(known)
            self._requests.leave_alone(str(problem))
        else:
            self._requests = self._through(known)
        return geometry

    def _open_back(self, env: Env, geometry: Geometry) -> Geometry:
        """Open FILE, also for whoever only looks: it may have what is nowhere else. Raises: DriverError, OSError."""
        options = self.options
        self._file, header = open_back(self, options.file, options.size, options.block)
        if header is None:
            self._requests = self._through(None)
        else:
            self._file.complete = self.on_complete
            self._requests = WriteBack(self, self._file, header, rate=options.destage)
            dirty = self._requests.figures()["dirty"]
            env.report("mode", self._file.mode)
            env.report("cache", f"{format_size(header.size)}; {dirty} blocks were in FILE alone when it was opened")
        physical = max(geometry.physical_sector_size, self._file.physical_sector_size)
        return replace(geometry, can_flush=True, physical_sector_size=physical)

    def _open_file(self, env: Env) -> CacheMap:
        """Open FILE, and return what was known of it. Raises: DriverError, OSError."""
        block, size = self.options.block, self.below.size  # type: ignore[union-attr]  # as in `Filter.open`
        self._file, header = open_read(self, self.options.file, self.options.size, block)
        cut = size % block and size  # its last block is another one once the disk has grown
        base = f"{describe(self.next, env.files, with_changes=False)} {cut}".encode(errors="surrogateescape")
        known = self._map(env, header.blocks, header.token + hashlib.sha256(base).digest())
        env.report("mode", self._file.mode)
        env.report("cache", f"{format_size(known.slots * block)} in blocks of {format_size(block)}")
        return known

    def _map(self, env: Env, slots: int, token: bytes) -> CacheMap:
        return CacheMap(env, slots, token, block=self.options.block, data_at=DATA_AT)

    def _through(self, known: CacheMap | None) -> WriteThrough:
        keeps_writes = self.options.mode == WRITETHROUGH
        return WriteThrough(self, self._file, known, self.options.block, keeps_writes=keeps_writes)

    def submit(self, batch: list[Request]) -> None:
        """Have FILE or the layer below do what they are to do."""
        self._requests.submit(batch)

    def on_complete(self, batch: list[Request]) -> None:
        """Go on with what the layer below gives back, or FILE with mode=writeback."""
        self._requests.take_back(batch)

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        return self._requests.figures()

    def close(self) -> None:
        """Let go of FILE. Raises: OSError."""
        try:
            self._requests.close()
        finally:
            if self._file is not None:
                self._file.close()
