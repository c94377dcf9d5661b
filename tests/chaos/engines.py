"""Servers and a cluster below the guests of a chaos run, and what can be done to them.

Must not choose what is done, nor judge it.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from random import Random
from types import TracebackType
from typing import Any, Protocol, Self

from tests.certificates import Authority
from tests.chaos.link import Fault, Link
from tests.chaos.plan import KILL_SERVER, LINK_FAULT, REFUSE, SECTORS, STOP_SERVER, Disk
from tests.engines.ceph import Ceph
from tests.engines.servers import Engine, tls_of

SIZE = SECTORS * 512
STOPPED_S = 0.3
AWAY_S = 0.1
DRAIN = "drain=200ms"  # of servers that close early: their writes go to the page cache
_LOOK_S = 0.01  # less than a server takes to start

Ask = Callable[[dict[str, Any]], Any]


class Engines(Protocol):
    """One kind of engine. `actions` are called with a guest's number, and a function that asks the service."""

    disks: list[Disk]
    kills: int
    actions: dict[str, Callable[[int, Ask], None]]

    def is_slowed(self, number: int, since_ns: int) -> bool: ...

    def counts(self) -> dict[str, int]: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NbdServers:
    """Four servers of a kind. Links with faults lead to two of them.

    Subclasses say which servers, and which faults they bear: an end that the server has not made proves nothing, so
    only a chain with `drain=` bears one.
    """

    programs: tuple[str, ...]
    servers: tuple[tuple[str, bool], ...]  # kind; whether it has TLS and several connections
    faults = tuple(Fault)

    def __init__(self, directory: Path, seed: int) -> None:
        """Start nothing yet."""
        self.disks: list[Disk] = []
        self.kills = 0
        self.actions: dict[str, Callable[[int, Ask], None]] = {
            KILL_SERVER: self._kill,
            STOP_SERVER: self._stop,
            LINK_FAULT: self._fail_link,
        }
        self._directory = directory
        self._random = Random(seed)
        self._engines: list[Engine] = []
        self._links: dict[int, Link] = {}
        self._lock = threading.Lock()  # held while one is started
        self._is_over = threading.Event()
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._directory.mkdir()
            ours = Authority(self._directory / "authority")
            more = f",connections=3,certificates={ours.client('client', shows_itself=True)}"
            for number, (kind, has_tls) in enumerate(self.servers):
                directory = self._directory / f"server-{number}"
                directory.mkdir()
                options = tls_of(kind, ours.server("server")) if has_tls else []
                engine = Engine(kind, directory, SIZE, options, more if has_tls else "", has_socket_unit=True)
                self._engines.append(undo.enter_context(engine))
            for number in (1, 2):
                path = self._directory / f"link-{number}"
                self._links[number] = undo.enter_context(Link(path, self._engines[number].socket))
            chains = [self._chain(number) for number in range(len(self._engines))]
            self.disks = [
                Disk(chains[0], f"log:|{chains[0]}", queues=2),
                Disk(f"log:|{chains[1]}", chains[1], indirect=32),
                Disk(chains[2], f"throttle:iops=3000|log:|{chains[2]}", persistent=False),
                Disk(chains[3], f"readahead:size=64K|log:|{chains[3]}", ring_order=2),
            ]
            watch = threading.Thread(target=self._watch)
            watch.start()
            undo.callback(watch.join)
            undo.callback(self._is_over.set)
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def is_slowed(self, number: int, since_ns: int) -> bool:
        """Return whether a guest's link has had a fault since then."""
        return number in self._links and self._links[number].has_fault(since_ns)

    def counts(self) -> dict[str, int]:
        """Return how often connections had each fault."""
        return {fault.value: sum(link.counts[fault] for link in self._links.values()) for fault in self.faults}

    def _chain(self, number: int) -> str:
        chain = self._engines[number].chain.replace("drain=1s", DRAIN)
        if number not in self._links:
            return chain
        return f"{chain.replace(str(self._engines[number].socket), str(self._links[number].path))},timeout=2s"

    def _watch(self) -> None:
        """Restart servers that have ended, as a unit does: nbdkit 1.32 aborts if a client dies with requests open."""
        while not self._is_over.wait(_LOOK_S):
            for engine in self._engines:
                with self._lock:
                    if not engine.is_alive():
                        engine.start()

    def _kill(self, number: int, _ask: Ask) -> None:
        with self._lock:
            self._engines[number].kill()
            self._is_over.wait(AWAY_S)
            self._engines[number].start()
        self.kills += 1

    def _stop(self, number: int, _ask: Ask) -> None:
        with self._lock:  # one that has ended is not there to be stopped
            self._engines[number].send(signal.SIGSTOP)
            self._is_over.wait(STOPPED_S)
            self._engines[number].send(signal.SIGCONT)

    def _fail_link(self, _number: int, _ask: Ask) -> None:
        """Have a fault on one link. Steps follow at once, so that what they do meets the fault."""
        self._random.choice([*self._links.values()]).fail(self._random.choice(self.faults), self._random)


