"""Whether a chain has what a guest has written, so that it can take another one's place below the running guest.

Must not open a file. What decides is which file a name means now, and not the name.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from xenbackend.block.formats.table import format_of
from xenbackend.block.opening import OpenLayer
from xenbackend.block.options import files_of


def keeps_content(former: Sequence[OpenLayer], new: Sequence[OpenLayer]) -> bool:
    """Return whether `new`, layers of an open chain, top first, has the source that `former` writes to.

    Its source is the same one, of the same format, or has it as a parent at any depth. One without files, such as
    ``ram:``, is the same if its text is. Whether an image in between is empty nobody can tell: a snapshot's is.

    Raises: OSError, DriverError, where a file cannot be looked at.
    """
    source = next(each for each in former if not each.driver.is_filter)
    return _disk_of(source) in [_disk_of(each) for each in new if not each.driver.is_filter]


def _disk_of(layer: OpenLayer) -> Hashable:
    """Return what tells the disk of a source from any other, however it is written."""
    driver, options = layer.driver.name, layer.driver.options
    files = frozenset(layer.driver.env.files.look(path).identity for path in files_of(options).values())
    if not files:
        return layer.driver.content() or layer.text
    return format_of(driver) or driver, files, getattr(options, "disk", "")  # of an archive with several
