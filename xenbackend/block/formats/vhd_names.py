r"""The names by which a differencing VHD image knows its parent.

Sources: "Virtual Hard Disk Image Format Specification", version 1.0, "Parent Locator Entry"; blktap's libvhd for what
writers really put there: names relative to the image under every code, ``.\base.vhd`` and ``file://./base.vhd``.
Must not look for the files, nor decide which of them may be opened.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from xenbackend.block.formats.common import Read
from xenbackend.block.formats.vhd import Header, Locator
from xenbackend.units import SECTOR

MAX_NAME = 8192  # bytes
_DRIVE = re.compile(r"[A-Za-z]:(?=/)")


def parent_names(read: Read, header: Header, file_size: int) -> list[str]:
    """Return the parent's names, the relative ones first, without unreadable ones. Raises: OSError."""
    names: list[str] = []
    for code in NAME_CODES:
        for locator in header.locators:
            if locator.code == code:
                names += names_in(read, locator, file_size)
    names += _readable(_windows(header.parent_name.decode("utf-16-be", "replace").encode("utf-16-le")))
    return sorted(dict.fromkeys(names), key=lambda name: name.startswith("/"))


def names_in(read: Read, locator: Locator, file_size: int) -> list[str]:
    """Return the names that one locator gives; none if its code is unknown, or if its content is not a name."""
    decode = _CODES.get(locator.code)
    return _readable(decode(_content(read, locator, file_size))) if decode else []


def space_of(locator: Locator) -> int:
    """Return the bytes reserved for a locator; libvhd and Windows write bytes instead of the specified sectors."""
    return locator.space * SECTOR if locator.space < SECTOR else locator.space


def _readable(names: list[str]) -> list[str]:
    return [name for name in names if name and "\0" not in name and "\ufffd" not in name]


def _content(read: Read, locator: Locator, file_size: int) -> bytes:
    if locator.length > min(MAX_NAME, space_of(locator)) or locator.offset + locator.length > file_size:
        return b""
    return read(locator.offset, locator.length)


def _windows(data: bytes) -> list[str]:
    r"""Convert a Windows path such as ``.\base.vhd`` to one of Unix."""
    name = data.decode("utf-16-le", "replace").rstrip("\0").replace("\\", "/")
    return [_DRIVE.sub("", name, count=1)]


def _url(data: bytes) -> list[str]:
    """Return the path of a URL, both literally (libvhd does not quote) and unquoted (RFC 2396)."""
    from urllib.parse import unquote  # late: most images have no parent

    url = data.decode("utf-8", "replace").rstrip("\0")
    if not url.startswith("file://"):
        return []
    path = url.removeprefix("file://").removeprefix("localhost")
    return [path, unquote(path)]


_CODES: dict[bytes, Callable[[bytes], list[str]]] = {b"W2ru": _windows, b"MacX": _url, b"W2ku": _windows}
NAME_CODES = tuple(_CODES)  # of locators that are read
OTHER_CODES = (b"Wi2r", b"Wi2k", b"Mac ")  # also in the specification; no program reads them any more