class Nbdkit(NbdServers):
    """nbdkit with one thread: the end of a connection proves that nothing is under way."""

    programs = ("nbdkit", "openssl")
    servers = (("nbdkit", False), ("nbdkit", False), ("nbdkit", True), ("nbdkit", False))
    faults = tuple(each for each in Fault if each is not Fault.HALF)


class Qemu(NbdServers):
    """QEMU's servers, which end a connection at once: a successor waits for the time of `drain`."""

    programs = ("qemu-nbd", "qemu-storage-daemon", "openssl")
    servers = (("qemu-nbd", False), ("qemu-nbd", False), ("qemu-nbd", True), ("qemu-storage-daemon", False))


class Cluster:
    """A Ceph with an image for each of four guests."""

    programs = ("ceph-mon", "ceph-osd", "rbd")

    def __init__(self, directory: Path, _seed: int) -> None:
        """Start nothing yet."""
        self.disks: list[Disk] = []
        self.kills = 0
        self.actions: dict[str, Callable[[int, Ask], None]] = {STOP_SERVER: self._stop, REFUSE: self._refuse}
        self._directory = directory
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._directory.mkdir()
            ceph = undo.enter_context(Ceph(self._directory))
            self._ceph = ceph
            chains = [ceph.create(f"guest{number}", f"{SIZE}B") for number in range(4)]
            self.disks = [
                Disk(chains[0], f"log:|{chains[0]}", queues=2, discard=False),
                Disk(f"log:|{chains[1]}", chains[1], indirect=32, discard=False),
                Disk(chains[2], f"throttle:iops=3000|log:|{chains[2]}", persistent=False, discard=False),
                Disk(chains[3], f"readahead:size=64K|log:|{chains[3]}", ring_order=2, discard=False),
            ]
            self._undo = undo.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo.close()

    def is_slowed(self, _number: int, _since_ns: int) -> bool:
        """Return False: there are no links."""
        return False

    def counts(self) -> dict[str, int]:
        """Return nothing: there are no links."""
        return {}

    def _stop(self, _number: int, _ask: Ask) -> None:
        self._ceph.stop_osd()
        threading.Event().wait(STOPPED_S)
        self._ceph.continue_osd()

    def _refuse(self, number: int, ask: Ask) -> None:
        """Have the cluster refuse the client that serves a guest, if there is one now."""
        status = sorted(ask({"verb": "status"}), key=lambda each: int(each["domid"]))[number]
        locks = [each["facts"].get("lock", "") for each in status["layers"]]
        for address in [each.split()[-1] for each in locks if each]:
            self._ceph.ceph("osd", "blocklist", "add", address)


KINDS: dict[str, type[NbdServers] | type[Cluster]] = {"nbdkit": Nbdkit, "qemu-nbd": Qemu, "rbd": Cluster}

GOALS_MS = {"nbdkit": 50, "qemu-nbd": 250, "rbd": 400}  # from a kill to the first answer; 200 of qemu-nbd's are DRAIN


def missing(kind: str) -> list[str]:
    """Return the programs that this host lacks for a kind."""
    return [each for each in KINDS[kind].programs if shutil.which(each) is None]
