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
    `snapshot` is refused below it. If the disk cannot be opened at the time, `set --replace` keeps the unnamed file for
    the new chain, and refuses a chain without one. `xenbackend status --json` shows how many blocks are `own` and
    `zeros`.

Example:
    cow:/srv/guests/1.cow|aio:/srv/images/template.raw
    log:|cow:/srv/guests/2.cow|qcow2:/srv/images/template.qcow2
    cow:|qcow2:/srv/images/template.qcow2

Limits:
    FILE must be a regular file, and not a symbolic link. Anything that opens the chain creates it, except for
    `xenbackend check`, `set --dry-run` and a `set` that is refused. A chain that is only read has no unnamed file, and
    shows the content of the layer below. If a chain has two layers without FILE, the upper one is written to. The
    directory of unnamed files needs space for what guests write: when it is full, their disks pause.
    Changes to a block device below cannot be detected, since its time does not show them. The map takes 16 MiB of
    memory for each TiB of disk with the default block. What was written since the last flush is lost if the host
    crashes, or if service and worker end together and nothing keeps their memory. The layer below cannot grow while
    FILE is kept.
    A request costs 0.2 us more than without this layer, in batches of 32 through the page cache; with direct I/O that
    is too little to be measured. The first write to a block also costs the read and the write of that block.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

from xenbackend.block.below import describe
from xenbackend.block.beside import begin, check_block, have, is_new, note_in_use, refuse_emptied
from xenbackend.block.cow_blocks import CowBlocks
from xenbackend.block.driver import Env, Filter, Geometry, HostFile
from xenbackend.block.durable_map import DurableMap
from xenbackend.block.durable_pages import TOKEN
from xenbackend.block.files import UNNAMED
from xenbackend.block.formats.beside import HEADER_SIZE
from xenbackend.block.formats.cow import Header
from xenbackend.block.options import RecordPath, Size, option
from xenbackend.block.request import Request
from xenbackend.errors import DriverError


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
    _file: HostFile | None = None
    _requests: CowBlocks

    def open(self, env: Env) -> Geometry:
        """Open FILE, and initialise it if it is new. Raises: DriverError, OSError."""
        geometry = super().open(env)
        file = self._file = None if env.read_only and self._is_unnamed else self._open_file(env)
        header = self._begin(file) if file else Header(geometry.size, self.options.block, "", b"")
        known = None
        if file and file.size >= header.file_size:  # otherwise it is new, and open for reading only
            known = DurableMap(env, file, HEADER_SIZE, header.map_size, header.token)
            note_in_use(env, self.options.file, file)
        can_discard = bool(file and file.can_discard and not env.read_only)
        self._requests = CowBlocks(self, file, header, known, can_discard=can_discard)
        return replace(
            geometry,
            read_only=env.read_only,
            can_flush=True,
            can_discard=can_discard,
            discard_granularity=header.block if can_discard else 0,
            discard_alignment=0,
            physical_sector_size=max(geometry.physical_sector_size, file.physical_sector_size if file else 0),
        )

    def _open_file(self, env: Env) -> HostFile:
        """Open FILE and return it. Raises: DriverError, OSError."""
        file, _ = have(env, self.options.file, read_only=env.read_only)
        env.report("mode", file.mode)
        if self._is_unnamed:
            env.report("scratch", env.files.look(UNNAMED).real)
        return file

    @property
    def _is_unnamed(self) -> bool:
        return self.options.file == UNNAMED

    def _begin(self, file: HostFile) -> Header:
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
        """Take requests; FILE, the layer below, or both execute them."""
        self._requests.submit(batch)

    def on_complete(self, batch: list[Request]) -> None:
        """Continue with what the layer below gives back."""
        self._requests.take_back(batch)

    def figures(self) -> dict[str, int]:
        """See `Driver`."""
        return self._requests.figures()

    def close(self) -> None:
        """Write the map to FILE, and close FILE. Raises: OSError."""
        try:
            self._requests.close(writes=not self.env.read_only)
        finally:
            if self._file is not None:
                self._file.close()
