"""Keeps the open files of a chain that is being closed until the next chain has taken them over.

Must not open a file, nor keep one longer than an exchange lasts.

What is kept is a copy of each descriptor: the open file description stays, and with it the locks and the claim. So
nobody else gets the image between two chains of one disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from xenbackend.kernel import blockdev
from xenbackend.kernel.identity import from_text, has_grown
from xenbackend.kernel.locks import Access
from xenbackend.worker.image import Image


class Spares:
    """The files of one worker: those that are open, and those that are kept during an exchange."""

    def __init__(self) -> None:
        self._open: list[tuple[Image, str, Access]] = []  # with the file's identity, as `Facts` has it
        self._kept: dict[str, tuple[int, Access]] = {}  # by identity

    def note(self, image: Image, identity: str, access: Access) -> Image:
        """Take note of an open image, and return it."""
        self._open = [each for each in self._open if each[0].fd >= 0]
        self._open.append((image, identity, access))
        return image

    @property
    def are_kept(self) -> bool:
        """Whether any file is kept."""
        return bool(self._kept)

    def find(self, identity: str) -> Image | None:
        """Return the open image of the file with this identity; None if it is not open."""
        return next((image for image, other, _ in self._open if image.fd >= 0 and _is_same(other, identity)), None)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep all files that are open now, while one chain is closed and the next one opened. Raises: OSError."""
        try:
            for image, identity, access in self._open:
                if image.fd >= 0 and identity not in self._kept:
                    self._kept[identity] = os.dup(image.fd), access
            yield
        finally:
            self.drop()

    def take(self, identity: str, access: Access) -> int:
        """Return a descriptor of a file that is kept for the same access; -1 if there is none. Raises: OSError.

        A file that is kept for another access is closed: its locks would be in the way. For a file that is open again
        by now the answer is -1, too: to open it once more is refused, as it would be in a first chain.
        """
        former = next((each for each in self._kept if _is_same(each, identity)), None)
        if former is None or self.find(identity) is not None:
            return -1
        fd, earlier = self._kept[former]
        if earlier != access:
            os.close(self._kept.pop(former)[0])
            return -1
        fd = os.dup(fd)
        blockdev.switch_to_cached(fd)
        return fd

    def drop(self) -> bool:
        """Close all files that are kept; return whether there were any."""
        were_kept = bool(self._kept)
        while self._kept:
            os.close(self._kept.popitem()[1][0])
        return were_kept


def _is_same(former: str, identity: str) -> bool:
    """Return whether two identities are of one file; a partition that has grown meanwhile is the same."""
    return former == identity or bool(former and identity and has_grown(from_text(former), from_text(identity)))
