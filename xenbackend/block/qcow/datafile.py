"""The external data file of a QCOW2 image: finds which file it is, and opens it.

Every cluster in it is at the same place as on the disk, so nothing in it is ever allocated, counted or moved.

Must not follow a name in the image other than by the rule for parents, and never for writing: whoever made the image
could name somebody else's disk, which is in the same directory.
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

_STEP = 512  # bytes: a file that ends inside a sector is extended by a hole


def find_data(files: Lookup, image: str, name: bytes, chosen: str, within: str, *, read_only: bool) -> tuple[str, str]:
    """Return the path of the data file, and which act of an administrator allowed it, as in `Found.by`.

    Args:
        files: finds the file that the image names, and compares files.
        image: the path of the image.
        name: the name in the image.
        chosen: the file that the operator names, which may be any; empty: none.
        within: where the operator says that a file that the image names may be (`parents=`).
        read_only: the file is only read, so the name in the image may suffice.

    Raises: DriverError, OSError.
    """
    if chosen:
        path, by = chosen, "data_file="
    elif not name:
        raise DriverError("its data are in another file, which it does not name; add data_file=FILE")
    else:
        said = os.fsdecode(name)
        if not is_file_name(said):
            raise DriverError(f"its data file {printable(said)!r} is not a file; add data_file=FILE")
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
    """Return the option that chooses a data file, escaped as in a layer's text."""
    return format_item(f"data_file={path}")


def unchosen(path: str, advice: str) -> str:
    """Return why a data file that only the image names is not written to, with `advice` on the option to use."""
    problem = f"its data file {printable(path)} is named only by the image, which is not enough for writing"
    return f"{problem}; if that file belongs to it, add {printable(advice)}"


def open_data(env: Env, path: str, header: Header, *, direct: bool) -> File:
    """Open a data file in the same mode as the image, with a lock of its own. Raises: DriverError, OSError.

    A successor refuses one that was cut off: less than a sector would be filled with zeros.
    """
    file = env.files.open(
        path, read_only=env.read_only, shareable=env.shareable, direct=direct, step=_STEP, lengths=env.lengths()
    )
    try:
        if not env.read_only:
            check_length(path, file.size, header.size)
    except BaseException:
        file.close()
        raise
    return file


def check_length(path: str, length: int, size: int) -> None:
    """Refuse a data file that is shorter than the disk: the rest of its data is lost, or was never there.

    Raises: DriverError.
    """
    if length < size:
        problem = f"its data file {printable(path)} has {format_size(length)}, and its disk {format_size(size)}"
        advice = f"find out why; or extend it with zeros: truncate -s {size} {printable(path)}"
        raise DriverError(f"{problem}; {advice}", path=path, errno=errno.ENODATA)


def in_place(cluster_bits: int) -> Callable[[int, int, Callable[[int, int, int, bool], None]], None]:
    """Return a `copyup.Reserve` for a data file, where the place of a cluster is that on the disk."""
    return lambda first, count, then: then(0, first << cluster_bits, count, False)
