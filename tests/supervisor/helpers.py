"""Shared by these tests: a registry in the test's thread, and a toolstack and a frontend that the test drives."""

from __future__ import annotations

import os
import select
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.answers import Answer, Reply
from xenbackend.protocol.codes import Code
from xenbackend.supervisor.service import parent
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.keeper import Keeper, length_of
from xenbackend.supervisor.service.ledger import Ledger
from xenbackend.supervisor.service.registry import Registry
from xenbackend.supervisor.service.server import Peer, Server
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.xentop import Xentop
from xenbackend.supervisor.vbd.claim import Bus
from xenbackend.supervisor.vbd.context import Context
from xenbackend.supervisor.vbd.events import Expired
from xenbackend.supervisor.vbd.last_chains import LastChains
from xenbackend.supervisor.vbd.vbd import Vbd
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store

_ROOT = Path(__file__).parents[2]
# An opener that opens nothing: it reads its job, and ends when its socket is closed.
_READS = "import socket, sys\nnear = socket.socket(fileno=int(sys.argv[2]))\nwhile near.recv(1 << 18): pass"
FAKE_OPENER = (sys.executable, "-I", "-S", "-c", _READS)
FAKE_WORKER = ("/usr/bin/env", f"PYTHONPATH={_ROOT}", sys.executable, str(Path(__file__).with_name("fake_worker.py")))
# A zygote that never becomes ready.
NEVER_READY = (sys.executable, "-I", "-S", "-c", "import os, signal; os.kill(os.getpid(), signal.SIGSTOP)")
PATH = VbdPath("vbd", 0, 5, 51712)
_TICK_S = 0.05
PATIENCE_S = 20.0  # until a test fails that waits for something


class Clock:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


def run_until(loop: Reactor, condition: Callable[[], object]) -> None:
    """Let a loop run until the condition holds."""
    give_up = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < give_up, "it never happened"
        loop.call_later(0.005, loop.stop)
        loop.run()


def settle(loop: Reactor, passes: int = 20) -> None:
    """Let a loop do everything that is due now, and what follows from that, without waiting."""
    for _ in range(passes):
        loop.call_soon(loop.stop)
        loop.run()


class Stepped:
    """A registry and the loop around it, with a toolstack that runs the hotplug script once it sees InitWait."""

    def __init__(
        self,
        address: str,
        settings: Settings,
        *,
        bus: Bus | None = None,
        xentop: Xentop | None = None,
        keeper: Keeper | None = None,
        socket: str = "",
        runs_script: bool = True,
        directory: Path = Path("/proc/nowhere"),
        starts: bool = True,
    ) -> None:
        self.bugs: list[Exception] = []
        self.loop = Reactor(on_bug=self.bugs.append)
        self.store = Store(address)
        self.answers: list[Answer] = []  # to the script
        self.fleet = Fleet(self.loop, FAKE_WORKER, opener=FAKE_OPENER)
        keeper = keeper or Keeper({})
        ledger, last_chains = Ledger(keeper), LastChains(directory)
        self.context = Context(
            self.store, self.loop, self.fleet, settings, bus or Bus(), keeper, time.time, ledger, last_chains
        )
        self.registry = Registry(self.context, Vbd, xentop=xentop)
        if starts:
            self.registry.start()
        self._runs_script = runs_script
        self._is_waiting = False
        self._asked: dict[VbdPath, Vbd] = {}  # for which the script was run
        self._tick = self.loop.timer(int)  # wakes the loop, as a condition may depend on another process
        self.loop.before_sleep(self._run_scripts)
        self._server = Server(socket, self.loop, self._answer) if socket else None

    def _answer(self, request: dict[str, Any], _peer: Peer, reply: Reply) -> None:
        if request["verb"] == "hotplug":
            self.registry.hotplug(request["path"], reply)
        else:
            reply(Answer(Code.OK, ""))

    def script(self, path: VbdPath = PATH) -> None:
        """Run the toolstack's hotplug script, whose answer goes to `answers`."""
        self.registry.hotplug(path.backend, self.answers.append)

    def _run_scripts(self) -> bool:
        """Run the script for each vbd in InitWait, as a toolstack does."""
        for path, vbd in list(self.registry.vbds.items()):
            is_due = self._runs_script and vbd.device.sight.ours == 2 and not vbd.device.sight.hotplug
            if is_due and self._asked.get(path) is not vbd:
                self._asked[path] = vbd
                self.script(path)
        return False

    def turn(self, seconds: float = 0.0) -> None:
        """Let the loop make one pass, or run for some seconds."""
        if not seconds:
            settle(self.loop, 1)
            return
        limit = self.loop.timer(self.loop.stop)
        limit.set(self.loop.now() + seconds)
        self.loop.run()

    def until(self, condition: Callable[[], Any]) -> Any:
        """Let the loop run until the condition holds, and return what it returned."""
        deadline = time.monotonic() + PATIENCE_S
        seen: list[Any] = []

        assert not self._is_waiting, "a condition waits for another one"
        self._is_waiting = True

        def look() -> bool:
            self._tick.set(self.loop.now() + _TICK_S)
            try:
                seen.append(condition())
            except Exception as error:
                seen.append(error)
            if seen[-1] or time.monotonic() >= deadline:
                self.loop.stop()
            return False

        self.loop.before_sleep(look)
        self.loop.run()
        self.loop.remove_hook(look)
        self._is_waiting = False
        if isinstance(seen[-1], Exception):
            raise seen[-1]
        assert seen[-1], "it never happened"
        return seen[-1]

    def vbd(self) -> Vbd:
        """The one vbd that most tests have."""
        return self.registry.vbds.get(PATH) or self.until(lambda: self.registry.vbds.get(PATH))

    def expire(self) -> None:
        """Let the vbd's limit be over."""
        self.vbd().handle(Expired())

    def give(self, verb: str, **request: Any) -> Answer:
        """Give an order to the one vbd, wait for its answer and return it."""
        answers: list[Answer] = []
        number = self.context.ledger.open(verb, str(PATH), {}, {})
        self.vbd().orders.give(verb, request, number, answers.append)
        self.until(lambda: answers)
        return answers[0]

    def leave(self) -> None:
        """Stop the registry, and leave the workers to the next service."""
        self.registry.stop(leaves=True)
        assert not self.registry.vbds
        self.context.ledger.leave()
        self._close()

    def close(self) -> None:
        """Stop the registry, and end every worker."""
        self.registry.stop()
        for vbd in self.registry.vbds.values():
            if vbd.worker is not None:
                vbd.worker.kill("the test is over")
        self.until(lambda: not self.registry.vbds)
        self.context.ledger.forget()
        self._close()

    def _close(self) -> None:
        self._tick.set(None)
        self.registry.close()
        self.fleet.close()
        if self._server is not None:
            self._server.close()
        self.store.close()
        self.loop.close()
        assert [] == self.bugs


