"""The operations of an image format that commands use: get a disk's size, check, repair, grow, change the parent.

Must not know a format: each has its own subclass in `image/formats`, which is imported for an image of that format.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from xenbackend.block.formats.table import FORMATS, load
from xenbackend.image.faults import Faults

if TYPE_CHECKING:
    from xenbackend.block.driver import File
    from xenbackend.block.formats.blank import Blank, Parent
    from xenbackend.block.formats.common import Plan
    from xenbackend.image.facts import Facts
    from xenbackend.image.names import Image
    from xenbackend.image.session import Session


class Tools:
    """The tools for a format. The methods here are for a format that has nothing but the disk's bytes.

    `file` is the image's file, open and locked, for writing if the method writes.
    """

    def size(self, file: File) -> int:
        """Return the size of the disk in bytes. Raises: DriverError, OSError."""
        return file.size

    def facts(self, driver: Any, base: Facts) -> Facts:  # noqa: ARG002 - for subclasses
        """Return `base` with the facts that an open driver knows about its image. Raises: DriverError, OSError."""
        return base

    def refuse_unchosen_data(self, image: Image, file: File) -> None:
        """Refuse to write to an image whose data are in another file, unless its layer names that file.

        Raises: DriverError, OSError.
        """

    def check(self, session: Session, image: Image, file: File) -> Faults:  # noqa: ARG002 - as above
        """Return what is wrong. Raises: DriverError if it is not an image of the format; OSError."""
        return Faults()

    def plan_repair(self, image: Image, file: File) -> Plan:  # noqa: ARG002 - as above
        """Return a plan that repairs what can be repaired without risk. Raises: DriverError, OSError."""
        return []

    def check_growth(self, file: File) -> None:
        """Refuse an image that cannot grow, regardless of the new size. Raises: DriverError, OSError."""

    def grow_data(self, data: File, file: File, path: str, size: int) -> None:
        """Extend an external data file at `path` to the disk's new size. Raises: DriverError, OSError."""
        raise NotImplementedError

    def grow(self, file: File, size: int, *, on_device: bool) -> None:
        """Grow the disk to `size` bytes. Raises: ConfigError, DriverError, OSError."""
        raise NotImplementedError

    def measure(self, empty: Blank, cluster: int, used: int, most: int) -> tuple[int, int]:  # noqa: ARG002 - as above
        """Return the size of a file with `used` clusters of `cluster` bytes, and with `most`; `empty` has none."""
        return empty.size, empty.size

    def check_parent(self, image: Image, file: File, parent: Parent | None, *, is_unsafe: bool) -> None:
        """Refuse an impossible change of the parent before anything is written. Raises: ConfigError, DriverError."""
        raise NotImplementedError

    def name_parent(self, file: File, parent: Parent | None) -> None:
        """Name another parent; if the process is killed, the image has the former one or the new one.

        Raises: OSError.
        """
        raise NotImplementedError


def tools_of(image_format: str) -> Tools:
    """Return the tools for a format, which must be one of WRITTEN."""
    found: Tools = load(FORMATS[image_format].tools)()
    return found
