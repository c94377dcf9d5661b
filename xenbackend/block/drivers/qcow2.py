r"""qcow2: an image of QEMU's format QCOW2; a parent (backing file) comes by itself.

Synopsis:
    qcow2:FILE[,cache=on|off][,share=on|off][,parents=PLACES][,parent_format=FORMAT][,data_file=FILE]

Description:
    The source of a chain for QCOW2 images of both versions, as `qemu-img` makes them; "Limits" says of each feature
    whether it is read and written. What the image does not have is read from its parent, if it has one, and else is
    zeros; what is written goes to the image.

    The parent is opened too, for reading, as what the image says it is: `raw` as `aio:`, `vpc` as `vhd:`, and `qcow`,
    `qcow2`, `vmdk`, `vhdx` and `vdi` as themselves; and so on to the last. Where the image does not say,
    `parent_format=` must: the format is never guessed, since whoever writes to a raw disk could make it look like
    anything.

    An image may keep its data in a file beside it, the external data file. That is opened too, as the image is; every
    cluster in it is where it is on the disk. To write to the disk, `data_file=` has to name that file: an image alone
    does not decide which file is written.

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
    but `image check`: have a look at an image that comes from a host that crashed. An image whose tables lie over one
    another is only opened for reading.

    Reserved bits in an image's tables mean nothing here, as to QEMU; `image check` finds them.

    Persistent dirty bitmaps in the image become invalid by opening it for writing, as the format demands.

    A parent is opened only if an administrator has allowed it: by a mark at the image, which `image create --parent`,
    `image snapshot`, `image rebase`, `snapshot` and `image trust` leave, and which names that one file; by `parents=`;
    or by `parents` in the settings. These name directories, beneath which a parent may be, or the parent itself; a
    device has to be named itself. `parents=` takes several, with a colon between them. Who copies an image copies no
    mark (unless with `cp -a` or `rsync -X`, as root): `xenbackend image trust qcow2:FILE` makes one. The image is
    locked while it is open: one writer, or any number of readers.

    An external data file that only the image names has to be allowed in the same way, and must not be a device. It is
    read (for a read-only disk, of a parent, by `image convert`) and never written: whoever made the image could have
    named the disk of another guest. `data_file=` may name any file, a device too, and then what the image says does not
    matter.
    The commands that change an image (`image resize`, `rebase`, `check --repair`) need `data_file=` in its layer;
    `image commit` into such an image takes `--into qcow2:FILE,data_file=FILE`. A parent's data file is the one that
    the parent names.

    A relative name in an image is relative to the image; to QEMU it is relative to where QEMU was started, so that a
    whole path is better. The data file has a lock of its own. A cluster is durable in it before the image names it,
    and a flush is one of the data file, then of the image. A discard makes holes in the data file. An image whose data
    file is shorter than the disk, or that has snapshots besides, can only be read.

Example:
    log:|qcow2:/srv/images/guest.qcow2
    qcow2:/srv/guests/a.qcow2,parents=/srv
    qcow2:/srv/guests/b.qcow2,data_file=/dev/vg/b

Limits:
    What an image may have:

        feature                         read  written
        version 2                       yes   yes
        version 3                       yes   yes
        clusters of 512 bytes to 2 MiB  yes   yes
        refcounts of 1 to 64 bits       yes   yes
        backing file                    yes   yes      the parent is only read
        clusters compressed by deflate  yes   yes      what is written is not compressed
        clusters compressed by zstd     yes   yes      the same; Python 3.14 or the package zstandard unpacks them
        internal snapshots              yes   yes      they are kept, but neither made nor looked at
        persistent bitmaps              yes   yes      writing makes them invalid, and a leak of their room
        lazy refcounts                  yes   yes      no use is made of them
        external data file              yes   yes      data_file= has to name it to be written
        raw external data file          yes   yes      the same; it stays a raw disk
        subclusters (extended L2)       yes   no       convert it, or make it the parent of another image
        dirty                           yes   no       its refcounts are out of date: qemu-img check -r all
        corrupt                         yes   no       xenbackend image check --repair
        encryption by AES               no    no       qemu-img convert decrypts it
        encryption by LUKS              no    no       the same
        unknown header extension        yes   yes      it stays
        unknown compatible feature      yes   yes      it stays
        unknown auto-clear feature      yes   yes      writing clears it, as the format demands
        unknown incompatible feature    no    no       the format forbids it
        size of no whole sectors        no    no       qemu-img resize makes it a multiple of 512

    The L2 tables that are in use take 256 MiB of memory for each TiB with clusters of 64 KiB, and 32 MiB at most, which
    is enough for 128 GiB at a time; the L1 table 16 KiB for each TiB, and 32 MiB at most; refcounts up to 16 MiB; what
    is known of parents up to 16 MiB.
    The file never becomes smaller. An image whose snapshots or bitmaps have tables of more than 64 MiB is only opened
    for reading.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

from xenbackend.block.driver import Env, File, Geometry
from xenbackend.block.extents import Extent
from xenbackend.block.formats import qcow2
from xenbackend.block.formats.qcow2_tables import ZERO as WORD_OF_ZEROS
from xenbackend.block.formats.qcow2_tables import Unpack, has_more_clusters, inflate, unpack_table
from xenbackend.block.formats.zstd import find_unzstd
from xenbackend.block.mapped.parents import DATA_FILE, act_key
from xenbackend.block.mapped.shared import Then
from xenbackend.block.mapped.tables import ZERO, Table, Tables
from xenbackend.block.options import FilePath, option
from xenbackend.block.qcow.codec import Version2
from xenbackend.block.qcow.datafile import find_data, in_place, open_data
from xenbackend.block.qcow.disk import TABLES, QcowDisk
from xenbackend.block.qcow.occupied import occupied_by
from xenbackend.block.qcow.refcounts import Refcounts
from xenbackend.block.qcow.subclusters import Subclusters
from xenbackend.block.request import Request
from xenbackend.errors import ConfigError, DriverError
from xenbackend.loop.steps import Steps, run
from xenbackend.units import format_size

_MOST_FREED = 8192  # clusters that wait for the guest's next flush; with more of them a discard flushes itself


class Qcow2(QcowDisk):
    """See the head of this file."""

    name = "qcow2"

    @dataclass(frozen=True, slots=True)
    class Options(QcowDisk.Options):
        """What the chain says of the image."""

        data_file: FilePath = option("the external data file; without it what the image names, to read", default="")

    options: Options
    allocator: Refcounts | None = None
    _subclusters: Subclusters | None = None
    _can_discard = False

    def open_image(self, env: Env, file: File) -> Geometry:
        """See `QcowDisk`."""
        header = self._header = qcow2.parse_header(file.read_at, file.size)
        env.report("format", f"QCOW2 version {header.version}, clusters of {format_size(header.cluster_size)}")
        if header.backing_file:
            self.parent = self.find_parent(header.backing_file, header.backing_format)
        if not env.read_only:
            _check_writable(header)
        data = self._open_data(env)
        try:
            return self._serve(env, file, data)
        except BaseException:
            if data is not None:
                data.close()
            raise

    def _open_data(self, env: Env) -> File | None:
        """Open the external data file, if there is one; it stands among the options from then on."""
        options, header = self.options, self._header
        if not header.has_data_file:
            if options.data_file:
                raise DriverError("its data are in the image itself, and data_file= names another file; leave that out")
            return None
        chosen, read_only = options.data_file, env.read_only
        files = env.files
        path, by = find_data(files, options.file, header.data_name, chosen, options.parents, read_only=read_only)
        data = open_data(env, path, header, direct=not options.cache)
        self.options = replace(options, data_file=path)
        env.report("data_file", f"{path}: {data.mode}")
        env.report(act_key(DATA_FILE), by)
        return data

    def identify(self) -> bytes:
        """See `Driver`."""
        if not self._says_where_its_data_are():
            problem = "only data_file= in its layer says where its data are, which its child's layer cannot"
            raise ConfigError(f"{problem}; let the image say it: qemu-img amend -f qcow2 -o data_file=FILE IMAGE")
        return super().identify()

    def _says_where_its_data_are(self) -> bool:
        """Return whether the image itself leads to its data, as `parents=` is now, and not only `data_file=`."""
        options, header = self.options, self._header
        if not header.has_data_file:
            return True
        try:
            files = self.env.files
            within = f"{options.parents}:{os.path.abspath(options.data_file)}"  # noqa: PTH100 - as `opening`: pathlib would alter it
            path, _ = find_data(files, options.file, header.data_name, "", within, read_only=True)
            return files.look(path).identity == files.look(options.data_file).identity
        except (OSError, DriverError):
            return False

    def _serve(self, env: Env, file: File, data: File | None) -> Geometry:
        header = self._header
        unpack = find_unzstd() if header.compression == "zstd" else inflate
        if header.has_subclusters:
            return self._serve_subclusters(file, data, unpack)
        self.serve(file, header.size, header.cluster_bits, header.l1, Version2(header), unpack, data)
        if env.read_only:
            return Geometry(size=header.size, read_only=True)
        words = file.read_at(header.refcount_table.offset, header.refcount_table.length)
        table = unpack_table(words + bytes(header.refcount_table.length - len(words)))
        occupied = occupied_by(file.read_at, file.size, header, self.l1_words(), table)
        self.serve_writes(Refcounts(self.io, header, table, occupied), in_place(header.cluster_bits) if data else None)
        if header.autoclear != header.kept_autoclear:
            file.write_at(*qcow2.autoclear_bytes(header.kept_autoclear))
            file.sync()
        granularity = header.cluster_size
        self._discarded = ZERO if self.parent else 0
        self._can_discard = not self.parent or header.version == 3
        if data:
            self._can_discard, granularity = data.can_discard, data.discard_granularity
        return Geometry(
            size=header.size,
            can_discard=self._can_discard,
            discard_granularity=granularity if self._can_discard else 0,
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

    def _serve_subclusters(self, file: File, data: File | None, unpack: Unpack) -> Geometry:
        header = self._header
        words = file.read_at(header.l1.offset, header.l1.length)
        l1 = unpack_table(words + bytes(header.l1.length - len(words)))
        bits, table_bits = header.subcluster_size.bit_length() - 1, Subclusters.table_bits
        tables: Tables[Table] = Tables(TABLES // (8 << table_bits))
        self.start(file, header.size, cluster_bits=bits, table_bits=table_bits, tables=tables, data=data)
        whole = partial(unpack, cluster_size=header.cluster_size)
        self._subclusters = Subclusters(self.io, header, l1, whole, tables)
        return Geometry(size=header.size, read_only=True)

    def _cluster_extents(self, size: int) -> Iterator[Extent]:
        return super()._cluster_extents(size) if self._subclusters is None else self._subclusters.extents(size)

    def load_table(self, number: int, then: Then) -> None:
        """See `MappedDisk`."""
        if self._subclusters is None:
            super().load_table(number, then)
        else:
            self._subclusters.load(number, then)

    def read_special(self, request: Request) -> None:
        """See `MappedDisk`."""
        if self._subclusters is None:
            super().read_special(request)
        else:
            self._subclusters.read_special(request)

    def flush(self, request: Request) -> None:
        """Make everything durable; then lower the refcounts of what was freed before."""
        allocator = self.allocator
        if allocator is None or not allocator.freed_count:
            super().flush(request)
        else:
            self.io.sync(partial(self._flushed, request, allocator, allocator.take_freed()))

    def discard(self, request: Request) -> None:
        """Free the clusters that lie in the range as a whole; of a data file, which stays as it is, make holes."""
        if not self._can_discard:
            self.io.finish(request, errno.EOPNOTSUPP)
        elif self._header.has_data_file:
            self.io.to_file(request, request.offset)
        else:
            run(self._discard(request.offset, request.length), lambda status, _: self.io.finish(request, status))

    def close(self) -> None:
        """Give back the clusters that were reserved and not used, and close the files."""
        try:
            if self.allocator is not None:
                self.allocator.close()
        finally:
            self.io.close()

    def _flushed(self, request: Request, allocator: Refcounts, freed: list[int], status: int) -> None:
        if status:
            allocator.keep_freed(freed)
            self.io.finish(request, status)
        else:
            allocator.lower(freed, lambda _: self.io.finish(request, 0))

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
                yield self.io.pause  # so that others have their turn
            first += count
        if self.allocator is not None and self.allocator.freed_count > _MOST_FREED:
            freed = self.allocator.take_freed()
            try:
                yield self.io.sync
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
    if header.has_subclusters:
        problem = "it has subclusters (extended L2 entries), and it can only be read"
        raise DriverError(f"{problem}; xenbackend image convert makes an image without, or use it as the parent of one")
    if header.has_data_file and header.snapshot_count:
        raise DriverError("it has snapshots, which would change with its data file, and it can only be read")
    if header.incompatible & qcow2.DIRTY:
        raise DriverError("its refcounts are out of date (dirty), and it can only be read; run qemu-img check -r all")