class Kept:
    """A keeper of descriptors, which outlives a service: the store of `supervisor.parent`.

    It listens all the time, as a parent does: else a service would wait for its time-out again and again.
    """

    def __init__(self, directory: Path) -> None:
        self._parents = parent.Store(directory / "keep")
        self._environment = {"NOTIFY_SOCKET": str(self._parents.path), "FDSTORE": str(parent.MAX_KEPT)}
        self._lock = threading.Lock()
        self._end = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        while self._end not in select.select([self._parents.socket, self._end], [], [])[0]:
            self._take_all()

    def _take_all(self) -> None:
        with self._lock, suppress(BlockingIOError):
            while self._parents.take():
                pass

    @property
    def fds(self) -> dict[str, int]:
        """The kept descriptors by name."""
        self._take_all()
        return self._parents.fds

    def keeper(self, room: int = parent.MAX_KEPT) -> Keeper:
        """Return the keeper as the next service finds it, with descriptors of its own; `room` is how many it says it
        can keep.
        """
        keeper = Keeper({**self._environment, "FDSTORE": str(room)})
        keeper.inherited |= {name: os.dup(fd) for name, fd in self.fds.items()}
        keeper._names |= keeper.inherited.keys()
        keeper._length = length_of(keeper._names)
        return keeper

    def close(self) -> None:
        """Let go of everything; nothing the second time."""
        if self._thread.is_alive():
            os.eventfd_write(self._end, 1)
            self._thread.join()
            os.close(self._end)
            self._parents.close()


def write_like_libxl(store: Store, path: VbdPath = PATH, **changes: str) -> None:
    """Make both directories as libxl does, in one transaction; `changes` has ``_`` for ``-`` in keys."""
    back = {
        "frontend": path.frontend, "params": "null:1G", "script": "/etc/xen/scripts/block-xenbackend",
        "online": "1", "mode": "w", "device-type": "disk", "state": "1",
    }  # fmt: skip
    back |= {key.replace("_", "-"): value for key, value in changes.items()}

    front_permissions = [f"n{path.frontend_domid}", f"r{path.backend_domid}"]
    back_permissions = [f"n{path.backend_domid}", f"r{path.frontend_domid}"]

    def body(nodes: Nodes) -> None:
        for directory, permissions in ((path.frontend, front_permissions), (path.backend, back_permissions)):
            nodes.mkdir(directory)
            nodes.set_permissions(directory, permissions)
        for key, value in back.items():
            nodes.write(f"{path.backend}/{key}", value)
        nodes.write(f"{path.frontend}/backend", path.backend)
        nodes.write(f"{path.frontend}/state", "1")
        nodes.set_permissions(f"{path.frontend}/state", front_permissions)

    store.transact(body)


def offer_ring(guest: Store, path: VbdPath = PATH) -> None:
    """Do what a frontend does when it sees InitWait."""
    guest.write(f"{path.frontend}/ring-ref", "8")
    guest.write(f"{path.frontend}/event-channel", "3")
    guest.write(f"{path.frontend}/protocol", "x86_64-abi")
    guest.write(f"{path.frontend}/state", "3")


def remove_like_libxl(store: Store, path: VbdPath = PATH) -> None:
    """Ask for the removal of a vbd."""

    def body(nodes: Nodes) -> None:
        nodes.write(f"{path.backend}/online", "0")
        nodes.write(f"{path.backend}/state", "5")

    store.transact(body)
