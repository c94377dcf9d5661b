r"""qcow2: an image of QEMU's format QCOW2; a parent (backing file) comes by itself.

Synopsis:
    qcow2:FILE[,cache=on|off][,parents=DIR][,parent_format=FORMAT]

Description:
    The source of a chain for QCOW2 images of both versions, as `qemu-img` makes them: clusters of 512 bytes to 2 MiB,
    refcounts of 1 to 64 bits, compressed clusters (zlib, and zstd with Python 3.14 or the package `zstandard`, Debian's
    `python3-zstandard`). What the image does not have is read from its parent, if it
    has one, and else is zeros; what is written goes to the image.

    The parent is opened too, for reading, as what the image says it is: `raw` as `aio:`, `vpc` as `vhd:`, and `qcow`,
    `qcow2`, `vmdk`, `vhdx` and `vdi` as themselves; and so on to the last. Where the image does not say,
    `parent_format=` must: the format is never guessed, since whoever writes to a raw disk could make it look like
    anything.

Behaviour:
    Requests that lie in a cluster that the image has to itself go to the file as they are. The first write to a
    cluster writes it to a new place, with what it had around the data, and then the table that names it, before the
    write is answered. Clusters that a snapshot in the image or a compressed cluster has are not touched by that.
    Refcounts are raised before a cluster is used, and lowered after a flush. Whoever is killed in the middle leaves
    an image without an error; what it leaks, up to 16 MiB and what was freed since the last flush, `qemu-img check`
    shows and reclaims. A flush returns when everything that was answered is durable.

    A discard frees whole clusters, which are used again for other ones. In an image of version 3 with a parent they
    become zeros; in one of version 2 with a parent nothing can be discarded.

    An image that says that it is dirty (a QEMU with lazy refcounts was killed) or corrupt is only opened for reading;
    `qemu-img check -r all` mends a dirty one. The bit for lazy refcounts itself is allowed and not made use of.
    A cluster that holds a table of the image is never written over, also where the image's refcount says that it is
    free: nothing is written, an image of version 3 says from then on that it is corrupt, and the disk waits until
    `xenbackend image check --repair` has mended it. Where it is data that is wrongly counted as free, nobody sees that
    but `image check`: have a look at an image that comes from a host that crashed.

    Reserved bits in an image's tables mean nothing here, as to QEMU; `image check` finds them.

    Persistent dirty bitmaps in the image become invalid by opening it for writing, as the format demands.

    A parent must lie in the image's own directory, or in `parents=`; links are followed before that is checked. The
    image is locked while it is open: one writer, or any number of readers.

Example:
    log:|qcow2:/srv/images/guest.qcow2
    qcow2:/srv/guests/a.qcow2,parents=/srv

Limits:
    Not supported, and refused: encryption, external data files, subclusters (extended L2 entries). The L2 tables that
    are in use take 256 MiB of memory for each TiB with clusters of 64 KiB, and 32 MiB at most, which is enough for 128
    GiB at a time; the L1 table 16 KiB for each TiB, and 32 MiB at most; refcounts up to 16 MiB; what is known of
    parents up to 16 MiB.
    The file never becomes smaller. Snapshots in the image are kept, but neither made nor looked at; an image whose
    snapshots or bitmaps have tables of more than 64 MiB is only opened for reading.
"""

from __future__ import annotations

import errno
from functools import partial

from xenbackend.block.driver import Env, File, Geometry
from xenbackend.block.formats import qcow2
from xenbackend.block.formats.qcow2_tables import ZERO as WORD_OF_ZEROS
from xenbackend.block.formats.qcow2_tables import has_more_clusters, inflate, unpack_table
from xenbackend.block.formats.zstd import find_unzstd
from xenbackend.block.mapped.tables import ZERO
from xenbackend.block.qcow.codec import Version2
from xenbackend.block.qcow.disk import QcowDisk
from xenbackend.block.qcow.occupied import occupied_by
from xenbackend.block.qcow.refcounts import Refcounts
from xenbackend.block.qcow.steps import Steps, run
from xenbackend.block.request import Request
from xenbackend.errors import DriverError
from xenbackend.units import format_size

_MOST_FREED = 8192  # clusters that wait for the guest's next flush; with more of them a discard flushes itself


