"""What a layer gets from its worker: the clock, timers, threads, files, memory that outlives the process, reports.

Must not know a driver by name, nor the messages by which the supervisor keeps a memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Protocol

from xenbackend.block.driver import Files
from xenbackend.block.env import Connected
from xenbackend.block.length import SIZE, Lengths
from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError, KernelError
from xenbackend.kernel import memfd
from xenbackend.worker.callbacks import Callbacks

if TYPE_CHECKING:
    import socket

    from xenbackend.loop.reactor import Reactor

Make = Callable[[str, int], int]  # by name and size in bytes: the descriptor of a sealed memory of zeros


def drop_nothing(name: str) -> None:
    """Take no note of a memory that is dropped."""


def tell_nobody(sentence: str = "") -> None:
    """Tell nobody of a layer: for a process that only looks at a chain."""


class WorkerEnv:
    """The `Env` of one layer; made by `EnvFactory`, lives as long as the layer."""

    def __init__(self, factory: EnvFactory, layer: str, *, read_only: bool, shareable: bool) -> None:
        self.read_only = read_only
        self.shareable = shareable
        self.resumes = factory.resumes
        self.continues = factory.continues and factory.is_first
        self.serves = factory.serves
        self.is_check = factory.is_check
        self.is_draft = factory.is_draft
        self.files = factory.files
        self.facts: dict[str, str] = {}  # what the layer reported
        self.callbacks = callbacks = Callbacks(factory.reactor, layer, factory.on_stopped)
        self.now = factory.reactor.now
        self.call_later = callbacks.call_later
        self.run_in_thread = callbacks.run_in_thread
        self.call_soon_threadsafe = callbacks.call_soon_threadsafe
        self.watch, self.want, self.unwatch = callbacks.watch, callbacks.want, callbacks.unwatch
        self.wait_for = factory.reactor.run_until
        self._factory = factory
        self._layer = layer
        self._sockets: dict[tuple[str, int], int] = {}  # inodes by server and place

    def memory(self, name: str, size: int) -> memoryview:
        """Return `size` bytes, zero at first, that outlive this process: a successor gets the same bytes back.

        Raises: OSError, if the host has no memory for it.
        """
        return self._factory.memory(f"{self._layer}:{name}", size)

    def lengths(self) -> Lengths:
        """As `block.driver.Env.lengths`."""
        return self._factory.lengths()

    def connect(self, endpoint: Endpoint, place: int = 0) -> socket.socket:
        """As `block.driver.Env.connect`."""
        near = self._factory.connect(endpoint, place)
        self._sockets[str(endpoint), place] = os.fstat(near.fileno()).st_ino
        return near

    def reconnect(self, endpoint: Endpoint, place: int, after: After, then: Connected) -> None:
        """As `block.driver.Env.reconnect`."""

        def connected(near: socket.socket | None, why: DriverError | None) -> None:
            if near is not None:
                self._sockets[str(endpoint), place] = os.fstat(near.fileno()).st_ino
            then(near, why)

        self._factory.reconnect(endpoint, place, after, connected)

    def disconnected(self, endpoint: Endpoint, place: int = 0) -> None:
        """As `block.driver.Env.disconnected`."""
        inode = self._sockets.pop((str(endpoint), place), None)
        if self._factory.connections is not None and inode is not None:
            self._factory.connections.parted(str(endpoint), place, inode)

    def give_up(self, why: str) -> None:
        """As `block.driver.Env.give_up`."""
        self._factory.give_up(f"the layer {self._layer}: {why}")

    def alarm(self, sentence: str) -> None:
        """As `block.driver.Env.alarm`."""
        self._factory.alarm(f"the layer {self._layer}: {sentence}")

    def report(self, key: str, value: str) -> None:
        """Publish a fact about this layer, while it is opened or later."""
        if self.facts.get(key) != value:
            self.facts[key] = value
            self._factory.on_report()


class Connections(Protocol):
    """Keeps connections for a successor, and replaces those that were lost."""

    def want(self, endpoint: Endpoint, place: int, after: After, then: Connected) -> None:
        """As `block.driver.Env.reconnect`."""

    def parted(self, server: str, place: int, inode: int) -> None:
        """Stop keeping the connection whose socket had this inode: it was closed with nothing under way."""


class EnvFactory:
    """Makes the `Env` of each layer of one chain.

    Args:
        reactor: the worker's loop.
        files: opens the layers' images.
        memories: descriptors of a predecessor's memories by name; the factory owns and closes them.
        make: makes a memory that a successor can get, while a chain is opened; by default memories are private, without
            descriptors.
        drop: tells the supervisor that no layer wants a memory any longer.
        connections: keeps connections to servers for a successor; None: there will be no successor.
        on_report: called when a layer has published a fact.
        on_stopped: gets a sentence when a layer's callbacks are stopped (`worker.callbacks`).
        give_up: ends this process at a layer's request, which is a sentence; by default the process continues.
        alarm: logs a sentence of a layer.
        resumes: a guest may have written through an earlier worker.
        continues: an earlier worker served a guest through the chain that is opened first.
        serves: a guest is served.
        is_check: the chain is only opened and closed, with `files` that change nothing.
        is_draft: the image is being made, as `Env` says.
    """

    def __init__(
        self,
        reactor: Reactor,
        files: Files,
        memories: Mapping[str, int] | None = None,
        make: Make | None = None,
        drop: Callable[[str], None] = drop_nothing,
        *,
        connections: Connections | None = None,
        on_report: Callable[[], None] = tell_nobody,
        on_stopped: Callable[[str], None] = tell_nobody,
        give_up: Callable[[str], None] = tell_nobody,
        alarm: Callable[[str], None] = tell_nobody,
        resumes: bool = False,
        continues: bool = False,
        serves: bool = False,
        is_check: bool = False,
        is_draft: bool = False,
    ) -> None:
        self.reactor = reactor
        self.files = files
        self.resumes, self.continues = resumes, continues
        self.serves = serves
        self.is_check = is_check
        self.is_draft = is_draft
        self._memories = dict(memories or {})
        self._make = make
        self._private: dict[str, memoryview] = {}
        self._drop = drop
        self.connections = connections
        self.is_first = True  # chain of this process: connections of a predecessor may have to be drained
        self.on_report, self.on_stopped, self.give_up, self.alarm = on_report, on_stopped, give_up, alarm
        self._lengths: Lengths | None = None  # of the chain that is being opened, or was opened last
        self._wanted: set[str] = set()  # by the layers that are being opened
        self._envs: list[WorkerEnv] = []  # of the layers that were opened last

    def __call__(self, layer: str, *, read_only: bool = False, shareable: bool = False) -> WorkerEnv:
        """Return the `Env` of a layer. `layer` names it: uniquely in this chain, and as in a successor."""
        env = WorkerEnv(self, layer, read_only=read_only, shareable=shareable)
        self._envs.append(env)
        return env

    def memory(self, name: str, size: int) -> memoryview:
        """Return the memory called `name`: the predecessor's if it is sealed at `size` bytes, else a new one of zeros.

        Raises: DriverError, OSError.
        """
        self._wanted.add(name)
        fd = self._memories.get(name, -1)
        if fd >= 0 and not memfd.is_sealed(fd, size):
            os.close(self._memories.pop(name))
            fd = -1
        if fd < 0 and self._make is None:
            return self._private_memory(name, size)
        try:
            if fd < 0 and self._make is not None:
                fd = self._memories[name] = self._make(name, size)
            return memfd.map_sealed(fd, size)
        except KernelError as error:
            raise OSError(error.errno, str(error)) from None

    def _private_memory(self, name: str, size: int) -> memoryview:
        if len(self._private.get(name, b"")) != size:
            self._private[name] = memfd.private(size)
        return memoryview(self._private[name])  # which a layer releases

    def lengths(self) -> Lengths:
        """As `block.driver.Env.lengths`. Raises: OSError."""
        if self._lengths is None:
            self._lengths = Lengths(self.memory("lengths", SIZE))
            if self.is_first and not self.resumes:  # no guest has written
                self._lengths.clear()
        return self._lengths

    def connect(self, endpoint: Endpoint, place: int) -> socket.socket:
        """Return a connected socket, as `block.driver.Env.connect`. Raises: DriverError."""
        serves = self.connections is not None  # a process that only looks must not end a serving one's connection
        after = After.DEATH if serves and self.is_first and place == 0 else After.NOTHING
        return self.files.connect(endpoint, place, after, keeps=serves)

    def reconnect(self, endpoint: Endpoint, place: int, after: After, then: Connected) -> None:
        """Replace a connection; in a thread, if this process makes its connections itself."""
        if self.connections is not None:
            self.connections.want(endpoint, place, after, then)
            return
        found: list[socket.socket | DriverError] = []

        def connect() -> None:
            try:
                found.append(self.files.connect(endpoint, place, after, keeps=False))
            except DriverError as problem:
                found.append(problem)

        def tell() -> None:
            result = found[0]
            then(None, result) if isinstance(result, DriverError) else then(result, None)

        self.reactor.run_in_thread(connect, tell)

    def begin(self) -> None:
        """Prepare for a chain that is about to be opened."""
        self._wanted.clear()
        self._envs.clear()
        self._lengths = None

    def resume(self) -> None:
        """Resume the callbacks of layers that were stopped."""
        for env in self._envs:
            env.callbacks.resume()

    def drop_unwanted(self) -> None:
        """Drop the memories that no layer has asked for since `begin`: they miss what is written from now on."""
        self.is_first = False
        if self._lengths is not None:
            self._lengths.drop_unwanted()
        for name in [name for name in self._memories if name not in self._wanted]:
            os.close(self._memories.pop(name))
            self._drop(name)
        for name in self._private.keys() - self._wanted:
            del self._private[name]
            self._drop(name)

    def close(self) -> None:
        """Release the descriptors; what is mapped stays."""
        for fd in self._memories.values():
            os.close(fd)
        self._memories.clear()
        self._private.clear()
