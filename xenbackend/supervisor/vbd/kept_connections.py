"""The connections of a disk to servers, kept beyond the worker that uses them: a successor's opener ends them.

Must not read from one, nor write to it.

What a worker had sent when it died the server may still do. While its connection is kept the server sees no end of it
that nobody asked for, and whoever comes next can see when the server has ended it (`opener.connecting`). It is kept
before the worker gets it. A worker that closes its chain in order says so, and nothing is kept of it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum

from xenbackend.errors import ConfigError, printable
from xenbackend.protocol.opening import MAX_CONNECTIONS, KeptConnection
from xenbackend.supervisor.vbd.slots import Slots


class Trouble(StrEnum):
    """Why a connection could not be seen to its end."""

    NONE = "none"
    SILENT = "silent"
    BROKEN = "broken"


@dataclass(frozen=True, slots=True)
class NotedConnection:
    """A connection, as the notes have it: ``none|0|unix:/run/nbd.sock``."""

    server: str
    place: int
    trouble: Trouble = Trouble.NONE

    def __str__(self) -> str:
        return f"{self.trouble.value}|{self.place}|{self.server}"

    @classmethod
    def parse(cls, text: str) -> NotedConnection:
        """Return what `str` made a text of."""
        trouble, place, server = text.split("|", 2)
        return cls(server, int(place), Trouble(trouble))


class KeptConnections:
    """One vbd's, in its slots."""

    def __init__(self, slots: Slots) -> None:
        self.slots = slots

    def kept(self) -> list[tuple[KeptConnection, int]]:
        """Return them as a job names them, each with its descriptor; lent."""
        return [
            (KeptConnection(each.server, each.place, each.trouble is Trouble.BROKEN), self.slots[slot])
            for slot, each in self._all().items()
            if slot in self.slots
        ]

    def take(self, server: str, place: int, fd: int, *, is_alone: bool) -> str:
        """Keep a connection, ours from now on, in the place of one of the same name, or of all where it `is_alone`.

        Returns: why the worker may not have it, empty: it is kept.
        """
        known = self._all()
        same = [slot for slot, each in known.items() if is_alone or (each.server, each.place) == (server, place)]
        left = {slot: str(each) for slot, each in known.items() if slot not in same}
        slot = self.slots.free()
        try:
            if len(left) >= MAX_CONNECTIONS:
                raise ConfigError(f"the service keeps {MAX_CONNECTIONS} connections of a disk")
            self.slots.note({**left, slot: str(NotedConnection(server, place))})
        except ConfigError as error:
            os.close(fd)
            return f"{printable(server)} cannot be connected to: {error}"
        self.slots.put(slot, fd)
        self.slots.drop_unnoted()
        return ""

    def is_undrained(self, server: str, place: int, *, is_broken: bool) -> None:
        """Take note that a connection could not be seen to its end."""
        trouble = Trouble.BROKEN if is_broken else Trouble.SILENT
        self.slots.note(
            {
                slot: str(replace(each, trouble=trouble) if (each.server, each.place) == (server, place) else each)
                for slot, each in self._all().items()
            }
        )

    def accept_undrained(self) -> None:
        """Let go of those that could not be seen to their end: an administrator says that nothing is under way."""
        self._keep_only(lambda _, each: each.trouble is Trouble.NONE)

    def has_closed(self, server: str, place: int, inode: int) -> None:
        """Let go of a connection that its worker has closed in order: nothing is under way.

        An opener's word and a worker's come by two sockets, in any order. The one that was closed is told from one that
        has taken its place by its socket's inode, which is no other socket's as long as we have it open.
        """
        closed = {slot for slot, fd in self.slots.descriptors().items() if os.fstat(fd).st_ino == inode}
        self._keep_only(lambda slot, each: slot not in closed or (each.server, each.place) != (server, place))

    def let_go(self) -> None:
        """Forget all of them: the vbd has ended."""
        self._keep_only(lambda *_: False)

    def _all(self) -> dict[str, NotedConnection]:
        return {slot: NotedConnection.parse(text) for slot, text in self.slots.noted().items()}

    def _keep_only(self, wanted: Callable[[str, NotedConnection], bool]) -> None:
        self.slots.note({slot: str(each) for slot, each in self._all().items() if wanted(slot, each)})
        self.slots.drop_unnoted()
