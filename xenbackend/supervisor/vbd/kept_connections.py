"""A disk's connections to servers, which outlive the worker that used them, until a successor's opener drains them.

Must not read from a connection, nor write to it.

A server may still carry out what a worker had sent before it died. As long as the connection is kept, the server does
not see it end unasked, and the next opener can see when the server has ended it (`opener.connecting`). A connection is
kept before the worker gets it. A worker that closes its chain in order says so, and its connection is dropped.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from xenbackend.errors import ConfigError, printable
from xenbackend.protocol.jobs import MAX_CONNECTIONS, KeptConnection
from xenbackend.supervisor.vbd.slots import Slots


class Trouble(StrEnum):
    """Why a connection could not be drained."""

    NONE = "none"
    SILENT = "silent"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class NotedConnection:
    """A connection as it stands in the notes, such as ``none|0|unix:/run/nbd.sock``."""

    server: str
    place: int
    trouble: Trouble = Trouble.NONE

    def __str__(self) -> str:
        return f"{self.trouble.value}|{self.place}|{self.server}"

    @classmethod
    def parse(cls, text: str) -> NotedConnection:
        """Return the connection that `str` turned into this text."""
        trouble, place, server = text.split("|", 2)
        return cls(server, int(place), Trouble(trouble))


class KeptConnections:
    """The kept connections of one vbd, in its slots."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    def kept(self) -> list[tuple[KeptConnection, int]]:
        """Return the connections as a job names them, each with its descriptor, which stays ours."""
        return [
            (KeptConnection(each.server, each.place, each.trouble is Trouble.BROKEN), self.slots[slot])
            for slot, each in self._all().items()
            if slot in self.slots
        ]

    def take(self, server: str, place: int, fd: int, *, is_alone: bool) -> str:
        """Keep a connection, which is ours from now on, in place of the same one, or of all if it `is_alone`.

        Returns: why the worker may not have it; empty if it is kept.
        """
        known = self._all()
        same = [slot for slot, each in known.items() if is_alone or (each.server, each.place) == (server, place)]
        left = {slot: str(each) for slot, each in known.items() if slot not in same}
        slot = self.slots.free()
        try:
            if len(left) >= MAX_CONNECTIONS:
                raise ConfigError(f"the service keeps at most {MAX_CONNECTIONS} connections of a disk")
            self.slots.note({**left, slot: str(NotedConnection(server, place))})
        except ConfigError as error:
            os.close(fd)
            return f"{printable(server)} cannot be connected to: {error}"
        self.slots.put(slot, fd)
        self.slots.drop_unnoted()
        return ""

    def is_undrained(self, server: str, place: int, *, is_broken: bool) -> None:
        """Note that a connection could not be drained."""
        trouble = Trouble.BROKEN if is_broken else Trouble.SILENT
        self.slots.note(
            {
                slot: str(replace(each, trouble=trouble) if (each.server, each.place) == (server, place) else each)
                for slot, each in self._all().items()
            }
        )

    def accept_undrained(self) -> None:
        """Drop the connections that could not be drained: an administrator says that nothing is under way."""
        self._keep_only(lambda _, each: each.trouble is Trouble.NONE)

    def has_closed(self, server: str, place: int, inode: int) -> None:
        """Drop a connection that its worker has closed in order: nothing is under way.

        An opener's messages and a worker's come by two sockets, in any order. So the closed connection is told from its
        replacement by its socket's inode, which no other socket can have as long as we have this one open.
        """
        closed = {slot for slot, fd in self.slots.descriptors().items() if os.fstat(fd).st_ino == inode}
        self._keep_only(lambda slot, each: slot not in closed or (each.server, each.place) != (server, place))

    def let_go(self) -> None:
        """Drop all connections: the vbd has ended."""
        self._keep_only(lambda *_: False)

    def _all(self) -> dict[str, NotedConnection]:
        return {slot: NotedConnection.parse(text) for slot, text in self.slots.noted().items()}

    def _keep_only(self, wanted: Callable[[str, NotedConnection], bool]) -> None:
        self.slots.note({slot: str(each) for slot, each in self._all().items() if wanted(slot, each)})
        self.slots.drop_unnoted()
