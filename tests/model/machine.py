"""A process of the model: a loop that the scheduler steps, descriptors, access to the hypervisor; and its death.

Must not choose what happens next: `world` does.

A process that is killed does nothing any more, and the kernel takes back its descriptors, mappings, ports and locks.
Its objects must do nothing when they are collected or unwound, so they are cut off first.
"""

from __future__ import annotations

import gc
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, ClassVar

from xenbackend.errors import KernelError
from xenbackend.kernel.memory import address_of
from xenbackend.kernel.ports import Arena
from xenbackend.loop.reactor import Reactor
from xenbackend.rig import host as rig_host
from xenbackend.rig.hypervisor import Hypervisor

collect, freeze = gc.collect, gc.freeze  # kept, as workers call them as if the whole process were theirs
_close = os.close


class Died(BaseException):
    """The running process was killed at this point."""


class Begun(BaseException):
    """A process has finished its start; the scheduler steps its loop from now on."""


class Clock:
    """The one clock; only the scheduler moves it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def time(self) -> float:
        """Return the seconds since 1970."""
        return 1_700_000_000.0 + self.now


class Jobs:
    """Jobs that a process would do in threads; each is done when the scheduler says so."""

    def __init__(self, hand_over: Callable[[Callable[[], object]], None]) -> None:
        self.waiting: list[tuple[Callable[[], object], Callable[[], object], Any]] = []
        self._hand_over = hand_over

    def run(self, function: Callable[[], object], then: Callable[[], object], on_error: Any) -> None:
        """Take a job."""
        self.waiting.append((function, then, on_error))

    def do(self, number: int) -> None:
        """Do a job that waits."""
        function, then, on_error = self.waiting.pop(number)
        try:
            function()
        except Exception as error:
            self._hand_over(on_error(error))
        self._hand_over(then)

    def close(self) -> None:
        """Do all jobs that wait."""
        while self.waiting:
            self.do(0)


class Loop(Reactor):
    """A loop that never sleeps. Each pass handles one thing of those that are ready; the others stay ready."""

    def __init__(
        self, clock: Clock, choose: Callable[[int], int], on_bug: Callable[[Exception], None] | None = None
    ) -> None:
        super().__init__(clock=clock, on_bug=on_bug)
        self._threads = self.jobs = Jobs(self.call_soon_threadsafe)
        self._choose = choose
        self._is_asleep = False  # a pass found nothing to do
        self._calls = 0

    @property
    def is_stopped(self) -> bool:
        """Whether `run` would return."""
        return self._stopped

    def due(self) -> float | None:
        """Return when the next timer is due."""
        return self._timers[0][0] if self._timers else None

    def has_something(self) -> bool:
        """Return whether a pass would do anything."""
        if not self._is_asleep or self._soon or (self._timers and self._timers[0][0] <= self.now()):
            return True
        return bool(self._epoll.poll(0, 1))

    def run(self) -> None:
        """Leave the passes to the scheduler."""
        self._stopped = False
        raise Begun

    def step(self) -> None:
        """Pass once."""
        calls = self._calls
        self._pass()
        self._is_asleep = calls == self._calls

    def cut(self) -> None:
        """Forget all calls, and close the descriptors: the process has died."""
        self._soon.clear()
        self._timers.clear()
        self._hooks.clear()
        self._callbacks.clear()
        self._from_threads.clear()
        self.jobs.waiting.clear()
        self._epoll.close()
        os.close(self._wake)

    def _call(self, function: Callable[[], object]) -> None:
        self._calls += 1
        super()._call(function)

    def _until_timer(self) -> float | None:
        return 0.0

    def _wait(self, timeout_s: float | None) -> list[tuple[int, int]]:
        del timeout_s
        ready = self._epoll.poll(0, 64)
        return [ready[self._choose(len(ready))]] if len(ready) > 1 else ready


class Door:
    """One user of the hypervisor, as `rig.wire.Connection` is, without a socket."""

    def __init__(self, directory: str) -> None:
        machine = Machine.of(str(directory))
        self._hypervisor = machine.hypervisor
        self._holder = machine.hypervisor.enter()
        self._is_open = True
        if machine.running is not None:
            machine.running.doors.append(self)

    def call(self, name: str, **arguments: Any) -> tuple[dict[str, Any], list[int]]:
        """Make one call; descriptors are the caller's. Raises: KernelError."""
        if not self._is_open:
            raise KernelError(f"the rig's {name}", 9)
        answer, fds = self._hypervisor.call(self._holder, name, arguments)
        return answer, [os.dup(fd) for fd in fds]

    def close(self) -> None:
        """Release what it holds."""
        if self._is_open:
            self._is_open = False
            self._hypervisor.leave(self._holder)


