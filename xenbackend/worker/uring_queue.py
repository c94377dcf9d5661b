"""Requests on their way through io_uring: one queue for all images of a worker.

Must not decide which requests come here, nor what becomes of an odd result: the image does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from xenbackend.block.request import Op, Request
from xenbackend.kernel.memory import address_of, addresses
from xenbackend.kernel.uring import MAX_IOVECS, OP_READ, OP_READV, OP_WRITE, OP_WRITEV, Uring

if TYPE_CHECKING:
    from xenbackend.worker.reactor import Reactor

_EAGER = 8  # queued: more would leave the disk idle while we queue; measured, a fifth more I/O than without
_SINGLE = (OP_READ, OP_WRITE)
_VECTOR = (OP_READV, OP_WRITEV)
_POLL = 1 << 63  # the user_data of no request


class Owner(Protocol):
    """Whoever queues requests for a file: an open image."""

    fd: int

    def settle(self, request: Request, result: int) -> bool:
        """Set the status for a result that is not the full length; False where the request was started again."""

    def finished(self, batch: list[Request]) -> None:
        """Take back what was started."""


class UringQueue:
    """Collects requests until `kick`, and gives back together what has completed together.

    Args:
        reactor: the worker's loop; while anything is in flight it sleeps in `wait`, one call for everything.

    Raises: KernelError, where the host has no io_uring for us.
    """

    def __init__(self, reactor: Reactor) -> None:
        self._reactor = reactor
        self._uring = Uring()
        self._lent: list[Request | None] = []  # by the number that travels as user_data
        self._owners: list[Owner | None] = []
        self._free: list[int] = []
        self._done: dict[Owner, list[Request]] = {}
        self._is_polling = False  # for the loop's descriptors
        self.in_flight = 0
        reactor.sleep_by(self)

    def start(self, image: Owner, request: Request) -> None:
        """Queue one request for `image`, whose `finished` or `settle` gets it back."""
        if self._free:
            number = self._free.pop()
            self._lent[number] = request
            self._owners[number] = image
        else:
            number = len(self._lent)
            self._lent.append(request)
            self._owners.append(image)
        self.in_flight += 1
        op, iov = request.op, request.iov
        if len(iov) == 1:
            view = iov[0]
            address = addresses.get(id(view)) or address_of(view)
            self._uring.queue(_SINGLE[op], image.fd, request.offset, address, request.length, number)
        elif iov:
            self._start_vector(image, request, number)
        elif op == Op.FLUSH:
            self._uring.queue_sync(image.fd, number)
        else:
            self._uring.queue_punch(image.fd, request.offset, request.length, number)
        if self._uring.queued >= _EAGER:
            self._uring.submit()

    def kick(self) -> bool:
        """Submit what was queued: once per turn, not once per request. Returns False: the loop may sleep."""
        if self._uring.queued:
            self._uring.submit()
        return False

    def let_go(self) -> None:
        """Let the kernel do what it has put off until we call it: it may hold files of requests that have come back."""
        self._uring.enter()

    def close(self) -> None:
        """Release the ring; nothing is in flight."""
        self._reactor.sleep_by(None)
        self._uring.close()

    def wait(self, timeout_s: float | None) -> bool:
        """Submit what is queued and sleep until something has completed or a descriptor of the loop is ready.

        True if one may be ready. What has completed is given back by `deliver`.
        """
        uring = self._uring
        if not self._is_polling:
            self._is_polling = True
            uring.queue_poll(self._reactor.fileno(), _POLL)
        uring.wait(timeout_s)
        return self._collect()

    def deliver(self) -> None:
        """Give back what has completed."""
        done, self._done = self._done, {}
        try:
            while done:
                image, batch = done.popitem()
                image.finished(batch)
        finally:
            if done:  # what a bug of one image lets out must not cost the others theirs
                self._done = done
                self._reactor.call_soon(self.deliver)

    def _start_vector(self, image: Owner, request: Request, number: int) -> None:
        """Join what lies side by side in memory: a disk's price is per piece."""
        pieces: list[int] = []
        end = -1
        for view in request.iov:
            address = addresses.get(id(view)) or address_of(view)
            if address == end:
                pieces[-1] += len(view)
            else:
                pieces += (address, len(view))
            end = address + len(view)
        # More pieces than one call takes come back short, and `settle` does the rest.
        pieces = pieces[: 2 * MAX_IOVECS]
        if len(pieces) == 2:
            self._uring.queue(_SINGLE[request.op], image.fd, request.offset, pieces[0], pieces[1], number)
        else:
            self._uring.queue_vector(_VECTOR[request.op], image.fd, request.offset, pieces, number)

    def _collect(self) -> bool:
        """Take completions off the ring; True if the look at the loop's descriptors is among them."""
        lent, owners, free, done = self._lent, self._owners, self._free, self._done
        for number, result in self._uring.reap():
            if number == _POLL:
                self._is_polling = False
                continue
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
        return not self._is_polling
