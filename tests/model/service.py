"""The supervisor as a process: its start with what the keeper has, its steps, its death and its end.

Must not do the service's work: `Service` is the product's, with the model's store, loop, fleet and clock.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from tests.model.fleet import LocalFleet
from tests.model.machine import Begun, Died, Loop, Process
from tests.model.xenstore import LocalStore
from xenbackend.errors import StoreError
from xenbackend.supervisor.service import main
from xenbackend.supervisor.service.settings import Settings

if TYPE_CHECKING:
    from tests.model.world import World


class LocalKeeper:
    """A keeper of descriptors: `kept` outlives the service."""

    is_there = True

    def __init__(self, world: World, kept: dict[str, int]) -> None:
        self.inherited = {name: os.dup(fd) for name, fd in kept.items()}
        self._world = world
        self._kept = kept

    def keep(self, name: str, fd: int) -> None:
        self._world.point("service: before a descriptor is kept")
        with self._world.machine.outside():
            self._let_go(name)
            self._kept[name] = os.dup(fd)
        self._world.point("service: after a descriptor was kept")

    def replace(self, name: str, fd: int) -> None:
        self.keep(name, fd)

    def forget(self, name: str) -> None:
        self._world.point("service: before a descriptor is forgotten")
        with self._world.machine.outside():
            self._let_go(name)

    def send_again_from(self, loop: object) -> None:
        """Everything is taken at once."""

    def close(self, *, waits: bool) -> None:
        """Nothing is left to be taken."""

    def _let_go(self, name: str) -> None:
        fd = self._kept.pop(name, -1)
        if fd >= 0:
            os.close(fd)


class Nobody:
    """A notifier that notifies nobody."""

    interval_s = None

    def __getattr__(self, _: str) -> Any:
        return lambda *_: None


class ServiceProcess(Process):
    """One service, from its start to its end."""

    def __init__(self, world: World) -> None:
        super().__init__("service", world.machine)
        self._world = world
        self.loop: Loop | None = None
        self.service: Any = None
        self.is_over = False
        self.has_begun = self.is_stopping = False
        self._store: LocalStore | None = None

    def has_something(self) -> bool:
        """Return whether a step would do anything."""
        return not self.is_over and (self.loop is None or self.loop.has_something())

    def step(self) -> None:
        """Begin, or let the loop pass once."""
        how = ""
        try:
            with self.running():
                self._pass()
        except Died:
            how = "killed"
        except StoreError:
            how = "found no xenstore"
        if how:  # not before: an exception that is being handled keeps objects alive that must be collected
            self.kill(how)

    def _pass(self) -> None:
        world = self._world
        if self.loop is None:
            self.loop = world.new_loop(None)
            world.clock.now += 0.001  # a process takes that long to start, and numbers are times
            self._begin()
            return
        self.loop.step()
        self._end_if_it_is_over()

    def _end_if_it_is_over(self) -> None:
        if self.loop is not None and self.loop.is_stopped:
            self.service._close()
            self.is_over = True
            self._world.service_is_over(self)

    def _begin(self) -> None:
        world = self._world
        main.Reactor = self._loop_of
        main.Store = self._connect
        main.Fleet = lambda loop, *more, **named: LocalFleet(loop, world=world)
        keeper: Any = LocalKeeper(world, world.kept)
        settings = Settings(
            host=f"tests.model.machine:{world.machine.name}", socket=world.control, poll_us=0, store="model"
        )
        notifier: Any = Nobody()
        self.service = main.Service(settings, notifier, keeper, clock=world.clock, wall_clock=world.clock.time)
        try:
            self.service.run()
        except Begun:
            self.has_begun = True
        self._end_if_it_is_over()

    def stop(self, number: int) -> None:
        """Deliver a signal."""
        loop = self.loop
        if loop is not None and self.has_begun:
            self.is_stopping = True
            loop.call_soon(lambda: self.service._stop(number))

    def _connect(self, *_: Any) -> LocalStore:
        self._store = self._world.xenstored.store(0, self._world.before_operation)
        return self._store

    def _loop_of(self, _clock: Any, on_bug: Any) -> Loop:
        assert self.loop is not None
        self.loop._on_bug = on_bug
        return self.loop

    def kill(self, how: str) -> None:
        """End the service as SIGKILL does; `how`: for the report."""
        if self.is_over:
            return
        self.is_over = True
        loop, self.loop = self.loop, None
        self._world.service_is_over(self, rests=how != "killed")
        if self._store is not None:
            self._store.close()
        self.service = self._store = None
        self.die(loop)
        self._world.note(f"service: {how}")
