"""Which file an image may mean by its parent's name, and how that parent is written as a layer.

Must not open the file. An image is not to be trusted: whoever made it may have named any file of the host as its
parent, to read it as a disk. So a parent has to lie in the image's own directory, or where the operator says.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from xenbackend.block.driver import ParentRef
from xenbackend.block.grammar import format_layer
from xenbackend.errors import DriverError, printable


def find_parent(image: str, names: Sequence[str], within: str = "") -> str:
    """Return the path of the first name that exists.

    Args:
        image: the path of the image that names its parent.
        names: what it says, relative to its own directory, or absolute.
        within: the directory that the parent has to be in, at any depth and with all links followed; without it that
            of the image.

    Raises: DriverError, where there is none, or the first that exists is somewhere else.
    """
    beside = os.path.dirname(os.path.abspath(image))  # noqa: PTH100, PTH120 - as `opening`: pathlib would alter names
    for name in names:
        path = os.path.normpath(os.path.join(beside, name))  # noqa: PTH118 - the same
        if os.path.exists(path):  # noqa: PTH110 - the same
            _check_within(path, within or beside)
            return path
    said = ", ".join(printable(repr(name)) for name in names) or "nothing that is a name"
    raise DriverError(
        f"its parent is not there: it says {said}; put the parent beside the image, or give the image its new name",
        path=image,
        errno=errno.ENOENT,
    )


def parent_ref(driver: str, path: str, **options: str) -> ParentRef:
    """Return the parent as a layer; options without a value are left out."""
    return ParentRef(format_layer(driver, path, *(f"{key}={value}" for key, value in options.items() if value)))


def _check_within(path: str, directory: str) -> None:
    real, root = Path(path).resolve(), Path(directory).resolve()
    if not real.is_relative_to(root):
        problem = f"its parent {printable(path)} is {real}, outside of {root}; if that is right, say parents=DIRECTORY"
        raise DriverError(problem, path=path, errno=errno.EACCES)
