"""Raw images: the file is the disk.

Must not read the content of the file.
"""

from __future__ import annotations

from xenbackend.block.driver import File
from xenbackend.image.tools import Tools
from xenbackend.image.writing import no_room


class Raw(Tools):
    """See `Tools`."""

    def grow(self, file: File, size: int, *, on_device: bool) -> None:
        """See `Tools`."""
        if on_device:
            raise no_room(size, file.size)
        file.grow(size)
