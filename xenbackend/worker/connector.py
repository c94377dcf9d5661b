"""Replaces connections that layers of a disk in service have lost, by an opener that the supervisor gives us for that.

Must not wait for a connection: the disk's other requests, and orders, are served meanwhile.

    layer         want        the supervisor reads in `Standing` that connections are wanted
    supervisor    Reconnect   comes with an opener, which is asked for one connection after another
    opener                    drains the former connection, connects, has the new one kept
    layer         then        gets the socket, or the reason why there is none
"""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xenbackend.block.env import Connected
from xenbackend.block.servers import After, Endpoint
from xenbackend.errors import DriverError

if TYPE_CHECKING:
    from xenbackend.loop.reactor import Reactor
    from xenbackend.worker.opener import RemoteOpener

Call = Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Want:
    endpoint: Endpoint
    place: int
    after: After
    then: Connected


class Connector:
    """The connector of one worker. `tell` sends its standing, `part` says that a connection need not be kept."""

    def __init__(self, reactor: Reactor, tell: Call, part: Callable[[str, int, int], None]) -> None:
        self._reactor = reactor
        self._tell = tell
        self._part = part
        self._wants: deque[_Want] = deque()
        self._opener: RemoteOpener | None = None
        self._done: Call | None = None

    @property
    def wants(self) -> bool:
        """Whether a connection is wanted and there is no opener to make it."""
        return bool(self._wants) and self._opener is None

    def want(self, endpoint: Endpoint, place: int, after: After, then: Connected) -> None:
        """Have a connection made; `then` gets its socket, or the reason why there is none."""
        self._wants.append(_Want(endpoint, place, after, then))
        self._tell()

    def parted(self, server: str, place: int, inode: int) -> None:
        """As `worker.env.Connections.parted`."""
        self._part(server, place, inode)

    def serve(self, opener: RemoteOpener, done: Call) -> None:
        """Make all wanted connections by `opener`, which is ours from now on; call `done` when that is finished."""
        if self._opener is not None:
            opener.close()
            done()
            return
        self._opener, self._done = opener, done
        self._reactor.add(opener.fileno(), self._answered)
        self._ask()

    def _ask(self) -> None:
        opener, done = self._opener, self._done
        if opener is None or done is None:
            return
        if self._wants:
            want = self._wants[0]
            opener.begin_connect(want.endpoint, want.place, want.after)
            return
        self._opener = self._done = None
        self._reactor.remove(opener.fileno())
        opener.close()
        done()

    def _answered(self) -> None:
        opener = self._opener
        if opener is None or not self._wants:
            return
        want = self._wants.popleft()
        near: socket.socket | None = None
        why: DriverError | None = None
        try:
            near = opener.end_connect()
        except DriverError as problem:
            why = problem
        except OSError as problem:
            why = DriverError(str(problem), errno=problem.errno or errno.EIO)
        try:
            want.then(near, why)
        finally:
            self._ask()
