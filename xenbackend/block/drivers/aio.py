r"""aio: a raw image file or block device; what is in the file is the disk.

Synopsis:
    aio:FILE[,cache=on|off]

Description:
    The source of most chains. Requests go to the kernel asynchronously, many at a time, and bypass the page cache
    where the file allows it (O_DIRECT); `xenbackend check` shows what was chosen as `mode`.

    The disk's sectors are the medium's: 512 bytes for a file, and what a block device says, which is 4096 for some
    ("4Kn"). The guest is also told what the medium writes at once (`physical-sector-size`): a device's own physical
    sector, or what the file system of a file demands of direct I/O.

    FILE is taken as it stands; write a backslash before `|`, `,` and `\` in it.

Behaviour:
    The image is locked while it is open: one writer, or any number of readers. A flush returns when everything that
    was written before is durable. A discard punches a hole into a file, or discards on a block device, where the
    host can; what was discarded from a file reads as zeros. Errors of the host reach the guest.

    A file that ends inside a sector is served read-only, with zeros up to the end of that sector. To write to it, make
    it whole first: `truncate -s %512 FILE`.

Example:
    log:|aio:/srv/images/guest.img

Limits:
    The size is that at opening. Image formats are not looked at: the header of a VHD or QCOW2 file is data here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

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
