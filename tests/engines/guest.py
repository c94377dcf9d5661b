"""A guest of the embedded machine with one disk of an engine, under verified load.

Must not know which engine that is.
"""

from __future__ import annotations

import os
import signal
from contextlib import ExitStack, closing
from typing import Any, Protocol

from tests.workload import Load, make_model, read_all
from xenbackend.embedded.machine import Machine
from xenbackend.rig.frontend import Wishes

SIZE = 64 << 20
SECTORS = SIZE // 512
DOMID = 5


class Server(Protocol):
    """An engine's process, as tests need it."""

    def start(self) -> None:
        """Start it."""

    def kill(self) -> None:
        """Kill it."""

    def is_alive(self) -> bool:
        """Return whether it runs."""


class Guest:
    """A guest with a disk of an engine under verified load."""

    def __init__(self, machine: Machine, chain: str, seed: int, stack: ExitStack) -> None:
        self.machine = machine
        guest = stack.enter_context(closing(machine.create_guest(DOMID)))
        self.path = machine.attach(DOMID, "xvda", chain)
        self.frontend = stack.enter_context(closing(guest.connect(self.path, Wishes(persistent=True, indirect=64))))
        self.model = make_model(seed, SECTORS, can_discard=False)
        self.load = Load(self.frontend, self.model, patience_s=60)

    def status(self) -> dict[str, Any]:
        """Return the service's status of the disk."""
        [found] = self.machine.ask({"verb": "status"})["data"]
        return found

    def connection(self) -> str:
        """Return the layer's fact about its connection."""
        return self.fact("connection")

    def fact(self, key: str) -> str:
        """Return a fact of the layer, or an empty text."""
        layers = self.status()["layers"]
        return str(layers[0]["facts"].get(key, "")) if layers else ""

    def error(self) -> str:
        """Return why the disk is not served, or not fully."""
        return str(self.status()["error"] or "")

    def kill(self) -> None:
        """Kill the worker if there is one; it may be just starting."""
        worker = self.status()["worker"]
        if worker:
            os.kill(worker, signal.SIGKILL)

    def outlive(self, server: Server) -> None:
        """Kill the worker, the server and the worker again, each amid requests. Restart the server if needed."""
        for dies in (self.kill, server.kill, self.kill):
            self.load.run(60)
            self.load.top_up()
            dies()
            if not server.is_alive():
                server.start()

    def end(self) -> None:
        """Check that the guest saw no error, and that each sector holds what was written."""
        self.load.finish()
        assert 0 == self.model.failures
        read_all(self.frontend, self.model)
