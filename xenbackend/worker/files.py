"""Opens image files and block devices: checks that they can be images, locks them, chooses the fastest way of I/O.

Must not do I/O for a guest: `image`, `cached` and `direct` do.

The locks (`kernel.locks`) hang on the image's own open file description, and there is never a second description: a
write that a killed worker left in flight keeps the description, and with it the locks, until it has landed. A
process that gets the locks therefore knows that no earlier write can come after its own.
"""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeVar

from xenbackend.block.driver import Found
from xenbackend.block.keys import Derivation
from xenbackend.block.length import Length, Lengths
from xenbackend.block.servers import Account, After, Endpoint
from xenbackend.errors import DriverError, KernelError, printable
from xenbackend.kernel import blockdev, locks
from xenbackend.kernel.blockdev import Medium
from xenbackend.opener.local import LocalOpener
from xenbackend.protocol.opening import Facts
from xenbackend.units import round_up
from xenbackend.worker.cached import CachedImage
from xenbackend.worker.direct import DirectImage
from xenbackend.worker.image import Image
from xenbackend.worker.spares import Spares

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor
    from xenbackend.worker.io_queue import IoQueue

_LOCK_PAUSE_S = 0.005  # between two tries for a lock
_LOOKS = 20  # tries at least: to look for a claim takes one for a moment, which another look may meet

_T = TypeVar("_T")


class Opener(Protocol):
    """What opens files for `HostFiles`: `LocalOpener` in this process, `worker.opener.RemoteOpener` in another one."""

    def hold(self, path: str) -> None:
        """Make a name mean one file until it is `release`d as often as held. Raises: DriverError, OSError."""

    def release(self, path: str) -> None:
        """End one `hold` of a name."""

    def open(self, path: str, *, write: bool, claims: bool = False) -> tuple[int, Facts]:
        """Return a descriptor of a new open file description, and the facts of the file; the name is held.

        `claims`: claim a block device, as `kernel.claims.open_medium`.

        Raises: DriverError; OSError, with EBUSY if somebody else uses the device.
        """

    def is_used_beside(self, path: str, fd: int, access: locks.Access) -> bool:
        """As `kernel.inuse.is_used_by_another_face`; `fd` is of the file, which is locked by now."""

    def why_in_use(self, path: str, access: locks.Access, *, is_claimed: bool, with_names: bool) -> DriverError:
        """Return the error for an image that somebody else claims or has locked. Raises: DriverError, OSError."""

    def open_record(self, path: str, *, creates: bool = True) -> int:
        """As `block.driver.Files.open_record`; if not `creates`, an unnamed file stands for one that would be made."""

    def is_stand_in(self, path: str) -> bool:
        """Return whether an unnamed file stands for this one, which was not to be created."""

    def look(self, path: str) -> Facts:
        """As `block.driver.Files.look`."""

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """As `block.driver.Files.find`."""

    def resolve(self, path: str) -> str:
        """As `block.driver.Files.resolve`."""

    def connect(self, endpoint: Endpoint, place: int, after: After, *, keeps: bool) -> socket.socket:
        """Return a socket connected to a server, as `opening.ConnectTo`. Raises: DriverError, OSError."""

    def derive(self, source: str, how: Derivation, *, without_newline: bool) -> memoryview:
        """As `block.driver.Files.derive`."""

    def read_cluster(self, account: Account) -> Mapping[str, str]:
        """As `block.driver.Files.read_cluster`."""

    def read_certificates(self, directory: str) -> Mapping[str, str]:
        """As `block.driver.Files.read_certificates`."""


