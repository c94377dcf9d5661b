r"""vdi: a VDI image of VirtualBox, read-only.

Synopsis:
    vdi:FILE[,cache=on|off][,share=on|off]

Description:
    The source of a chain for disks of VirtualBox, dynamic or fixed. It can only be read: attach it read-only, or make
    it the parent of a QCOW2 image, which takes the writes.

Behaviour:
    Requests go to the places where the image's map says that their blocks are; blocks that the image does not have are
    zeros. The image is locked while it is open: any number of readers.

Example:
    vdi:/srv/images/appliance.vdi

Limits:
    No differencing images, which VirtualBox uses for snapshots: they name their parent by a UUID, and not by a file.
    The map takes 8 MiB of memory for each TiB that is used, and 16 MiB at most.
"""

from __future__ import annotations

from xenbackend.block.driver import Env, File
from xenbackend.block.formats import vdi
from xenbackend.block.mapped.foreign import ForeignDisk
from xenbackend.units import format_size


class Vdi(ForeignDisk):
    """See the head of this file."""

    name = "vdi"

    def parse(self, env: Env, file: File) -> vdi.Image:
        """See `ForeignDisk`."""
        image = vdi.parse(file.read_at, file.size)
        self.is_preallocated = image.kind == "fixed"
        env.report("format", f"VDI, {image.kind}, blocks of {format_size(1 << image.shape.cluster_bits)}")
        return image
