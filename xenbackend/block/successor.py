"""Whether one chain can take another one's place below a running guest: does it have what the guest has written?

Must not open a file. What decides is which file a name means now, and not the name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Hashable, Sequence

from xenbackend.block.opening import OpenLayer
from xenbackend.block.options import files_of


def keeps_content(former: Sequence[OpenLayer], new: Sequence[OpenLayer]) -> bool:
    """Return whether `new`, layers of an open chain, top first, has the source that `former` writes to.

    Its source is the same one, or has it as a parent at any depth. One without files, such as ``ram:``, is the same if
    its text is. Whether an image in between is empty nobody can tell: a snapshot's is.

    Raises: OSError, where a file of `former` cannot be looked at.
    """
    source = _source(former)
    files = {_identity(path) for path in files_of(source.driver.options).values()}
    if not files:
        return _source(new).text == source.text
    below = [each for each in new if not each.driver.is_filter]
    return files <= {_identity(path) for each in below for path in files_of(each.driver.options).values()}


def _source(layers: Sequence[OpenLayer]) -> OpenLayer:
    return next(each for each in layers if not each.driver.is_filter)


def _identity(path: str) -> Hashable:
    """Return what tells a file or device from any other, whatever it is called."""
    status = os.stat(path)  # noqa: PTH116 - pathlib would alter the name
    if stat.S_ISBLK(status.st_mode):
        return "device", status.st_rdev
    return status.st_dev, status.st_ino
