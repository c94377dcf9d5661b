"""A blkfront on the rig: the handshake through xenstore as in Linux, and a guest's I/O on all its rings.

Must not trust the backend: anything that a real blkfront refuses raises `BackendMisbehaved`.

Source: Linux drivers/block/xen-blkfront.c (talk_to_blkback, blkfront_connect, blkback_changed); io/blkif.h.
"""

from __future__ import annotations

import errno
import select
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xenbackend.blkif.abi import (
    BLKIF_OP_DISCARD,
    BLKIF_OP_FLUSH_DISKCACHE,
    BLKIF_OP_READ,
    BLKIF_OP_WRITE,
    BLKIF_OP_WRITE_BARRIER,
    BLKIF_RSP_OKAY,
    NATIVE,
    VDISK_READONLY,
    Layout,
)
from xenbackend.errors import StoreError, XenbackendError
from xenbackend.kernel.fence import find_fence
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import BackendMisbehaved, GuestRing, Span, Submitted

UNKNOWN, INITIALISING, INIT_WAIT, INITIALISED, CONNECTED, CLOSING, CLOSED = range(7)  # io/xenbus.h


class Store(Protocol):
    """The part of a xenstore client that a frontend needs."""

    def read_optional(self, path: str) -> str | None:
        """Return a node's value, or None if there is no such node."""

    def write(self, path: str, value: str) -> None:
        """Write a node."""

    def watch(self, path: str, token: str) -> None:
        """Ask for an event whenever the node changes."""

    def events(self) -> object:
        """Return the events that have arrived, without blocking."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while events wait."""


class DiskError(XenbackendError):
    """The disk answered a request with an error; `status` is BLKIF_RSP_*."""

    def __init__(self, request: Submitted) -> None:
        super().__init__(f"operation {request.operation} at sector {request.sector} ended with {request.status}")
        self.status = request.status


@dataclass(frozen=True, slots=True)
class Wishes:
    """The features that this frontend uses if the backend offers them."""

    layout: Layout = NATIVE
    protocol: bool = True  # write the `protocol` node; without it a backend assumes its native layout
    ring_order: int = 0  # 0 to 4
    queues: int = 1  # 1 to 8
    persistent: bool = False
    indirect: int = 0  # segments
    flush: bool = True
    barrier: bool = True  # used if there is no flush
    discard: bool = True
    start_index: int = 0  # first value of the rings' indices


@dataclass(frozen=True, slots=True)
class DiskFacts:
    """The backend's description of the disk when it connected."""

    sectors: int  # of 512 bytes
    sector_size: int  # bytes
    read_only: bool
    can_flush: bool
    can_barrier: bool
    can_discard: bool
    persistent: bool
    max_indirect: int  # segments that we use, 0 for none


