"""Opens image files and block devices: what may be an image, the lock, and the fastest way to do I/O on it.

Must not do I/O for a guest: `image`, `cached` and `direct` do.

The locks (`kernel.locks`) hang on the image's own open file description, and there is never a second description: a
write that a killed worker left in flight keeps the description, and with it the locks, until it has landed. Whoever
gets them therefore knows that no old write can come after his.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from xenbackend.block.driver import Found
from xenbackend.errors import DriverError, KernelError
from xenbackend.kernel import blockdev, claims, locks
from xenbackend.kernel.blockdev import Medium
from xenbackend.opener.local import LocalOpener
from xenbackend.units import round_up
from xenbackend.worker.cached import CachedImage
from xenbackend.worker.direct import DirectImage
from xenbackend.worker.image import Image
from xenbackend.worker.spares import Spares

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor
    from xenbackend.worker.io_queue import IoQueue

_LOCK_PAUSE_S = 0.005  # between two tries for a lock
_LOOK_S = 0.05  # a look for a claim is one for a moment: of two who look at once, one tries again

_T = TypeVar("_T")


class HostFiles:
    """Opens the images of one worker; implements `block.driver.Files`.

    Args:
        reactor: the worker's loop.
        opener: gives it the files; without one this process opens them itself.
        use_queues: use the kernel's asynchronous I/O where the host has it; else threads do what blocks.
        lock_timeout_s: how long `open` waits for a lock. A successor has to wait for the last writes of its
            predecessor; for everybody else a lock that is taken is an answer.
        direct: without it, everything goes through the page cache, whatever a layer asks for.
        locks: without locks nothing may be written, and what is read may be half of somebody's change.
        whole: refuse what only a reader could open, because it ends inside a sector.
        opener: gets the descriptors, and is closed with this; by default one of its own. Whoever opens a chain by
            several `HostFiles` gives them the same one.
    """

    def __init__(
        self,
        reactor: Reactor,
        opener: Opener | None = None,
        *,
        use_queues: bool = True,
        lock_timeout_s: float = 0.0,
        direct: bool = True,
        locks: bool = True,
        whole: bool = False,
        opener: LocalOpener | None = None,
    ) -> None:
        self.opener: Opener = opener or LocalOpener()
        self._reactor = reactor
        self._use_queues = use_queues
        self.lock_timeout_s = lock_timeout_s
        self._direct = direct
        self._locks = locks
        self._whole = whole
        self.opener = opener or LocalOpener()
        self._queues: list[IoQueue] = []
        self._spares = Spares()

    def open(
        self,
        path: str,
        *,
        read_only: bool,
        shareable: bool = False,
        direct: bool = True,
        blocking: bool = False,
        step: int = 0,
        sector_size: int = 0,
    ) -> Image:
        """Open an image, as `block.driver.Files.open` says."""
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        flags = (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = self.opener.open(path, flags)
        except IsADirectoryError as error:
            raise DriverError(f"{path} is a directory; an image is a file or a block device", path=path) from error
        try:
            medium = blockdev.examine(fd, path, read_only=read_only, ends_anywhere=step > 0, sector_size=sector_size)
            if self._whole:
                blockdev.refuse_part_of_a_sector(medium, path)
            os.set_blocking(fd, True)  # asynchronous I/O would answer EAGAIN where it has to wait
            self._lock(fd, path, access)
            if step and not (read_only or medium.is_device):
                size = round_up(medium.size, step)
                os.ftruncate(fd, size)
                medium = replace(medium, size=size, end=size)
            image = self._choose(fd, medium, direct=direct, blocking=blocking)
            image.on_close = partial(self.opener.release, path)
            return image
        except BaseException:
            os.close(fd)
            self.opener.release(path)
            raise

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """Find what an image names, as `block.driver.Finder` says."""
        return self.opener.find(what, image, names, within)

    def kick(self) -> bool:
        """Submit what was queued, at the end of a turn, before the loop sleeps. Returns False: it may."""
        for queue in self._queues:
            queue.kick()
        return False

    def close(self) -> None:
        """Release what the images share; all of them are closed."""
        while self._queues:
            self._queues.pop().close()
        self.opener.close()

    def _choose(self, fd: int, medium: Medium, *, direct: bool, blocking: bool) -> Image:
        alignment = blockdev.switch_to_direct(fd, medium) if direct and self._direct else None
        if blocking:
            return Image(fd, medium, alignment, self._reactor, None)
        if alignment is not None:
            return DirectImage(fd, medium, alignment, self._reactor, self._queue(direct=True))
        return CachedImage(fd, medium, None, self._reactor, self._queue(direct=False))

    def _open(self, path: str, access: locks.Access, *, timeout_s: float | None = None) -> int:
        """Open a file, or a block device that nobody else uses. Raises: DriverError, OSError."""
        claims_it = self._locks and not access.is_shared
        node = os.open(path, os.O_PATH | os.O_CLOEXEC)

        def attempt() -> int | None:
            try:
                return claims.open_medium(node, read_only=not access.writes, claims=claims_it)
            except IsADirectoryError as error:
                sentence = f"{path} is a directory; an image is a file or a block device"
                raise DriverError(sentence, path=path) from error
            except OSError as error:
                if claims_it and error.errno == errno.EBUSY:
                    return None
                error.filename = path
                raise

        try:
            fd = self._patiently(attempt, max(_LOOK_S, self.lock_timeout_s if timeout_s is None else timeout_s))
            if fd is None:
                raise self._naming.claimed(node, path)
            return fd
        finally:
            os.close(node)

    def _lock(self, fd: int, path: str, access: locks.Access) -> None:
        """Lock an image, and see that it is not in use by another face. Raises: DriverError, OSError."""

        def attempt() -> bool | None:
            if locks.take(fd, access, self._disk):
                if not is_used_by_another_face(fd, access):
                    return True
                locks.drop(fd)
            return None

        if self._locks and not self._patiently(attempt, self.lock_timeout_s):
            raise self._naming.locked(fd, path, access)

    def _patiently(self, attempt: Callable[[], _T | None], timeout_s: float) -> _T | None:
        """Try until there is something, or the time is over; return it."""
        give_up = time.monotonic() + timeout_s
        while (found := attempt()) is None:
            if time.monotonic() < give_up:
                time.sleep(_LOCK_PAUSE_S)
            elif not self._spares.drop():  # else it may have been we, by another face
                break
        return found

    def _queue(self, *, direct: bool) -> IoQueue | None:
        """Return the worker's one queue of a kind, or None where the host has none for us."""
        if not self._use_queues:
            return None
        from xenbackend.worker.io_queue import CachedQueue, DirectQueue  # late: who opens files only to look has none

        kind = DirectQueue if direct else CachedQueue
        for queue in self._queues:
            if isinstance(queue, kind):
                return queue
        try:
            self._queues.append(queue := kind(self._reactor))
        except KernelError:
            return None
        return queue
