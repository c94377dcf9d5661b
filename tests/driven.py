"""A real worker process driven by control messages, and a real frontend on the rig's hypervisor, without xenstore.

Must not serve a request: the tests that use it try the worker alone, before there is a supervisor.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Self

from tests.openers import Openers
from tests.until import until
from xenbackend import counters, journal
from xenbackend.bench.worker import POLL_US
from xenbackend.blkif.abi import BLKIF_OP_WRITE
from xenbackend.blkif.features import Disk, Limits, parse_frontend, publish_at_connect, publish_at_probe
from xenbackend.block.drivers import BUILT_IN
from xenbackend.kernel import memfd
from xenbackend.protocol import codec, jobs, messages
from xenbackend.protocol.messages import Stage
from xenbackend.rig.frontend import Frontend, Wishes
from xenbackend.rig.guest import Guest
from xenbackend.rig.guest_ring import Submitted
from xenbackend.rig.xen import Xen

DOMID = 5
FRONT = f"/local/domain/{DOMID}/device/vbd/51712"
BACK = f"/local/domain/0/backend/vbd/{DOMID}/51712"
_PROGRAM = """
import sys
from xenbackend.block.drivers import BUILT_IN
from xenbackend.worker.main import main
BUILT_IN.update({drivers})
sys.exit(main(sys.argv[1:]))
"""


class Nodes:
    """Xenstore as a dictionary; nothing ever happens in it by itself."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {f"{FRONT}/backend": BACK}
        self._never = os.eventfd(0, os.EFD_CLOEXEC)

    def read_optional(self, path: str) -> str | None:
        return self.values.get(path)

    def write(self, path: str, value: str) -> None:
        self.values[path] = value

    def watch(self, path: str, token: str) -> None:
        pass

    def events(self) -> list[tuple[str, str]]:
        return []

    def fileno(self) -> int:
        return self._never

    def close(self) -> None:
        os.close(self._never)


