r"""aio: a raw image file or block device; what is in the file is the disk.

Synopsis:
    aio:FILE[,cache=on|off][,sector=512|1024|2048|4096][,share=on|off]

Description:
    The source of most chains. Requests go to the kernel asynchronously, many at a time, and bypass the page cache
    where the file allows it (O_DIRECT); `xenbackend check` shows what was chosen as `mode`.

    The disk's sectors are the medium's: 512 bytes for a file, and what a block device says, which is 4096 for some
    ("4Kn"). The guest is also told what the medium writes at once (`physical-sector-size`): a device's own physical
    sector, or what the file system of a file demands of direct I/O. `sector=512` is for guests that can do with no
    other sectors, and for disks that were copied from a medium with sectors of 512 bytes: a partition table counts in
    sectors, and is not understood where they have another size. `sector=4096` is for the opposite.

    FILE is taken as it stands; write a backslash before `|`, `,` and `\` in it.

Behaviour:
    The image is locked while it is open: one writer, or any number of readers. QEMU's tools see that lock, and theirs
    is respected: who writes is refused beside any other user, on both sides. As with QEMU's own disks, `qemu-img info
    -U` and its like read an image that is written to, and of a raw one its readers (`qemu-img convert -f raw`) do not
    ask: what they see may be half of a change.

    A block device is refused, too, while the host uses it: mounted, swapped to, below LVM, device mapper or md, by
    another node, by the kernel's own backend for another guest, or by way of a partition of it or the disk that it is
    a partition of. While it is served for writing, the host cannot use it so; only that backend does not ask. A file
    is refused while a loop device over it is used, and a loop device while its file is. The refusal names the user
    where it can. Nothing is refused for a reader of what cannot be written to, such as an ISO image that is mounted.

    `share=on` is for who means it, as the mode `w!` is for a whole disk, and `image convert --overwrite` takes it in
    the layer, too: the image is opened although the host uses it, and beside others that share it. Others that have
    locked it against writers are still respected. Two writers of one disk destroy what is on it, unless both know of
    each other, as a cluster file system does; two of an image with tables, such as QCOW2, do so always.

    A flush returns when everything that was written before is durable. A discard punches a hole into a file, or
    discards on a block device, where the host can; what was discarded from a file reads as zeros. Errors of the host
    reach the guest.

    Where the disk's sectors are smaller than the medium's own, a write of a part of one of those reads all of it and
    writes it back. It does so alone: what is in flight ends first, and what comes meanwhile waits. So writes that
    meet there do not undo one another, but they are slow; guests that align to `physical-sector-size`, as most do,
    have hardly any. If the power fails during such a write, the other sectors of the same 4096 bytes are at risk,
    too, though the guest did not write to them just then, unless the device writes all 4096 or nothing; drives that
    emulate sectors of 512 bytes ("512e") are no different. Of a discard on a device, what fills no whole sector of
    its own is left as it is.

    A file that ends inside a sector is served read-only, with zeros up to the end of that sector. To write to it, make
    it whole first: `truncate -s %512 FILE`, with the disk's sector instead of 512 where that is larger.

Example:
    log:|aio:/srv/images/guest.img
    aio:/dev/nvme1n1,sector=512

Limits:
    The size is that at opening. Image formats are not looked at: the header of a VHD or QCOW2 file is data here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from xenbackend.block.driver import Complete, Driver, Env, File, Geometry
from xenbackend.block.extents import Extent, of_file
from xenbackend.block.options import FilePath, option
from xenbackend.block.request import Request


class Aio(Driver):
    """Forwards to the worker's file, and gets out of the way: the layer above calls the file itself."""

    name = "aio"
    blocking: ClassVar[bool] = False

    @dataclass(frozen=True, slots=True)
    class Options:
        """What the chain says of the file."""

        file: FilePath = option("the image file or block device", target=True)
        cache: bool = option("go through the host's page cache", default=False)
        sector: Literal["medium", "512", "1024", "2048", "4096"] = option(
            "bytes of a sector of the disk; by default as large as the medium's", default="medium"
        )

        share: bool = option("others may write to it at the same time", default=False)

    options: Options
    _file: File | None = None

    @property
    def complete(self) -> Complete:
        """Where finished requests go; the file gives them there directly."""
        return self._complete

    @complete.setter
    def complete(self, complete: Complete) -> None:
        self._complete = complete
        if self._file is not None:
            self._file.complete = complete

    def open(self, env: Env) -> Geometry:
        """Open the file."""
        file = env.files.open(
            self.options.file,
            read_only=env.read_only,
            shareable=env.shareable,
            direct=not self.options.cache,
            blocking=self.blocking,
            sector_size=0 if self.options.sector == "medium" else int(self.options.sector),
        )
        file.complete = self._complete
        self._file = file
        self.submit = file.submit  # type: ignore[method-assign]  # one call less
        env.report("mode", file.mode)
        return Geometry(
            size=file.size,
            sector_size=file.sector_size,
            read_only=env.read_only,
            can_discard=file.can_discard,
            discard_granularity=file.discard_granularity,
            physical_sector_size=file.physical_sector_size,
        )

    def extents(self, size: int, *, all_holes: bool = False) -> Iterator[Extent]:  # noqa: ARG002 - it shows them always
        """See `Driver`: the file's holes are zeros."""
        assert self._file is not None  # noqa: S101 - only open layers are asked
        return of_file(self._file, size)

    def submit(self, batch: list[Request]) -> None:
        """Say that the file is not open; `open` puts the file's own `submit` in this place."""
        raise RuntimeError(f"submitted before the file was open: {batch!r}")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
