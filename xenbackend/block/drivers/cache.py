"""cache: keeps blocks of the layer below in a file on a faster device.

Synopsis:
    cache:FILE,size=SIZE[,mode=read|writethrough|writeback][,block=SIZE][,destage=SIZE]

Description:
    What the guest reads from a slow layer, such as an image on NFS, a disk on a server or on rotating media, is kept in
    FILE, and the next time it is read from there. FILE should be on a faster medium, and holds up to `size` bytes of
    data. It is created if it does not exist.

    With mode=read (the default) FILE keeps what was read. With mode=writethrough it also keeps what was written, once
    the layer below has it: whole blocks, and parts of blocks that FILE had already. This suits a guest that soon reads
    again what it wrote. In both modes every write is answered by the layer below, and a flush flushes that layer.

    With mode=writeback a write of up to 128 KiB is answered as soon as it is in FILE, and is written to the layer below
    later (destaged). FILE is then a part of the disk: it holds the only copy of the dirty blocks, and they are lost if
    FILE is lost.

    `cache=on` of `aio:` does the same with the host's memory; this layer is for more data than fit into that.

Behaviour:
    The cache is empty when the disk is attached, and filled by use. The map of its blocks is in memory that outlives
    the worker, so kills, upgrades and restarts of the service lose nothing. Except for dirty blocks the map is nowhere
    else, so after a power failure, or after others have written to the image, no outdated block can come back.

    A read of up to 128 KiB for which one of the blocks is missing reads whole blocks from below, and stores them in the
    cache unless they were written to in the meantime; with writeback it does so only if all of its blocks are missing.
    Larger reads, such as those of a backup, bypass the cache. If no slot is free for a block, it replaces one that has
    not been used recently (CLOCK, among the 8 slots where it can be).

    With mode=read or writethrough the disk never depends on FILE: a block that cannot be read from it is read from
    below. After 16 errors in a row FILE is no longer used until the layer is opened again, and the fact `cache` says
    so. If a worker's successor cannot open FILE, it serves the disk without a cache.

    With writeback, a flush makes the data in FILE durable, then records there which blocks are dirty, and flushes what
    was written to the layer below. A block is destaged 5 s after it was written, or earlier if more than half of the
    blocks that may be dirty are; `destage` limits the rate. The layer below is flushed before the record in FILE is
    removed. So after a power failure each sector is as it was at the last flush, or newer.
    If FILE gives errors, requests for dirty blocks wait, whatever the policy says, and all others bypass FILE. If the
    layer below gives errors, the fact `destage` says so. Closing the disk takes up to 5 s to destage dirty blocks, and
    so do `set` and `upgrade`. What remains is durable in FILE, and the service's log says so. While FILE has dirty
    blocks, it is refused above another layer, or above an image that was changed without it.

    `xenbackend status --json` shows `hits` and `misses`, both in read requests, and `errors` of FILE. With writeback it
    also shows how many blocks are `dirty`, how many were `destaged`, and how many pieces of writes went `around` FILE,
    directly to the layer below.

Example:
    cache:/ssd/guest.cache,size=4G|aio:/mnt/nfs/guest.img
    cache:/ssd/guest.cache,size=20G,mode=writethrough|nbd:unix:/run/server.sock
    cache:/ssd/guest.cache,size=20G,mode=writeback,destage=50M|aio:/mnt/nfs/guest.img

Limits:
    FILE must be a regular file, and is for one disk at a time. `check` opens FILE and looks at its header; commands on
    the image do not open it, except with writeback. `size` must be at least 1 MiB and 8 blocks, and at most 16 million
    blocks. A slot, which has one block, takes 21 bytes of memory, or 29 with writeback: 8 of them are for an index,
    which takes at least 512 KiB. Above `luks:` FILE has plain text. What others write to a shared image (`share=on`,
    `w!`) is not noticed: do not use a cache there. A discard of more than 4096 blocks empties the cache, except for
    dirty blocks. If the medium below FILE hangs, rather than failing, reads from FILE hang as well.

    With writeback the image alone is not the disk until nothing is dirty, and nothing keeps others from using the
    image. At most 65536 blocks, and at most 3/4 of FILE, can be dirty. `snapshot` is refused. To change the mode,
    use another FILE, while nothing is dirty.

    In batches of 32 a hit of 4096 bytes costs 0.3 us more than a read without this layer if FILE is in the host's
    memory, which is a ninth of a whole request: most of it is the lookup of the slot. A hit that comes alone costs
    1.1 to 1.9 us more. If FILE is read past the host's memory (O_DIRECT), a hit costs 1.3 us more, since each hit then
    needs a request of its own. A write costs 2.8 us more with mode=read, 7.7 us with mode=writethrough, and 6.8 us with
    writeback. With writeback, a write to a block that FILE has, but that is not dirty yet, costs 11 us more than that.
    These are CPU times; those of hits and of the 11 us were measured while other programs used the host, too.
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

        file: RecordPath = option("the file that keeps blocks", target=True)
        size: Size = option("bytes of data that FILE can hold")
        mode: Annotated[str, Kind(" or ".join(MODES), parse_mode)] = option(
            "what FILE keeps: blocks read, also blocks written, or also writes that are not below yet", default=READ
        )
        block: Size = option("bytes of a block, a power of two", default=16 << 10)
        destage: Size = option("with writeback: bytes written below per second, at most; 0: no limit", default=0)

        def __post_init__(self) -> None:
            check_sizes(self.size, self.block)
            if self.destage and self.mode != WRITEBACK:
                raise ValueError("destage has no effect without mode=writeback")

    options: Options
    _file: HostFile | None = None
    _requests: WriteThrough | WriteBack

    def __init__(self, options: Options) -> None:
        """See `Driver`."""
        super().__init__(options)
        self.may_answer_alone = options.mode == WRITEBACK
        self.is_transparent = not self.may_answer_alone

    def open(self, env: Env) -> Geometry:
        """Open FILE, and initialise it if it is new. Raises: DriverError, OSError."""
        geometry = super().open(env)
        if self.options.mode == WRITEBACK:
            return self._open_back(env, geometry)
        if not (env.serves or env.is_check):
            self._requests = self._through(None)
            return geometry
        try:
            known = self._open_file(env)
        except (DriverError, OSError) as problem:
            if not env.resumes:
                raise
            known = self._map(env, self.options.size // self.options.block, b"")  # stays empty
            self._requests = self._through(known)
            self._requests.leave_alone(str(problem))
        else:
            self._requests = self._through(known)
        return geometry

    def _open_back(self, env: Env, geometry: Geometry) -> Geometry:
        """Open FILE, even if no guest is served: it may have the only copy of a block. Raises: DriverError, OSError."""
        options = self.options
        self._file, header = open_back(self, options.file, options.size, options.block)
        if header is None:
            self._requests = self._through(None)
        else:
            self._file.complete = self.on_complete
            self._requests = WriteBack(self, self._file, header, rate=options.destage)
            dirty = self._requests.figures()["dirty"]
            env.report("mode", self._file.mode)
            env.report("cache", f"{format_size(header.size)}; {dirty} blocks were dirty when FILE was opened")
        physical = max(geometry.physical_sector_size, self._file.physical_sector_size)
        return replace(geometry, can_flush=True, physical_sector_size=physical)

    def _open_file(self, env: Env) -> CacheMap:
        """Open FILE, and return the map that a predecessor left, or an empty one. Raises: DriverError, OSError."""
        block, size = self.options.block, self.below.size  # type: ignore[union-attr]  # as in `Filter.open`
        self._file, header = open_read(self, self.options.file, self.options.size, block)
        cut = size % block and size  # an incomplete last block is no longer the same once the disk has grown
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
        """Take requests; FILE, the layer below, or both execute them."""
        self._requests.submit(batch)

    def on_complete(self, batch: list[Request]) -> None:
        """Continue with requests that the layer below gives back; with mode=writeback also those of FILE."""
        self._requests.take_back(batch)

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        return self._requests.figures()

    def close(self) -> None:
        """Close FILE, with mode=writeback after destaging for a few seconds. Raises: OSError."""
        try:
            self._requests.close()
        finally:
            if self._file is not None:
                self._file.close()
