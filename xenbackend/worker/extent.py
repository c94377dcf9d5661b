"""How much there is of an open file, and what another program has cut off since it was opened.

Must not read or write the file, nor know its name.

What was cut off stays lost until the file is closed, even if it becomes longer again: it held data that were answered.
The kernel offers only to look, so this is missed: a file that was cut off and made as long again between two looks, and
one that was cut off between the look and the write after it, which makes it grow again. On NFS a change by another host
counts from when our kernel knows of it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING

from xenbackend.kernel import blockdev
from xenbackend.kernel.blockdev import Medium

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor


class Extent:
    """How much there is of one file; a block device is always there.

    Args:
        fd: of the file, open as long as this is used.
        medium: what it is.
        reactor: the worker's loop.

    end       bytes from here up to the image's size are not there, and read as zeros
    is_short  another program has made the file shorter
    on_short  is called about that once, in the loop, with the bytes that the file had and those it has; None: nothing
              that is lost there is missed
    """

    def __init__(self, fd: int, medium: Medium, reactor: Reactor) -> None:
        self.end = medium.end
        self.is_short = False
        self.on_short: Callable[[int, int], None] | None = None
        self._kept = medium.end  # if it is short: bytes that it has not lost
        self._owes_error = False  # the next flush fails, as data that were answered are lost
        self._lock = Lock()  # of what `_note` sets; requests on a healthy file never take it
        self._fd = fd
        self._measure = None if medium.is_device else blockdev.measure(fd)
        self._reactor = reactor

    def look(self, size: int) -> int:
        """Return up to which byte a write is inside an image of `size` bytes. For the loop only.

        If the file cannot be measured, nothing is noted: the request itself gets the error.
        """
        if self._measure is not None:
            had = self.end  # before we measure: another thread may make the file longer, and call `grown`, meanwhile
            try:
                found = self._measure()
            except OSError:
                found = had
            if found < had:
                self._note(found)
        return self._kept if self.is_short else size

    def check(self, end: int) -> None:
        """Check that the file has not lost anything before byte `end`. For any thread. Raises: OSError."""
        if self._measure is not None:
            had = self.end  # as in `look`
            if (found := blockdev.size_of(self._fd)) < had:
                self._note(found)
            if end > (self._kept if self.is_short else self.end):
                raise shorter()

    def check_read(self, end: int) -> None:
        """Check that nothing before byte `end` is known to be lost. Raises: OSError."""
        if self.is_short and end > self._kept:
            raise shorter()

    def grown(self, size: int) -> None:
        """Note that we have made the file longer, which must have happened by now. For any thread."""
        self.end = size

    def flushed(self) -> None:
        """Note that all was flushed that is there. Raises: OSError, once after something was lost."""
        if self._owes_error:
            self._owes_error = False
            raise shorter()

    def _note(self, size: int) -> None:
        """Note that the file was shorter than what it had when we began to measure it."""
        with self._lock:
            if self.is_short:
                self._kept = min(self._kept, size)
                return
            self._kept = size
            self.is_short = self._owes_error = True
        if self.on_short is not None:
            self._reactor.call_soon_threadsafe(partial(self.on_short, self.end, size))


def shorter() -> OSError:
    """Return the error of a request for what is lost."""
    return OSError(errno.EIO, "the image has become shorter")
