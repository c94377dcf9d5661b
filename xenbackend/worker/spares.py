"""The open files of a chain that is closed, kept until the next one has taken them over.

Must not open a file, nor keep one longer than an exchange lasts.

What is kept is a copy of each descriptor: the open file description stays, and with it the locks and the claim. So
nobody else gets the image between two chains of one disk.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager

from xenbackend.kernel import blockdev
from xenbackend.kernel.locks import Access
from xenbackend.worker.image import Image

_Key = tuple[int, int]  # device and inode of a file; 0 and the number of a block device


class Spares:
    """The files of one worker, open ones and kept ones."""

    def __init__(self) -> None:
        self._open: list[tuple[Image, _Key, Access]] = []
        self._kept: dict[_Key, tuple[int, Access]] = {}

    def note(self, image: Image, access: Access) -> Image:
        """Take note of an open image, and return it."""
        self._open = [each for each in self._open if each[0].fd >= 0]
        self._open.append((image, _key(os.fstat(image.fd)), access))
        return image

    def has(self, path: str) -> bool:
        """Return whether a file is open here. Raises: OSError."""
        return self._has(_key_of(path))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep what is open now, while it is closed and the next chain is opened. Raises: OSError."""
        try:
            for image, key, access in self._open:
                if image.fd >= 0 and key not in self._kept:
                    self._kept[key] = os.dup(image.fd), access
            yield
        finally:
            self.drop()

    def take(self, path: str, access: Access) -> int:
        """Return a descriptor of a file that is kept, for the same access; -1 where there is none. Raises: OSError.

        A file that is kept for another access is kept no more: it would stand in the way. One that is open again by
        now is opened anew, and refused, as it would be in a first chain.
        """
        if not self._kept:
            return -1
        key = _key_of(path)
        if key not in self._kept or self._has(key):
            return -1
        fd, earlier = self._kept[key]
        if earlier != access:
            os.close(self._kept.pop(key)[0])
            return -1
        fd = os.dup(fd)
        blockdev.switch_to_cached(fd)
        return fd

    def drop(self) -> bool:
        """Keep nothing any more; return whether something was kept."""
        were_kept = bool(self._kept)
        while self._kept:
            os.close(self._kept.popitem()[1][0])
        return were_kept

    def _has(self, key: _Key) -> bool:
        return any(image.fd >= 0 and key == other for image, other, _ in self._open)


def _key_of(path: str) -> _Key:
    return _key(os.stat(path))  # noqa: PTH116 - as `opening`: pathlib would alter the name


def _key(status: os.stat_result) -> _Key:
    return (0, status.st_rdev) if stat.S_ISBLK(status.st_mode) else (status.st_dev, status.st_ino)
