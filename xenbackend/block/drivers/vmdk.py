r"""vmdk: a VMDK image of VMware that is one file, for reading; a parent comes by itself.

Synopsis:
    vmdk:FILE[,cache=on|off][,parents=DIR][,changed=refuse|accept]

Description:
    The source of a chain for disks of VMware Workstation (monolithicSparse) and of appliances, OVA files among them
    (streamOptimized, which is compressed). It can only be read: attach it read-only, or give a QCOW2 image this one as
    its parent, which takes what is written.

    A snapshot names its parent, which has to be such an image too.

Behaviour:
    Requests go to where the tables say that their grains are. A compressed grain is read and inflated as a whole, and
    the last one is kept, so that small reads in a row cost that once. What the image does not have is its parent's, if
    it has one, and else zeros.

    A parent must lie in the image's own directory, or in `parents=`; links are followed before that is checked. One
    whose content changed since the image was made is refused; `changed=accept` takes it as it is. The image is locked
    while it is open: any number of readers.

Example:
    vmdk:/srv/images/appliance-disk1.vmdk

Limits:
    Not supported, and refused: disks in several files, flat ones and those of ESXi among them, for which `qemu-img
    convert` makes one file. Tables take 128 MiB of memory for each TiB that is in use, and 16 MiB at most; the
    directory takes 128 KiB for each TiB.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from functools import partial
from typing import Literal

from xenbackend.block.driver import Env, File, Geometry, ParentRef
from xenbackend.block.formats import vmdk
from xenbackend.block.mapped.foreign import ForeignDisk
from xenbackend.block.mapped.inflated import Inflated
from xenbackend.block.mapped.parents import find_parent, parent_ref
from xenbackend.block.mapped.tables import PLACE
from xenbackend.block.options import FilePath, option
from xenbackend.block.request import Request
from xenbackend.errors import DriverError
from xenbackend.units import format_size

_SECTOR = 512


class Vmdk(ForeignDisk):
    """See the head of this file."""

    name = "vmdk"

    @dataclass(frozen=True, slots=True)
    class Options:
        """What the chain says of the image."""

        file: FilePath = option("the image file or block device", target=True)
        cache: bool = option("go through the host's page cache", default=False)
        parents: str = option("directory that the parents must be in; by default the image's own", default="")
        changed: Literal["refuse", "accept"] = option("a parent that was altered or exchanged", default="refuse")

    options: Options  # type: ignore[assignment]  # those of the base, and more
    image: vmdk.Image

    def parse(self, env: Env, file: File) -> vmdk.Image:
        """See `ForeignDisk`."""
        image = vmdk.parse(file.read_at, file.size)
        kind = "compressed grains" if image.is_compressed else "grains"
        env.report("format", f"VMDK, {kind} of {format_size(1 << image.shape.cluster_bits)}")
        if image.descriptor.parent_cid != vmdk.NO_PARENT:
            self.parent = self._find_parent(image.descriptor.parent)
        self._inflated = Inflated(self)
        return image

    def check_parent(self, parent: Geometry) -> None:
        """Refuse a parent that is not what it was when the image was made. Raises: DriverError."""
        super().check_parent(parent)
        expected = self.image.descriptor.parent_cid
        if self.options.changed == "refuse" and isinstance(self.next, Vmdk):
            found = self.next.image.descriptor.cid
            if found != expected:
                problem = f"its parent has the content ID {found:08x}, and this image was made for {expected:08x}"
                advice = "use the right one, or say changed=accept if you know that it holds what it did"
                raise DriverError(f"{problem}; {advice}", errno=errno.ESTALE)

    def read_special(self, request: Request) -> None:
        """Read from a compressed grain."""
        cluster = request.offset >> self.cluster_bits
        entry = self.entry(cluster)
        assert entry is not None  # noqa: S101 - it was just found
        sector = cluster << self.cluster_bits >> 9
        most = (1 << self.cluster_bits) + _SECTOR  # what does not become smaller becomes a little larger
        self._inflated.read(request, cluster, entry & PLACE, most, partial(self.image.inflate, sector))

    def _find_parent(self, hint: bytes) -> ParentRef:
        options = self.options
        name = os.fsdecode(hint).replace("\\", "/")
        path = find_parent(options.file, [name, name.rpartition("/")[2]], options.parents)
        cache = "on" if options.cache else ""
        changed = "" if options.changed == "refuse" else options.changed
        return parent_ref("vmdk", path, cache=cache, parents=options.parents, changed=changed)
