"""What an image says of its parent, or of another file: asks for the file that it means; how a parent is a layer.

Must not open a file, nor decide where an image may lead to: it is not to be trusted, and `env.files` has the rule.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from xenbackend.block.driver import Driver, ParentRef
from xenbackend.block.grammar import format_layer

PARENT, DATA_FILE, EXTENT = "parent", "data file", "extent"  # what an image names
_BETWEEN = re.compile(r":(?=/)")  # two places in `parents=`
_PROTOCOL = re.compile(r"[A-Za-z0-9+.-]+:")


def is_file_name(name: str) -> bool:
    """Return whether QEMU would take a name in an image for that of a file, and not for a protocol's."""
    return _PROTOCOL.match(name) is None


def places_of(text: str) -> list[str]:
    """Return the places that `parents=` names: ``/img:/srv/base`` are two."""
    return [each for each in _BETWEEN.split(text) if each]


def find_named(disk: Driver, what: str, names: Sequence[str]) -> str:
    """Return the path of the file that a disk's image names, if it may be followed there, and report by what act.

    Args:
        disk: its options have the image's file, and what the chain says of where such files may be.
        what: PARENT, DATA_FILE or EXTENT.
        names: what the image says, relative to its own directory, or absolute.

    Raises: DriverError, where there is no such file, or nobody has allowed that.
    """
    options = disk.options
    found = disk.env.files.find(what, options.file, names, options.parents)
    disk.env.report(act_key(what), found.by)
    return found.path


def act_key(what: str) -> str:
    """Return the name of the fact by which act of an administrator a file was found that an image names."""
    return f"{what.replace(' ', '_')}_by"


def parent_ref(driver: str, path: str, **options: str) -> ParentRef:
    """Return the parent as a layer; options without a value are left out."""
    return ParentRef(format_layer(driver, path, *(f"{key}={value}" for key, value in options.items() if value)))
