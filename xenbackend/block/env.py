"""`Env`, which a layer gets from its process when it is opened: a part of the contract in `block.driver`.

Must not do anything itself: `worker.env` implements it, for workers and image commands alike.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError

if TYPE_CHECKING:
    import socket

    from xenbackend.block.driver import Files
    from xenbackend.block.length import Lengths

Connected = Callable[["socket.socket | None", "DriverError | None"], None]  # gets a socket, or why there is none


class Env(Protocol):
    """A layer's access to its process: files, servers, timers, threads. Everything here lives as long as the layer."""

    read_only: bool  # this layer must not alter its image
    shareable: bool  # others may write to this layer's image at the same time
    resumes: bool  # the guest may have written before this opening, so a fresh `memory` is missing those writes
    continues: bool  # a guest was served through this same layer before, even if none of its memories is left
    serves: bool  # a guest is served through the layer; else a check of the chain or a command uses it
    is_check: bool  # the layer is opened and closed again, without a request; `files` change nothing meanwhile
    is_draft: bool  # the image is being made: if that is interrupted, only what was flushed will be read again
    files: Files
    facts: dict[str, str]  # what the layer has reported so far (`report`)

    def now(self) -> float:
        """Return the time of a monotonic clock, in seconds."""

    def call_later(self, delay_s: float, function: Callable[[], None]) -> None:
        """Call `function` from the worker's loop after `delay_s` seconds."""

    def run_in_thread(self, function: Callable[[], None], then: Callable[[], None]) -> None:
        """Call `function` in a thread of a small pool, and afterwards `then` from the worker's loop."""

    def wait_for(self, is_done: Callable[[], bool]) -> None:
        """Run the worker's loop until `is_done` is true. For `open` and `close` only: nothing is served meanwhile."""

    def call_soon_threadsafe(self, function: Callable[[], None]) -> None:
        """Call `function` from the worker's loop, soon. The only method of this class that another thread may call."""

    def watch(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` from the worker's loop whenever `fd` is readable or broken, until `unwatch`.

        The callback must cope with finding nothing to do. If the layer's callbacks keep failing (D8), the disk pauses,
        and none of them is called until an administrator resumes the disk.
        """

    def want(self, fd: int, *, writable: bool) -> None:
        """Choose whether the callback of `fd`, which is watched, is also called while `fd` is writable."""

    def unwatch(self, fd: int) -> None:
        """Stop watching `fd`; call this before closing it."""

    def lengths(self) -> Lengths:
        """Return the sizes of the chain's files, which all its layers note for a successor.

        Raises: OSError.
        """

    def memory(self, name: str, size: int) -> memoryview:
        """Return `size` bytes of memory that outlive this process: zeros at first; a successor gets the same bytes.

        For `open` only, as an opener makes it. `name` is unique within the layer. If the predecessor asked for another
        size, the memory is fresh zeros. Raises: DriverError, OSError.
        """

    def connect(self, endpoint: Endpoint, place: int = 0) -> socket.socket:
        """Return a socket connected to a server that the layer's options name (`block.servers`). For `open` only.

        The opener makes the connection, as it has the host's names and networks. The connection outlives this process
        unless the layer calls `disconnected`: a successor's `connect` first drains it, so that nothing that was sent
        by it is still under way at the server (`opener.connecting`). `place` distinguishes connections to one server.

        Raises: DriverError, also if the former connection cannot be drained.
        """

    def reconnect(self, endpoint: Endpoint, place: int, after: After, then: Connected) -> None:
        """Replace a connection that was lost, and that the layer has closed; `then` is called from the loop.

        `after` says how it was lost (`block.servers.After`).
        """

    def disconnected(self, endpoint: Endpoint, place: int = 0) -> None:
        """Say that a connection was closed with nothing under way, so that it need not be drained."""

    def give_up(self, why: str) -> None:
        """End this process because only a successor can put something right; `why` is reported.

        Nothing in flight is answered. If no successor would follow, as in a command, do nothing and return.
        """

    def alarm(self, sentence: str) -> None:
        """Write to the service's log what an administrator must read, if `report` is of no use, as in `close`."""

    def report(self, key: str, value: str) -> None:
        """Publish a fact about this layer for `check` and `status`, such as ``mode`` = ``O_DIRECT, Linux AIO``.

        May be called after `open`, too, when the fact changes, but not for each request.
        """
