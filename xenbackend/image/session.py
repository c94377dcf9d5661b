"""Opens chains and files as a worker does, for a process that waits for each batch.

Must not be used while another reactor runs in this process, nor keep anything for a successor.
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
Progress = Callable[[int, int], None]  # gets bytes done and bytes in total; may raise, to stop

LOCK_TIMEOUT_S = 2.0  # if I/O is in flight, the kernel releases a file's locks a moment after its process has ended


class RequestFailed(XenbackendError):
    """A request to a disk failed: a fault of the host or the medium."""


class Disk:
    """An open chain with a callback for each request: its `tag`, an `Ended`."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.size = chain.geometry.size  # bytes
        self.can_flush = chain.geometry.can_flush
        chain.complete = _tell

    def submit(self, batch: Sequence[Request]) -> None:
        """Send requests; the `tag` of each is called when it has completed."""
        for request in batch:
            request.status = PENDING
        self.chain.submit(list(batch))


class Session:
    """Opens chains and files, and runs their loop; at its end, it closes everything that is still open.

    Args:
        direct: allow layers that ask for it to bypass the page cache.
        use_queues: use asynchronous I/O; not needed for the reads that drivers do while they open.
        trusts: follow images wherever they lead, as an administrator has asked for.
    """

    def __init__(self, *, direct: bool = True, use_queues: bool = True, trusts: bool = False) -> None:
        self._reactor = Reactor()
        self.opener = LocalOpener(trusts=trusts)
        self._files = HostFiles(
            self._reactor, use_queues=use_queues, lock_timeout_s=LOCK_TIMEOUT_S, direct=direct, opener=self.opener
        )
        # without queues, since a loop has only one of each kind
        self._unlocked = HostFiles(self._reactor, use_queues=False, direct=direct, locks=False, opener=self.opener)
        self._open: list[Chain | File | Opening] = []

    def open(self, spec: ChainSpec, *, read_only: bool, locked: bool = True, is_draft: bool = False) -> Disk:
        """Open a chain. Without a lock it is read-only, and a read may return half of a change that somebody makes.

        With `is_draft`, if the image is left unfinished, only what a flush has made durable may be used of it.

        Raises: DriverError.
        """
        env = EnvFactory(self._reactor, self._files if locked else self._unlocked, is_draft=is_draft)
        chain = open_chain(spec, env, read_only=read_only or not locked)
        self._open.append(chain)
        if read_only and locked:
            _see_that_nobody_writes(chain)
        return Disk(chain)

    def close_chain(self, text: str) -> None:
        """Close the chain whose first layer has this text, if it is open. Raises: what closing it raises."""
        for each in [each for each in self._open if isinstance(each, Chain) and each.layers[0].text == text]:
            self._open.remove(each)
            each.close()

    def open_as_far(self, spec: LayerSpec, *, locked: bool = True) -> list[OpenLayer]:
        """Open a source for reading, and its parents up to the first that cannot be opened; return the opened layers.

        They can only be examined, since no request can be sent to them.
        """
        env = EnvFactory(self._reactor, self._files if locked else self._unlocked)
        opening = Opening(env, _do_not_sleep)
        self._open.append(opening)
        with suppress(DriverError):  # the caller knows the reason already
            opening.source_and_parents(spec, read_only=True, shareable=False)
        return opening.layers

    def open_file(self, path: str, *, read_only: bool, step: int = 0) -> File:
        """Open an image's file, with a lock against writers, or for writing against everybody.

        `step` is as in `block.driver.Files`.

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
        """Close a disk or file before the session ends; nothing may be in flight. Raises: what closing it raises."""
        what: Chain | File = opened.chain if isinstance(opened, Disk) else opened
        self._open.remove(what)
        what.close()

    def run_until(self, is_done: Callable[[], bool]) -> None:
        """Run the loop until `is_done`. Code that may change its result has to call `wake`."""
        while not is_done():
            self._reactor.run()

    def glance(self) -> None:
        """Run the loop once, without waiting for anything."""
        self._reactor.call_soon(self._reactor.stop)
        self._reactor.run()

    def wake(self) -> None:
        """Make `run_until` check again."""
        self._reactor.stop()

    def do(self, disk: Disk, *batch: Request) -> None:
        """Send a batch, and wait for it. Raises: RequestFailed for the first request that has failed."""
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
    """Check that nobody may write to a layer in a way that our locks do not prevent. Raises: DriverError, EBUSY."""
    for layer in chain.layers:
        if writer := layer.driver.writer():
            raise DriverError(
                f"{writer} may write to it meanwhile; a snapshot stays as it is", layer=layer.text, errno=errno.EBUSY
            )


def check_status(disk: Disk, request: Request) -> None:
    """Raise RequestFailed if a request has failed, with what failed in words."""
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
    """Do not sleep before the next attempt: the session has waited for the medium already."""


def _tell(batch: list[Request]) -> None:
    for request in batch:
        request.tag(request)
