"""What a layer gets from its worker: the clock, timers, threads, files, memory that outlives the process, reports.

Must not know a driver by name, nor the messages by which the supervisor keeps a memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from xenbackend.block.driver import Files
from xenbackend.errors import KernelError
from xenbackend.kernel import memfd

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor

Keep = Callable[[str, int, int], None]  # name, size in bytes, descriptor: lent for the call


def keep_nothing(name: str, size: int, fd: int) -> None:
    """Keep no memory for a successor: for a process that only looks at a chain."""


def drop_nothing(name: str) -> None:
    """Take no note of a memory that is dropped."""


class WorkerEnv:
    """The `Env` of one layer; made by `EnvFactory`, lives as long as the layer."""

    def __init__(self, factory: EnvFactory, layer: str, *, read_only: bool, shareable: bool) -> None:
        self.read_only = read_only
        self.shareable = shareable
        self.resumes = factory.resumes
        self.is_draft = factory.is_draft
        self.files = factory.files
        self.facts: dict[str, str] = {}  # what the layer reported
        self.now = factory.reactor.now
        self.call_later = factory.reactor.call_later
        self.run_in_thread = factory.reactor.run_in_thread
        self._factory = factory
        self._layer = layer

    def memory(self, name: str, size: int) -> memoryview:
        """Return `size` bytes, zero at first, that outlive this process: a successor gets the same bytes back.

        Raises: OSError, where the host has no memory for it.
        """
        return self._factory.memory(f"{self._layer}:{name}", size)

    def report(self, key: str, value: str) -> None:
        """Publish a fact about this layer."""
        self.facts[key] = value


class EnvFactory:
    """Makes the `Env` of each layer of one chain.

    Args:
        reactor: the worker's loop.
        files: opens the layers' images.
        memories: descriptors of a predecessor's memories by name; the factory owns and closes them.
        keep: tells the supervisor of a memory, so that a successor can get it. By default a memory is private.
        drop: tells the supervisor that a memory is wanted no more.
        resumes: a guest may have written through an earlier worker.
        is_draft: the image is being made, as `Env` says.
    """

    def __init__(
        self,
        reactor: Reactor,
        files: Files,
        memories: Mapping[str, int] | None = None,
        keep: Keep = keep_nothing,
        drop: Callable[[str], None] = drop_nothing,
        *,
        resumes: bool = False,
        is_draft: bool = False,
    ) -> None:
        self.reactor = reactor
        self.files = files
        self.resumes = resumes
        self.is_draft = is_draft
        self._memories = dict(memories or {})
        self._keep = keep
        self._drop = drop
        self._wanted: set[str] = set()  # by the layers that are being opened

    def __call__(self, layer: str, *, read_only: bool = False, shareable: bool = False) -> WorkerEnv:
        """Return the `Env` of the layer that `layer` names; the same in a successor, different from every other one."""
        return WorkerEnv(self, layer, read_only=read_only, shareable=shareable)

    def memory(self, name: str, size: int) -> memoryview:
        """Return the memory called `name`: the predecessor's where it has `size` bytes for good, else fresh and zero.

        Raises: OSError.
        """
        self._wanted.add(name)
        fd = self._memories.get(name, -1)
        if fd >= 0 and not memfd.is_sealed(fd, size):
            os.close(self._memories.pop(name))
            fd = -1
        try:
            if fd < 0:
                fd = self._memories[name] = memfd.make("xenbackend", size)
                self._keep(name, size, fd)
            return memfd.map_sealed(fd, size)
        except KernelError as error:
            raise OSError(error.errno, str(error)) from None

    def begin(self) -> None:
        """Take note that layers are opened anew."""
        self._wanted.clear()

    def drop_unwanted(self) -> None:
        """Forget the memories that no layer asked for since `begin`: what is written now, they do not see."""
        for name in [name for name in self._memories if name not in self._wanted]:
            os.close(self._memories.pop(name))
            self._drop(name)

    def close(self) -> None:
        """Release the descriptors; what is mapped stays."""
        for fd in self._memories.values():
            os.close(fd)
        self._memories.clear()
