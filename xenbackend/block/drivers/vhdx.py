r"""vhdx: a VHDX image of Hyper-V, read-only.

Synopsis:
    vhdx:FILE[,cache=on|off][,share=on|off]

Description:
    The source of a chain for disks of Hyper-V's newer format, dynamic or fixed, with sectors of 512 or 4096 bytes. It
    can only be read: attach it read-only, or make it the parent of a QCOW2 image, which takes the writes.

Behaviour:
    Requests go to the places where the image's table says that their blocks are; blocks that the image does not have
    are zeros. The checksums of headers are verified. The guest is told the physical sector size in the image. The image
    is locked while it is open: any number of readers.

    If the host crashed, or the image was copied while it was in use, the image's log has changes that are not in their
    places yet. The log is replayed in memory, as Hyper-V and QEMU would replay it in the file; `xenbackend check`
    reports that as `log`. Nothing is written to the file: whoever opens it next finds it unchanged. What had not
    reached the log is lost, as after a power failure. An image is refused if no entry of its log is complete, or if the
    file is shorter than the log says.

Example:
    vhdx:/srv/images/windows.vhdx

Limits:
    No differencing images. The table takes 8 MiB of memory for each TiB that is used where blocks have 1 MiB, less
    where they are larger, and 16 MiB at most. A log of more than 64 MiB, or with more than 65,536 changes, is refused.
"""

from __future__ import annotations

from xenbackend.block.driver import Env, File
from xenbackend.block.formats import vhdx
from xenbackend.block.mapped.changed import ChangedFile
from xenbackend.block.mapped.foreign import ForeignDisk
from xenbackend.units import format_size


class Vhdx(ForeignDisk):
    """See the head of this file."""

    name = "vhdx"
    is_preallocated = True  # it may be: nothing in the image says

    def parse(self, env: Env, file: File) -> vhdx.Image:
        """See `ForeignDisk`."""
        image = vhdx.parse(file.read_at, file.size)
        env.report("format", f"VHDX, blocks of {format_size(1 << image.shape.cluster_bits)}")
        if image.log is not None:
            self.file = ChangedFile(file, image.log.changes, image.log.size)
            env.report("log", f"not empty; ranges of the file replayed in memory: {len(image.log.changes)}")
        return image
