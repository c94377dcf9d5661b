r"""vmdk: a VMDK disk of VMware, in one or several files or in an OVA, read-only; its parent is opened automatically.

Synopsis:
    vmdk:FILE[,cache=on|off][,share=on|off][,parents=PLACES][,changed=refuse|accept][,disk=NAME]

Description:
    The source of a chain for disks of VMware Workstation, of ESX, and of appliances. It can only be read: attach it
    read-only, or make it the parent of a QCOW2 image, which takes the writes.

    FILE is one of three: a disk in one file (monolithicSparse, or streamOptimized, which is compressed); the
    descriptor, a small text file beside a disk in several files (monolithicFlat, twoGbMaxExtentFlat,
    twoGbMaxExtentSparse, and of ESX vmfs and vmfsSparse); or an OVA, an appliance in one archive, whose disk is read in
    place, without unpacking. If an OVA has several disks, `disk=` gives the file name of one of them.

    A snapshot names its parent, which has to be a VMDK disk, too.

Behaviour:
    Requests go to the places where the image's tables say that their grains are. A compressed grain is read and
    inflated as a whole, and the last one is kept, so that sequential small reads do that only once. Data that the image
    does not have are read from its parent, or are zeros if it has none.

    A parent, and each file that a descriptor names, is opened only if an administrator has allowed it: by a mark on the
    image, which `image trust` leaves; by `parents=`; or by `parents` in the settings. The latter two name directories
    below which such files may be, or the file itself; `parents=` takes several, separated by colons. A descriptor
    cannot name a device. A parent whose content changed after the image was made is refused; `changed=accept` accepts
    it as it is. All files are locked while the disk is open: any number of readers.

Example:
    vmdk:/srv/images/appliance-disk1.vmdk
    vmdk:/srv/images/disk-in-parts.vmdk,parents=/srv/images
    vmdk:/srv/images/appliance.ova,disk=appliance-disk2.vmdk

Limits:
    Refused with an explanation: SE sparse extents of ESXi, which `qemu-img convert` turns into one file; raw device
    mappings; disks in an OVA that are additionally compressed by gzip, or split into chunks. Up to 512 extents. All
    sparse extents of a disk must have grains of the same size. Tables take 128 MiB of memory for each TiB that is in
    use, and 16 MiB at most; the directory takes 128 KiB for each TiB.
"""

from __future__ import annotations

import errno
import os
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from xenbackend.block.driver import Env, File, Geometry, ParentRef
from xenbackend.block.extents import Extent, with_holes
from xenbackend.block.formats import ova, vmdk, vmdk_descriptor
from xenbackend.block.formats.common import damaged
from xenbackend.block.formats.vmdk_descriptor import COWD, FLAT, ZEROS, Descriptor
from xenbackend.block.formats.vmdk_descriptor import Extent as ExtentFile
from xenbackend.block.formats.vmdk_disk import Disk, Piece
from xenbackend.block.mapped.disk import ChangedOptions
from xenbackend.block.mapped.foreign import ForeignDisk
from xenbackend.block.mapped.inflated import Inflated
from xenbackend.block.mapped.joined import Joined
from xenbackend.block.mapped.parents import EXTENT, PARENT, find_named, parent_ref
from xenbackend.block.mapped.shared import Then
from xenbackend.block.mapped.tables import PLACE
from xenbackend.block.options import option
from xenbackend.block.request import Request
from xenbackend.errors import DriverError, printable
from xenbackend.units import SECTOR, format_size, round_up


