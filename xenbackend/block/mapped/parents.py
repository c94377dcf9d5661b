"""Finds the parent or another file that an image names, and describes a parent as a layer.

Must not open a file, nor decide where an image may lead to: an image is not trusted, and `env.files` has the rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from xenbackend.block.driver import Driver, ParentRef
from xenbackend.block.grammar import format_layer

PARENT, DATA_FILE, EXTENT = "parent", "data file", "extent"  # the kinds of files that an image names
_BETWEEN = re.compile(r":(?=/)")  # the separator of places in `parents=`
_PROTOCOL = re.compile(r"[A-Za-z0-9+.-]+:")


def is_file_name(name: str) -> bool:
    """Return whether QEMU takes a name in an image for a file name, and not for one with a protocol."""
    return _PROTOCOL.match(name) is None


def places_of(text: str) -> list[str]:
    """Return the places that `parents=` names, such as two for ``/img:/srv/base``."""
    return [each for each in _BETWEEN.split(text) if each]


def find_named(disk: Driver, what: str, names: Sequence[str]) -> str:
    """Return the path of the file that an image names, if it is allowed, and report what has allowed it.

    Args:
        disk: the image's; its options have the image's file, and `parents`, the places where such files may be.
        what: PARENT, DATA_FILE or EXTENT.
        names: the names in the image, relative to its directory, or absolute; the likeliest one first.

    Raises: DriverError if there is no such file, or if it is not allowed.
    """
    options = disk.options
    found = disk.env.files.find(what, options.file, names, options.parents)
    disk.env.report(act_key(what), found.by)
    return found.path


def act_key(what: str) -> str:
    """Return the key of the fact that says which act of an administrator allowed a file that an image names."""
    return f"{what.replace(' ', '_')}_by"


def parent_ref(driver: str, path: str, **options: str) -> ParentRef:
    """Return a parent as the text of a layer; options without a value are left out."""
    return ParentRef(format_layer(driver, path, *(f"{key}={value}" for key, value in options.items() if value)))
