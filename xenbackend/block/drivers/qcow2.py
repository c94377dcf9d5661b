r"""qcow2: an image of QEMU's format QCOW2; its parent (backing file) is opened automatically.

Synopsis:
    qcow2:FILE[,cache=on|off][,share=on|off][,parents=PLACES][,parent_format=FORMAT][,data_file=FILE]

Description:
    The source of a chain for QCOW2 images of versions 2 and 3, as made by `qemu-img`; "Limits" says for each feature
    whether it can be read and written. Data that the image does not have are read from its parent, or are zeros if
    it has none; writes go to the image.

    The parent is also opened, for reading, in the format that the image names (`raw` by `aio:`, `vpc` by `vhd:`, and
    `qcow`, `qcow2`, `vmdk`, `vhdx` and `vdi` by the drivers of these names), and so are the parent's own parents. If
    the image does not name the format, `parent_format=` must: the format is never guessed, since anybody who can write
    to a raw disk could make it look like an image of any format.

    An image may keep its data in a file beside it, the external data file. That is opened, too, in the same mode as the
    image; each cluster is at the same place in it as on the disk. To write to the disk, `data_file=` has to name that
    file: an image alone does not decide which file is written to.

Behaviour:
    Requests for clusters that only the image's active state uses go to the file as they are. The first write to any
    other cluster puts it in a new place, with its old content around the new data; then the table that refers to it is
    written, and the write is answered after that. Clusters that are compressed, or shared with a snapshot in the image,
    are not modified by that. Refcounts are raised before a cluster is used, and lowered after a flush. A kill in the
    middle leaves an image without errors; it leaks at most 16 MiB and what was freed since the last flush, which
    `qemu-img check` reports and reclaims. A flush returns when everything that was answered is durable.

    A discard frees whole clusters for reuse. In an image of version 3 that has a parent they become zeros; in one of
    version 2 that has a parent nothing can be discarded.

    An image that is marked as corrupt, or as dirty (QEMU was killed while it used lazy refcounts), can be opened for
    reading only; `qemu-img check -r all` repairs a dirty one. Lazy refcounts may be enabled, but are not used here.
    A cluster that holds a table of the image is never overwritten, even if the image's refcount says that it is
    free: nothing is written, an image of version 3 is marked as corrupt, and the disk waits until `xenbackend image
    check --repair` has repaired the image. If a cluster with data is wrongly counted as free, only `image check`
    notices: use it on an image that comes from a host that crashed. An image whose tables overlap can be opened for
    reading only.

    Reserved bits in an image's tables are ignored, as by QEMU; `image check` reports them.

    Opening the image for writing makes its persistent dirty bitmaps invalid, as the format demands.

    A parent is opened only if an administrator has allowed it: by a mark on the image, which `image create --parent`,
    `image snapshot`, `image rebase`, `snapshot` and `image trust` leave, and which names that one file; by `parents=`;
    or by `parents` in the settings. The latter two name directories below which a parent may be, or the parent itself;
    a device has to be named itself. `parents=` takes several, separated by colons. A copy of an image does not have the
    mark (unless it was made by `cp -a` or `rsync -X`, as root): `xenbackend image trust qcow2:FILE` makes one. The
    image is locked while it is open: one writer, or any number of readers.

    An external data file that only the image names has to be allowed in the same way, and must not be a device. It is
    read (for a read-only disk, for a parent, by `image convert`) and never written to: whoever made the image could
    have named another guest's disk. `data_file=` may name any file, also a device; the name in the image is then
    ignored.
    The commands that change an image (`image resize`, `rebase`, `check --repair`) need `data_file=` in its layer;
    `image commit` into such an image takes `--into qcow2:FILE,data_file=FILE`. The data file of a parent is the one
    that the parent itself names.

    A relative name in an image is relative to the image; QEMU takes it as relative to its own working directory, so an
    absolute path is better. The data file has a lock of its own. A cluster is durable in it before the image refers to
    it, and a flush flushes the data file, then the image. A discard punches holes into the data file. If the data file
    is shorter than the disk, or the image has snapshots, the image can only be read.

Example:
    log:|qcow2:/srv/images/guest.qcow2
    qcow2:/srv/guests/a.qcow2,parents=/srv
    qcow2:/srv/guests/b.qcow2,data_file=/dev/vg/b

Limits:
    Features of an image:

        feature                         read  written
        version 2                       yes   yes
        version 3                       yes   yes
        clusters of 512 bytes to 2 MiB  yes   yes
        refcounts of 1 to 64 bits       yes   yes
        backing file                    yes   yes      the parent is read only
        clusters compressed by deflate  yes   yes      writes are not compressed
        clusters compressed by zstd     yes   yes      the same; needs Python 3.14 or the package zstandard
        internal snapshots              yes   yes      they are kept, but neither made nor shown
        persistent bitmaps              yes   yes      writing makes them invalid, and leaks their room
        lazy refcounts                  yes   yes      they are not used
        external data file              yes   yes      to be written, data_file= has to name it
        raw external data file          yes   yes      the same; it stays a raw disk
        subclusters (extended L2)       yes   no       convert it, or make it the parent of another image
        dirty                           yes   no       its refcounts are out of date: qemu-img check -r all
        corrupt                         yes   no       xenbackend image check --repair
        encryption by AES               no    no       qemu-img convert decrypts it
        encryption by LUKS              no    no       the same
        unknown header extension        yes   yes      it is kept
        unknown compatible feature      yes   yes      it is kept
        unknown auto-clear feature      yes   yes      writing clears it, as the format demands
        unknown incompatible feature    no    no       the format forbids it
        size not in whole sectors       no    no       qemu-img resize makes it a multiple of 512

    L2 tables in use take 256 MiB of memory for each TiB with clusters of 64 KiB, and 32 MiB at most, which
    is enough for 128 GiB at a time; the L1 table takes 16 KiB for each TiB, and 32 MiB at most; refcounts take up to
    16 MiB, and information about parents up to 16 MiB.
    The file never shrinks. An image whose snapshots or bitmaps have tables of more than 64 MiB can be opened for
    reading only.
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

_MOST_FREED = 8192  # freed clusters that may wait for the guest's next flush; beyond that a discard flushes itself


class Qcow2(QcowDisk):
    """See the head of this file."""

    name = "qcow2"

    @dataclass(frozen=True, slots=True)
    class Options(QcowDisk.Options):
        """The options of `qcow2:`."""

        data_file: FilePath = option(
            "the external data file; without this option, the file that the image names, only for reading", default=""
        )

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
        """Open the external data file, if there is one, and put its path into `self.options`."""
        options, header = self.options, self._header
        if not header.has_data_file:
            if options.data_file:
                raise DriverError(
                    "its data are in the image itself, but data_file= names another file; leave data_file= out"
                )
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
            problem = "only data_file= in its own layer says where its data are, and a child's layer cannot give that"
            raise ConfigError(
                f"{problem}; let the image name the file: qemu-img amend -f qcow2 -o data_file=FILE IMAGE"
            )
        return super().identify()

    def _says_where_its_data_are(self) -> bool:
        """Return whether the name in the image leads to the data file that is open, with `parents=` as it is now."""
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
        """See `QcowDisk`. As QEMU: true if over a tenth more clusters are in use than the host has allocated."""
        file, header = self.file, self._header
        most = file.allocated >> header.cluster_bits
        most = max(most * 10 // 9, most + 2)
        try:
            return has_more_clusters(file.read_at, header, -(-file.size >> header.cluster_bits), most)
        except DriverError:  # damaged refcounts must not keep `extents` from an answer
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
        """Make everything durable; then lower the refcounts of the clusters that were freed before the flush."""
        allocator = self.allocator
        if allocator is None or not allocator.freed_count:
            super().flush(request)
        else:
            self.io.sync(partial(self._flushed, request, allocator, allocator.take_freed()))

    def discard(self, request: Request) -> None:
        """Free the clusters that are completely in the range; with a data file, punch a hole into that instead."""
        if not self._can_discard:
            self.io.finish(request, errno.EOPNOTSUPP)
        elif self._header.has_data_file:
            self.io.to_file(request, request.offset)
        else:
            run(self._discard(request.offset, request.length), lambda status, _: self.io.finish(request, status))

    def close(self) -> None:
        """Free the clusters that were reserved and not used, and close the files."""
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
                yield self.io.pause  # let other requests have their turn
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
            "it is marked as corrupt, and can only be opened read-only; repair it with: xenbackend image check --repair"
        )
    if header.has_subclusters:
        problem = "it has subclusters (extended L2 entries), and can only be opened read-only"
        raise DriverError(
            f"{problem}; xenbackend image convert makes an image without them, or use it as the parent of a new image"
        )
    if header.has_data_file and header.snapshot_count:
        raise DriverError("it has snapshots, which would change with its data file, so it can only be opened read-only")
    if header.incompatible & qcow2.DIRTY:
        raise DriverError(
            "its refcounts are out of date (dirty), so it can only be opened read-only; run qemu-img check -r all"
        )