class Vmdk(ForeignDisk):
    """See the head of this file."""

    name = "vmdk"

    @dataclass(frozen=True, slots=True)
    class Options(ChangedOptions):
        """The options of `vmdk:`."""

        disk: str = option("which disk of an OVA: the name of its file in the archive", default="")

    options: Options
    image: Disk  # type: ignore[assignment]  # the entries of one table may be in several places

    def parse(self, env: Env, file: File) -> Disk:  # type: ignore[override]  # see `image`
        """See `ForeignDisk`."""
        start = file.read_at(0, vmdk_descriptor.MAX_LENGTH if file.size <= vmdk_descriptor.MAX_LENGTH else 1024)
        if vmdk_descriptor.is_descriptor(start):
            disk = self._join(vmdk_descriptor.parse(start), file)
        else:
            disk = self._parse_one(file, start)
        if self.options.disk and not ova.is_archive(start):
            raise DriverError("it is not an OVA, and has no disks to choose from; leave disk= out")
        kind = f"{printable(disk.descriptor.create_type)}, " if disk.descriptor.create_type else ""
        env.report("format", f"VMDK, {kind}{_grains(disk)}")
        if disk.descriptor.parent_cid != vmdk_descriptor.NO_PARENT:
            self.parent = self._find_parent(disk.descriptor.parent)
        return disk

    def open_image(self, env: Env, file: File) -> Geometry:
        """See `MappedDisk`."""
        geometry = super().open_image(env, file)
        self._inflated = Inflated(self.io, self.cluster_bits)
        return geometry

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:
        """See `Driver`. In a flat extent, what the file has is data, and its holes are shown."""
        for found in self.table_extents(size):
            is_flat = self.image.piece_at(found.start).image is None
            for each in with_holes([found], self.file) if all_holes or is_flat else [found]:
                place = each.place
                if place is not None and isinstance(self.file, Joined):
                    place = self.file.place_in_file(place)
                yield replace(each, place=place)

    def read_table(self, number: int) -> array[int]:
        """See `ForeignDisk`."""
        needs = self.image.needs(number)
        return self.image.table(number, [self.file.read_at(each.place, each.length) for each in needs])

    def load_table(self, number: int, then: Then) -> None:
        """See `MappedDisk`."""
        needs = self.image.needs(number)
        left = Gathering(len(needs), partial(self._build, number, then))
        for place, need in enumerate(needs):
            first = need.place // SECTOR * SECTOR
            length = round_up(need.place + need.length, SECTOR) - first
            self.io.read_meta(first, length, partial(left.put, place, need.place - first, need.length))
        if not needs:
            self.io.soon(partial(self._build, number, then, 0, []))

    def check_parent(self, parent: Geometry) -> None:
        """Refuse a parent whose content changed after the image was made. Raises: DriverError."""
        super().check_parent(parent)
        expected = self.image.descriptor.parent_cid
        if self.options.changed == "refuse" and isinstance(self.next, Vmdk):
            found = self.next.image.descriptor.cid
            if found != expected:
                problem = f"its parent has the content ID {found:08x}, and this image was made for {expected:08x}"
                advice = "use the right parent, or add changed=accept if you are certain that its content is the same"
                raise DriverError(f"{problem}; {advice}", errno=errno.ESTALE)

    def read_special(self, request: Request) -> None:
        """Read from a compressed grain."""
        cluster = request.offset >> self.cluster_bits
        entry = self.entry(cluster)
        piece = self.image.piece_at(request.offset)
        assert entry is not None  # noqa: S101 - it was just found
        assert piece.image is not None  # noqa: S101 - only sparse images have SPECIAL entries
        sector = (cluster << self.cluster_bits) - piece.start >> 9
        most = (1 << self.cluster_bits) + SECTOR  # data that cannot be compressed become a little larger
        self._inflated.read(request, cluster, entry & PLACE, most, partial(piece.image.inflate, sector))

    def _parse_one(self, file: File, start: bytes) -> Disk:
        """Return the disk in one file, or in one member of an archive."""
        if ova.is_archive(start):
            member = ova.find_disk(file.read_at, file.size, self.options.disk)
            joined = self.file = Joined()
            joined.add(file, member.offset, member.length)
            file = joined
        image = vmdk.parse(file.read_at, file.size)
        return Disk([Piece(0, image.shape.size, 0, image)], image.descriptor)

    def _join(self, descriptor: Descriptor, file: File) -> Disk:
        """Return the disk in the files that a descriptor names."""
        if not 0 < len(descriptor.extents) <= vmdk_descriptor.MAX_EXTENTS:
            most = vmdk_descriptor.MAX_EXTENTS
            raise damaged(f"its descriptor names {len(descriptor.extents)} extents and not 1 to {most}")
        if descriptor.size > vmdk_descriptor.MAX_SIZE:
            raise damaged(f"its descriptor is of a disk of {descriptor.size} bytes")
        for extent in descriptor.extents:
            extent.check()
        joined = self.file = Joined()
        joined.add(file, 0, file.size)
        pieces: list[Piece] = []
        for extent in descriptor.extents:
            start = pieces[-1].start + pieces[-1].length if pieces else 0
            pieces.append(self._piece(joined, extent, start))
            directories = sum(4 * len(each.image.directory) for each in pieces if each.image is not None)
            if directories > vmdk.MAX_DIRECTORY:
                raise damaged(f"its extents have directories of more than {vmdk.MAX_DIRECTORY} bytes")
        return Disk(pieces, descriptor)

    def _piece(self, joined: Joined, extent: ExtentFile, start: int) -> Piece:
        if extent.kind == ZEROS:
            return Piece(start, extent.length, 0, is_zeros=True)
        path = find_named(self, EXTENT, _names(extent.name))
        file = self.open_file(self.env, path)
        base = joined.add(file, 0, file.size)
        try:
            return self._piece_of(file, extent, start, base)
        except DriverError as error:
            raise DriverError(f"its extent {printable(path)}: {error.problem}", path=path, errno=error.errno) from error

    def _piece_of(self, file: File, extent: ExtentFile, start: int, base: int) -> Piece:
        if extent.kind == FLAT:
            if extent.offset + extent.length > file.size:
                raise damaged(f"it has {file.size} bytes, and {extent.length} from byte {extent.offset} on are wanted")
            return Piece(start, extent.length, base + extent.offset)
        if extent.kind == COWD:
            return Piece(start, extent.length, base, vmdk.parse_cowd(file.read_at, file.size))
        return Piece(start, extent.length, base, vmdk.parse(file.read_at, file.size, is_part=True))

    def _build(self, number: int, then: Then, status: int, data: Sequence[bytes]) -> None:
        if not status:
            try:
                self.tables.put(number, self.image.table(number, data))
            except DriverError:
                status = errno.EIO
        then(status)

    def _find_parent(self, hint: bytes) -> ParentRef:
        options = self.options
        path = find_named(self, PARENT, _names(hint))
        cache = "on" if options.cache else ""
        changed = "" if options.changed == "refuse" else options.changed
        return parent_ref("vmdk", path, cache=cache, parents=options.parents, changed=changed)


class Gathering:
    """Several reads under way at a time. When all have ended, `then` gets the first error or 0, and their data."""

    def __init__(self, count: int, then: Callable[[int, Sequence[bytes]], None]) -> None:
        self._left = count
        self._then = then
        self._status = 0
        self._data = [b""] * count

    def put(self, number: int, skip: int, length: int, status: int, data: memoryview) -> None:
        """Take the result of read number `number`: `length` bytes of `data`, after the first `skip`."""
        self._data[number] = bytes(data[skip : skip + length])
        self._status = self._status or status
        self._left -= 1
        if not self._left:
            self._then(self._status, self._data)


def _names(name: bytes) -> list[str]:
    """Return the names to try for a file: the one in the image, and its last part, for a file beside the image."""
    path = os.fsdecode(name).replace("\\", "/")
    return list(dict.fromkeys([path, path.rpartition("/")[2]]))


def _grains(disk: Disk) -> str:
    if all(each.image is None for each in disk.pieces):
        return "flat"
    kind = "compressed grains" if disk.is_compressed else "grains"
    return f"{kind} of {format_size(1 << disk.shape.cluster_bits)}"
