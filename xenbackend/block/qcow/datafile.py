"""The external data file of a QCOW2 image: which file it may be, and opening it.

Every cluster in it is where it is on the disk, so that nothing in it is ever handed out, counted or moved.

Must not follow a name that the image gives but by the rule for parents, nor for writing at all: whoever made the image
could name the disk of somebody else there, which lies in the same directory.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable

from xenbackend.block.driver import Env, File, Lookup
from xenbackend.block.formats.qcow2 import Header
from xenbackend.block.grammar import format_item
from xenbackend.block.mapped.parents import DATA_FILE, is_file_name
from xenbackend.errors import DriverError, printable
from xenbackend.units import format_size

_STEP = 512  # bytes: it may end inside of a sector, and is made longer by a hole then


def find_data(files: Lookup, image: str, name: bytes, chosen: str, within: str, *, read_only: bool) -> tuple[str, str]:
    """Return the path of the data file, and by which act of an administrator it is that, as `Found.by`.

    Args:
        files: finds what the image names, and tells files apart.
        image: the path of the image.
        name: what the image says.
        chosen: what the operator says, who may name any file.
        within: where the operator says that a file that the image names may be.
        read_only: it is only read, for which what the image says may suffice.

    Raises: DriverError, OSError.
    """
    if chosen:
        path, by = chosen, "data_file="
    elif not name:
        raise DriverError("its data are in another file, and it does not say in which; say data_file=FILE")
    else:
        said = os.fsdecode(name)
        if not is_file_name(said):
            raise DriverError(f"its data file {printable(said)!r} is no file; say data_file=FILE")
        if not read_only:
            refuse_unchosen(image, name)
        found = files.find(DATA_FILE, image, [said], within)
        path, by = found.path, found.by
    if files.look(image).identity == files.look(path).identity:
        raise DriverError(f"its data file {printable(path)} is the image itself", path=path)
    return path, by


def refuse_unchosen(image: str, name: bytes) -> None:
    """Refuse to write to a data file that only the image names. Raises: DriverError."""
    beside = os.path.dirname(os.path.abspath(image))  # noqa: PTH100, PTH120 - as `opening`: pathlib would alter names
    path = os.path.normpath(os.path.join(beside, os.fsdecode(name)))  # noqa: PTH118 - the same
    raise DriverError(unchosen(path, data_item(path)), path=path, errno=errno.EACCES)


def data_item(path: str) -> str:
    """Return what a layer says to choose a data file, with whatever it needs escaped."""
    return format_item(f"data_file={path}")


def unchosen(path: str, advice: str) -> str:
    """Return why a data file is not written to that only the image names, and what to say instead."""
    problem = f"its data file {printable(path)} is named by the image alone, which does not suffice for writing"
    return f"{problem}; if that file belongs to it, say {printable(advice)}"


def open_data(env: Env, path: str, header: Header, *, direct: bool) -> File:
    """Open a data file as the image is opened, with a lock of its own. Raises: DriverError, OSError."""
    file = env.files.open(path, read_only=env.read_only, shareable=env.shareable, direct=direct, step=_STEP)
    try:
        if not env.read_only:
            check_length(path, file.size, header.size)
    except BaseException:
        file.close()
        raise
    return file


def check_length(path: str, length: int, size: int) -> None:
    """Refuse a data file that ends before the disk does: what was behind is lost, or was never there.

    Raises: DriverError.
    """
    if length < size:
        problem = f"its data file {printable(path)} has {format_size(length)}, and its disk {format_size(size)}"
        advice = f"look what became of it, or make it longer, by zeros: truncate -s {size} {printable(path)}"
        raise DriverError(f"{problem}; {advice}", path=path, errno=errno.ENODATA)


def in_place(cluster_bits: int) -> Callable[[int, int, Callable[[int, int, int, bool], None]], None]:
    """Return what finds room for clusters in a data file, as `copyup.Reserve`: where they are on the disk."""
    return lambda first, count, then: then(0, first << cluster_bits, count, False)
