"""Workers within this process, which replace worker processes.

Must not do a worker's work: each is a `worker.main.Worker` at the other end of a real socket, with a loop of its own.

Here a pidfd is the reading end of a pipe: it becomes readable when the process has ended, and its inode identifies it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.model import openers
from tests.model.machine import Begun, Died, Loop, Process
from xenbackend.supervisor.service.fleet import Fleet, Worker
from xenbackend.worker import main as worker_main

if TYPE_CHECKING:
    from tests.model.world import World


class WorkerProcess(Process):
    """A worker as a process.

    pid        for people
    loop       its loop, once it has begun
    worker     the product's object
    how        how it ended, None while it runs
    is_dying   it was sent SIGKILL, and may do one more step
    """

    def __init__(self, world: World, far: socket.socket, writing: int, pid: int) -> None:
        super().__init__(f"worker {pid}", world.machine)
        self.pid = pid
        self.loop: Loop | None = None
        self.worker: Any = None
        self.how: str | None = None
        self.is_dying = False
        self.vbd = ""  # as it was told
        self.sockets: list[socket.socket] = []  # to openers
        self._far = far
        self._writing = writing
        self._world = world

    @property
    def stages(self) -> Any:
        """The worker's `Stages`, None until it was told what to open."""
        return self.worker._stages if self.worker is not None else None

    @property
    def chain(self) -> str:
        """The chain that is open, empty if none is."""
        stages = self.stages
        return stages.chain if stages is not None and stages.is_open else ""

    @property
    def connection(self) -> Any:
        """The connection to the frontend that is served, None if none is."""
        stages = self.stages
        return stages.connection if stages is not None else None

    def has_something(self) -> bool:
        """Return whether a step would do anything."""
        return self.how is None and (self.loop is None or self.loop.has_something())

    def step(self) -> None:
        """Begin, or let the loop pass once; a death at a kill point ends it."""
        self._do(self._pass)

    def do_job(self, number: int) -> None:
        """Do one of the jobs that a thread would do."""
        loop = self.loop
        if loop is not None:
            self._do(lambda: loop.jobs.do(number))

    def _do(self, function: Callable[[], None]) -> None:
        how = ""
        try:
            with self.running():
                function()
        except Died:
            how = "the worker was ended by SIGKILL"
        except SystemExit as end:
            how = f"the worker ended unexpectedly with exit status {end.code}"
        if not how and self.loop is not None and self.loop.is_stopped:
            how = "the worker ended unexpectedly with exit status 0"
        if how:  # not before: an exception that is being handled keeps objects alive that must be collected
            self.end(how)

    def _pass(self) -> None:
        if self.loop is None:
            self.loop = self._world.new_loop(None)
            worker_main.Reactor = self._loop_of
            self.worker = worker_main.Worker(self._far)
            with suppress(Begun):
                self.worker.run()
            return
        self.loop.step()
        if self.loop.is_stopped:
            with suppress(BlockingIOError):
                while self.worker._take_message():
                    pass

    def _loop_of(self, on_bug: Callable[[Exception], None]) -> Loop:
        assert self.loop is not None
        self.loop._on_bug = on_bug
        return self.loop

    def kill(self) -> None:
        """End the worker as SIGKILL does."""
        if self.how is None:
            self.end("the worker was ended by SIGKILL")

    def end(self, how: str) -> None:
        """End the process: the kernel takes back what it had, and its pidfd becomes readable."""
        self.how = how
        self._world.has_ended(self)
        self._cut_off()
        self.worker = None
        loop, self.loop = self.loop, None
        self._far.close()
        for each in self.sockets:
            each.detach()
        self.die(loop)
        os.close(self._writing)

    def _cut_off(self) -> None:
        """Keep its objects from doing anything when they are collected."""
        stages, connection = self.stages, self.connection
        if stages is not None:
            stages._disk._env._memories.clear()
        if connection is not None:
            connection._closed = True
            connection._undo.pop_all()
            connection._by_port.clear()
            connection.engine.queues.clear()


class Handle:
    """A worker's process as the service sees it, in the place of `supervisor.service.process.Process`."""

    def __init__(self, world: World, near: socket.socket, pidfd: int) -> None:
        self.socket = near
        self.pidfd = pidfd
        self._world = world
        self._process = world.process_of(pidfd)
        self.pid = self._process.pid
        self.is_there = True
        self._loop: Loop | None = None
        near.setblocking(False)

    def kill(self) -> None:
        self._world.send_kill(self._process)

    def boost(self) -> None:
        """Do nothing: priorities do not matter here."""

    def unboost(self) -> None:
        """Do nothing, as `boost`."""

    def describe_end(self) -> str:
        self.leave()
        return self._process.how or "the worker has ended"

    def leave(self) -> None:
        self.unwatch()
        self.socket.close()
        os.close(self.pidfd)

    def when_there(self, callback: Callable[[], object]) -> None:
        callback()

    def watch(self, loop: Loop, on_end: Callable[[], object]) -> None:
        self._loop = loop
        loop.add(self.pidfd, on_end)

    def unwatch(self) -> None:
        loop, self._loop = self._loop, None
        if loop is not None:
            loop.remove(self.pidfd)


class LocalFleet(Fleet):
    """`Fleet` whose workers are made here."""

    def __init__(self, loop: Loop, *_: Any, world: World, **__: Any) -> None:
        super().__init__(loop)
        self._world = world

    def start(self, on_message: Any, on_end: Any, _drivers: Any = ()) -> Worker:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        pidfd = self._world.new_worker(far)
        self._world.point("service: after a worker was started")
        handle: Any = Handle(self._world, near, pidfd)
        return Worker(self, handle, on_message, on_end)

    def open(self, job: Any, kept: Any, on_found: Any, *_: Any) -> tuple[Any, socket.socket]:
        return openers.begin(self._world, job, kept, on_found)

    def adopt(self, fds: tuple[int, int], on_message: Any, on_end: Any) -> Worker:
        handle: Any = Handle(self._world, socket.socket(fileno=fds[0]), fds[1])
        return Worker(self, handle, on_message, on_end)
