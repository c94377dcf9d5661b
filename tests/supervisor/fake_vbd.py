"""A vbd that only records what it is asked for, and the registry around it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.supervisor.helpers import Clock, settle
from xenbackend.errors import KernelError, StoreError
from xenbackend.loop.reactor import Reactor
from xenbackend.protocol.answers import Reply
from xenbackend.supervisor.service.keeper import Keeper
from xenbackend.supervisor.service.registry import Registry
from xenbackend.supervisor.service.settings import Settings
from xenbackend.supervisor.service.xentop import Xentop
from xenbackend.supervisor.vbd.last_chains import LastChains
from xenbackend.supervisor.xenstore.paths import VbdPath
from xenbackend.supervisor.xenstore.store import Store


class FakeVbd:
    """A fake vbd. `calls` has the calls to all of them, `bugs` the methods that raise, `short` those that cannot be
    made now.
    """

    calls: list[tuple[VbdPath, str]]
    bugs: set[tuple[VbdPath, str]]
    short: set[VbdPath]

    def __init__(
        self,
        path: VbdPath,
        context: Any,
        inherited: Mapping[str, int] | None,
        on_forgotten: Callable[[FakeVbd], None],
    ) -> None:
        self.path = path
        self.token = f"frontend/{path}"
        self.is_forgotten = False
        self.worker = None
        self.looks: list[str] = []
        self.stopped: list[bool] = []
        self.doubted = 0
        self.waiting: list[Reply] = []  # replies to hotplug scripts
        self.page: memoryview | None = None
        self.inherited = dict(inherited) if inherited is not None else None
        self._on_forgotten = on_forgotten
        try:
            self._note("__init__")
            if path in self.short:
                raise KernelError("map a memory of 8192 bytes", errno.ENOMEM)
        except (ValueError, KernelError):
            self._let_go()
            raise

    def _note(self, method: str) -> None:
        assert not self.is_forgotten, f"{method} of a vbd that was forgotten"
        self.calls.append((self.path, method))
        if (self.path, method) in self.bugs:
            raise ValueError(f"a bug of {self.path}")

    def look_soon(self, *, node: bool, theirs: bool) -> None:
        """Note that a look is due."""
        self._note("look_soon")
        self.looks += ["node"] * node + ["theirs"] * theirs

    def hotplug(self, reply: Reply) -> None:
        """Record a script that waits."""
        self._note("hotplug")
        self.waiting.append(reply)

    def stop(self, *, leaves: bool) -> None:
        """Record how the service ends."""
        self._note("stop")
        self.stopped.append(leaves)

    def doubt(self) -> None:
        """Note that xenstore was away."""
        self._note("doubt")
        self.doubted += 1

    def counters_page(self) -> memoryview | None:
        """Return the page that the test has set."""
        self._note("counters_page")
        return self.page

    def give_up_scripts(self) -> list[Reply]:
        """Return the scripts that wait."""
        given, self.waiting = self.waiting, []
        return given

    def end(self) -> None:
        """Let the vbd be over."""
        self._note("end")
        self.is_forgotten = True
        self._let_go()
        self._on_forgotten(self)

    def _let_go(self) -> None:
        for fd in (self.inherited or {}).values():
            os.close(fd)


class Place:
    """A registry of fake vbds in a loop whose clock stands still."""

    def __init__(
        self,
        address: str,
        settings: Settings | None = None,
        *,
        keeper: Keeper | None = None,
        xentop: Xentop | None = None,
    ) -> None:
        FakeVbd.calls, FakeVbd.bugs, FakeVbd.short = [], set(), set()
        self.clock = Clock()
        self.told: list[Exception] = []
        self.changes: list[int] = []  # the number of vbds after each change
        self.loop = Reactor(self.clock, on_bug=self.told.append)
        self.store = Store(address)
        context: Any = SimpleNamespace(
            store=self.store,
            loop=self.loop,
            settings=settings or Settings(),
            keeper=keeper or Keeper({}),
            last_chains=LastChains(Path("/proc/nowhere")),
        )
        make: Any = FakeVbd
        self.registry = Registry(context, make, xentop=xentop, on_change=self._note_change)

    def _note_change(self) -> None:
        self.changes.append(len(self.registry.vbds))

    def start(self) -> Place:
        """Start the registry, and look at everything."""
        self.registry.start()
        self.settle()
        return self

    def settle(self, seconds: float = 0.0) -> None:
        """Let some time pass, and do all that is due; what others did in xenstore is seen by then."""
        self.clock.time += seconds
        with suppress(StoreError):
            self.store.read("domid")  # its answer comes after the events
        settle(self.loop)

    def vbd(self, path: VbdPath) -> FakeVbd:
        """Return the vbd at a path."""
        found: Any = self.registry.vbds[path]
        return found

    def close(self) -> None:
        """End everything."""
        for path in list(self.registry.vbds):
            self.vbd(path).end()
        self.registry.stop()
        self.registry.close()
        self.store.close()
        self.loop.close()
