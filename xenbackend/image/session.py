"""Chains and files opened as a worker opens them, by a process that waits for each batch.

Must not be used while a reactor of somebody else runs in this process, nor keep anything for a successor.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from xenbackend.block.chain import Chain, open_chain
from xenbackend.block.driver import File
from xenbackend.block.opening import Opening, OpenLayer
from xenbackend.block.request import PENDING, Op, Request
from xenbackend.block.spec import ChainSpec, LayerSpec
from xenbackend.errors import DriverError, XenbackendError
from xenbackend.loop.reactor import Reactor
from xenbackend.opener.local import LocalOpener
from xenbackend.worker.env import EnvFactory
from xenbackend.worker.files import HostFiles

Ended = Callable[[Request], None]
Progress = Callable[[int, int], None]  # bytes done and bytes in all; may raise, to stop

LOCK_TIMEOUT_S = 2.0  # the kernel lets go of a file that has I/O in flight a moment after its process has


class RequestFailed(XenbackendError):
    """A request failed while a disk was copied: a fault of the host or the medium."""


class Disk:
    """An open chain whose requests are called back one by one: their `tag` is an `Ended`."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.size = chain.geometry.size  # bytes
        self.can_flush = chain.geometry.can_flush
        chain.complete = _tell

    def submit(self, batch: Sequence[Request]) -> None:
        """Send requests; each one's `tag` is called when it is back."""
        for request in batch:
            request.status = PENDING
        self.chain.submit(list(batch))


class Session:
    """Opens chains and files, and runs their loop; closes everything that is still open at its end.

    Args:
        direct: bypass the page cache where layers ask for it; without it, nothing does.
        use_queues: have the kernel do I/O asynchronously. Who reads only what drivers read while they open needs none.
        trusts: follow images wherever they lead to, as an administrator has said.
    """

    def __init__(self, *, direct: bool = True, use_queues: bool = True, trusts: bool = False) -> None:
        self._reactor = Reactor()
        self.opener = LocalOpener(trusts=trusts)
        self._files = HostFiles(
            self._reactor, use_queues=use_queues, lock_timeout_s=LOCK_TIMEOUT_S, direct=direct, opener=self.opener
        )
        # a loop has one queue of each kind
        self._unlocked = HostFiles(self._reactor, use_queues=False, direct=direct, locks=False, opener=self.opener)
        self._open: list[Chain | File | Opening] = []

    def open(self, spec: ChainSpec, *, read_only: bool, locked: bool = True, is_draft: bool = False) -> Disk:
        """Open a chain. Without a lock it is only read, and what is read may be half of somebody's change.

        With `is_draft` nobody may use the image, should it stay as it is, but for what a flush has made durable.

        Raises: DriverError.
        """
        env = EnvFactory(self._reactor, self._files if locked else self._unlocked, is_draft=is_draft)
        chain = open_chain(spec, env, read_only=read_only or not locked)
        self._open.append(chain)
        if read_only and locked:
            _see_that_nobody_writes(chain)
        return Disk(chain)

    def close_chain(self, text: str) -> None:
        """Close the chain of a text, where it is open. Raises: what closing it raised."""
        for each in [each for each in self._open if isinstance(each, Chain) and each.layers[0].text == text]:
            self._open.remove(each)
            each.close()

    def open_as_far(self, spec: LayerSpec, *, locked: bool = True) -> list[OpenLayer]:
        """Open a source, for reading, and its parents up to the first that cannot be opened; return those that could.

        They are to be looked at: no request can be sent there.
        """
        env = EnvFactory(self._reactor, self._files if locked else self._unlocked)
        opening = Opening(env, _do_not_sleep)
        self._open.append(opening)
        with suppress(DriverError):  # who asks has been told why already
            opening.source_and_parents(spec, read_only=True, shareable=False)
        return opening.layers

    def open_file(self, path: str, *, read_only: bool, step: int = 0) -> File:
        """Open an image's file: locked for readers, or for us alone. `step` is that of `block.driver.Files`.

        Raises: DriverError.
        """
        try:
            file = self._files.open(path, read_only=read_only, direct=False, step=step)
        except OSError as error:
            number = error.errno or errno.EIO
            raise DriverError(f"{path}: {os.strerror(number)}", path=path, errno=number) from error
        self._open.append(file)
        return file

    def close(self, opened: Disk | File) -> None:
        """Close a disk or a file before the session ends; nothing is in flight. Raises: what closing it raised."""
        what: Chain | File = opened.chain if isinstance(opened, Disk) else opened
        self._open.remove(what)
        what.close()

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Run the loop until something is so; whoever makes it so calls `wake`."""
        while not is_done():
            self._reactor.run()

    def glance(self) -> None:
        """Run the loop once, without waiting for anything."""
        self._reactor.call_soon(self._reactor.stop)
        self._reactor.run()

    def wake(self) -> None:
        """Let `run_until` look again."""
        self._reactor.stop()

    def do(self, disk: Disk, *batch: Request) -> None:
        """Do one batch. Raises: RequestFailed, for the first one that failed."""
        left = set(batch)

        def ended(request: Request) -> None:
            left.remove(request)
            self.wake()

        for request in batch:
            request.tag = ended
        disk.submit(batch)
        self.run_until(lambda: not left)
        for request in batch:
            check_status(disk, request)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        failure: Exception | None = None
        for each in reversed(self._open):
            try:
                each.close()
            except (OSError, XenbackendError) as error:  # the others must be closed all the same
                failure = failure or error
        self._open.clear()
        self._files.close()
        self._unlocked.close()
        self.opener.close()
        self._reactor.close()
        if failure and kind is None:
            raise failure


def _see_that_nobody_writes(chain: Chain) -> None:
    """Raise DriverError with EBUSY where somebody may write to what is read, as no lock of ours forbids that."""
    for layer in chain.layers:
        if writer := layer.driver.writer():
            raise DriverError(
                f"{writer} may write to it meanwhile; a snapshot stays as it is", layer=layer.text, errno=errno.EBUSY
            )


def check_status(disk: Disk, request: Request) -> None:
    """Say what failed. Raises: RequestFailed, where the request did."""
    if request.status:
        what = "flush"
        if request.op != Op.FLUSH:
            what = f"{Op(request.op).name.lower()} of {request.length} bytes at {request.offset}"
        raise RequestFailed(f"{disk.chain.layers[0].text}: {what}: {os.strerror(request.status)}")


def request_for(op: Op, offset: int, view: memoryview, then: Ended | None = None) -> Request:
    """Return a read into a view, or a write of it."""
    request = Request(then)
    request.op, request.offset, request.length, request.iov = op, offset, len(view), [view]
    return request


def flush_request() -> Request:
    """Return a flush."""
    request = Request()
    request.op = Op.FLUSH
    return request


def _do_not_sleep(seconds: float) -> None:
    """Try again at once: the medium has been waited for already."""


def _tell(batch: list[Request]) -> None:
    for request in batch:
        request.tag(request)
