"""The worker's half of a vbd in the test's own thread: a real ring on the rig, and a disk that answers when told.

Must not serve a request itself, nor sleep: time passes for the worker only when a test moves its clock.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Self

from tests.driven import BACK, DOMID, FRONT, Nodes
from xenbackend import journal
from xenbackend.blkif.features import Disk, Limits, parse_frontend, publish_at_connect, publish_at_probe
from xenbackend.block.driver import Geometry
from xenbackend.block.policy import Policy
from xenbackend.block.request import Op, Request
from xenbackend.kernel.ports import Host, open_host
from xenbackend.loop.reactor import Reactor
from xenbackend.loop.steps import Steps, run
from xenbackend.protocol import messages
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.rig.guest import Guest
from xenbackend.rig.xen import Xen
from xenbackend.units import SECTOR
from xenbackend.worker.connection import Below, Connection, Peer
from xenbackend.worker.holds import Hold
from xenbackend.worker.polling import Poller

SIZE = 1 << 20


class HeldDisk:
    """A disk of bytes that remembers what it was asked, and gives requests back at once or when told.

    seen     the operations in order, "READ" and so on
    held     the requests that it has
    holding  True: nothing is given back before `give_back`
    errors   errno by operation, for operations that are to fail
    """

    def __init__(self, size: int = SIZE) -> None:
        self.content = bytearray(size)
        self.seen: list[str] = []
        self.held: list[Request] = []
        self.holding = False
        self.errors: dict[int, int] = {}
        self.complete: Callable[[list[Request]], None]

    def submit(self, batch: list[Request]) -> None:
        """Take requests as a driver does."""
        self.seen += [Op(request.op).name for request in batch]
        self.held += batch
        if not self.holding:
            self.give_back(batch)

    def give_back(self, batch: Iterable[Request] | None = None) -> None:
        """Do these requests, by default all that are held, and give them back as one batch."""
        batch = list(self.held if batch is None else batch)
        given = {id(request) for request in batch}
        self.held = [request for request in self.held if id(request) not in given]
        for request in batch:
            self._do_or_fail(request)
        self.complete(batch)

    def _do_or_fail(self, request: Request) -> None:
        request.status = self.errors.get(request.op, 0) if self.errors else 0
        if not request.status:
            self._do(request)

    def _do(self, request: Request) -> None:
        place, content = request.offset, memoryview(self.content)
        for view in request.iov:
            end = place + len(view)
            if request.op == Op.READ:
                view[:] = content[place:end]
            else:
                content[place:end] = view
            place = end
        if request.op == Op.DISCARD:
            content[place : place + request.length] = bytes(request.length)


class Served:
    """Hypervisor, guest, frontend and a `Connection`, whose loop passes while the frontend waits.

    complaints, alarms    what the worker would have sent to the supervisor
    halted, troubles      the values of these two that the standing has had
    now                   the worker's clock, in seconds
    """

    def __init__(self, directory: Path, disk: Any = None, geometry: Geometry | None = None) -> None:
        self.disk = disk or HeldDisk()
        self.geometry = geometry or Geometry(size=SIZE, can_discard=True, discard_granularity=SECTOR)
        self.directory = directory
        self.now = 0.0
        self.complaints: list[str] = []
        self.alarms: list[str] = []
        self.troubles: list[str] = []
        self.policy = ""
        self.halted: list[str] = []
        self.bugs: list[Exception] = []
        self.reactor = Reactor(clock=lambda: self.now, on_bug=self.bugs.append)
        self.journal = memoryview(mmap.mmap(-1, journal.SIZE))
        self.nodes = Nodes()
        self.limits = Limits(max_queues=8)
        self.offered: dict[str, Any] = {}  # what `messages.Connect` says besides
        self.flushes_at_end = 0
        self.frontend: Frontend
        self.connection: Connection | None = None
        self.begin()

    def begin(self) -> None:
        """Make the machine and its guest."""
        self.xen = Xen(self.directory)
        self.xen.start()
        self.guest = Guest(self.directory, DOMID, pages=8192)

    def open_host(self) -> Host:
        """Return the backend's machine."""
        return open_host(f"xenbackend.rig.host:{self.directory}")

    def connect(self, wishes: Wishes = Wishes()) -> Frontend:
        """Announce a frontend with these wishes and connect to it. Raises: KernelError."""
        self._publish(publish_at_probe(self.limits))
        self.frontend = Frontend(self.guest, self.nodes, FRONT, wishes, idle=self._idle)
        self.frontend.announce()
        self.connect_rings()
        geometry = self.geometry
        can = (geometry.can_flush, geometry.can_discard)
        self._publish(publish_at_connect(Disk(geometry.size, geometry.sector_size, geometry.read_only, *can)))
        self.frontend.read_facts()
        self.step()  # a channel is pending when it is bound
        return self.frontend

    def stand(self) -> None:
        """Take note that the standing has changed, and of what is wrong now."""
        connection = self.connection
        halted, trouble = (connection.halted, connection.trouble) if connection else ("", "")
        if halted and halted not in self.halted:
            self.halted.append(halted)
        if trouble != (self.troubles or [""])[-1]:
            self.troubles.append(trouble)

    def complain(self, sentence: str) -> None:
        """Take a complaint about the guest."""
        self.complaints.append(sentence)

    def alarm(self, sentence: str) -> None:
        """Take what an administrator must read."""
        self.alarms.append(sentence)

    def connect_rings(self, *, rejoins: bool = False) -> None:
        """Serve the announced rings; `rejoins`: continue where a predecessor stopped. Raises: KernelError."""
        asked = parse_frontend(lambda key: self.nodes.read_optional(f"{FRONT}/{key}"), self.limits)
        rings = [messages.RingParameters(ring.grefs, ring.event_channel) for ring in asked.rings]
        self.connection = Connection(
            Peer(
                self.open_host(),
                DOMID,
                messages.Connect(asked.protocol, rings, asked.persistent, **self.offered),
                is_inherited=rejoins,
            ),
            Below(self.geometry, self.disk.submit, kick=lambda: None),
            self.reactor,
            self.journal,
            channel=self,
            poller=Poller(0, None),
            policy=Policy(self.policy),
        )
        self.disk.complete = self.connection.engine.finish

    @property
    def engine(self) -> Any:
        """The engine that serves."""
        assert self.connection is not None
        return self.connection.engine

    def step(self, passes: int = 1) -> None:
        """Let the worker's loop pass, without ever sleeping in it."""
        for _ in range(passes):
            self.reactor.call_soon(self.reactor.stop)
            self.reactor.run()

    def pass_time(self, seconds: float) -> None:
        """Move the worker's clock, and let its timers go off."""
        self.now += seconds
        self.step(2)

    def kill(self) -> None:
        """Have the worker die as by SIGKILL: it writes nothing more, and the kernel releases what it had."""
        connection, self.connection = self.connection, None
        assert connection is not None
        self.disk.held.clear()
        self.reactor._soon.clear()
        self.reactor._timers.clear()
        connection._closed = True
        connection._undo.close()
        connection.engine.queues.clear()
        connection._by_port.clear()

    def disconnect(self, *, goes_on: bool = False) -> bool:
        """Leave the rings; False if something is still in flight after a few passes of the loop.

        `goes_on`: the frontend stays connected.
        """
        assert self.connection is not None
        run(self._leave(self.connection, goes_on=goes_on), lambda *_: None)
        self.step(8)
        return self.connection is None

    def close(self) -> None:
        """Release everything."""
        if self.connection is not None:
            self.disk.holding = False
            if self.disk.held:
                self.disk.give_back()
            assert self.disconnect()
        self.reactor.close()
        self.guest.close()
        self.xen.close()
        self.nodes.close()

    def _leave(self, connection: Connection, *, goes_on: bool) -> Steps[None]:
        yield connection.quiet(Hold.END)
        self.flushes_at_end += 1
        self.connection = None
        try:
            connection.close(goes_on=goes_on)
        except Exception as bug:
            self.bugs.append(bug)

    def _idle(self, _timeout_s: float) -> None:
        self.step()

    def _publish(self, keys: dict[str, str]) -> None:
        for key, value in keys.items():
            self.nodes.write(f"{BACK}/{key}", value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
