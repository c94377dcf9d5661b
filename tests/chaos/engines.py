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
from types import TracebackType
from typing import Any, Protocol, Self

from tests.certificates import Authority
from tests.chaos.plan import KILL_SERVER, REFUSE, SECTORS, STOP_SERVER, Disk
from tests.engines.ceph import Ceph
from tests.engines.servers import Engine

SIZE = SECTORS * 512
STOPPED_S = 0.3
AWAY_S = 0.1
DRAIN = "drain=200ms"  # of servers that close early: their writes go to the page cache
_LOOK_S = 0.05

Ask = Callable[[dict[str, Any]], Any]


class Engines(Protocol):
    """One kind of engine. `actions` are called with a guest's number, and a function that asks the service."""

    disks: list[Disk]
    kills: int
    actions: dict[str, Callable[[int, Ask], None]]

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NbdServers:
    """Four servers: qemu-nbd, nbdkit, qemu-nbd with TLS and several connections, qemu-storage-daemon."""

    programs = ("qemu-nbd", "nbdkit", "qemu-storage-daemon", "openssl")

    def __init__(self, directory: Path) -> None:
        """Start nothing yet."""
        self.disks: list[Disk] = []
        self.kills = 0
        self.actions: dict[str, Callable[[int, Ask], None]] = {KILL_SERVER: self._kill, STOP_SERVER: self._stop}
        self._directory = directory
        self._engines: list[Engine] = []
        self._lock = threading.Lock()  # held while one is started
        self._is_over = threading.Event()
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as undo:
            self._directory.mkdir()
            ours = Authority(self._directory / "authority")
            tls = f"tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={ours.server('server')}"
            more = f",connections=3,certificates={ours.client('client', shows_itself=True)}"
            for number, (kind, options, in_chain) in enumerate(
                (
                    ("qemu-nbd", [], ""),
                    ("nbdkit", [], ""),
                    ("qemu-nbd", ["--object", tls, "--tls-creds", "t"], more),
                    ("qemu-storage-daemon", [], ""),
                )
            ):
                directory = self._directory / f"server-{number}"
                directory.mkdir()
                engine = undo.enter_context(Engine(kind, directory, SIZE, options, in_chain))
                self._engines.append(engine)
            chains = [each.chain.replace("drain=1s", DRAIN) for each in self._engines]
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


class Cluster:
    """A Ceph with an image for each of four guests."""

    programs = ("ceph-mon", "ceph-osd", "rbd")

    def __init__(self, directory: Path) -> None:
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


KINDS: dict[str, type[NbdServers] | type[Cluster]] = {"nbd": NbdServers, "rbd": Cluster}


def missing(kind: str) -> list[str]:
    """Return the programs that this host lacks for a kind."""
    return [each for each in KINDS[kind].programs if shutil.which(each) is None]