class Process:
    """One process of the model. `doors` and `unmaps` are what the kernel would take back at its death."""

    def __init__(self, name: str, machine: Machine) -> None:
        self.name = name
        self.doors: list[Door] = []
        self.unmaps: list[Callable[[], None]] = []
        self.is_dead = False
        self._machine = machine

    @contextmanager
    def running(self) -> Iterator[None]:
        """Account to this process what is opened within this context."""
        machine = self._machine
        outer, machine.running = machine.running, self
        try:
            yield
        finally:
            machine.running = outer

    def die(self, loop: Loop | None) -> None:
        """Take everything back; call it when nothing that stays refers to the process's objects."""
        self.is_dead = True
        for door in self.doors:
            door.close()
        for unmap in self.unmaps:
            unmap()
        self.doors.clear()
        self.unmaps.clear()
        if loop is not None:
            loop.cut()
        collect()
        self._machine.close_all_of(self)


class Machine:
    """The hypervisor, the running process, and whose descriptors are open."""

    _machines: ClassVar[dict[str, Machine]] = {}

    def __init__(self, name: str) -> None:
        self.name = name
        self.hypervisor = Hypervisor()
        self.running: Process | None = None
        self._owners: dict[int, tuple[Process, tuple[int, int]]] = {}  # of descriptors, and what they are of
        self._machines[name] = self

    @classmethod
    def of(cls, name: str) -> Machine:
        """Return the machine of that name."""
        return cls._machines[name]

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Account to no process what is opened within this context."""
        outer, self.running = self.running, None
        try:
            yield
        finally:
            self.running = outer

    def opened(self, fd: int) -> int:
        """Take note of a descriptor that is a plain number: only `os.close` closes it."""
        self._owners.pop(fd, None)
        found = os.fstat(fd)
        if self.running is not None:
            self._owners[fd] = self.running, (found.st_dev, found.st_ino)
        return fd

    def closed(self, fd: int) -> None:
        """Close a descriptor."""
        self._owners.pop(fd, None)
        _close(fd)

    def fds_of(self, process: Process) -> list[int]:
        """Return the descriptors of a process that are plain numbers."""
        return [fd for fd, (owner, _) in self._owners.items() if owner is process]

    def close_all_of(self, process: Process) -> None:
        """Close what a process had open."""
        for fd in self.fds_of(process):
            _, identity = self._owners.pop(fd)
            with suppress(OSError):  # an object has closed it
                found = os.fstat(fd)
                if identity == (found.st_dev, found.st_ino):
                    _close(fd)

    def close(self) -> None:
        """Forget this machine."""
        del self._machines[self.name]


class Host(rig_host.RigHost):
    """The rig's host; what it maps is taken back from a process that dies."""

    def allocate(self, size: int) -> Arena:
        """Return memory without huge pages, which would not suffice for many workers in one process."""
        view = memoryview(mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        return Arena(view, address_of(view))


def open_host(argument: str, devices: Sequence[int] = ()) -> Host:
    """Return the host of the machine of that name: ``tests.model.machine:NAME``."""
    del devices
    return Host(argument)


def open_devices(argument: str, domid: int) -> list[int]:
    """Return none: a process makes its own doors, so that they are taken back when it dies."""
    del argument, domid
    return []


def tracking_map_pages(map_pages: Callable[..., Any]) -> Callable[..., Any]:
    """Return a `map_pages` whose mappings are taken back when the running process dies."""

    def tracked(fd: int, frames: Any, *, writable: bool) -> Any:
        view, address, unmap = map_pages(fd, frames, writable=writable)
        running = next(iter(Machine._machines.values())).running
        if running is None:
            return view, address, unmap
        running.unmaps.append(unmap)

        def release() -> None:
            running.unmaps.remove(unmap)
            unmap()

        return view, address, release

    return tracked
