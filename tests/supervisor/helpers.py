"""What these tests share: a registry stepped in the test's own thread, a toolstack and a frontend by hand."""

from __future__ import annotations

import os
import selectors
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from xenbackend.supervisor.service import parent
from xenbackend.supervisor.service.fleet import Fleet
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.registry import Registry
from xenbackend.supervisor.service.server import Reply, Server
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.xentop import Xentop
from xenbackend.supervisor.vbd.claim import Bus
from xenbackend.supervisor.vbd.events import Expired
from xenbackend.supervisor.vbd.vbd import Vbd
from xenbackend.supervisor.xenstore.nodes import Nodes
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store

_ROOT = Path(__file__).parents[2]
FAKE_WORKER = ("/usr/bin/env", f"PYTHONPATH={_ROOT}", sys.executable, str(Path(__file__).with_name("fake_worker.py")))
PATH = VbdPath("vbd", 0, 5, 51712)
PATIENCE_S = 20.0  # for what must happen; a failed test takes this long, a passed one does not


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
    ) -> None:
        self.selector = selectors.DefaultSelector()
        self.store = Store(address)
        self.answers: list[dict[str, Any]] = []  # that the script got
        self.fleet = Fleet(self.selector, FAKE_WORKER)
        self.registry = Registry(self.store, self.fleet, settings, self.selector, bus=bus, xentop=xentop, keeper=keeper)
        self.registry.start()
        self._runs_script = runs_script
        self._server = Server(socket, self.selector, self._answer, time.monotonic) if socket else None

    def _answer(self, request: dict[str, Any], reply: Reply) -> None:
        if request["verb"] == "hotplug":
            self.registry.hotplug(request["path"], reply)
        else:
            reply({"data": ""})

    def script(self, path: VbdPath = PATH) -> None:
        """Run the toolstack's hotplug script; what it is told goes to `answers`."""
        self.registry.hotplug(path.backend, self.answers.append)

    def turn(self, timeout_s: float = 0.05) -> None:
        """Do one pass of the loop."""
        is_busy = self.registry.turn()
        for path, vbd in list(self.registry.vbds.items()):
            if self._runs_script and vbd.device.ours == 2 and not vbd.device.hotplug and not vbd.scripts:
                self.script(path)
        for key, _ in self.selector.select(0 if is_busy else timeout_s):
            if self.selector.get_map().get(key.fd) is key:
                key.data()

    def until(self, condition: Callable[[], Any], *, timeout_s: float = 0.05) -> Any:
        """Turn until the condition holds, and return what it returned."""
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, "it never happened"
            self.turn(timeout_s)
        return found

    def vbd(self) -> Vbd:
        """The one vbd that most tests have."""
        return self.until(lambda: self.registry.vbds.get(PATH))

    def expire(self) -> None:
        """Let the vbd's limit be over now."""
        self.vbd().handle(Expired())

    def ask(self, order: Callable[..., None], *arguments: str) -> dict[str, Any]:
        """Give an order, wait for its answer and return it."""
        answers: list[dict[str, Any]] = []
        order(*arguments, answers.append)
        self.until(lambda: answers)
        return answers[0]

    def leave(self) -> None:
        """Stop, and leave the workers to the next service."""
        self.registry.stop(leaves=True)
        assert not self.registry.vbds
        self._close()

    def close(self) -> None:
        """Stop, and see that every worker ends."""
        self.registry.stop()
        for vbd in self.registry.vbds.values():
            if vbd.worker is not None:
                vbd.worker.kill("the test is over")
        self.until(lambda: not self.registry.vbds)
        self._close()

    def _close(self) -> None:
        self.fleet.close()
        if self._server is not None:
            self._server.close()
        self.store.close()
        self.selector.close()


class Kept:
    """A keeper of descriptors, whose memory goes from one service to the next: that of `supervisor.parent`."""

    def __init__(self, directory: Path) -> None:
        self._parents = parent.Store(directory / "keep")
        self._parents.socket.setblocking(False)
        self._environment = {"NOTIFY_SOCKET": str(self._parents.path), "FDSTORE": "64"}

    @property
    def fds(self) -> dict[str, int]:
        """What is kept now, by name."""
        with suppress(BlockingIOError):
            while self._parents.take():
                pass
        return self._parents.fds

    def keeper(self) -> Keeper:
        """Return the keeper as the next service has it, with descriptors of its own."""
        keeper = Keeper(self._environment)
        keeper.inherited |= {name: os.dup(fd) for name, fd in self.fds.items()}
        return keeper

    def close(self) -> None:
        """Let go of everything."""
        self._parents.close()


def write_like_libxl(store: Store, path: VbdPath = PATH, **changes: str) -> None:
    """Make both directories as libxl does, in one transaction; `changes` has ``_`` for ``-`` in keys."""
    back = {
        "frontend": path.frontend, "params": "null:1G", "script": "/etc/xen/scripts/block-xenbackend",
        "online": "1", "mode": "w", "device-type": "disk", "state": "1",
    }  # fmt: skip
    back |= {key.replace("_", "-"): value for key, value in changes.items()}

    def body(nodes: Nodes) -> None:
        for directory, permissions in ((path.frontend, ["n5", "r0"]), (path.backend, ["n0", "r5"])):
            nodes.mkdir(directory)
            nodes.set_permissions(directory, permissions)
        for key, value in back.items():
            nodes.write(f"{path.backend}/{key}", value)
        nodes.write(f"{path.frontend}/backend", path.backend)
        nodes.write(f"{path.frontend}/state", "1")
        nodes.set_permissions(f"{path.frontend}/state", ["n5", "r0"])

    store.transact(body)


def offer_ring(guest: Store, path: VbdPath = PATH) -> None:
    """Do what a frontend does when it sees InitWait."""
    guest.write(f"{path.frontend}/ring-ref", "8")
    guest.write(f"{path.frontend}/event-channel", "3")
    guest.write(f"{path.frontend}/protocol", "x86_64-abi")
    guest.write(f"{path.frontend}/state", "3")


def remove_like_libxl(store: Store, path: VbdPath = PATH) -> None:
    """Ask for the vbd to go away."""

    def body(nodes: Nodes) -> None:
        nodes.write(f"{path.backend}/online", "0")
        nodes.write(f"{path.backend}/state", "5")

    store.transact(body)