class HostFiles:
    """Opens the images of one worker; implements `block.driver.Files`.

    Args:
        reactor: the worker's loop.
        opener: opens the files; its creator closes it. Several `HostFiles` for one chain must share one opener. If it
            is None, this process opens the files itself.
        use_queues: use the kernel's asynchronous I/O where the host has it; else threads do what blocks.
        lock_timeout_s: how long `open` waits for a lock. A successor has to wait for the last writes of its
            predecessor; for all others a lock that is taken means that the image is in use.
        direct: if False, everything goes through the page cache, whatever a layer asks for.
        locks: if False, take no locks: nothing may be written then, and what is read may be half of a change.
        whole: refuse an image that ends inside a sector, which only a reader can open.
        names_users: say who uses an image that is in use. That looks at every process: not for callers that ask often.
        disk: a number that no other disk has, for `kernel.locks.take`.
        creates: if False, no file is created: unnamed files stand for those that would be (`Opener.is_stand_in`).
        changes: if False, no file is created or changed: what is written by `File`'s own methods is dropped, except for
            files that stand for others, and the time of a file's last change (mtime) is as before.
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
        names_users: bool = True,
        disk: int = -1,
        creates: bool = True,
        changes: bool = True,
    ) -> None:
        self._own: LocalOpener | None = None
        if opener is None:
            opener = self._own = LocalOpener()
        self.opener = opener
        self._reactor = reactor
        self._use_queues = use_queues
        self.lock_timeout_s = lock_timeout_s
        self._direct = direct
        self._locks = locks
        self._whole = whole
        self._names_users = names_users
        self._disk = disk
        self._creates = creates and changes
        self._changes = changes
        self._queues: list[IoQueue] = []
        self._spares = Spares()
        self.on_short: Callable[[str], None] | None = None  # gets a sentence if another program cuts a file off
        self._changed: dict[str, int] = {}  # mtime_ns of open files from before: opening one for writing changes it

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
        lengths: Lengths | None = None,
        is_copy: bool = False,
    ) -> Image:
        """Open an image, as `block.driver.Files.open` says."""
        access = locks.access(read_only=read_only, shareable=shareable)
        opener = self.opener  # kept, as `self.opener` may be another one when the image is closed
        with ExitStack() as held:
            opener.hold(path)
            held.callback(opener.release, path)
            fd, facts = self._spare(path, access) or self._open(path, access)
            with ExitStack() as opened:
                opened.callback(os.close, fd)
                drops = not (self._changes or opener.is_stand_in(path))
                os.set_blocking(fd, True)  # else asynchronous I/O would end with EAGAIN instead of waiting
                if self._lock(fd, path, access):  # first: a check must not set back another writer's time
                    with _as_before(fd) if drops else nullcontext():
                        medium = blockdev.examine(
                            fd, path, read_only=read_only, ends_anywhere=step > 0, sector_size=sector_size,
                            discard_granularity=facts.discard_granularity,
                        )  # fmt: skip
                    if self._whole:
                        blockdev.refuse_part_of_a_sector(medium, path)
                    length = None if lengths is None else _compared(lengths.of(facts.identity), medium, path)
                    if step and not (read_only or medium.is_device):
                        size = round_up(medium.size, step)
                        if size > medium.size and not drops:  # else it would bring back zeros for what was just cut off
                            os.ftruncate(fd, size)
                        medium = replace(medium, size=size, end=medium.end if drops else size)
                    image = self._choose(fd, medium, direct=direct, blocking=blocking)
                    image.path, image.drops = path, drops
                    if length is not None:
                        image.length, length.size = length, image.extent.end
                    if not is_copy:
                        image.extent.on_short = partial(self._tell_of_short, path)
                    opened.pop_all()
                    self._changed[path] = facts.mtime_ns
                    held.callback(self._changed.pop, path, None)
                    image.on_close = held.pop_all().close
                    return self._spares.note(image, facts.identity, access)
            raise self._in_use(path, access)  # the file is closed by now, else we would be among its users

    def check_free(self, path: str, *, read_only: bool, shareable: bool) -> None:
        """Refuse an image that somebody else uses at the moment, without waiting, or of which we have lost a part.

        Raises: DriverError, OSError.
        """
        access = locks.access(read_only=read_only, shareable=shareable)
        with ExitStack() as held:
            self.opener.hold(path)
            held.callback(self.opener.release, path)
            if (image := self._spares.find(self.opener.look(path).identity)) is not None:
                kept = image.extent.look(image.size)
                if image.extent.is_short and image.extent.on_short is not None:
                    raise _cut_off(path, kept, image.extent.end, "detach the disk")
                return
            fd, _ = self._open(path, access, timeout_s=0.0)
            try:
                is_free = locks.take(fd, access, self._disk)
            finally:
                os.close(fd)  # as in `open`
            if not is_free:
                raise self._in_use(path, access)

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep the images that are open now from others while they are closed, and opened again in another chain."""
        with self._spares.kept():
            yield

    def open_record(self, path: str) -> int:
        """See `block.driver.Files`."""
        return self.opener.open_record(path, creates=self._creates)

    def look(self, path: str) -> Facts:
        """See `block.driver.Files`."""
        facts = self.opener.look(path)
        return replace(facts, mtime_ns=self._changed.get(path, facts.mtime_ns))

    def find(self, what: str, image: str, names: Sequence[str], within: str = "") -> Found:
        """See `block.driver.Files`."""
        return self.opener.find(what, image, names, within)

    def resolve(self, path: str) -> str:
        """See `block.driver.Files`."""
        return self.opener.resolve(path)

    def connect(self, endpoint: Endpoint, place: int, after: After, *, keeps: bool) -> socket.socket:
        """Return a socket connected to a server, as `Opener.connect`."""
        return self.opener.connect(endpoint, place, after, keeps=keeps)

    def derive(self, source: str, how: Derivation, *, without_newline: bool = False) -> memoryview:
        """Return a key that is made of a passphrase, as `Opener.derive`."""
        return self.opener.derive(source, how, without_newline=without_newline)

    def read_cluster(self, account: Account) -> Mapping[str, str]:
        """See `block.driver.Files`."""
        return self.opener.read_cluster(account)

    def read_certificates(self, directory: str) -> Mapping[str, str]:
        """As `block.driver.Files.read_certificates`."""
        return self.opener.read_certificates(directory)

    def kick(self) -> bool:
        """Submit queued requests, at the end of a turn, before the loop sleeps. Returns False: it may sleep."""
        for queue in self._queues:
            queue.kick()
        return False

    def close(self) -> None:
        """Release what the images share; all of them must be closed."""
        while self._queues:
            self._queues.pop().close()
        if self._own is not None:
            self._own.close()

    def _choose(self, fd: int, medium: Medium, *, direct: bool, blocking: bool) -> Image:
        alignment = blockdev.switch_to_direct(fd, medium) if direct and self._direct else None
        if blocking:
            return Image(fd, medium, alignment, self._reactor, None)
        if alignment is not None:
            return DirectImage(fd, medium, alignment, self._reactor, self._queue(direct=True))
        return CachedImage(fd, medium, None, self._reactor, self._queue(direct=False))

    def _tell_of_short(self, path: str, had: int, has: int) -> None:
        if self.on_short is not None:
            self.on_short(
                f"{printable(path)} has become shorter: it has {has} of {had} bytes, and another program has cut off "
                "the rest; the disk waits: after `resume`, requests for the rest fail until the disk is detached"
            )

    def _spare(self, path: str, access: locks.Access) -> tuple[int, Facts] | None:
        """Return descriptor and facts of a file that is kept during an exchange; None if it is not kept."""
        if not self._spares.are_kept:
            return None
        facts = self.opener.look(path)
        fd = self._spares.take(facts.identity, access)
        return (fd, facts) if fd >= 0 else None

    def _open(self, path: str, access: locks.Access, *, timeout_s: float | None = None) -> tuple[int, Facts]:
        """Open a file, or a block device that nobody else uses. Raises: DriverError, OSError."""
        claims = self._locks and not access.is_shared

        def attempt() -> tuple[int, Facts] | None:
            try:
                return self.opener.open(path, write=access.writes, claims=claims)
            except OSError as error:
                if claims and error.errno == errno.EBUSY:
                    return None
                raise

        found = self._patiently(attempt, self.lock_timeout_s if timeout_s is None else timeout_s, _LOOKS)
        if found is None:
            raise self._in_use(path, access, is_claimed=True)
        return found

    def _lock(self, fd: int, path: str, access: locks.Access) -> bool:
        """Lock an image, and check that it is not in use by another face; return whether we have it. Raises: OSError.

        Of two processes that come by different faces at once, at least one sees the other, since each locks its own
        face before it looks at others.
        """

        def attempt() -> bool | None:
            if locks.take(fd, access, self._disk):
                if not self.opener.is_used_beside(path, fd, access):
                    return True
                locks.drop(fd)
            return None

        return not self._locks or bool(self._patiently(attempt, self.lock_timeout_s))

    def _in_use(self, path: str, access: locks.Access, *, is_claimed: bool = False) -> DriverError:
        return self.opener.why_in_use(path, access, is_claimed=is_claimed, with_names=self._names_users)

    def _patiently(self, attempt: Callable[[], _T | None], timeout_s: float, tries: int = 1) -> _T | None:
        """Repeat `attempt` until it returns a value, for at most `timeout_s` or, if longer, `tries` calls."""
        give_up = time.monotonic() + timeout_s
        while (found := attempt()) is None:
            tries -= 1
            if tries > 0 or time.monotonic() < give_up:
                time.sleep(_LOCK_PAUSE_S)
            elif not self._spares.drop():  # else what we keep may be in our own way, by another face
                break
        return found

    def _queue(self, *, direct: bool) -> IoQueue | None:
        """Return the worker's one queue of this kind, or None if the host offers us none."""
        if not self._use_queues:
            return None
        from xenbackend.worker.io_queue import CachedQueue, DirectQueue  # late: few that only look need it

        kind = DirectQueue if direct else CachedQueue
        for queue in self._queues:
            if isinstance(queue, kind):
                return queue
        try:
            self._queues.append(queue := kind(self._reactor))
        except KernelError:
            return None
        return queue


def _compared(length: Length, medium: Medium, path: str) -> Length:
    """Return what was noted about a file that is as long as noted, or longer. Raises: DriverError, if it is shorter."""
    if medium.end < length.size:
        raise _cut_off(path, medium.end, length.size, "restore the file, or detach the disk")
    return length


def _cut_off(path: str, has: int, had: int, advice: str) -> DriverError:
    """Return the error for a file that must not be opened again: what it has lost would be read as zeros."""
    return DriverError(
        f"it has {has} of the {had} bytes that it had in service: another program has cut off the rest; {advice}, "
        "which loses these data",
        path=path,
    )


@contextmanager
def _as_before(fd: int) -> Iterator[None]:
    """Give a file its mtime back: the attempt to punch a hole behind its end changes it on some file systems.

    The file must be locked: what another writer changes meanwhile would be set back, too.
    """
    times = os.fstat(fd)
    try:
        yield
    finally:
        if os.fstat(fd).st_mtime_ns != times.st_mtime_ns:
            with suppress(OSError):
                os.utime(fd, ns=(times.st_atime_ns, times.st_mtime_ns))
