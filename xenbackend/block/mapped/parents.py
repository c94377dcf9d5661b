"""Which file an image may mean by its parent's name, or another's that it names, and how a parent is a layer.

Must not open the file. An image is not to be trusted: whoever made it may have named any file of the host as its
parent, to read it as a disk. So what it names has to lie in the image's own directory, or where the operator says.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence

from xenbackend.block.driver import Lookup, ParentRef
from xenbackend.block.grammar import format_layer
from xenbackend.errors import DriverError, printable

PARENT, DATA_FILE, EXTENT = "parent", "data file", "extent"  # what an image names
_OR = {  # what else can be done where it is not there
    PARENT: ", or name it anew by xenbackend image rebase --unsafe",
    DATA_FILE: ", or say data_file=FILE",
}
_PROTOCOL = re.compile(r"[A-Za-z0-9+.-]+:")


def is_file_name(name: str) -> bool:
    """Return whether QEMU would take a name in an image for that of a file, and not for a protocol's."""
    return _PROTOCOL.match(name) is None


def find_parent(files: Lookup, image: str, names: Sequence[str], within: str = "") -> str:
    """Return the path of the first name of a parent that exists; as `find_named`."""
    return files.find(PARENT, image, names, within)


def find_named(what: str, image: str, names: Sequence[str], within: str = "") -> str:
    """Return the path of the first name that exists.

    Args:
        what: PARENT, DATA_FILE or EXTENT.
        image: the path of the image that names it.
        names: what it says, relative to its own directory, or absolute.
        within: the directory that it has to be in, at any depth and with all links followed; without it that
            of the image.

    Raises: DriverError, where there is none, or the first that exists is somewhere else.
    """
    beside = _directory_of(image)
    for path in paths_of(image, names):
        if os.path.exists(path):  # noqa: PTH110 - the same
            _check_within(what, path, within or beside)
            return path
    said = ", ".join(printable(repr(name)) for name in names) or "nothing that is a name"
    problem = f"its {what} is not there: it says {said}; put the {what} beside the image{_OR.get(what, '')}"
    raise DriverError(problem, path=image, errno=errno.ENOENT)


def paths_of(image: str, names: Sequence[str]) -> list[str]:
    """Return the paths that an image's names stand for, whether there is something or not."""
    return [os.path.normpath(os.path.join(_directory_of(image), name)) for name in names]  # noqa: PTH118 - as below


def parent_ref(driver: str, path: str, **options: str) -> ParentRef:
    """Return the parent as a layer; options without a value are left out."""
    return ParentRef(format_layer(driver, path, *(f"{key}={value}" for key, value in options.items() if value)))


def _directory_of(image: str) -> str:
    return os.path.dirname(os.path.abspath(image))  # noqa: PTH100, PTH120 - as `opening`: pathlib would alter names


def _check_within(what: str, path: str, directory: str) -> None:
    real, root = os.path.realpath(path), os.path.realpath(directory)
    if os.path.commonpath([real, root]) != root:
        advice = "data_file=FILE" if what == DATA_FILE else "parents=DIRECTORY"
        problem = f"its {what} {printable(path)} is {real}, outside of {root}; if that is right, say {advice}"
        raise DriverError(problem, path=path, errno=errno.EACCES)
