"""Requests on their way through the kernel's asynchronous I/O: one queue of each kind for all images of a worker.

Must not decide which requests come here, nor what becomes of an odd result: the image does.

    DirectQueue   Linux AIO, for what goes past the page cache, to and from the guest's own pages
    CachedQueue   io_uring, for what the page cache has to wait for: with Linux AIO the loop would wait for it, too
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from xenbackend.block.request import Request
from xenbackend.errors import KernelError
from xenbackend.kernel.aio import MAX_IOVECS, Aio
from xenbackend.kernel.memory import address_of, addresses
from xenbackend.kernel.uring import Uring

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor

_EAGER = 8  # queued: with more the disk would be idle meanwhile; measured, a fifth more I/O than without
_POLL = 1 << 63  # the user_data of no request
# Made before the walls go up, as none can be made behind them.
_direct: list[Aio] = []
_cached: list[Uring] = []


def set_aside(*, direct: bool) -> None:
    """Make now what the first `CachedQueue` needs, and, if `direct`, the first `DirectQueue`.

    If the host does not offer it, threads do the work.
    """
    with suppress(KernelError):
        _cached.append(Uring())
    if direct:
        with suppress(KernelError):
            _direct.append(Aio())


def take_spare() -> Aio | None:
    """Return what was set aside for a `DirectQueue`, the caller's now; None if one uses it, or there was none."""
    return _direct.pop() if _direct else None


class Owner(Protocol):
    """What queues requests for a file: an open image."""

    fd: int

    def settle(self, request: Request, result: int) -> bool:
        """Set the status for a result that is not the full length; False if the request was started again."""

    def finished(self, batch: list[Request]) -> None:
        """Take back requests that were started."""


class IoQueue:
    """Collects requests until `kick`, and gives back in one batch those that completed together."""

    name = ""  # for people

    def __init__(self, reactor: Reactor, ring: Aio | Uring) -> None:
        self._reactor = reactor
        self._ring = ring  # owned from now on
        self._lent: list[Request | None] = []  # by the number that travels as user_data
        self._owners: list[Owner | None] = []
        self._free: list[int] = []
        self._done: dict[Owner, list[Request]] = {}
        self.in_flight = 0

    def start(self, image: Owner, request: Request) -> None:
        """Queue a read, write or flush for `image`, whose `finished` or `settle` gets it back."""
        if self._free:
            number = self._free.pop()
            self._lent[number] = request
            self._owners[number] = image
        else:
            number = len(self._lent)
            self._lent.append(request)
            self._owners.append(image)
        self.in_flight += 1
        ring, op, iov = self._ring, request.op, request.iov
        if len(iov) == 1:
            view = iov[0]
            address = addresses.get(id(view)) or address_of(view)
            ring.queue(ring.single[op], image.fd, request.offset, address, request.length, number)
        elif iov:
            self._start_vector(image, request, number)
        else:
            ring.queue_sync(image.fd, number)
        if ring.queued >= _EAGER:
            ring.submit()

    def kick(self) -> bool:
        """Submit what was queued: once per turn, not once per request. Returns False: the loop may sleep."""
        if self._ring.queued:
            self._ring.submit()
        return False

    def close(self) -> None:
        """Release the ring; nothing is in flight."""
        self._ring.close()

    def deliver(self) -> None:
        """Give back the requests that have completed."""
        done, self._done = self._done, {}
        try:
            while done:
                image, batch = done.popitem()
                image.finished(batch)
        finally:
            if done:  # an exception of one image must not keep the others' requests
                self._done = done
                self._reactor.call_soon(self.deliver)

    def _start_vector(self, image: Owner, request: Request, number: int) -> None:
        """Queue a request of several pieces, joined where they lie side by side: a disk's cost is per piece."""
        pieces: list[int] = []
        end = -1
        for view in request.iov:
            address = addresses.get(id(view)) or address_of(view)
            if address == end:
                pieces[-1] += len(view)
            else:
                pieces += (address, len(view))
            end = address + len(view)
        # A request with more pieces than one call takes comes back short, and `settle` does the rest.
        pieces = pieces[: 2 * MAX_IOVECS]
        ring, op = self._ring, request.op
        if len(pieces) == 2:
            ring.queue(ring.single[op], image.fd, request.offset, pieces[0], pieces[1], number)
        else:
            ring.queue_vector(ring.vector[op], image.fd, request.offset, pieces, number)

    def _collect(self, completions: Iterable[tuple[int, int]]) -> None:
        """Take completions, for `deliver` to give back."""
        lent, owners, free, done = self._lent, self._owners, self._free, self._done
        for number, result in completions:
            request, image = lent[number], owners[number]
            assert request is not None and image is not None  # noqa: S101, PT018 - each number comes back once
            lent[number] = owners[number] = None
            free.append(number)
            self.in_flight -= 1
            if result == request.length:
                request.status = 0
            elif not image.settle(request, result):
                continue
            if image in done:
                done[image].append(request)
            else:
                done[image] = [request]


class DirectQueue(IoQueue):
    """Linux AIO. While anything is in flight the worker's loop sleeps in `wait`, for completions and descriptors.

    Raises: KernelError, if the host offers us none.
    """

    name = "Linux AIO"

    def __init__(self, reactor: Reactor) -> None:
        self._aio = take_spare() or Aio()
        super().__init__(reactor, self._aio)
        self._is_polling = False  # for the loop's descriptors
        reactor.sleep_by(self)

    def wait(self, timeout_s: float | None) -> bool:
        """Submit what is queued and sleep until something has completed or a descriptor of the loop is ready.

        True if a descriptor may be ready. `deliver` gives back the requests that have completed.
        """
        aio = self._aio
        if not self._is_polling:
            self._is_polling = True
            aio.queue_poll(self._reactor.fileno(), _POLL)
        aio.wait(timeout_s)
        completions = aio.reap()
        if any(number == _POLL for number, _ in completions):
            self._is_polling = False
            completions = [each for each in completions if each[0] != _POLL]
        self._collect(completions)
        return not self._is_polling

    def close(self) -> None:
        """Release it; nothing is in flight."""
        self._reactor.sleep_by(None)
        super().close()


class CachedQueue(IoQueue):
    """io_uring. The worker's loop watches its descriptor, like any other.

    Raises: KernelError, if the host offers us none.
    """

    name = "io_uring"

    def __init__(self, reactor: Reactor) -> None:
        self._uring = _cached.pop() if _cached else Uring()
        super().__init__(reactor, self._uring)
        reactor.add(self._uring.fileno(), self._take)
        reactor.before_sleep(self.kick)

    def close(self) -> None:
        """Release it; nothing is in flight."""
        self._reactor.remove_hook(self.kick)
        self._reactor.remove(self._uring.fileno())
        super().close()

    def _take(self) -> None:
        self._uring.enter()
        self._collect(self._uring.reap())
        self.deliver()