class Frontend:
    """One vbd as its guest sees it. `rings` and `facts` are set once it is connected."""

    def __init__(
        self,
        guest: Guest,
        store: Store,
        path: str,
        wishes: Wishes = Wishes(),
        idle: Callable[[float], None] | None = None,
    ) -> None:
        """Use the frontend at `path`, such as ``/local/domain/5/device/vbd/51712``.

        `idle` is called whenever the frontend has to wait, with the longest time in seconds. The default sleeps until
        an event comes from xenstore or the backend; another function may step a backend in this thread.
        """
        self.guest = guest
        self.wishes = wishes
        self.path = path
        self.rings: list[GuestRing] = []
        self.facts: DiskFacts
        self._store = store
        self._idle = idle or self._sleep
        self._next_ring = 0
        backend = store.read_optional(f"{path}/backend")
        if backend is None:
            raise BackendMisbehaved(f"{path}/backend names no backend")
        self.backend_path = backend
        store.watch(f"{backend}/state", f"{path}/backend-state")

    def connect(self, timeout_s: float = 10) -> None:
        """Shake hands until both sides are connected. Raises: TimeoutError, BackendMisbehaved, KernelError."""
        self._set_state(INITIALISING)
        self._wait_for_backend({INIT_WAIT}, timeout_s)
        self.announce()
        self._wait_for_backend({CONNECTED}, timeout_s)
        self.read_facts()
        self._set_state(CONNECTED)

    def announce(self) -> None:
        """Create the rings, and write the keys by which the backend finds them.

        As in Linux, no key is removed. Keys from an earlier connection that are not written again, such as the number
        of queues if there is only one now, keep their values (talk_to_blkback, write_per_ring_nodes).
        """
        wishes = self.wishes
        order = min(wishes.ring_order, self._offered("max-ring-page-order"))
        queues = min(wishes.queues, max(1, self._offered("multi-queue-max-queues")))
        fence, _ = find_fence()
        self.rings = [
            GuestRing(
                self.guest, wishes.layout, order, fence, persistent=wishes.persistent, start_index=wishes.start_index
            )
            for _ in range(queues)
        ]
        if queues > 1:
            self._write("multi-queue-num-queues", queues)
        if order:
            self._write("ring-page-order", order)
        for number, ring in enumerate(self.rings):
            self._announce_ring(ring, f"queue-{number}/" if queues > 1 else "")
        if wishes.protocol:
            self._write("protocol", wishes.layout.protocol)
        self._write("feature-persistent", int(wishes.persistent))
        self._set_state(INITIALISED)

    def _announce_ring(self, ring: GuestRing, prefix: str) -> None:
        if len(ring.grefs) == 1:
            self._write(f"{prefix}ring-ref", ring.grefs[0])
        else:
            for number, gref in enumerate(ring.grefs):
                self._write(f"{prefix}ring-ref{number}", gref)
        self._write(f"{prefix}event-channel", ring.port.number)

    def read_facts(self) -> None:
        """Read the connected backend's description of the disk; call it again if the size may have changed."""
        wishes = self.wishes
        can_flush = wishes.flush and bool(self._offered("feature-flush-cache"))
        persistent = wishes.persistent and bool(self._offered("feature-persistent"))
        self.facts = DiskFacts(
            sectors=self._offered("sectors", required=True),
            sector_size=self._offered("sector-size", required=True),
            read_only=bool(self._offered("info", required=True) & VDISK_READONLY),
            can_flush=can_flush,
            can_barrier=not can_flush and wishes.barrier and bool(self._offered("feature-barrier")),
            can_discard=wishes.discard and bool(self._offered("feature-discard")),
            persistent=persistent,
            max_indirect=min(wishes.indirect, self._offered("feature-max-indirect-segments")),
        )
        for ring in self.rings:
            ring.persistent = persistent
            ring.max_indirect = self.facts.max_indirect

    def submit(
        self,
        operation: int,
        sector: int = 0,
        count: int = 0,
        data: bytes = b"",
        *,
        spans: Sequence[Span] | None = None,
        ring: int | None = None,
        push: bool = True,
    ) -> Submitted:
        """Put a request into a ring, by default into each ring in turn; see `GuestRing.submit`."""
        if ring is None:
            ring = self._next_ring = (self._next_ring + 1) % len(self.rings)
        request = self.rings[ring].submit(operation, sector, count, data, spans=spans)
        if push:
            self.rings[ring].push()
        return request

    def free(self) -> int:
        """Return how many requests the fullest ring can still take."""
        return min(ring.ring.size - ring.in_flight() for ring in self.rings)

    def poll(self) -> list[Submitted]:
        """Push the submitted requests, and return those that are done. Raises: BackendMisbehaved."""
        for ring in self.rings:
            ring.push()
        return [request for ring in self.rings for request in ring.reap()]

    def wait(self, requests: Iterable[Submitted], timeout_s: float = 10) -> list[Submitted]:
        """Wait until all of `requests` are done; return all that are done. Raises: TimeoutError, BackendMisbehaved."""
        deadline = time.monotonic() + timeout_s
        waiting = [request for request in requests if request.status is None]
        done: list[Submitted] = []
        while waiting:
            done += self.poll()
            waiting = [request for request in waiting if request.status is None]
            if waiting:
                self._pause(deadline, f"{len(waiting)} requests were not answered")
        return done

    def wait_for_any(self, timeout_s: float = 10) -> list[Submitted]:
        """Wait until anything in flight is done, and return it. Raises: TimeoutError, BackendMisbehaved."""
        deadline = time.monotonic() + timeout_s
        while not (done := self.poll()):
            self._pause(deadline, "nothing in flight was answered")
        return done

    def drain(self, timeout_s: float = 10) -> None:
        """Wait until nothing is in flight. Raises: TimeoutError, BackendMisbehaved."""
        deadline = time.monotonic() + timeout_s
        while any(ring.in_flight() for ring in self.rings):
            if not self.poll():
                self._pause(deadline, "requests in flight were not answered")

    def read(self, sector: int, count: int) -> bytes:
        """Read sectors. Raises: DiskError."""
        return self._do(self.submit(BLKIF_OP_READ, sector, count)).data

    def write(self, sector: int, data: bytes) -> None:
        """Write sectors. Raises: DiskError."""
        self._do(self.submit(BLKIF_OP_WRITE, sector, data=data))

    def flush(self) -> None:
        """Make completed writes durable, by an empty barrier if the backend has no flush. Raises: DiskError."""
        self._do(self.submit(BLKIF_OP_WRITE_BARRIER if self.facts.can_barrier else BLKIF_OP_FLUSH_DISKCACHE))

    def discard(self, sector: int, count: int) -> None:
        """Discard sectors. Raises: DiskError."""
        self._do(self.submit(BLKIF_OP_DISCARD, sector, count))

    def close(self, timeout_s: float = 10) -> None:
        """Finish the requests in flight, then go through Closing to Closed with the backend.

        A toolstack may remove the backend's directory as soon as that is Closed, before we see it.

        Raises: TimeoutError; BackendMisbehaved if the backend keeps a page mapped.
        """
        self.drain(timeout_s)
        self._set_state(CLOSING)
        self._wait_for_backend({CLOSING, CLOSED, UNKNOWN}, timeout_s)
        self._set_state(CLOSED)
        self._wait_for_backend({CLOSED, UNKNOWN}, timeout_s)
        for ring in self.rings:
            ring.close()
        self.rings = []

    def crash(self) -> None:
        """Die without telling the backend; `guest.close()` then ends the domain."""
        for ring in self.rings:
            ring.forget()
        self.rings = []

    def backend_state(self) -> int:
        """Return the backend's state, 0 if it has none, or if its directory is gone, which the guest may not read."""
        try:
            return self._offered("state")
        except StoreError as error:
            if error.errno != errno.EACCES:
                raise
            return UNKNOWN

    def _do(self, request: Submitted) -> Submitted:
        self.wait([request])
        if request.status != BLKIF_RSP_OKAY:
            raise DiskError(request)
        return request

    def _wait_for_backend(self, states: set[int], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while self.backend_state() not in states:
            self._pause(deadline, f"{self.backend_path} is in state {self.backend_state()}, not in {sorted(states)}")

    def _pause(self, deadline: float, problem: str) -> None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(problem)
        self._idle(left)

    def _sleep(self, timeout_s: float) -> None:
        poll = select.poll()
        poll.register(self._store.fileno(), select.POLLIN)
        for ring in self.rings:
            poll.register(ring.port.fileno(), select.POLLIN)
        poll.poll(timeout_s * 1000)
        self._store.events()

    def _offered(self, key: str, *, required: bool = False) -> int:
        value = self._store.read_optional(f"{self.backend_path}/{key}")
        if value is None and not required:
            return 0
        try:
            return int(value or "")
        except ValueError:
            raise BackendMisbehaved(f"{self.backend_path}/{key} is {value!r}, not a number") from None

    def _write(self, key: str, value: object) -> None:
        self._store.write(f"{self.path}/{key}", str(value))

    def _set_state(self, state: int) -> None:
        self._write("state", state)
