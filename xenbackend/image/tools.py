"""What commands ask of an image's format: how large its disk is, whether it is sound, to grow, to get another parent.

Must not know a format: each has its own subclass in `image/formats`, which is imported when an image of it is there.
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
    """The tools for a format; as they stand, those for one that has nothing but the disk's bytes.

    `file` is the image's, open and locked: for writing where it is written to.
    """

    def size(self, file: File) -> int:
        """Return the bytes of the disk. Raises: DriverError, OSError."""
        return file.size

    def facts(self, driver: Any, base: Facts) -> Facts:  # noqa: ARG002 - of the formats that have more to say
        """Return what an open driver knows of its image, given what anybody can see. Raises: DriverError, OSError."""
        return base

    def refuse_unchosen_data(self, image: Image, file: File) -> None:
        """Refuse to write to an image whose data are in another file, where its layer does not say in which.

        Raises: DriverError, OSError.
        """

    def check(self, session: Session, image: Image, file: File) -> Faults:  # noqa: ARG002 - as above
        """Return what is wrong. Raises: DriverError, where it is no image of the format; OSError."""
        return Faults()

    def plan_repair(self, image: Image, file: File) -> Plan:  # noqa: ARG002 - as above
        """Return what mends what can be mended without risk. Raises: DriverError, OSError."""
        return []

    def check_growth(self, file: File) -> None:
        """Refuse an image that cannot grow whatever its size. Raises: DriverError, OSError."""

    def grow_data(self, data: File, file: File, path: str, size: int) -> None:
        """Make an external data file at `path` as long as the disk will be. Raises: DriverError, OSError."""
        raise NotImplementedError

    def grow(self, file: File, size: int, *, on_device: bool) -> None:
        """Make the disk larger. Raises: ConfigError, DriverError, OSError."""
        raise NotImplementedError

    def measure(self, empty: Blank, cluster: int, used: int, most: int) -> tuple[int, int]:  # noqa: ARG002 - as above
        """Return the bytes of a file with `used` clusters of `cluster` bytes, and with `most`; `empty` has none."""
        return empty.size, empty.size

    def check_parent(self, image: Image, file: File, parent: Parent | None, *, is_unsafe: bool) -> None:
        """Refuse another parent, or none, before anything is written. Raises: ConfigError, DriverError."""
        raise NotImplementedError

    def name_parent(self, file: File, parent: Parent | None) -> None:
        """Name another parent, so that whoever is killed leaves the former one or the new one. Raises: OSError."""
        raise NotImplementedError


def tools_of(image_format: str) -> Tools:
    """Return the tools for a format that is written."""
    found: Tools = load(FORMATS[image_format].tools)()
    return found