class WorkerProcess:
    """A worker, its socket and its journal.

    number   of the last order
    said     messages that no `expect` has returned, except about memories
    kept     descriptors of memories by name
    """

    def __init__(
        self, host: str, drivers: dict[str, str] | None = None, left: int = -1, command: Sequence[str] = ()
    ) -> None:
        """Start one.

        Args:
            host: names the rig.
            drivers: words of its own, as `module:Class` by name.
            left: a predecessor's journal.
            command: another program that takes `--socket N`, instead of ours.
        """
        self.host = host
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket = ours
        command = command or [sys.executable, "-c", _PROGRAM.format(drivers=drivers or {})]
        self.process = subprocess.Popen([*command, "--socket", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        self.memfd = left if left >= 0 else memfd.make("journal", journal.SIZE)
        self.journal = memfd.map_sealed(self.memfd, journal.SIZE)
        self.number = 0
        self._last_id = 0
        self.said: list[messages.FromWorker] = []
        self.openers = Openers()
        self._job = jobs.Job("vbd/5/51712", [], read_only=False)  # of the last `open`
        self._may_wait = False
        self._successor = ""  # the chain that is being put in
        self._drivers = drivers or {}
        BUILT_IN.update(self._drivers)  # for the openers, which are in this process

    @property
    def kept(self) -> dict[str, int]:
        """Return the memories that openers have made for the worker, by name."""
        return self.openers.memories

    @property
    def lines(self) -> list[messages.Log]:
        """Return the log lines that the worker has sent so far."""
        return [message for message in self.said if isinstance(message, messages.Log)]

    def send(self, message: messages.FromSupervisor, *fds: int) -> None:
        """Send a message."""
        socket.send_fds(self.socket, [codec.encode(message)], fds)

    def tell(self, kind: Callable[..., messages.Order], *fields: Any, fds: Sequence[int] = ()) -> int:
        """Give an order of this kind, with an opener if it may open something, and return its number."""
        self.number += 1
        order = kind(self.number, *fields)
        if isinstance(order, messages.Open):
            self._job = replace(self._job, chains=[order.chain], read_only=order.read_only, shareable=order.shareable)
            self._may_wait = order.may_wait
            devices = {"host": order.host, "frontend_domid": order.frontend_domid, "export": order.export}
            self._send_with_opener(order, replace(self._job, **devices), *fds)
        elif isinstance(order, messages.Serve) and self._may_wait:
            self._send_with_opener(order, self._job, *fds)
        else:
            self.send(order, *fds)
        return self.number

    def put(self, question: messages.Question) -> int:
        """Ask, with an opener if something may be opened for it, and return the question's id."""
        self._last_id += 1
        ask = messages.Ask(self._last_id, question)
        match question:
            case messages.Swap():
                self._send_with_opener(ask, replace(self._job, chains=[*self._job.chains[:1], question.chain]))
                if not question.is_dry_run:
                    self._successor = question.chain
            case messages.Reconnect():
                self._send_with_opener(ask, replace(self._job, only_connects=True))
            case messages.Branch():
                self._send_with_opener(ask, replace(self._job, makes=question.file))
            case _:
                self.send(ask)
        return self._last_id

    def _send_with_opener(self, message: messages.FromSupervisor, job: jobs.Job, *fds: int) -> None:
        with self.openers.begin(job) as opener:
            self.send(message, *fds[:1], opener.fileno(), *fds[1:])

    def hear(self, timeout_s: float = 20) -> messages.FromWorker | None:
        """Return the next message, None if the worker has closed the socket. Raises: TimeoutError."""
        if not select.select([self.socket], [], [], timeout_s)[0]:
            raise TimeoutError(f"the worker said nothing but {self.said}")
        try:
            datagram = self.socket.recv(messages.MAX_MESSAGE)
        except ConnectionResetError:  # it ended before it had read all messages
            return None
        if not datagram:
            return None
        message = codec.from_worker(datagram)
        if isinstance(message, messages.Standing) and message.chain == self._successor:
            self._job = replace(self._job, chains=[message.chain])
        if isinstance(message, messages.Disconnected):
            self.openers.disconnected(message.server, message.place, message.inode)
        return message

    def expect(self, is_wanted: Callable[[Any], bool]) -> Any:
        """Return the next message that is wanted; those before it go to `said`."""
        while True:
            message = self.hear()
            assert message is not None, f"the worker ended; it had said {self.said}"
            if is_wanted(message):
                return message
            self.said.append(message)

    def expect_standing(self, *stages: Stage) -> messages.Standing:
        """Return where it stands after the last order, once that is one of `stages` or the order has failed."""
        standing: messages.Standing = self.expect(
            lambda it: (
                isinstance(it, messages.Standing)
                and it.number == self.number
                and (not stages or it.stage in stages or bool(it.failure))
            )
        )
        return standing

    def expect_reply(self, number: int) -> messages.Reply:
        """Return the reply to the question with this id."""
        reply: messages.Reply = self.expect(lambda it: isinstance(it, messages.Reply) and it.id == number)
        return reply

    def ask(self, question: messages.Question) -> messages.Reply:
        """Ask, and return the reply."""
        return self.expect_reply(self.put(question))

    def stand(self) -> messages.Standing:
        """Return where the worker stands, as it reports."""
        self.tell(messages.Report)
        return self.expect_standing()

    def open(self, chain: str, **wishes: Any) -> messages.Standing:
        """Have it open a chain, and return where it stands then."""
        names = list(self.kept)
        how: dict[str, Any] = {"host": self.host, "read_only": False, "memories": names, "poll_us": POLL_US, **wishes}
        order = partial(messages.Open, vbd="vbd/5/51712", frontend_domid=DOMID, chain=chain, **how)
        self.tell(order, fds=[self.memfd, *[self.kept[name] for name in names]])
        return self.expect_standing()

    def counters(self) -> dict[str, int]:
        return counters.snapshot(self.journal)

    def expect_counter(self, name: str, value: int, *, at_least: bool = False, timeout_s: float = 5) -> int:
        """Wait until a counter, which is written once a second, has a value, and return it."""

        def has_it() -> bool:
            found = self.counters()[name]
            return found == value or (at_least and found > value)

        until(has_it, lambda: f"{name} is {self.counters()[name]}, not {value}", limit_s=timeout_s)
        return self.counters()[name]

    def end(self) -> None:
        """Close in order, and check that the process ends by itself."""
        self.close()
        assert self.process.wait(10) == 0
        self.openers.close()

    def close(self, *, hands_over: bool = False) -> messages.Standing:
        """Close in order, and return where it stands in the end."""
        self.tell(messages.Close, hands_over)
        return self.expect_standing(Stage.IDLE)

    def drop(self) -> None:
        """Release everything, whatever state it is in."""
        self.process.kill()
        self.process.wait()
        self.socket.close()
        self.openers.close()
        for name in self._drivers:
            BUILT_IN.pop(name, None)
        os.close(self.memfd)


class Driven:
    """One disk: hypervisor, guest, worker and frontend."""

    def __init__(
        self,
        directory: Path,
        pages: int = 16384,
        drivers: dict[str, str] | None = None,
        command: Sequence[str] = (),
    ) -> None:
        """Start all of it; `command` is a worker's program other than ours."""
        self.command = command
        self.xen = Xen(directory)
        self.xen.start()
        self.guest = Guest(directory, DOMID, pages)
        self.nodes = Nodes()
        self.limits = Limits(max_queues=8)
        self.goes_on = False  # the frontends that connect are in service already
        self.worker = WorkerProcess(f"xenbackend.rig.host:{directory}", drivers, command=command)
        self.disk: Disk
        self.frontend: Frontend

    def connect(self, chain: str, wishes: Wishes = Wishes(), **how: bool) -> Frontend:
        """Open a chain and connect a frontend to it."""
        self.open(chain, **how)
        return self.attach(wishes)

    def open(self, chain: str, **how: Any) -> messages.Standing:
        """Open a chain."""
        opened = self.worker.open(chain, **how)
        assert not opened.failure, opened
        top = opened.layers[0]
        read_only = top.read_only or how.get("read_only", False)
        self.disk = Disk(top.size, top.sector_size, read_only, top.can_flush, top.can_discard)
        return opened

    def attach(self, wishes: Wishes) -> Frontend:
        """Connect a new frontend to the open chain; none is connected."""
        self.announce(wishes)
        self.offer_rings()
        return self.joined()

    def announce(self, wishes: Wishes) -> None:
        """Let a new frontend announce its rings."""
        for key in [key for key in self.nodes.values if key.startswith(FRONT) and not key.endswith("/backend")]:
            del self.nodes.values[key]
        self._publish(publish_at_probe(self.limits))
        self.frontend = Frontend(self.guest, self.nodes, FRONT, wishes)
        self.frontend.announce()

    def joined(self) -> Frontend:
        """Return the frontend once the worker serves it."""
        standing = self.worker.expect_standing(Stage.SERVING)
        assert not standing.failure, standing
        self._publish(publish_at_connect(self.disk))
        self.frontend.read_facts()
        return self.frontend

    def connect_rings(self) -> messages.Standing:
        """Let the worker map what the frontend announced, and return where it stands then."""
        self.offer_rings()
        return self.worker.expect_standing(Stage.SERVING)

    def offer_rings(self) -> None:
        """Tell the worker what the frontend announced."""
        asked = parse_frontend(lambda key: self.nodes.read_optional(f"{FRONT}/{key}"), self.limits)
        rings = [messages.RingParameters(ring.grefs, ring.event_channel) for ring in asked.rings]
        connect = messages.Connect(asked.protocol, rings, asked.persistent, goes_on=self.goes_on)
        self.worker.tell(messages.Serve, connect)

    def reconnect(self, wishes: Wishes | None = None) -> Frontend:
        """Disconnect, check that no page of the guest is still mapped, and connect again, perhaps with other wishes."""
        self.disconnect()
        for ring in self.frontend.rings:
            ring.close()
        return self.attach(wishes or self.frontend.wishes)

    def start_successor(self) -> None:
        """Start another worker in the place of one that was killed, with the journal and the memories that it left."""
        old = self.worker
        self.worker = WorkerProcess(old.host, left=os.dup(old.memfd), command=self.command)
        self.worker.openers.memories, old.openers.memories = old.openers.memories, {}
        self.worker.openers.connections, old.openers.connections = old.openers.connections, {}
        old.drop()

    def kill(self) -> None:
        """Kill the worker as the kernel does: between any two instructions."""
        self.worker.process.kill()
        self.worker.process.wait()

    def succeed(self, chain: str, **how: Any) -> None:
        """Let a successor of a killed worker take over its rings."""
        self.start_successor()
        self.open(chain, **how)
        self.worker.tell(messages.Serve, None)
        standing = self.worker.expect_standing(Stage.SERVING)
        assert not standing.failure, standing

    def begin_write(self, data: bytes) -> Submitted:
        """Write to the disk's beginning, and return the request once the worker has taken it."""
        request = self.frontend.submit(BLKIF_OP_WRITE, 0, data=data)
        words = journal.RingJournal(self.worker.journal, 0, journal.SLOT).words
        while not words[journal.REQ_CONS]:
            pass
        return request

    def disconnect(self) -> None:
        """Have the worker leave the rings."""
        self.worker.tell(messages.Leave)
        assert self.worker.expect_standing(Stage.OPEN)

    def _publish(self, keys: dict[str, str]) -> None:
        for key, value in keys.items():
            self.nodes.write(f"{BACK}/{key}", value)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.worker.drop()
        self.guest.close()
        self.xen.close()
        self.nodes.close()
