"""The descriptor of a VMDK disk: the text that names the files of the disk, its parent and its content ID.

Sources: VMware, "Virtual Disk Format 5.0", "The Descriptor File"; for the extents of ESX (VMFS, VMFSSPARSE) QEMU,
``block/vmdk.c``. Must not open a file: whoever made the image chose the names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from xenbackend.block.formats.common import damaged
from xenbackend.errors import DriverError, printable
from xenbackend.units import SECTOR

NO_PARENT = 0xFFFFFFFF  # as a content ID
MAX_LENGTH = 1 << 20  # bytes
MAX_EXTENTS = 512  # files that a worker may have open for one disk: 1 TiB in pieces of 2 GiB
MAX_SIZE = 64 << 40  # bytes of a disk; VMware's limit is 62 TiB

FLAT, SPARSE, COWD, ZEROS = "FLAT", "SPARSE", "VMFSSPARSE", "ZERO"
_KINDS = {FLAT: FLAT, "VMFS": FLAT, SPARSE: SPARSE, COWD: COWD, ZEROS: ZEROS}  # by the word in the text
_REFUSED = {
    "SESPARSE": "is of ESXi's format SE sparse; make one file of the disk with qemu-img convert -f vmdk",
    "VMFSRDM": "is a raw device mapping, a device of an ESX host; clone the disk there with vmkfstools -i",
    "VMFSRAW": "is a device of an ESX host; clone the disk there with vmkfstools -i",
}
_BEGINS = re.compile(
    rb"\s*#[ \t]*disk[ \t]+descriptorfile|(?:[ \t]*(?:#[^\n]*)?\r?\n)*[ \t]*version[ \t]*=", re.IGNORECASE
)
_EXTENT = re.compile(
    rb"^[ \t]*(?P<access>RW|RDONLY|NOACCESS)[ \t]+(?P<sectors>\d{1,16})[ \t]+(?P<kind>\w+)"
    rb'(?:[ \t]+"(?P<name>[^"\r\n]*)"(?:[ \t]+(?P<offset>\d{1,16}))?)?[^\n]*$',
    re.MULTILINE,
)


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of the disk, and the file that holds it. Numbers are in bytes."""

    kind: str  # FLAT, SPARSE, COWD or ZEROS, or an unknown word of the text
    length: int
    name: bytes  # of the file; empty for zeros
    offset: int  # in the file, for a flat extent
    is_readable: bool = True

    def check(self) -> None:
        """Refuse an extent that cannot be read. Raises: DriverError."""
        name = printable(self.name.decode("utf-8", "replace"))
        if self.kind not in _KINDS.values():
            problem = _REFUSED.get(self.kind, f"is of the kind {printable(self.kind)}, which is not known")
            raise DriverError(f"its extent {name!r} {problem}")
        if not self.is_readable:
            raise DriverError(f"its extent {name!r} is marked NOACCESS: it may not be read")
        if not self.length or bool(self.name) == (self.kind == ZEROS):
            raise damaged(f"an extent of {self.length} bytes has the name {name!r}")


@dataclass(frozen=True, slots=True)
class Descriptor:
    """The content of the text. `extents` are in the order of the disk, and not checked yet."""

    cid: int  # content ID, which changes with the content
    parent_cid: int
    parent: bytes  # the name of its file
    create_type: str = ""  # "monolithicFlat"
    extents: tuple[Extent, ...] = ()

    @property
    def size(self) -> int:
        """The disk's size in bytes."""
        return sum(each.length for each in self.extents)


def is_descriptor(start: bytes) -> bool:
    """Return whether a file that begins like this is a descriptor."""
    return _BEGINS.match(start) is not None


def parse(text: bytes) -> Descriptor:
    """Parse a descriptor, up to its first NUL. Raises: DriverError if it is inconsistent."""
    text = text.partition(b"\0")[0]
    values = {}
    for line in text.splitlines():
        key, _, value = line.partition(b"=")
        values[key.strip().lower()] = value.strip().strip(b'"')
    try:
        cid, parent_cid = (int(values.get(key, b"ffffffff"), 16) for key in (b"cid", b"parentcid"))
    except ValueError:
        raise damaged("a content ID in its descriptor is not a number") from None
    extents = tuple(_extent(match) for match in _EXTENT.finditer(text))
    create_type = values.get(b"createtype", b"").decode("ascii", "replace")
    return Descriptor(cid, parent_cid, values.get(b"parentfilenamehint", b""), create_type, extents)


def _extent(match: re.Match[bytes]) -> Extent:
    kind = match["kind"].decode("ascii", "replace").upper()
    return Extent(
        _KINDS.get(kind, kind),
        int(match["sectors"]) * SECTOR,
        match["name"] or b"",
        int(match["offset"] or 0) * SECTOR,
        is_readable=match["access"] != b"NOACCESS",
    )
