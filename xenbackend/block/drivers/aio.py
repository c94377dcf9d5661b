r"""aio: a raw image file or block device, whose content is the disk.

Synopsis:
    aio:FILE[,cache=on|off][,sector=512|1024|2048|4096][,share=on|off]

Description:
    The source of most chains. Requests go to the kernel asynchronously, many at a time, and bypass the page cache
    if the file allows it (O_DIRECT); `xenbackend check` shows the choice as `mode`.

    The disk has the sectors of its medium: 512 bytes for a file; for a block device what the device reports, which
    is 4096 for some ("4Kn"). The guest is also told the unit in which the medium writes (`physical-sector-size`): a
    device's physical sector, or the alignment that a file's file system demands of direct I/O. Use `sector=512` for a
    guest that supports no other sectors, and for a disk that was copied from a medium with sectors of 512 bytes: a
    partition table counts in sectors, and is not understood if they have another size. `sector=4096` is for the
    opposite case.

    FILE is taken literally, except that `|`, `,` and `\` need a backslash before them.

Behaviour:
    The image is locked while it is open: one writer, or any number of readers. QEMU's tools see that lock, and theirs
    is respected: neither side can write while anybody else uses the image. As with QEMU's own disks, `qemu-img info
    -U` and similar commands do read an image that is being written, and readers of a raw image (`qemu-img convert -f
    raw`) take no lock: what they read may be a half-finished change.

    A block device is also refused while the host uses it: while it is mounted, used for swap, below LVM, device mapper
    or md, opened through another device node, served to another guest by the kernel's own backend, or used through one
    of its partitions or through the disk of which it is a partition. While it is served for writing, the host cannot
    use it in any of these ways; only the kernel's backend does not check. A file is refused while a loop device over
    it, or a partition of such a device, is used, and either of them while the file is used. The refusal names the user
    if that is known. A reader is never refused a medium that nobody can write to, such as an ISO image that is mounted.

    With `share=on` the image is opened although the host uses it, and together with others that share it; so it is
    with the mode `w!`, which is for a whole disk, and `image convert --overwrite` accepts `share=on` in the layer, too.
    A lock that somebody else holds against writers is still respected. Two writers destroy a disk unless they know of
    each other, as the nodes of a cluster file system do; two writers of an image with tables, such as QCOW2, always
    destroy it.

    A flush returns when everything that was written before is durable. A discard punches a hole into a file, or
    discards on a block device, if the host can do that; what was discarded in a file reads as zeros. The host's errors
    reach the guest.

    If the disk's sectors are smaller than those of the medium, a write to a part of a medium's sector reads the whole
    sector and writes it back. It runs alone: requests in flight finish first, and new ones wait. So writes to the same
    sector do not undo one another, but they are slow; guests that align to `physical-sector-size`, as most do, hardly
    ever need them. If the power fails during such a write, the other sectors of the same 4096 bytes are at risk, too,
    although the guest did not write to them, unless the device writes all 4096 bytes or none; drives that emulate
    sectors of 512 bytes ("512e") are no different. A discard on a device leaves out what does not fill a whole sector
    of the device.

    A file that ends inside a sector is served read-only, with zeros up to the end of that sector. To write to it, make
    the last sector whole first: `truncate -s %512 FILE`, with the disk's sector instead of 512 if that is larger.

Example:
    log:|aio:/srv/images/guest.img
    aio:/dev/nvme1n1,sector=512

Limits:
    The size is determined when the disk is opened. Image formats are not recognised: the header of a VHD or QCOW2 file
    is data here.
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
    """Opens a `File`, and then gets out of the way: the layer above calls the file directly."""

    name = "aio"
    blocking: ClassVar[bool] = False

    @dataclass(frozen=True, slots=True)
    class Options:
        """The options of `aio:` and `sync:`."""

        file: FilePath = option("the image file or block device", target=True)
        cache: bool = option("go through the host's page cache", default=False)
        sector: Literal["medium", "512", "1024", "2048", "4096"] = option(
            "bytes of a sector of the disk; by default the medium's", default="medium"
        )

        share: bool = option("others may write to it at the same time", default=False)

    options: Options
    _file: File | None = None

    @property
    def complete(self) -> Complete:
        """The function that finished requests are given to; the file calls it directly."""
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
            lengths=env.lengths() if env.read_only else None,  # the size of a writable disk is compared anyway
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
        """See `Driver`. The file's holes are zeros."""
        assert self._file is not None  # noqa: S101 - only open layers are asked
        return of_file(self._file, size)

    def submit(self, batch: list[Request]) -> None:
        """Raise RuntimeError, since the file is not open; `open` replaces this method by the file's own `submit`."""
        raise RuntimeError(f"submitted before the file was open: {batch!r}")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None
