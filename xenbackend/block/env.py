"""What a layer gets from the process that it runs in, when it is opened: a part of the contract in `block.driver`.

Must not do anything: `worker.env` does, for workers and image commands alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError

if TYPE_CHECKING:
    import socket

    from xenbackend.block.driver import Files

Connected = Callable[["socket.socket | None", "DriverError | None"], None]  # a socket, or why there is none


class Env(Protocol):
    """What a layer gets from its worker when it is opened. Everything here lives as long as the layer."""

    read_only: bool  # this layer must not alter what it holds
    shareable: bool  # others may write to this layer's image at the same time
    resumes: bool  # the guest may have written already: a memory that is fresh knows nothing of that
    continues: bool  # a guest was served through this very layer before, also where no memory is left of that
    serves: bool  # a guest is served through it; else somebody looks at the chain, or a command uses it
    is_draft: bool  # of an image that is being made: only what a flush has made durable is ever looked at again
    files: Files
    facts: dict[str, str]  # what the layer reported so far

    def now(self) -> float:
        """Return seconds of a clock that only goes forward."""

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call `function` from the worker's loop after `delay_s` seconds."""

    def run_in_thread(self, function: Callable[[], None], then: Callable[[], None]) -> None:
        """Call `function` in a thread of a small pool, and `then` from the worker's loop afterwards."""

    def wait_for(self, is_done: Callable[[], bool]) -> None:
        """Run the worker's loop until `is_done` says so. For `open` and `close` only: nothing is served meanwhile."""

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        """Call `function` from the worker's loop, soon; the one call of this class that another thread may make."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` from the worker's loop whenever `fd` is readable or broken, until `unwatch`.

        It must bear finding nothing to do. A layer whose callbacks fail again and again (D8) is called no more until an
        administrator resumes the disk, which pauses.
        """

    def want(self, fd: int, *, writable: bool) -> None:
        """Call the callback of a descriptor that is watched also while it can be written to; or no longer."""

    def unwatch(self, fd: int) -> None:
        """Watch `fd` no more; call this before closing it."""

    def memory(self, name: str, size: int) -> memoryview:
        """Return `size` bytes, zero at first, that outlive this process: a successor gets the same bytes back.

        `name` is unique within the layer. A different size than the predecessor asked for gives fresh zeros.
        """

    def connect(self, endpoint: Endpoint, place: int = 0) -> socket.socket:
        """Return a socket connected to a server that the layer's options name (`block.servers`). For `open` only.

        An opener makes it, a process that has the host's names and networks. It outlives this process, unless the
        layer says that it is `disconnected`: a successor's `connect` first sees it to its end, so that nothing of what
        was sent before is under way at the server any more (`opener.connecting`). `place` tells one connection to a
        server from another.

        Raises: DriverError, also where a former connection has no end.
        """

    def reconnect(self, endpoint: Endpoint, place: int, after: After, then: Connected) -> None:
        """Have a connection made in the place of one that was lost and is closed; `then` is called from the loop.

        The former one is seen to its end before (LOSS), or its end cannot be seen, as the network broke it (BREACH).
        """

    def disconnected(self, endpoint: Endpoint, place: int = 0) -> None:
        """Say that a connection is closed with nothing under way: nobody need see it to its end."""

    def give_up(self, why: str) -> None:
        """End this process, for what only another one can put right: `why` is said, and a successor begins anew.

        Nothing in flight is answered. Where no successor would follow, as in a command, it does nothing and returns.
        """

    def alarm(self, sentence: str) -> None:
        """Say in the service's log what an administrator must read, and no fact can tell, as in `close`."""

    def report(self, key: str, value: str) -> None:
        """Publish a fact about this layer for `check` and `status`, such as ``mode`` = ``O_DIRECT, Linux AIO``.

        Also later than in `open`, where it changes: not for each request.
        """