class Qcow2(QcowDisk):
    """See the head of this file."""

    name = "qcow2"
    allocator: Refcounts | None = None
    _can_discard = False

    def open_image(self, env: Env, file: File) -> Geometry:
        """See `QcowDisk`."""
        header = self._header = qcow2.parse_header(file.read_at, file.size)
        env.report("format", f"QCOW2 version {header.version}, clusters of {format_size(header.cluster_size)}")
        if header.backing_file:
            self.parent = self.find_parent(header.backing_file, header.backing_format)
        unpack = find_unzstd() if header.compression == "zstd" else inflate
        self.serve(file, header.size, header.cluster_bits, header.l1, Version2(header), unpack)
        if env.read_only:
            return Geometry(size=header.size, read_only=True)
        _check_writable(header)
        data = file.read_at(header.refcount_table.offset, header.refcount_table.length)
        table = unpack_table(data + bytes(header.refcount_table.length - len(data)))
        occupied = occupied_by(file.read_at, file.size, header, self.l1_words(), table)
        self.serve_writes(Refcounts(self, header, table, occupied))
        if header.autoclear:
            file.write_at(*qcow2.autoclear_bytes(0))
            file.sync()
        self._discarded = ZERO if self.parent else 0
        self._can_discard = not self.parent or header.version == 3
        return Geometry(
            size=header.size,
            can_discard=self._can_discard,
            discard_granularity=header.cluster_size if self._can_discard else 0,
        )

    def is_preallocated(self) -> bool:
        """See `QcowDisk`: where a tenth more clusters are counted as used than the file has on its host, as QEMU."""
        file, header = self.file, self._header
        most = file.allocated >> header.cluster_bits
        most = max(most * 10 // 9, most + 2)
        try:
            return has_more_clusters(file.read_at, header, -(-file.size >> header.cluster_bits), most)
        except DriverError:  # damaged refcounts are no reason not to say where the data are
            return False

    def flush(self, request: Request) -> None:
        """Make everything durable; then lower the refcounts of what was freed before."""
        allocator = self.allocator
        if allocator is None or not allocator.freed_count:
            self.to_file(request, 0)
        else:
            self.sync(partial(self._flushed, request, allocator, allocator.take_freed()))

    def discard(self, request: Request) -> None:
        """Free the clusters that lie in the range as a whole."""
        if not self._can_discard:
            self.finish(request, errno.EOPNOTSUPP)
            return
        run(self._discard(request.offset, request.length), lambda status, _: self.finish(request, status))

    def close(self) -> None:
        """Give back the clusters that were reserved and not used, and close the file."""
        try:
            if self.allocator is not None:
                self.allocator.close()
        finally:
            self.file.close()

    def _flushed(self, request: Request, allocator: Refcounts, freed: list[int], status: int) -> None:
        if status:
            allocator.keep_freed(freed)
            self.finish(request, status)
        else:
            allocator.lower(freed, lambda _: self.finish(request, 0))

    def _discard(self, offset: int, length: int) -> Steps[None]:
        bits, table_bits = self.cluster_bits, self._header.l2_bits
        first, end = -(-offset >> bits), offset + length >> bits
        if offset + length == self.size:
            end = -(-self.size >> bits)
        while first < end:
            number, index = divmod(first, 1 << table_bits)
            count = min(end - first, (1 << table_bits) - index)
            if self._mapping.is_mapped(number):
                yield from self._discard_in_table(number, index, count)
                yield partial(self.in_thread, _nothing)  # so that others have their turn
            first += count
        if self.allocator is not None and self.allocator.freed_count > _MOST_FREED:
            freed = self.allocator.take_freed()
            try:
                yield self.sync
            except OSError:
                self.allocator.keep_freed(freed)
                raise
            yield partial(self.allocator.lower, freed)

    def _discard_in_table(self, number: int, index: int, count: int) -> Steps[None]:
        table = yield from self._mapping.table(number)
        wanted = [
            place for place, word in enumerate(table.words[index : index + count], index) if word & ~WORD_OF_ZEROS
        ]
        if not wanted:
            return
        first, last = wanted[0], wanted[-1]
        entries = table[first : last + 1]
        for place in wanted:
            entries[place - first] = self._discarded
        yield from self._mapping.change(number, first, entries)


def _check_writable(header: qcow2.Header) -> None:
    if header.incompatible & qcow2.CORRUPT:
        raise DriverError(
            "it says that it is corrupt, and can only be read; mend it with: xenbackend image check --repair"
        )
    if header.incompatible & qcow2.DIRTY:
        raise DriverError("its refcounts are out of date (dirty), and it can only be read; run qemu-img check -r all")


def _nothing() -> None:
    """Do nothing, in a thread."""
