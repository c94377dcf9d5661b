"""Whether a chain has the data that a guest has written, so that it can replace another one below the running guest.

Must not open a file. Files are compared by identity, and not by name.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from xenbackend.block.driver import Filter
from xenbackend.block.formats.table import format_of
from xenbackend.block.opening import OpenLayer
from xenbackend.block.options import files_of


def keeps_content(former: Sequence[OpenLayer], new: Sequence[OpenLayer]) -> bool:
    """Return whether `new` has the source that `former` writes to; both are layers of open chains, top first.

    The source of `new` has to be the same one, of the same format, or have it as a parent at any depth. A source
    without files, such as ``ram:``, is compared by its `content` or its text. Whether images in between are empty, as a
    snapshot's new one is, is not checked.

    Raises: OSError, DriverError if a file cannot be looked at.
    """
    source = next(each for each in former if not each.driver.is_filter)
    return _disk_of(source) in [_disk_of(each) for each in new if not each.driver.is_filter]


def shows_the_same(former: Sequence[OpenLayer], new: Sequence[OpenLayer]) -> bool:
    """Return whether both chains have the same non-transparent filters, such as `partition:`, in the same order.

    Raises: OSError, DriverError if a file cannot be looked at.
    """
    return _views_of(former) == _views_of(new)


def _views_of(layers: Sequence[OpenLayer]) -> list[Hashable]:
    filters = [each for each in layers if isinstance(each.driver, Filter) and not each.driver.is_transparent]
    return [(each.driver.name, _files_of(each) or each.text) for each in filters]


def _disk_of(layer: OpenLayer) -> Hashable:
    """Return a value that identifies the disk of a source, independently of its text."""
    driver, options = layer.driver.name, layer.driver.options
    files = _files_of(layer)
    if not files:
        return layer.driver.content() or layer.text
    return format_of(driver) or driver, files, getattr(options, "disk", "")  # of an archive with several


def _files_of(layer: OpenLayer) -> frozenset[str]:
    return frozenset(layer.driver.env.files.look(path).identity for path in files_of(layer.driver.options).values())
