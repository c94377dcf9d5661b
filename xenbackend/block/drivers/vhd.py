r"""vhd: a VHD image: fixed, dynamic or differencing; its parent is opened automatically.

Synopsis:
    vhd:FILE[,cache=on|off][,share=on|off][,parents=PLACES][,changed=refuse|accept]

Description:
    The source of a chain for images of XenServer, blktap, Hyper-V, Virtual PC and QEMU (`vpc`). Data that the image
    does not have are read from its parent, or are zeros if it has none; writes go to the image.

    A differencing image names its parent. That is also opened, for reading: by `aio:` if the image says that its parent
    is a raw one, else by `vhd:`; and so are the parent's own parents.

Behaviour:
    Requests for blocks that the image already has go to the file as they are. The first write to a block (2 MiB as
    a rule) lengthens the file. In images with a parent, and on block devices, the first write to a sector also
    writes the block's bitmap, before it is answered. A kill in the middle wastes at most some room in the file, and
    there is always a valid footer at its end. A flush returns when everything that was answered is durable.

    An image whose its blocks overlap, or anything else in the image, is refused. One whose table or map of full
    blocks overlaps something is read, but not written to. A new block is never put over the place where the image
    says that a name of its parent is: instead nothing is written, and the disk waits until `xenbackend image check
    --repair` has repaired the image.

    A discard punches holes into the file, if the host's file system can do that: data of the image become zeros, and
    take no room on the host. No block is freed, so neither the file nor a copy of it that is not sparse becomes
    shorter. Data that come from a parent are not discarded.

    A parent is looked for by its relative name, seen from the image, first, and then by its absolute name. It is opened
    only if an administrator has allowed it: by a mark on the image, which `image create --parent`, `image snapshot`,
    `image rebase`, `snapshot` and `image trust` leave, and which names that one file; by `parents=`; or by `parents` in
    the settings. The latter two name directories below which a parent may be, or the parent itself; a device has to be
    named itself. `parents=` takes several, separated by colons.

    A parent is refused if its UUID is not the one in the image. It is also refused if it was modified after the image
    was made, provided that the image records that time, which blktap and XenServer do not do. `changed=accept` accepts
    the parent as it is.

    The image is locked while it is open: one writer, or any number of readers.

Example:
    log:|vhd:/srv/images/guest.vhd
    vhd:/dev/VG_XenStorage-1/VHD-3,parents=/dev/VG_XenStorage-1/VHD-2:/dev/VG_XenStorage-1/VHD-1

Limits:
    New disks can have up to 2040 GiB, in blocks of up to 2 MiB, since other programs do not read larger ones. Older
    ones of ours, up to 2 TiB, are served, but there is no room for writes to their last blocks. Up to 2 million blocks.
    No encryption, no split images, no images written by Virtual PC before 2004; no discard on block devices. The table
    takes 4 MiB of memory for each TiB, the bitmaps up to 16 MiB for each image, and information about a parent as much
    again. A block device has to be large enough for everything that will be written.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator

from xenbackend.block.driver import Env, File, Geometry, ParentRef
from xenbackend.block.extents import Extent, Kind, with_holes
from xenbackend.block.formats import vhd, vhd_tables
from xenbackend.block.formats.vhd_names import parent_names
from xenbackend.block.formats.vhd_places import Place, overlaps, places_of, ranges_of
from xenbackend.block.mapped.blocks import Blocks
from xenbackend.block.mapped.disk import ChangedOptions
from xenbackend.block.mapped.parents import PARENT, find_named, parent_ref
from xenbackend.block.mapped.tables import OWNED
from xenbackend.block.request import Request
from xenbackend.errors import DriverError
from xenbackend.units import PAGE, SECTOR, round_up

_RAW = bytes(16)  # the UUID of a parent that is no VHD image (libvhd)
_TOLERANCE = 2  # seconds: file systems round times to this


class Vhd(Blocks):
    """See the head of this file."""

    name = "vhd"

    Options = ChangedOptions
    options: ChangedOptions
    _batmap: vhd_tables.Batmap | None = None

    def open_image(self, env: Env, file: File) -> Geometry:
        """Read and check the headers and the table; find the parent's file."""
        footer, is_at_end = vhd.read_footer(file.read_at, file.size)
        self.footer = footer
        env.report("format", vhd.title_of(footer))
        if footer.type == vhd.FIXED:
            return self._open_fixed(env, file)
        self._open_dynamic(env, file, is_at_end=is_at_end)
        granularity = file.discard_granularity if self.can_discard else 0
        return Geometry(footer.size, 512, env.read_only, can_discard=self.can_discard, discard_granularity=granularity)

    def _open_fixed(self, env: Env, file: File) -> Geometry:
        size = self.footer.size
        if size > file.size - SECTOR:
            raise vhd.damaged(f"the file has {file.size} bytes, too few for its disk of {size}")
        file.complete = self._pass_up
        self.submit = file.submit  # type: ignore[method-assign]  # the file begins with the disk
        return Geometry(
            size, 512, env.read_only, can_discard=file.can_discard, discard_granularity=file.discard_granularity,
            physical_sector_size=file.physical_sector_size,
        )  # fmt: skip

    def _pass_up(self, batch: list[Request]) -> None:
        self.complete(batch)

    def _open_dynamic(self, env: Env, file: File, *, is_at_end: bool) -> None:
        footer = self.footer
        header = self.header = vhd.read_header(file.read_at, footer, file.size)
        table = vhd_tables.read_table(file.read_at, footer, header)
        batmap = vhd_tables.read_batmap(file.read_at, footer, header, table)
        places = places_of(footer, header, batmap)
        room = file.size - SECTOR if is_at_end else file.size
        end = vhd_tables.check_table(table, header, ranges_of(places), room)
        if not env.read_only:
            _check_apart([*places, Place("the footer at the end", room, file.size)])
        on_device = env.files.look(self.options.file).is_device
        if on_device and end > room:
            raise vhd.damaged("a block reaches beyond the end of the device")
        packed = vhd.pack_footer(footer)
        if not (env.read_only or on_device) and (end > room or not is_at_end):
            self._complete_end(max(end, file.size), packed)
        if footer.type == vhd.DIFFERENCING:
            self.parent = self._find_parent()
        full = batmap.blocks if batmap else bytes(len(table))
        self._batmap = None if env.read_only else batmap
        taken = [*ranges_of(places), *vhd_tables.batmap_ranges(file.read_at, footer, header)]
        device_end = max([end, *(stop for _, stop in taken if stop <= room)]) if on_device else 0
        self.serve(file, footer.size, header, table, full, packed, taken, device_end)

    def _complete_end(self, end: int, footer: bytes) -> None:
        """Complete what a killed writer left undone: the end of the file's last block, and a footer after it."""
        self.file.grow(round_up(end + SECTOR, PAGE), footer)

    def _find_parent(self) -> ParentRef:
        options = self.options
        names = parent_names(self.file.read_at, self.header, self.file.size)
        self._parent_path = find_named(self, PARENT, names)
        cache = "on" if options.cache else ""
        if self.header.parent_uuid == _RAW:
            return parent_ref("aio", self._parent_path, cache=cache)
        changed = "" if options.changed == "refuse" else options.changed
        return parent_ref("vhd", self._parent_path, cache=cache, parents=options.parents, changed=changed)

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:
        """See `Driver`."""
        if self.footer.type == vhd.FIXED:
            return with_holes([Extent(0, size, Kind.DATA, 0)], self.file)
        return super().extents(size, all_holes=all_holes)

    def check_parent(self, parent: Geometry) -> None:
        """Refuse a parent that is not the one the image was made for. Raises: DriverError."""
        super().check_parent(parent)
        if self.options.changed == "accept":
            return
        problem = ""
        if isinstance(self.next, Vhd) and self.next.footer.uuid != self.header.parent_uuid:
            problem = "has another UUID than the one this image was made for"
        elif self._was_altered():
            problem = "was changed after this image was made"
        if problem:
            advice = "use the right parent, or add changed=accept if you are certain that its content is the same"
            raise DriverError(f"its parent {self._parent_path} {problem}; {advice}", errno=errno.ESTALE)

    def _was_altered(self) -> bool:
        """Return whether the parent's file has another time than the image records; False for images of blktap."""
        known = self.header.parent_timestamp
        if not known or self.footer.creator[:3] == b"tap":
            return False
        changed_s = self.env.files.look(self._parent_path).mtime_ns / 1e9
        return abs(changed_s - vhd.EPOCH - known) > _TOLERANCE

    def close(self) -> None:
        """Update the image's map of full blocks, if it has one, and close the file."""
        try:
            if self._batmap is not None:
                self._write_batmap(self._batmap)
        finally:
            self.file.close()

    def identify(self) -> bytes:
        """See `Driver`."""
        return self.footer.uuid

    def _write_batmap(self, batmap: vhd_tables.Batmap) -> None:
        blocks = bytes(entry & OWNED == OWNED for entry in self.entries)
        if blocks == batmap.blocks:
            return
        header, bits = vhd_tables.pack_batmap(batmap, blocks)
        self.file.sync()  # first the bitmaps that it describes
        self.file.write_at(batmap.offset, bits)
        self.file.write_at(batmap.header_offset, header)


def _check_apart(places: list[Place]) -> None:
    """Refuse writing if a place that changes in service overlaps another one. Raises: DriverError."""
    for one, other in overlaps(places):
        if one.changes or other.changes:
            raise vhd.damaged(f"{one.what} and {other.what} overlap, so it can only be opened read-only")
